"""What is in checkpoints and task vectors, and how they differ; read once, in little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cl_merge.checkpoints import Weights, open_weights
from cl_merge.engine.hashing import BLOCK
from cl_merge.errors import InputError
from cl_merge.mergers.chunks import Reader, chunk_size, cut, stretches
from cl_merge.mergers.ties import trim_threshold
from cl_merge.parallel import in_threads
from cl_merge.task_vector import subtract

_CPU = torch.device("cpu")


@dataclass
class FileReport:
    """What one file holds.

    Attributes:
        path: The file or folder.
        kind: Of which kind it is.
        tensors: Number of tensors.
        parameters: Number of floating-point values.
        dtypes: Names of the dtypes.
        missing: Tensors of the reference that it lacks.
        extra: Tensors that the reference lacks.
        shapes: Tensors whose shape or dtype differs from the reference's, and how.
        not_finite: Tensors that hold NaN or infinity.
        norm: Euclidean norm of the task vector; of the weights without a base.
        relative: That norm, divided by the norm of the base's same tensors.
        zeros: Share of the task vector's values that are zero.
        largest: Largest magnitude.
        layers: Norm of the task vector by tensor.
    """

    path: Path
    kind: str
    tensors: int
    parameters: int
    dtypes: list[str]
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    norm: float = math.nan
    relative: float = math.nan
    zeros: float = math.nan
    largest: float = math.nan
    layers: dict[str, float] = field(default_factory=dict)


@dataclass
class Inspection:
    """What several files hold, and how they compare.

    Attributes:
        files: A report on each.
        base: The base, where there is one.
        compared: Number of tensors that all files have alike, over which the figures run.
        cosines: Cosine of the angle between each two task vectors, ``[T][T]``.
        conflicts: Share of positions that tasks move in both directions, of those that any moves.
        top_conflicts: The same over the largest values of each task, as TIES trims them.
        density: Share of values that count as the largest.
    """

    files: list[FileReport]
    base: Path | None
    compared: int
    cosines: list[list[float]]
    conflicts: float
    top_conflicts: float
    density: float

    @property
    def fine(self) -> bool:
        """Whether the files could be merged: the same tensors everywhere, and all finite."""
        return not any(f.missing or f.extra or f.shapes or f.not_finite for f in self.files)


def inspect_checkpoints(
    tasks: Sequence[str | Path],
    base: str | Path | None = None,
    *,
    density: float = 0.2,
    progress: Callable[[int], Callable[[int], None]] | None = None,
) -> Inspection:
    """Look into checkpoints and task vectors before merging them.

    What does not match is reported, not refused; figures are over what all files have alike.

    Args:
        tasks: Fine-tuned weights or task vectors, of any kind that `merge_checkpoints` reads.
        base: The weights before fine-tuning; without it, weights are looked at as they are.
        density: Share of each task vector that counts as its largest values.
        progress: Given the number of bytes to be read; returns what is told of bytes that were.

    Returns:
        What was found.

    Raises:
        InputError: If a file is missing or damaged, or the density is outside (0, 1].
    """
    if not 0 < density <= 1:
        raise InputError(f"the density must be above 0 and at most 1, not {density}")
    with ExitStack() as stack:
        opened = [stack.enter_context(open_weights(path)) for path in tasks]
        before = stack.enter_context(open_weights(base)) if base is not None else None
        return _Look(opened, before, density, progress).run()


class _Look:
    """One inspection under way."""

    def __init__(
        self,
        tasks: list[Weights],
        base: Weights | None,
        density: float,
        progress: Callable[[int], Callable[[int], None]] | None,
    ) -> None:
        self._tasks = tasks
        self._base = base
        self._density = density
        self._reports = [_compared(task, base or tasks[0], base is None) for task in tasks]
        self._shapes = self._common()
        read = [*tasks, *([base] if base is not None else [])]
        total = 2 * sum(
            shape.numel() * weights.dtype(name).itemsize
            for weights in read
            for name, shape in self._shapes.items()
        )
        self._tell = progress(total) if progress else None

    def run(self) -> Inspection:
        """Read everything twice: for the thresholds, and for the figures."""
        thresholds = [self._threshold(task) for task in range(len(self._tasks))]
        blocks = list(cut(self._shapes, "element", BLOCK))
        figures = in_threads(lambda block: self._figures(*block, thresholds), blocks)
        total = _Figures(len(self._tasks))
        for (name, _), found in zip(blocks, figures, strict=True):
            total.add(name, found)
        for task, report in enumerate(self._reports):
            total.into(report, task, sum(shape.numel() for shape in self._shapes.values()))
        norms = total.gram.diagonal().sqrt()
        cosines = total.gram / (norms[:, None] * norms[None, :])
        return Inspection(
            self._reports,
            self._base.path if self._base is not None else None,
            len(self._shapes),
            cosines.tolist(),
            _share(total.conflicts, total.moved),
            _share(total.top_conflicts, total.top_moved),
            self._density,
        )

    def _common(self) -> dict[str, torch.Size]:
        """What all files have alike, in the order of the first."""
        odd = {name for report in self._reports for name in (*report.missing, *report.extra)}
        odd |= {text.split(" ")[0] for report in self._reports for text in report.shapes}
        first = self._tasks[0]
        return {
            name: first.shape(name)
            for name in first.names
            if name not in odd
            and first.dtype(name).is_floating_point
            and all(name in task.names for task in self._tasks)
        }

    def _vector(self, task: int, name: str, part: slice) -> Tensor:
        """Read a stretch of a task vector, NaN and infinity included; float32 [n]."""
        weights = self._tasks[task]
        raw = weights.read(name, part.start, part.stop)
        self._count(raw)
        if weights.is_task_vector or self._base is None:
            return raw.to(torch.float32)
        vector = torch.empty(raw.numel())
        subtract(raw, self._base.read(name, part.start, part.stop), vector)
        return vector

    def _threshold(self, task: int) -> float:
        reader = Reader(self._shapes, lambda name, part: self._vector(task, name, part), _CPU)
        return trim_threshold(reader, self._density)

    def _figures(self, name: str, block: slice, thresholds: list[float]) -> _Figures:
        found = _Figures(len(self._tasks))
        for part in stretches(self._shapes[name], "element", chunk_size(_CPU), block):
            vectors = torch.stack(
                [self._vector(task, name, part) for task in range(len(self._tasks))]
            )
            base = None
            if self._base is not None:
                base = self._base.read(name, part.start, part.stop).to(torch.float32)
                self._count(base)
            found.take(name, vectors, base, thresholds)
        return found

    def _count(self, raw: Tensor) -> None:
        if self._tell is not None:
            self._tell(raw.numel() * raw.element_size())


class _Figures:
    """Sums over values, which add up over stretches."""

    def __init__(self, tasks: int) -> None:
        self.gram = torch.zeros(tasks, tasks, dtype=torch.float64)
        self.squares: dict[str, Tensor] = {}
        self.base_squares = 0.0
        self.zeros = torch.zeros(tasks, dtype=torch.int64)
        self.largest = torch.zeros(tasks)
        self.broken: list[set[str]] = [set() for _ in range(tasks)]
        self.moved = self.conflicts = self.top_moved = self.top_conflicts = 0

    def take(
        self, name: str, vectors: Tensor, base: Tensor | None, thresholds: list[float]
    ) -> None:
        """Take up a stretch of all task vectors, float32 [T, n]; they are changed."""
        for task, vector in enumerate(vectors):
            if not bool(vector.sum().isfinite()) and not bool(vector.isfinite().all()):
                self.broken[task].add(name)
                vector.nan_to_num_(0.0, 0.0, 0.0)
        wide = vectors.to(torch.float64)
        gram = wide @ wide.T
        self.gram += gram
        self.squares[name] = self.squares.get(name, 0) + gram.diagonal()
        if base is not None:
            self.base_squares += float(base.to(torch.float64).square().sum())
        self.zeros += (vectors == 0).sum(dim=1)
        if vectors.shape[1]:
            self.largest = torch.maximum(self.largest, vectors.abs().amax(dim=1))
        moved, conflicts = _both_signs(vectors)
        self.moved, self.conflicts = self.moved + moved, self.conflicts + conflicts
        limit = torch.tensor(thresholds)[:, None]
        moved, conflicts = _both_signs(vectors.masked_fill_(vectors.abs() < limit, 0))
        self.top_moved, self.top_conflicts = self.top_moved + moved, self.top_conflicts + conflicts

    def add(self, name: str, other: _Figures) -> None:
        """Add the sums of another stretch, of one tensor."""
        self.gram += other.gram
        for tensor, squares in other.squares.items():
            self.squares[tensor] = self.squares.get(tensor, 0) + squares
        self.base_squares += other.base_squares
        self.zeros += other.zeros
        self.largest = torch.maximum(self.largest, other.largest)
        for mine, theirs in zip(self.broken, other.broken, strict=True):
            mine |= theirs
        self.moved, self.conflicts = self.moved + other.moved, self.conflicts + other.conflicts
        self.top_moved += other.top_moved
        self.top_conflicts += other.top_conflicts

    def into(self, report: FileReport, task: int, size: int) -> None:
        """Write one task's figures into its report."""
        report.norm = float(self.gram[task, task].sqrt())
        if self.base_squares:
            report.relative = report.norm / math.sqrt(self.base_squares)
        report.zeros = _share(int(self.zeros[task]), size)
        report.largest = float(self.largest[task])
        report.not_finite = sorted(self.broken[task])
        report.layers = {name: float(sums[task].sqrt()) for name, sums in self.squares.items()}


