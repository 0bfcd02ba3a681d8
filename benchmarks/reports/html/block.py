"""The data that the page's script needs, as compact JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cl_merge.benchmarks.reports.html.content import Content, Place
from cl_merge.benchmarks.reports.html.entries import STATES, Shown
from cl_merge.benchmarks.reports.summary import METRICS
from cl_merge.benchmarks.reports.tables import TITLES

_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_NOTHING = ".."


def data_block(content: Content) -> str:
    """Write what the script needs.

    Args:
        content: Of the page.

    Returns:
        JSON that can stand in a ``<script>``: nothing in it can end one.
    """
    numbers = {place: number for number, place in enumerate(content.runs)}
    data = {
        "metrics": {name: [TITLES[name], about] for name, about in METRICS.items()},
        "settings": [column.name for column in content.columns],
        "methods": [[row.method, row.about] for row in content.rows],
        "seeds": list(content.summary.suite.seeds),
        "runs": [
            {
                "place": run.place,
                "state": STATES[run.state],
                "config": run.config,
                "links": dict(run.links),
                "tasks": [task["name"] for task in run.tasks],
            }
            for run in content.runs.values()
        ],
        "cells": [[_cell(place, numbers) for place in row.places] for row in content.rows],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def packed(matrix: Sequence[Sequence[float | None]]) -> str:
    """Write a matrix of accuracies in few bytes.

    Args:
        matrix: In per cent, [tasks learned, tasks]; None where there is nothing.

    Returns:
        Two characters for each value, in tenths to the base of 64, row after row; one row only if
        all are the same.

    Example:
        >>> packed([[0.0, 6.4, None]])
        'AABA..'
    """
    rows = list(matrix)
    if all(row == rows[0] for row in rows):
        rows = rows[:1]
    return "".join(_NOTHING if value is None else _pair(value) for row in rows for value in row)


def _pair(value: float) -> str:
    high, low = divmod(round(10 * value), 64)
    return _DIGITS[high] + _DIGITS[low]


def _cell(place: Place, runs: Mapping[str, int]) -> dict[str, Any]:
    paper = place.paper
    found: dict[str, Any] = {
        "id": place.id,
        "gap": place.gap,
        "figures": {metric: _figure(shown) for metric, shown in place.shown.items()},
        "seeds": [
            {
                "run": runs[cell.place],
                "state": STATES[cell.state],
                **({"reason": cell.reason} if cell.reason else {}),
                **_details(cell.result),
            }
            for cell in place.entry.cells
        ],
    }
    if paper:
        found["paper"] = [paper.value, paper.difference, paper.strength]
    return found


def _figure(shown: Shown) -> list[Any]:
    return [shown.order, shown.mean, shown.spread, shown.seeds, shown.rank, list(shown.values)]


def _details(result: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: result[key] for key in ("scale", "merger", "training") if result.get(key)}
    for key, name in (("matrix", "matrix"), ("matrix_task_aware", "aware")):
        if result.get(key):
            found[name] = [len(result[key]), len(result[key][0]), packed(result[key])]
    return found
