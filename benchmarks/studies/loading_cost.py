"""What part of an evaluation goes into loading images, where they are decoded each time and kept.

    python -m cl_merge.benchmarks.studies.loading_cost data=caltech101 source=/photos/caltech101

Takes the settings of ``cl-merge run``. Goes over all test images three times, without workers.
"""

from __future__ import annotations

import torch

from cl_merge.benchmarks.datasets.loading import load_parts
from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.benchmarks.studies import harness
from cl_merge.config.schema import RunConfig

PASSES = 3


def main() -> None:
    """Measure, and print a table."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as in cl-merge run")
    settings = parser.parse_intermixed_args().settings
    rows = []
    for cache in ("false", "true"):
        config = read_settings([*settings, "stream.num_workers=0", f"stream.cache={cache}"])
        for number, (load, model) in enumerate(measure(config), start=1):
            name = f"{'kept' if cache == 'true' else 'decoded each time'}, pass {number}"
            share = 100 * load / (load + model)
            rows.append([name, f"{load:.2f}", f"{model:.2f}", f"{share:.0f}"])
    title = f"{config.model}, {config.data}, threads: {torch.get_num_threads()}"
    harness.show(title, ["", "loading, CPU s", "model, CPU s", "loading, %"], rows)


def measure(config: RunConfig) -> list[tuple[float, float]]:
    """CPU seconds of loading and of the model, for each pass over the test images."""
    stream, model = load_parts(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    visual, found = model.visual.eval().to(device), []
    for _ in range(PASSES):
        load, run = harness.Stopwatch(), harness.Stopwatch()
        batches = iter(stream.test_dataloader())
        while True:
            with load:
                batch = next(batches, None)
            if batch is None:
                break
            with run, torch.inference_mode():
                visual(batch.image.to(device))
        found.append((load.cpu, run.cpu))
    return found


if __name__ == "__main__":
    main()
