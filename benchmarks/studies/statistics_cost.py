"""What class statistics and their scale cost: processor time of a training with and without them.

    OMP_NUM_THREADS=1 python -m cl_merge.benchmarks.studies.statistics_cost data=caltech101

Trains the stream that the settings name, with `MergeCallback` at the drift scale and
`ClassStatistics`, and times what both do at the end of each task. Processor seconds of one thread
do not depend on what else the machine does.
"""

from __future__ import annotations

import logging

from cl_merge.benchmarks.datasets.loading import load_parts
from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.benchmarks.studies import harness
from cl_merge.callbacks import ClassStatistics, MergeCallback
from cl_merge.training.fit import fit_stream


def main() -> None:
    """Train the stream once, and print the ratio."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("settings", nargs="*", help="as of cl-merge run")
    config = read_settings(parser.parse_args().settings)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    stream, model = load_parts(config)
    merge, statistics = MergeCallback("magmax", scale="drift"), ClassStatistics("both")
    everything, merging = harness.Stopwatch(), harness.timed(merge, "end_task")
    learning = harness.timed(statistics, "end_task")
    with everything:
        fit_stream(
            model,
            stream,
            callbacks=[merge, statistics],
            trainer=harness.QUIET | dict(config.trainer),
            evaluate=False,
            seed=config.seed,
        )
    rest = everything.cpu - merging.cpu - learning.cpu
    harness.tell(
        f"{rest:.1f} s of training, {merging.cpu:.1f} s to merge and choose scales, "
        f"{learning.cpu:.1f} s for statistics: {everything.cpu / rest:.2f} times"
    )


if __name__ == "__main__":
    main()
