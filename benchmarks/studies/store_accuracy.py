"""What a smaller store of task vectors costs: accuracy of finished runs, merged from each store.

    python -m cl_merge.benchmarks.studies.store_accuracy runs/plain-0 runs/plain-1 runs/plain-2

Takes the float32 task vectors that `cl-merge run` has left, stores each in fewer bits, and merges
and evaluates what comes back. The training is not repeated: it does not depend on the store.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from cl_merge.benchmarks.runs.evaluator import RunEvaluator
from cl_merge.benchmarks.studies import harness
from cl_merge.mergers import get_merger
from cl_merge.storage.quantize import STORES, stored


def main() -> None:
    """Measure every run, and print a table of means and spreads."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    runs, rows = parser.parse_args().runs, []
    for training, method in product(("sequential", "independent"), ("magmax", "average", "ties")):
        found = [measure(run, training, method) for run in runs]
        cells = [
            harness.mean_and_spread([accuracy[store] for accuracy in found]) for store in STORES
        ]
        rows.append([training, method, *cells])
    harness.show(None, ["trained", "merged", *STORES], rows)


def measure(run: Path, training: str, method: str) -> dict[str, float]:
    """Merge the task vectors of a training from each store; accuracies in per cent."""
    evaluator, found = RunEvaluator.of(run), {}
    for store in STORES:
        merger = get_merger(method)
        for vector in harness.task_vectors(run, training):
            merger.update(stored(vector, store))
        found[store] = evaluator.accuracy(merger.items(), merger.published_scale)
    return found


if __name__ == "__main__":
    main()
