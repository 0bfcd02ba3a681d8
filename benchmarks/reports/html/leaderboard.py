"""Write a leaderboard as one page, from what was joined and a template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cl_merge.benchmarks.formatting import counted, rounded
from cl_merge.benchmarks.reports.html.page import element_id, html_templates, metric_text
from cl_merge.benchmarks.reports.leaderboard import Finding, Leaderboard, Row, Stream, spread_of
from cl_merge.benchmarks.reports.summary import METRICS
from cl_merge.storage.files import atomic_write

_HASH = 10  # letters of a commit that are shown


def write_leaderboard(board: Leaderboard, path: str | Path) -> None:
    """Write the page, one file that needs no network."""
    page = html_templates().get_template("leaderboard.html").render(_content(board))
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _content(board: Leaderboard) -> dict[str, Any]:
    streams, rows = board.streams, board.rows
    findings = [finding for cell in board.cells.values() for finding in cell]
    best = {
        (stream, metric): _best(board, stream, metric) for stream in streams for metric in METRICS
    }
    cells = {
        key: {
            "id": element_id("of", str(streams.index(key[0])), key[1].name),
            "method": key[1].name,
            "figures": _figures(found, [m for m in METRICS if key[1] in best[key[0], m]]),
            "findings": [_finding(finding) for finding in found],
        }
        for key, found in board.cells.items()
    }
    table = [[cells.get((stream, row), {"figures": {}}) for stream in streams] for row in rows]
    return {
        "rows": [{"name": row.name, "cells": own} for row, own in zip(rows, table, strict=True)],
        "columns": [
            {
                "id": element_id("stream", str(index)),
                "name": stream.name,
                "model": stream.model,
                "settings": stream.settings,
                "differing": _differing(stream, streams),
                "cells": [cells[stream, row] for row in rows if (stream, row) in cells],
            }
            for index, stream in enumerate(streams)
        ],
        "published": _published(board),
        "refused": board.refused,
        "files": sorted({finding.file for finding in findings}),
        "facts": [
            ("versions", _listed(f"cl-merge {f.versions.get('cl-merge', '?')}" for f in findings)),
            ("commits", _listed(f.commit[:_HASH] for f in findings)),
            ("seeds", _listed(str(f.seed) for f in findings)),
            ("orders", _listed(f.order for f in findings)),
            ("machines", _listed(f.machine for f in findings)),
        ],
        "metrics": METRICS,
        "data": {
            "metrics": {name: metric.about for name, metric in METRICS.items()},
            "cells": [[cell["figures"] for cell in own] for own in table],
        },
    }


def _figures(findings: Sequence[Finding], best: Iterable[str]) -> dict[str, Any]:
    """The metrics of a cell in words, and the number by which they are sorted."""
    shown = {}
    for name, metric in METRICS.items():
        found = spread_of(findings, name)
        if found is None:
            continue
        mean, spread, values = found
        orders = len({finding.order for finding in findings})
        seeds = counted(len({finding.seed for finding in findings}), "seed")
        shown[name] = {
            "mean": metric_text(mean, metric),
            "spread": "" if spread is None else metric_text(spread, metric),
            "of": seeds + (f", {counted(orders, 'order')}" if orders > 1 else ""),
            "values": values,
            "order": float(f"{mean:.8g}"),
            "best": name in best,
        }
    return shown


def _best(board: Leaderboard, stream: Stream, metric: str) -> list[Row]:
    """The rows of the best mean of a column, joint training apart; none where more is no better."""
    better = METRICS[metric].better
    means = {
        row: better * found[0]
        for (other, row), cell in board.cells.items()
        if better
        and other == stream
        and row.training != "joint"
        and (found := spread_of(cell, metric)) is not None
    }
    return [row for row, value in means.items() if value == max(means.values())]


def _finding(finding: Finding) -> dict[str, Any]:
    metrics, commit = finding.metrics, finding.commit
    dirty = " and changes" if commit.endswith("-dirty") else ""
    return {
        "seed": finding.seed,
        "order": finding.order,
        "accuracy": rounded(metrics["accuracy"], 2),
        "minutes": metric_text(metrics["seconds"], METRICS["seconds"]),
        "memory": metric_text(metrics["peak_memory"], METRICS["peak_memory"]),
        "version": " ".join(
            filter(None, (finding.versions.get("cl-merge", "?"), commit[:_HASH] + dirty))
        ),
        "machine": finding.machine,
        "command": finding.command,
    }


def _differing(stream: Stream, streams: Sequence[Stream]) -> list[str]:
    """The settings by which a stream differs from others of its name and model."""
    like = [s for s in streams if (s.name, s.model) == (stream.name, stream.model)]
    counts = Counter(word for other in like for word in other.settings)
    return [word for word in stream.settings if counts[word] < len(like)]


def _published(board: Leaderboard) -> list[dict[str, Any]]:
    """Rows of figures that others report, as far as they have a column."""
    rows: dict[tuple[str, str], list[str]] = {}
    for index, stream in enumerate(board.streams):
        for own in filter(lambda own: own.is_of(stream), board.published):
            values = rows.setdefault((own.method, own.source), [""] * len(board.streams))
            values[index] = rounded(own.accuracy)
    return [{"method": m, "source": s, "accuracies": values} for (m, s), values in rows.items()]


def _listed(words: Iterable[str]) -> str:
    return ", ".join(sorted({word for word in words if word})) or "not said"
