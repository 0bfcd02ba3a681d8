"""What class statistics cost: processor time of a stream's training, with and without them.

    OMP_NUM_THREADS=1 python -m cl_merge.benchmarks.studies.statistics_cost data=caltech101

Trains the stream that the settings name, with `MergeCallback` and `ClassStatistics`, and times the
end of each task. Processor seconds of one thread do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

import lightning as L
from typing_extensions import override

from cl_merge.benchmarks.datasets.loading import load_parts
from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.callbacks import ClassStatistics, MergeCallback
from cl_merge.training.fit import fit_stream


class _Timed(ClassStatistics):
    """Class statistics that count the processor seconds that they take."""

    seconds = 0.0

    @override
    def end_task(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        began = time.process_time()
        super().end_task(trainer, pl_module)
        self.seconds += time.process_time() - began


def main() -> None:
    """Train the stream once, and print the ratio."""
    from rich.console import Console

    logging.getLogger("lightning").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("settings", nargs="*", help="as of cl-merge run")
    parser.add_argument("--kind", default="both", help="as of ClassStatistics")
    arguments = parser.parse_args()
    config = read_settings(arguments.settings)
    stream, model = load_parts(config)
    statistics = _Timed(arguments.kind)
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    began = time.process_time()
    fit_stream(
        model,
        stream,
        callbacks=[MergeCallback("magmax"), statistics],
        trainer=quiet | dict(config.trainer),
        evaluate=False,
        seed=config.seed,
    )
    whole = time.process_time() - began
    Console().print(
        f"{whole - statistics.seconds:.1f} s without, {statistics.seconds:.1f} s for statistics: "
        f"{whole / (whole - statistics.seconds):.2f} times"
    )


if __name__ == "__main__":
    main()
