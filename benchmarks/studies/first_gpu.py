"""All that needs a GPU, in one command: most important first, what is done is kept.

    python -m cl_merge.benchmarks.studies.first_gpu OUT --photos caltech101/
    python -m cl_merge.benchmarks.studies.first_gpu OUT --photos caltech101/ --tiny

Each step is a command of its own, whose output goes to OUT/STEP.txt; a step that fails does not
keep the next from running, and one that ended well is not done again. ``--minutes`` bounds all of
them together. ``--tiny`` does the same in the smallest sizes, also without a GPU, to see that
every step works.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cl_merge.benchmarks.formatting import duration
from cl_merge.benchmarks.studies import harness

_PYTHON = (sys.executable, "-m")
_TORCHRUN = (*_PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node=1")
_CLI = (*_PYTHON, "cl_merge.cli")
_STUDIES = "cl_merge.benchmarks.studies"
_TESTS = Path(__file__).resolve().parents[2] / "tests"  # of a checkout


@dataclass(frozen=True)
class Step:
    """A command that measures or tests something."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def main() -> None:
    """Do all steps, and print how each ended."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of what the steps print")
    parser.add_argument(
        "--photos", type=Path, help="Caltech-101: a folder, or one of parquet files"
    )
    parser.add_argument("--minutes", type=float, default=12.0, help="for all steps together")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes")
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * words.minutes
    rows = []
    for step in steps(words.out, words.photos, words.tiny):
        began = time.monotonic()
        said = run(step, words.out, ends - began)
        rows.append([step.name, said, duration(time.monotonic() - began)])
        harness.tell(" ".join(rows[-1]))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    harness.show(f"{device}, torch {torch.__version__}", ["step", "ended", "time"], rows)
    sys.exit(any(said.startswith(("failed", "stopped")) for _, said, _ in rows))


def steps(out: Path, photos: Path | None, tiny: bool) -> list[Step]:
    """All steps, the most important first."""
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    shape = ["--model", "glyph", "--batch-size", "4", "--steps", "2"]
    table = ["--tasks", "10", "image_size=224", "stream.num_workers=8"]
    if tiny:
        table = ["--tasks", "10", "--methods", "sequential,magmax", "image_size=32"]
        table += ["stream.images_per_class=1", "trainer.max_epochs=1", "evaluate=last"]
    else:
        shape = ["--model", "ViT-B-16-quickgelu", "--batch-size", "128", "--steps", "40"]
        shape += ["--warmup", "10", "--repeat", "2"]
    kinds = ["--kinds", "bare loop", "plain", "magmax"]
    precisions = ["--precision", "32-true", "bf16-mixed", "bf16-mixed+compile"]
    cost = [f"{_STUDIES}.callback_cost"]
    cost += (
        ["--model", "ViT-B-32", "--tasks", "1", "--methods", "magmax"]
        if tiny
        else ["--model", "ViT-B-16"]
    )
    run_folder = out / "run"
    small = ["stream.tasks=2", "trainer.max_epochs=1", "compare=false"]
    ddp = [*_CLI, "run", *small, "trainer.devices=1", "trainer.strategy=ddp", f"out={run_folder}"]
    exported, digit = out / "exported", out / "digit.png"
    found = [
        Step("steps", [*_PYTHON, f"{_STUDIES}.regularizer_cost", *shape, *kinds, *precisions]),
        Step("ddp", ddp),
        Step("sharded", [*_TORCHRUN, "-m", *cost]),
        Step("callback", [*_PYTHON, *cost]),
        Step(
            "export", [*_CLI, "export", str(run_folder), "--format", "torch", "-o", str(exported)]
        ),
        Step("predict", [*_CLI, "predict", str(run_folder), str(digit), "--device", accelerator]),
    ]
    if photos is not None:
        words = ["--data", "caltech101", "--out", str(out / "table"), f"source={photos.resolve()}"]
        found.insert(1, Step("table", [*_CLI, "bench", "offline", *words, *table]))
    if _TESTS.is_dir():
        which = ["callbacks", "stream_merger", "mergers", "storage", "task_vectors"]
        folders = [str(_TESTS / name) for name in (which[-1:] if tiny else which)]
        tests = [*_PYTHON, "pytest", "-q", "-m", "not slow", "-n", "0" if tiny else "4", *folders]
        variables = {"CL_MERGE_TEST_ACCELERATOR": accelerator}
        found.append(Step("tests", tests, variables))
    return found


def run(step: Step, out: Path, seconds: float) -> str:
    """Do a step unless it has ended well before, and say how it ended."""
    log, done = out / f"{step.name}.txt", out / f"{step.name}.done"
    if done.exists():
        return "done before"
    if seconds < 1:
        return "not begun: no time was left"
    if step.name == "predict":
        _draw_digit(out / "digit.png")
    if step.name == "export":
        shutil.rmtree(out / "exported", ignore_errors=True)
    with log.open("w") as file:
        try:
            ended = subprocess.run(  # noqa: S603 - the words are of this file and the user's own
                step.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **step.environment},
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"stopped: no time was left; see {log}"
    if ended.returncode:
        return f"failed with exit code {ended.returncode}; see {log}"
    done.touch()
    return "well"


def _draw_digit(path: Path) -> None:
    from cl_merge.benchmarks.datasets.digits import digits

    digits()["test"][0]["image"].save(path)


if __name__ == "__main__":
    main()