def _both_signs(vectors: Tensor) -> tuple[int, int]:
    positive, negative = (vectors > 0).any(dim=0), (vectors < 0).any(dim=0)
    return int((positive | negative).sum()), int((positive & negative).sum())


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _compared(task: Weights, reference: Weights, among_tasks: bool) -> FileReport:
    """Compare names, shapes and dtypes with the base's, or with the first file's."""
    ours, theirs = set(reference.names), set(task.names)
    report = FileReport(
        path=task.path,
        kind=task.kind,
        tensors=len(task.names),
        parameters=sum(
            task.shape(name).numel() for name in task.names if task.dtype(name).is_floating_point
        ),
        dtypes=sorted({str(task.dtype(name)).removeprefix("torch.") for name in task.names}),
        extra=[name for name in task.names if name not in ours],
    )
    # A task vector holds what trained, which may be a part of the base.
    if among_tasks or not task.is_task_vector:
        report.missing = [name for name in reference.names if name not in theirs]
    for name in task.names:
        if name not in ours:
            continue
        if task.shape(name) != reference.shape(name):
            report.shapes.append(
                f"{name} {tuple(task.shape(name))} instead of {tuple(reference.shape(name))}"
            )
        elif not task.is_task_vector and task.dtype(name) != reference.dtype(name):
            report.shapes.append(f"{name} {task.dtype(name)} instead of {reference.dtype(name)}")
    return report
