"""What a page shows of a method on a setting, as plain data for the template and the script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cl_merge.benchmarks.formatting import rounded
from cl_merge.benchmarks.reports.summary import METRICS, Entry
from cl_merge.benchmarks.reports.tables import shown
from cl_merge.benchmarks.suites.plan import BEGUN, DONE, FAILED, NEW

STATES = {DONE: "done", FAILED: "failed", BEGUN: "unfinished", NEW: "not run"}
"""How far a run is, in the words of a page."""

_STRENGTHS = (1.0, 3.0)  # points from which a difference to the paper counts as larger
_MINUS, _DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def cell_of(entry: Entry, runs: Sequence[str], anchor: str) -> dict[str, Any]:
    """Describe a cell of the table.

    Args:
        entry: What is known of it.
        runs: The paths of all runs, which seeds refer to by their number.
        anchor: Its id.
    """
    states = {cell.state for cell in entry.cells}
    waiting = (word for state, word in STATES.items() if state in states)
    return {
        "id": anchor,
        "figures": {name: _figure(entry, name) for name in METRICS if name in entry.metrics},
        "gap": _DASH if DONE in states else next(waiting),
        "begun": states != {NEW},
        "reasons": list(dict.fromkeys(cell.reason for cell in entry.cells if cell.reason)),
        "paper": _paper(entry),
        "seeds": [
            {
                "run": runs.index(cell.path),
                "state": STATES[cell.state],
                **({"reason": cell.reason} if cell.reason else {}),
                **_details(cell.result),
            }
            for cell in entry.cells
        ],
    }


def _figure(entry: Entry, metric: str) -> dict[str, Any]:
    """A metric in words, and ``order``, the number that rows are sorted by."""
    words, found, kind = shown(entry, metric), entry.metrics[metric], METRICS[metric]
    values = [found.values.get(cell.cell.seed) for cell in entry.cells]
    return {
        "order": float(f"{found.mean:.8g}"),
        "mean": words.mean.replace("-", _MINUS),
        "spread": words.spread,
        "seeds": words.seeds,
        "rank": words.rank,
        "values": [
            "" if v is None else rounded(v / kind.unit, kind.digits + 1).replace("-", _MINUS)
            for v in values
        ],
    }


def _paper(entry: Entry) -> dict[str, Any] | None:
    """The paper's accuracy, ours less that, and from -3 to 3 how far and which way it is."""
    if entry.paper is None:
        return None
    value = rounded(entry.paper)
    if "accuracy" not in entry.metrics:
        return {"value": value, "difference": "", "strength": 0}
    difference = round(entry.metrics["accuracy"].mean - entry.paper, 1)
    strength = 1 + sum(abs(difference) >= least for least in _STRENGTHS)
    return {
        "value": value,
        "difference": rounded(difference, sign="+" if difference else "").replace("-", _MINUS),
        "strength": int(math.copysign(strength, difference)) if difference else 0,
    }


def _details(result: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: result[key] for key in ("scale", "merger", "training") if result.get(key)}
    for key, name in (("matrix", "matrix"), ("matrix_task_aware", "aware")):
        if rows := result.get(key):
            # Of a model that tasks do not change, one row says it all.
            same = all(row == rows[0] for row in rows)
            tenths = [[x and round(x, 1) for x in row] for row in rows[: 1 if same else None]]
            found[name] = {"steps": len(rows), "rows": tenths}
    return found
