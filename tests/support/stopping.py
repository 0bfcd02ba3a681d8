"""Stop a run from within, where a test wants it."""

from __future__ import annotations

import pytest

from cl_merge.benchmarks.runs.evaluation import Evaluation


def stop_at_evaluation(patch: pytest.MonkeyPatch, number: int) -> None:
    """Press Ctrl-C when a run is about to evaluate a method after a task for the n-th time."""
    evaluate, calls = Evaluation.evaluate, []

    def stop(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == number:
            raise KeyboardInterrupt
        evaluate(*arguments)  # type: ignore[arg-type]

    patch.setattr(Evaluation, "evaluate", stop)
