"""What the framework costs over a bare loop in plain torch that does the same work.

    python -m cl_merge.benchmarks.studies.overhead stream data=digits
    python -m cl_merge.benchmarks.studies.overhead stream data=caltech101 source=/photos/caltech101
    python -m cl_merge.benchmarks.studies.overhead test data=caltech101 source=/photos/caltech101
    python -m cl_merge.benchmarks.studies.overhead step --model ViT-B-16-quickgelu --batch-size 128

``stream``: the training of a whole run, with its logs, task vectors and checkpoints, against
`bare_loop`, on the CPU. The two take turns task by task, and must end with the
same weights, bit for bit. ``test``: an evaluation of all tasks against one forward pass over the
same images. Both take the settings of ``cl-merge run``. ``step``: images per second and peak memory
of training on random images, on a GPU where there is one.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from cl_merge.benchmarks.datasets.catalog import find_data
from cl_merge.benchmarks.datasets.loading import load_data, task_epochs
from cl_merge.benchmarks.methods.method import TRAININGS
from cl_merge.benchmarks.runs.progress import RunProgress
from cl_merge.benchmarks.runs.run import Run, start_run
from cl_merge.benchmarks.runs.trainers import evaluation_trainer, training_trainer
from cl_merge.benchmarks.studies import harness, step_speed
from cl_merge.benchmarks.studies.bare_loop import BareStream, BareTask, bare_test
from cl_merge.callbacks import MergeCallback
from cl_merge.config.reading import parse_arguments, read_config
from cl_merge.config.schema import RunConfig, default_of
from cl_merge.data.sampling import StreamSampler
from cl_merge.data.tasks import Task
from cl_merge.errors import InputError
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

    def figures(self) -> dict[str, Any]:
        """Read the figures off the pairs.

        Returns:
            By clock, ``"wall"`` and ``"cpu"``: milliseconds of a step or pass, and ratios of each
            pair and of the sums; all plain values.
        """
        found: dict[str, Any] = {"difference": self.difference, "passes": self.passes}
        units = [pair.units for pair in self.pairs]
        for clock in ("wall", "cpu"):
            ours = [getattr(pair.framework, clock) for pair in self.pairs]
            bare = [getattr(pair.bare, clock) for pair in self.pairs]
            ours_ms, bare_ms = (
                [1000 * seconds / n for seconds, n in zip(took, units, strict=True)]
                for took in (ours, bare)
            )
            found[clock] = {
                "framework_ms": ours_ms,
                "bare_ms": bare_ms,
                "more_ms": [a - b for a, b in zip(ours_ms, bare_ms, strict=True)],
                "ratios": [a / b for a, b in zip(ours, bare, strict=True)],
                "ratio_of_sums": sum(ours) / sum(bare),
            }
        return found


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = harness.new_parser(__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, repeat in (("stream", 3), ("test", 10)):
        part = parts.add_parser(name)
        part.add_argument("settings", nargs="*", metavar="key=value", help="as in cl-merge run")
        part.add_argument("--repeat", type=int, default=repeat)
        part.add_argument("--json", type=Path, help="where to write all figures")
    step_speed.add_arguments(parts.add_parser("step"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.part == "step":
        step_speed.run(arguments, "cl_merge.benchmarks.studies.overhead")
        return
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        run = start_run(read_settings(arguments.settings, Path(folder)))
        measure = measure_stream if arguments.part == "stream" else measure_test
        figures = measure(run, arguments.repeat).figures()
        run.folder.release()
    figures |= {"settings": arguments.settings, "threads": torch.get_num_threads()}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    _show(figures, arguments.part, f"{run.config.model}, {run.config.data}")


def read_settings(settings: Sequence[str], folder: Path) -> RunConfig:
    """Read settings as ``cl-merge run`` does, for one method on the CPU.

    Raises:
        InputError: If a setting is wrong, or asks for what the bare loop does not do.
    """
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
    """Train a stream with the framework and with the bare loop, a task here, a task there.

    The run has been started, of a method that merges as MagMax does. There is a pair for each task
    but the first of all, which pays for what is loaded and allocated once.
    """
    before = copy.deepcopy(run.model.visual)
    clip = load_clip(run.config.model, image_size=run.config.image_size)
    loaded = load_data(run.config)
    columns = {"image": run.config.stream.image, "label": run.config.stream.label}
    columns |= {name: loaded.columns[name] for name in columns if name in loaded.columns}
    images = loaded.splits[run.config.stream.train_split]
    labels = images[columns["label"]]
    tasks = [_plain(run, task, labels) for task in run.stream.tasks]
    found = Found([], 0.0)
    for turn in range(repeat):
        bare = BareStream(
            tower=copy.deepcopy(before),
            head=run.model.head.weight.clone(),
            images=images,
            column=columns["image"],
            transform=clip.train_transform,
            batch_size=run.config.stream.batch_size,
            optimizer=run.config.optimizer,
            clip=run.config.trainer.get("gradient_clip_val"),
        )
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
    _fit(run, callback, run.folder.path / "test", lambda end: None)
    samples: Any = run.stream.test_dataloader().dataset
    images, labels, tasks = samples[:]
    tower = copy.deepcopy(run.model.visual)
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            base, change = callback.base[f"visual.{name}"], callback.merged()[f"visual.{name}"]
            weight.copy_(torch.add(base, change, alpha=callback.scales.of(f"visual.{name}")))
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
        return bare_test(tower, run.model.head.weight, images, labels, tasks, outside, size)

    passes: list[None] = []
    hook = run.model.visual.register_forward_hook(lambda *_: passes.append(None))
    difference = (framework() - plain()).abs().max().item()
    hook.remove()
    turns = harness.alternated(
        {"framework": partial(_timed, framework), "bare": partial(_timed, plain)}, repeat
    )
    units = -(-len(images) // size)
    pairs = [Pair(units, a, b) for a, b in zip(turns["framework"], turns["bare"], strict=True)]
    return Found(pairs, difference, len(passes))


def _in_turns(run: Run, bare: BareStream, tasks: list[BareTask], folder: Path) -> list[Pair]:
    """Train all tasks in the order F0 B0 B1 F1 F2 B2 B3 ..., F the framework and B the bare loop.

    All that the framework does counts, from the call to its return; but that Python collects
    garbage counts for neither, or one would pay for the other.
    """
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
    run: Run, callback: MergeCallback, folder: Path, after_task: Callable[[TaskEnd], None]
) -> None:
    """Train the stream as a run does, with a progress bar that nobody sees."""
    with (
        Path(os.devnull).open("w") as nowhere,
        RunProgress(Console(file=nowhere, force_terminal=True), total=1000) as progress,
    ):
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


def _show(figures: dict[str, Any], part: str, title: str) -> None:
    clocks = figures["wall"], figures["cpu"]
    threads = f"{figures['threads']} thread{'s' if figures['threads'] > 1 else ''}"
    pairs = len(clocks[0]["ratios"])
    table = harness.new_table(
        f"{title}: {pairs} pairs, {threads}; median (range)", "", "wall time", "CPU time"
    )
    unit = "step" if part == "stream" else "forward pass"
    for key, name in (("framework", "framework"), ("bare", "bare loop"), ("more", "difference")):
        spreads = [harness.Spread.of(clock[f"{key}_ms"]) for clock in clocks]
        table.add_row(f"{name}, ms a {unit}", *(f"{spread:.2f}" for spread in spreads))
    table.add_row("ratio", *(f"{harness.Spread.of(clock['ratios']):.3f}" for clock in clocks))
    table.add_row("ratio of the sums", *(f"{clock['ratio_of_sums']:.3f}" for clock in clocks))
    difference = f"largest difference of a {'weight at the end' if part == 'stream' else 'count'}"
    passes = "" if part == "stream" else f"forward passes of the image tower: {figures['passes']}; "
    harness.show(table, f"{passes}{difference}: {figures['difference']:g}")


if __name__ == "__main__":
    main()
