"""What is in checkpoints and task vectors, and how they differ; read twice, in little memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cl_merge.errors import InputError
from cl_merge.kernels import subtract
from cl_merge.kernels.finite import is_finite
from cl_merge.kernels.parallel import in_threads
from cl_merge.merge_files.contents import check_several, parameters, quantised, take_off
from cl_merge.merge_files.grown import grown_vectors
from cl_merge.merge_files.hashing import BLOCK
from cl_merge.merge_files.inputs import ByteCount, Progress, bytes_of
from cl_merge.merge_files.plan import Chosen, check_base, dtype_name, unmatched
from cl_merge.mergers.chunks import Reader, chunk_size, cut
from cl_merge.mergers.threshold import trim_threshold
from cl_merge.storage import Weights, open_weights
from cl_merge.task_vectors.selection import Selection

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
        missing: Tensors of the reference, the base or else the first file, that it lacks.
        extra: Tensors that the reference lacks.
        shapes: Tensors of another shape than the reference's, or that are integers in one of the
            two, and how.
        uneven: Tensors that either this file or the first one changes, but not the other.
        quantised: What shows that its weights are quantised; nothing if they are not.
        not_finite: Tensors that hold NaN or infinity; such values count as zeros in the figures.
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
    uneven: list[str] = field(default_factory=list)
    quantised: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    norm: float = math.nan
    relative: float = math.nan
    zeros: float = math.nan
    largest: float = math.nan
    layers: dict[str, float] = field(default_factory=dict)

    @property
    def fine(self) -> bool:
        """Whether nothing keeps this file from being merged with the others."""
        differs = self.missing or self.extra or self.shapes or self.uneven
        return not (differs or self.quantised or self.not_finite)


@dataclass
class Inspection:
    """What several files hold, and how they compare.

    Attributes:
        files: A report on each.
        base: The base, where there is one.
        base_not_finite: Its tensors that hold NaN or infinity, of those that are compared.
        are_changes: Whether the figures are of task vectors; else they are of weights.
        compared: Number of tensors that all files have alike, over which the figures run.
        cosines: Cosine of the angle between each two task vectors, ``[T][T]``.
        conflicts: Share of positions that tasks move in both directions, of those that any moves.
        top_conflicts: The same over the largest values of each task, as TIES trims them.
        density: Share of values that count as the largest.
    """

    files: list[FileReport]
    base: Path | None
    base_not_finite: list[str]
    are_changes: bool
    compared: int
    cosines: list[list[float]]
    conflicts: float
    top_conflicts: float
    density: float

    @property
    def fine(self) -> bool:
        """Whether the files could be merged: the same tensors everywhere, and all finite."""
        return not self.base_not_finite and all(file.fine for file in self.files)


def inspect_checkpoints(
    tasks: Sequence[str | Path],
    base: str | Path | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    density: float = 0.2,
    strip_prefix: str | None = None,
    progress: Progress | None = None,
    block_size: int = BLOCK,
) -> Inspection:
    """Look into checkpoints and task vectors before merging them.

    What does not match is reported, not refused; figures are over the parameters that all files
    have alike. Buffers, such as batch-norm statistics, and what is not chosen do not count.

    Args:
        tasks: Fine-tuned weights or task vectors, of any kind that `merge_checkpoints` reads.
        base: The weights before fine-tuning; without it, weights are looked at as they are.
        include: Patterns of the parameters to look at; empty for all.
        exclude: Patterns of parameters not to look at.
        density: Share of each task vector that counts as its largest values.
        strip_prefix: What to take off names, as for `merge_checkpoints`.
        progress: Given the number of bytes to be read; returns what is told of bytes that were.
        block_size: Elements that a thread works on at a time.

    Returns:
        What was found.

    Raises:
        InputError: If there is no file, one is missing or damaged, the base is a task vector, a
            task vector has no place in a base that grew, or the density is outside (0, 1].
    """
    check_several(tasks=tasks)
    if not tasks:
        raise InputError("nothing to inspect; give at least one checkpoint or task vector")
    if not 0 < density <= 1:
        raise InputError(f"the density must be above 0 and at most 1, not {density}")
    with ExitStack() as stack:
        opened = [stack.enter_context(open_weights(path)) for path in tasks]
        before = stack.enter_context(open_weights(base)) if base is not None else None
        if before is not None:
            check_base(before)
        if strip_prefix is not None:
            take_off(strip_prefix, before, opened)
        opened = opened if before is None else grown_vectors(opened, before)
        every = opened if before is None else [before, *opened]
        chosen = Chosen(Selection(include, exclude), every)
        return _Look(opened, before, chosen, density, progress).run(block_size)


class _Look:
    """One inspection under way."""

    def __init__(
        self,
        tasks: list[Weights],
        base: Weights | None,
        chosen: Chosen,
        density: float,
        progress: Progress | None,
    ) -> None:
        self._tasks, self._chosen = tasks, chosen
        self._base = base
        self._density = density
        self._shapes = self._common()
        self._broken: list[set[str]] = [set() for _ in tasks]
        self._broken_base: set[str] = set()
        # Each task for its threshold and for the figures, the base for the figures.
        read = [*tasks, *tasks, *([base] if base is not None else [])]
        self._count = ByteCount(progress, sum(bytes_of(w, self._shapes) for w in read))

    def run(self, block_size: int) -> Inspection:
        """Read everything twice: for the thresholds, and for the figures."""
        tasks, base = self._tasks, self._base
        readers = [Reader(self._shapes, partial(self._vector, t), _CPU) for t in range(len(tasks))]
        thresholds = torch.tensor([trim_threshold(reader, self._density) for reader in readers])
        blocks = list(cut(self._shapes, "element", block_size))
        found = in_threads(lambda block: self._figures(*block, thresholds), blocks)
        total, squares = _Figures(len(tasks)), dict[str, Tensor]()
        for (name, _), figures in zip(blocks, found, strict=True):
            total.add(figures)
            squares[name] = squares.get(name, 0) + figures.gram.diagonal()
        norms = total.gram.diagonal().sqrt()
        reports = [self._compared(task) for task in tasks]
        for task, report in enumerate(reports):
            report.not_finite = [n for n in self._shapes if n in self._broken[task]]
            report.layers = {name: float(sums[task].sqrt()) for name, sums in squares.items()}
            if report.layers:
                size = sum(shape.numel() for shape in self._shapes.values())
                report.norm = float(norms[task])
                report.zeros = _share(int(total.zeros[task]), size)
                report.largest = float(total.largest[task])
            if total.base_squares:
                report.relative = report.norm / math.sqrt(total.base_squares)
        moved, conflicts, top_moved, top_conflicts = total.counts.tolist()
        return Inspection(
            files=reports,
            base=base.path if base is not None else None,
            base_not_finite=[name for name in self._shapes if name in self._broken_base],
            are_changes=base is not None or all(task.is_task_vector for task in tasks),
            compared=len(self._shapes),
            cosines=(total.gram / (norms[:, None] * norms[None, :])).tolist(),
            conflicts=_share(conflicts, moved),
            top_conflicts=_share(top_conflicts, top_moved),
            density=self._density,
        )

    def _common(self) -> dict[str, torch.Size]:
        """What all files have alike, in the order of the first."""
        first, weights = self._tasks[0], [*self._tasks, *([self._base] if self._base else [])]
        names = set.intersection(*(set(self._chosen.of(each)) for each in weights))
        return {
            name: first.shape(name)
            for name in first.names
            if name in names and len({each.shape(name) for each in weights}) == 1
        }

    def _compared(self, task: Weights) -> FileReport:
        """Compare names, shapes and dtypes with the base's, or with the first file's."""
        base, reference = self._base, self._base or self._tasks[0]
        theirs, ours = self._chosen.of_either(task, reference)
        missing, extra = unmatched(task, theirs, reference, ours)
        if task.is_task_vector and base is not None:
            missing = []  # it holds what trained, which may be a part of the base
        uneven = set(self._chosen.of(task)) ^ set(self._chosen.of(self._tasks[0]))
        held = set(ours)
        both = [name for name in theirs if name in held]
        return FileReport(
            path=task.path,
            kind=task.kind,
            tensors=len(task.names),
            parameters=sum(task.shape(name).numel() for name in parameters(task)),
            dtypes=sorted({dtype_name(task, name) for name in task.names}),
            missing=missing,
            extra=extra,
            shapes=[text for name in both if (text := _unlike(task, reference, name))],
            uneven=sorted(uneven - set(missing) - set(extra)) if base else [],
            quantised=[sign] if (sign := quantised(task)) else [],
        )

    def _vector(self, task: int, name: str, part: slice) -> Tensor:
        """Read a stretch of a task vector, float32 [n], with zeros for NaN and infinity."""
        weights = self._tasks[task]
        raw = weights.read(name, part.start, part.stop)
        self._count.took(raw)
        if weights.is_task_vector or self._base is None:
            vector = raw.to(torch.float32)
            if is_finite(vector):
                return vector
            self._broken[task].add(name)
        else:
            base = self._base.read(name, part.start, part.stop)
            vector = torch.empty(raw.numel(), dtype=torch.float32)
            if subtract(raw, base, vector):
                return vector
            # A broken base is reported where its own values are read.
            if is_finite(base.float()) or not is_finite(raw.float()):
                self._broken[task].add(name)
        return vector.nan_to_num(0.0, 0.0, 0.0)

    def _figures(self, name: str, block: slice, thresholds: Tensor) -> _Figures:
        found = _Figures(len(self._tasks))
        # The tasks' chunks together shall stay in a core's cache.
        size = max(chunk_size(_CPU) // (2 * len(self._tasks)), 1 << 12)
        for _, part in cut({name: self._shapes[name]}, "element", size, block):
            vectors = [self._vector(task, name, part) for task in range(len(self._tasks))]
            found.take(torch.stack(vectors), thresholds)
            if self._base is not None:
                base = self._base.read(name, part.start, part.stop)
                self._count.took(base)
                if not is_finite(base.float()):
                    self._broken_base.add(name)
                wide = base.to(torch.float64).nan_to_num_(0.0, 0.0, 0.0)
                found.base_squares += float(wide.square_().sum())
        return found


class _Figures:
    """Sums over values, which add up over stretches."""

    def __init__(self, tasks: int) -> None:
        self.gram = torch.zeros(tasks, tasks, dtype=torch.float64)
        self.base_squares = 0.0
        self.zeros = torch.zeros(tasks, dtype=torch.int64)
        self.largest = torch.zeros(tasks)
        # Positions that tasks move, and those in conflict; the same of their largest values.
        self.counts = torch.zeros(4, dtype=torch.int64)

    def take(self, vectors: Tensor, thresholds: Tensor) -> None:
        """Take up a stretch of all task vectors, float32 [T, n], n > 0; they are changed."""
        wide = vectors.to(torch.float64)
        self.gram += wide @ wide.T
        self.zeros += vectors.shape[1] - vectors.count_nonzero(dim=1)
        magnitudes = vectors.abs()
        self.largest = torch.maximum(self.largest, magnitudes.amax(dim=1))
        of_all = _both_signs(vectors)
        vectors.masked_fill_(magnitudes < thresholds[:, None], 0)
        self.counts += torch.tensor(of_all + _both_signs(vectors))

    def add(self, other: _Figures) -> None:
        self.gram += other.gram
        self.base_squares += other.base_squares
        self.zeros += other.zeros
        self.largest = torch.maximum(self.largest, other.largest)
        self.counts += other.counts


def _both_signs(vectors: Tensor) -> list[int]:
    """Count the positions that any task moves, and those that tasks move in both directions."""
    positive, negative = vectors.amax(dim=0) > 0, vectors.amin(dim=0) < 0
    return [int(each.count_nonzero()) for each in (positive | negative, positive & negative)]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _unlike(task: Weights, reference: Weights, name: str) -> str:
    """Say how a tensor differs in shape or dtype; nothing if it does not."""
    if task.shape(name) != reference.shape(name):
        return f"{name} {tuple(task.shape(name))} instead of {tuple(reference.shape(name))}"
    mine, other = task.dtype(name), reference.dtype(name)
    if mine == other or (mine.is_floating_point and other.is_floating_point):
        return ""
    return f"{name} {dtype_name(task, name)} instead of {dtype_name(reference, name)}"
