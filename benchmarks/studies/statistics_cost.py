"""What class statistics cost: processor time of a stream's training, with and without them.

    OMP_NUM_THREADS=1 python -m cl_merge.benchmarks.studies.statistics_cost data=caltech101

Trains the stream that the settings name, with `MergeCallback` and `ClassStatistics`, and times the
end of each task. Processor seconds of one thread do not depend on what else the machine does.
"""

from __future__ import annotations

import logging

import lightning as L
from typing_extensions import override

from cl_merge.benchmarks.datasets.loading import load_parts
from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.benchmarks.studies import harness
from cl_merge.callbacks import ClassStatistics, MergeCallback
from cl_merge.training.fit import fit_stream


class _Timed(ClassStatistics):
    """Class statistics that time themselves."""

    def __init__(self) -> None:
        super().__init__("both")
        self.watch = harness.Stopwatch()

    @override
    def end_task(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with self.watch:
            super().end_task(trainer, pl_module)


def main() -> None:
    """Train the stream once, and print the ratio."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("settings", nargs="*", help="as of cl-merge run")
    config = read_settings(parser.parse_args().settings)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    stream, model = load_parts(config)
    statistics, watch = _Timed(), harness.Stopwatch()
    with watch:
        fit_stream(
            model,
            stream,
            callbacks=[MergeCallback("magmax"), statistics],
            trainer=harness.QUIET | dict(config.trainer),
            evaluate=False,
            seed=config.seed,
        )
    own = statistics.watch.cpu
    without = watch.cpu - own
    harness.show(
        f"{without:.1f} s without, {own:.1f} s for statistics: {watch.cpu / without:.2f} times"
    )


if __name__ == "__main__":
    main()
