"""What the framework costs over a bare loop in plain torch that does the same work.

    python -m cl_merge.benchmarks.studies.overhead stream data=digits
    python -m cl_merge.benchmarks.studies.overhead test data=caltech101 source=/photos/caltech101

``stream``: the training of a whole run, with its logs, task vectors and checkpoints, against
`bare_loop`, on the CPU. The two take turns task by task, and must end with the same weights, bit
for bit. ``test``: an evaluation of all tasks against one forward pass over the same images. Both
take the settings of ``cl-merge run``. For steps on a GPU: ``regularizer_cost``.
"""

from __future__ import annotations

import copy
import gc
import io
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from cl_merge.benchmarks.datasets.catalog import find_data
from cl_merge.benchmarks.datasets.loading import load_data, task_epochs
from cl_merge.benchmarks.methods.method import TRAININGS
from cl_merge.benchmarks.runs.evaluation import evaluation_trainer
from cl_merge.benchmarks.runs.progress import RunProgress
from cl_merge.benchmarks.runs.run import Run, start_run
from cl_merge.benchmarks.runs.training import training_trainer
from cl_merge.benchmarks.studies import harness
from cl_merge.benchmarks.studies.bare_loop import BareStream, BareTask, bare_test
from cl_merge.callbacks import MergeCallback
from cl_merge.config.reading import parse_arguments, read_config
from cl_merge.config.schema import RunConfig, default_of
from cl_merge.data.sampling import StreamSampler
from cl_merge.data.tasks import Task
from cl_merge.errors import InputError
from cl_merge.models.classifier import CLIPClassifier
from cl_merge.models.pretrained import load_clip
from cl_merge.task_vectors.module_weights import copies, install, trained_parameters
from cl_merge.training.fit import TaskEnd, fit_stream

_TRAINING = TRAININGS["sequential"]


@dataclass
class Pair:
    """One piece of work of so many steps or forward passes, done by framework and bare loop."""

    units: int
    framework: harness.Stopwatch
    bare: harness.Stopwatch


@dataclass
class Found:
    """What was measured."""

    pairs: list[Pair]  # one after another
    difference: float  # the largest of the results: of weights, or of counted images
    passes: int | None = None  # in a test, those that the framework made each time

    def column(self, clock: str) -> dict[str, str]:
        """Write what a clock, ``wall`` or ``cpu``, says, by name of the table's row."""
        ours = np.array([1000 * getattr(pair.framework, clock) for pair in self.pairs])
        bare = np.array([1000 * getattr(pair.bare, clock) for pair in self.pairs])
        units = np.array([pair.units for pair in self.pairs])
        return {
            "framework, ms": harness.spread(ours / units, 2),
            "bare loop, ms": harness.spread(bare / units, 2),
            "difference, ms": harness.spread((ours - bare) / units, 2),
            "ratio": harness.spread(ours / bare, 3),
            "ratio of the sums": f"{ours.sum() / bare.sum():.3f}",
        }


