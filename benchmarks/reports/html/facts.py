"""What stands at the head of a page: what was run, on what, and how far it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from cl_merge.benchmarks.formatting import counted, duration
from cl_merge.benchmarks.reports.html.entries import STATES
from cl_merge.benchmarks.reports.html.runs import RunFacts, distinct
from cl_merge.benchmarks.reports.summary import Summary
from cl_merge.benchmarks.suites.plan import DONE


def facts_of(summary: Summary, runs: Mapping[str, RunFacts]) -> Iterator[tuple[str, str]]:
    """Say what was run, on what, and how far it is.

    Args:
        summary: Of a suite.
        runs: Its runs by place.

    Yields:
        A term and what it is; what is not known is empty.
    """
    suite, every = summary.suite, list(runs.values())
    methods = len({method for _, method in summary.entries})
    yield "model", ", ".join(distinct(every, "model"))
    yield "seeds", ", ".join(map(str, suite.seeds))
    yield "table", f"{counted(methods, 'method')} by {counted(len(suite.settings), 'setting')}"
    counts = Counter(cell.state for cell in summary.cells)
    states = [f"{counts[s]} {word}" for s, word in STATES.items() if counts[s]]
    yield (
        "results",
        ", ".join([f"{counts[DONE]} of {counts.total()} done", *states[counts[DONE] > 0 :]]),
    )
    seconds = sum(run.seconds for run in every)
    if seconds:
        finished = sum(1 for run in every if run.results)
        yield "time", f"{duration(seconds)} in {counted(finished, 'run')}"
    finished_at = sorted(distinct(every, "finished"))
    if finished_at:
        yield "finished", " to ".join(dict.fromkeys((finished_at[0], finished_at[-1])))
    yield "machine", "; ".join(dict.fromkeys(_machine(run) for run in every if run.results))
    packages = dict.fromkeys(name for run in every for name in run.results.get("versions", {}))
    yield (
        "versions",
        ", ".join(f"{p} {' and '.join(distinct(every, 'versions', p))}" for p in packages),
    )


def _machine(run: RunFacts) -> str:
    machine: Any = run.results.get("machine", {})
    threads = counted(int(machine.get("threads", 1)), "thread")
    return ", ".join(str(x) for x in (machine.get("device"), threads, machine.get("platform")) if x)
