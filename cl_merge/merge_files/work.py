"""One merge of files under way: a stretch of a parameter at a time, over all tasks."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from cl_merge.kernels import wide
from cl_merge.kernels.finite import rounded
from cl_merge.kernels.parallel import in_threads
from cl_merge.merge_files.grown import GrownVector
from cl_merge.merge_files.inputs import Inputs
from cl_merge.merge_files.plan import Plan
from cl_merge.mergers import Merger
from cl_merge.mergers.base import fold_chunk
from cl_merge.mergers.chunks import Accumulators, Piece, ResultInfo, Unit, chunk_size, cut
from cl_merge.task_vectors.scales import Scales
from cl_merge.task_vectors.task_vector import moved

_CPU = torch.device("cpu")
_HELD_BYTES = 16  # for each element of a block: what waits for a global count


class Sink(Protocol):
    """What takes the result: a `Writer`, or what makes something else of it first."""

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Take a stretch of one tensor, from any thread and in any order."""


class Work:
    """One merge under way."""

    def __init__(
        self,
        plan: Plan,
        merger: Merger,
        scales: Scales,
        inputs: Inputs,
        block_size: int,
        buffers: str,
    ) -> None:
        self._plan = plan
        self._merger = merger
        self._scales = scales
        self._block_size = block_size
        self._buffers = buffers
        self.inputs = inputs
        self._prepared: list[Any] = []  # by task
        self._counts: list[int] = []
        self._waiting: list[tuple[Piece, Accumulators | None]] = []
        self._lock = threading.Lock()
        self._held = 0

    def run(self, writer: Sink) -> None:
        """Read everything, and write every tensor of the output."""
        merged, copied = self._plan.merged, self._plan.copied
        readers = [self.inputs.reader(task) for task in range(len(self._plan.tasks))]
        if len(readers) < torch.get_num_threads():  # which share each task, then
            self._prepared = [self._merger.prepare(reader) for reader in readers]
        else:
            self._prepared = in_threads(self._merger.prepare, readers)
        # A thread takes a block at a time: whole parameters where the rule needs them.
        unit: Unit = "element" if self._merger.unit == "element" else "parameter"
        in_threads(lambda block: self._merge_block(writer, *block), self._blocks(merged, unit))
        total = sum(self._counts)
        # The stretches whose result depends on all others, now that it is known.
        in_threads(lambda waiting: self._finish(writer, *waiting, total), self._waiting)

        def write(block: Piece, values: Tensor) -> None:
            writer.write(block[0], block[1].start, self._converted(block[0], values))

        copy, choose = self.inputs.copied, partial(self.inputs.buffer, choice=self._buffers)
        in_threads(lambda block: write(block, copy(*block)), self._blocks(copied, "element"))
        buffers = self._blocks(self._plan.buffers, "element")
        in_threads(lambda block: write(block, choose(*block)), buffers)
        tied = [name for names in self._plan.twins.values() for name in names]
        in_threads(lambda block: copy(*block), self._blocks(tied, "element"))
        self.inputs.differing.difference_update(tied)
        for index, name, shape in self.inputs.rest():  # which only the hashes know
            for _, part in cut({name: shape}, "element", self._block_size):
                self.inputs.read(index, name, part, hashed=True)

    def _blocks(self, names: list[str], unit: Unit) -> list[Piece]:
        shapes = {name: self._plan.base.shape(name) for name in names}
        return list(cut(shapes, unit, self._block_size))

    def _merge_block(self, writer: Sink, name: str, block: slice) -> None:
        shapes = {name: self._plan.base.shape(name)}
        # A rule that adds accumulators with every task has a chunk of each at once.
        at_once = len(self._plan.tasks) if self._merger.new_accumulators(1) else 1
        size = self._merger.chunk_size or max(chunk_size(_CPU) // at_once, 1 << 14)
        for piece in cut(shapes, self._merger.unit, size, block):
            base = self.inputs.read(0, *piece, hashed=True)
            state = self._fold(piece, base, hashed=True)
            number, depends = self._merger.global_count(state)
            self._counts.append(number)
            if depends:
                self._waiting.append((piece, state if self._has_room(state) else None))
            else:
                self._write(writer, piece, base, state, 0)

    def _fold(self, piece: Piece, base: Tensor, *, hashed: bool) -> Accumulators:
        state: Accumulators = {}
        rule, shape = self._merger, self._plan.base.shape(piece[0])
        for task, prepared in enumerate(self._prepared):
            state |= new_state(rule, task, shape, len(base))
            grown = self._plan.tasks[task]
            if isinstance(grown, GrownVector) and piece[0] not in grown.vector.names:
                rule.fold_absent(state, prepared)  # it came after this task
                continue
            vector = self.inputs.reader(task, base, hashed=hashed)
            fold_chunk(rule, state, vector, piece, task, prepared)
        return state

    def _has_room(self, state: Accumulators) -> bool:
        """Whether it may be held in memory until all is counted; else it is made once more."""
        size = sum(tensor.nbytes for tensor in state.values())
        with self._lock:
            fits = self._held + size <= _HELD_BYTES * self._block_size
            self._held += size if fits else 0
        return fits

    def _finish(self, writer: Sink, piece: Piece, state: Accumulators | None, total: int) -> None:
        name, part = piece
        base = self._plan.base.read(name, part.start, part.stop)
        self._write(writer, piece, base, state or self._fold(piece, base, hashed=False), total)

    def _write(
        self, writer: Sink, piece: Piece, base: Tensor, state: Accumulators, total: int
    ) -> None:
        name, part = piece
        merged = torch.zeros(base.shape)
        shape, tasks = self._plan.base.shape(name), len(self._plan.tasks)
        self._merger.compute(state, merged, ResultInfo(name, shape, part.start, tasks, total))
        # A sum in float32 or wider, rounded once.
        before = torch.zeros_like(base) if self._plan.no_base else base
        exact = moved(before, merged, self._scales.of(name), wide(base.dtype))
        result = rounded(exact, self._plan.written(name))
        if result is None:
            raise self.inputs.broken_result(name)
        for each in (name, *self._plan.twins.get(name, ())):
            writer.write(each, part.start, result)

    def _converted(self, name: str, values: Tensor) -> Tensor:
        """What is not merged, in the dtype in which it is written; NaN and infinity may stay."""
        dtype = self._plan.written(name)
        if values.dtype == dtype:
            return values
        exact = values.to(wide(values.dtype))
        if rounded(exact.where(exact.isfinite(), 0), dtype) is None:
            raise self.inputs.overflow(name)
        return values.to(dtype)


def new_state(rule: Merger, task: int, shape: torch.Size, size: int) -> Accumulators:
    """What a rule adds before a task to the accumulators of a stretch, on the CPU.

    The stretch has `size` elements of a parameter of this shape, all where the rule needs them.
    """
    whole = rule.unit == "parameter"
    kept = {
        key: (dtype, rule.accumulator_shape(key, shape).numel() if whole else size)
        for key, dtype in rule.new_accumulators(task).items()
    }
    with torch.inference_mode(False):
        return {key: torch.zeros(numel, dtype=dtype) for key, (dtype, numel) in kept.items()}