def main() -> None:
    """Measure, and print a table."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("part", choices=("stream", "test"))
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as in cl-merge run")
    parser.add_argument("--repeat", type=int, help="by default 3 streams or 10 tests")
    arguments = parser.parse_intermixed_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        run = start_run(read_settings(arguments.settings, Path(folder)))
        if arguments.part == "stream":
            found = measure_stream(run, arguments.repeat or 3)
        else:
            found = measure_test(run, arguments.repeat or 10)
        run.folder.release()
    _show(found, f"{run.config.model}, {run.config.data}")


def read_settings(settings: Sequence[str], folder: Path) -> RunConfig:
    """Read settings as ``cl-merge run`` does; refuse what the bare loop does not do."""
    entry = find_data(str(parse_arguments(settings).get("data", "digits")))
    fixed = ["compare=false", "trainer.accelerator=cpu", "trainer.devices=1", f"out={folder}"]
    config = read_config([*settings, *fixed], entry.recipe)
    plain = default_of("stream.test_fraction"), 0.0, "magmax"
    if (config.stream.test_fraction, config.stream.held_out, config.method) != plain:
        raise InputError(
            "the bare loop trains on the training split as it is and merges with magmax: leave "
            "out stream.test_fraction, stream.held_out and method"
        )
    return config


def measure_stream(run: Run, repeat: int) -> Found:
    """Train a started run with the framework and with the bare loop, a task here, a task there.

    There is a pair for each task but the very first, which pays for what is loaded once.
    """
    before = copy.deepcopy(run.model.visual)
    clip = load_clip(run.config.model, image_size=run.config.image_size)
    loaded = load_data(run.config)
    settings, images = run.config.stream, loaded.splits[run.config.stream.train_split]
    column = loaded.columns.get("image", settings.image)
    labels = images[loaded.columns.get("label", settings.label)]
    tasks = [_plain(run, task, labels) for task in run.stream.tasks]
    found = Found([], 0.0)
    for turn in range(repeat):
        tower, head = copy.deepcopy(before), run.model.head.weight.clone()
        bare = BareStream(tower, head, images, column, clip.train_transform, run.config)
        install(trained_parameters(run.model), run.base)
        found.pairs += _in_turns(run, bare, tasks, run.folder.path / f"turn{turn}")
        ours = copies(run.model.visual.state_dict())
        found.difference = max(found.difference, _largest(ours, bare.tower.state_dict()))
    del found.pairs[0]
    return found


def measure_test(run: Run, repeat: int) -> Found:
    """Evaluate merged weights on all tasks, and make one forward pass over the same images."""
    callback = MergeCallback("magmax")
    run.config.trainer |= {"max_epochs": 1, "limit_train_batches": 1}
    _fit(run, callback, run.folder.path / "test")
    samples = [torch.cat(parts) for parts in zip(*run.stream.test_dataloader(), strict=True)]
    tower = copy.deepcopy(run.model.visual)
    callback.install(CLIPClassifier(tower, run.model.head))
    outside = torch.ones(len(run.stream.tasks), len(run.stream.class_names), dtype=torch.bool)
    for task in run.stream.tasks:
        outside[task.index, list(task.classes)] = False
    row, size = run.stream.row, run.stream.batch_size
    run.model.accuracy = run.matrices[run.own.name]

    def framework() -> Tensor:
        trainer = evaluation_trainer(run.config.trainer, [callback])
        trainer.test(run.model, datamodule=run.stream, verbose=False)
        return run.model.accuracy.rows[row]  # type: ignore[union-attr]

    def plain() -> Tensor:
        return bare_test(tower, run.model.head.weight, samples, outside, size)

    passes: list[None] = []
    hook = run.model.visual.register_forward_hook(lambda *_: passes.append(None))
    difference = (framework() - plain()).abs().max().item()
    hook.remove()
    works = {"framework": partial(_timed, framework), "bare loop": partial(_timed, plain)}
    turns = harness.alternated(works, repeat)
    units = -(-len(samples[0]) // size)
    pairs = [Pair(units, a, b) for a, b in zip(*turns.values(), strict=True)]
    return Found(pairs, difference, len(passes))


def _in_turns(run: Run, bare: BareStream, tasks: list[BareTask], folder: Path) -> list[Pair]:
    """Train all tasks, framework F and bare loop B, in the order F0 B0 B1 F1 F2 B2 B3 and so on."""
    # All that the framework does counts, from the call to its return; but that Python collects
    # garbage counts for neither, or one would pay for the other.
    pairs = [Pair(0, harness.Stopwatch(), harness.Stopwatch()) for _ in tasks]
    progress = bare.train(tasks)

    def after_task(end: TaskEnd) -> None:
        index = end.task.index
        pairs[index].framework.stop()
        gc.collect()
        for other in pairs[index : index + 2] if index % 2 == 0 else ():
            with other.bare:
                other.units = next(progress)
            gc.collect()
        pairs[min(index + 1, len(pairs) - 1)].framework.start()

    callback = MergeCallback("magmax", directory=folder / "vectors")
    pairs[0].framework.start()
    _fit(run, callback, folder / "state", after_task)
    pairs[-1].framework.stop()
    merged = {name.removeprefix("visual."): value for name, value in callback.merged().items()}
    if _largest(merged, bare.merged):
        raise RuntimeError("the framework and the bare loop do not do the same: merged weights")
    return pairs


def _fit(
    run: Run,
    callback: MergeCallback,
    folder: Path,
    after_task: Callable[[TaskEnd], None] | None = None,
) -> None:
    """Train the stream as a run does, with a progress bar that nobody sees."""
    unseen = Console(file=io.StringIO(), force_terminal=True)
    with RunProgress(unseen, total=1000) as progress:
        fit_stream(
            run.model,
            run.stream,
            callbacks=[callback, progress],
            trainer=partial(training_trainer, run, _TRAINING),
            evaluate=False,
            seed=run.config.seed,
            on_task_end=after_task,
            directory=folder,
            checkpoint_seconds=run.config.checkpoint_seconds,
        )


def _plain(run: Run, task: Task, labels: Sequence[int]) -> BareTask:
    """What a task's images are and when they come, worked out beforehand."""
    train = task.train.tolist()
    orders = []
    for epoch in range(task_epochs(run.config, len(run.stream.tasks))[task.index]):
        sampler = StreamSampler(train, seed=run.config.seed, task=task.index)
        sampler.set_epoch(epoch)
        orders.append([(draw.index, draw.seed) for draw in sampler])
    position = {label: index for index, label in enumerate(task.classes)}
    return BareTask(train, [position[labels[row]] for row in train], list(task.classes), orders)


def _timed(work: Callable[[], object]) -> harness.Stopwatch:
    gc.collect()
    watch = harness.Stopwatch()
    with watch:
        work()
    return watch


def _largest(ours: dict[str, Tensor], bare: dict[str, Tensor]) -> float:
    return max((ours[name] - bare[name]).abs().max().item() for name in bare)


def _show(found: Found, title: str) -> None:
    unit = "step" if found.passes is None else "forward pass"
    wall, cpu = found.column("wall"), found.column("cpu")
    harness.show(
        f"{title}: {len(found.pairs)} pairs, threads: {torch.get_num_threads()}; median (range)",
        [f"of a {unit}", "wall time", "CPU time"],
        ([name, wall[name], cpu[name]] for name in wall),
    )
    note = "largest difference of a weight at the end"
    if found.passes is not None:
        note = f"forward passes of the image tower: {found.passes}; largest difference of a count"
    harness.tell(f"{note}: {found.difference:g}")


if __name__ == "__main__":
    main()
