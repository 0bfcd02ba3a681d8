"""How parameters are cut into chunks that a rule can work on, and how a task vector is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor

from cl_merge.kernels import Chunk, values_of
from cl_merge.kernels.finite import is_finite, not_finite
from cl_merge.kernels.parallel import in_threads
from cl_merge.task_vectors.shards import Shards

Unit = Literal["element", "row", "parameter"]
"""What a rule must see at once: single elements, whole rows of matrices, or whole parameters."""

Accumulators = dict[str, Tensor]
"""What a rule keeps for a stretch of elements: tensors [n] of equal length, by name."""

Piece = tuple[str, slice]
"""A parameter, by name, and a stretch of it, flattened."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ChunkInfo:
    """Where a chunk of a task vector comes from.

    Attributes:
        name: Name of the parameter.
        shape: Shape of the whole parameter.
        start: Index of the chunk's first element in the flattened parameter.
        task: Index of the task, from 0.
        prepared: What `Merger.prepare` returned for this task.
        importance: How much each element matters, float32 [n], for mergers that are ``weighted``.
    """

    name: str
    shape: torch.Size
    start: int
    task: int
    prepared: Any = None
    importance: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ResultInfo:
    """Where a chunk of the result belongs, after the last task.

    Attributes:
        name: Name of the parameter.
        shape: Shape of the whole parameter.
        start: Index of the chunk's first element in the flattened parameter.
        tasks: Number of tasks folded.
        global_count: Sum of what `Merger.global_count` returned for all chunks.
    """

    name: str
    shape: torch.Size
    start: int
    tasks: int
    global_count: int = 0


@dataclass(frozen=True)
class Reader:
    """Reads one task vector in chunks, on several threads.

    Attributes:
        shapes: Shapes of the parameters by name.
        chunk: Reads a stretch of a flattened parameter, float32 [n] or a difference of weights; it
            need only be valid until the thread's next call.
        device: Where the values are.
        chunk_size: Elements of a chunk; None for what suits the device.
        importance: Reads a stretch of how much each element matters, float32 [n]; or of a Gram
            matrix, None if there is none.
        shards: Which stretches this process has, if others have the rest: `map` and `sample` then
            give what all processes find, and must be called on all alike.
        task: Index of the task, from 0.
    """

    shapes: Mapping[str, torch.Size]
    chunk: Callable[[str, slice], Chunk]
    device: torch.device
    chunk_size: int | None = None
    importance: Callable[[str, slice], Tensor | None] | None = None
    shards: Shards | None = None
    task: int = 0

    @classmethod
    def of(
        cls,
        vector: Mapping[str, Tensor],
        device: torch.device | None = None,
        chunk_size: int | None = None,
        importance: Mapping[str, Tensor] | None = None,
        shards: Shards | None = None,
        task: int = 0,
    ) -> Self:
        """Read tensors in memory.

        Args:
            vector: Floating-point tensors of any shape and dtype, by parameter name.
            device: Where the chunks shall be; None takes the device of the first tensor.
            chunk_size: As of the reader.
            importance: How much each element matters, of the same names and shapes.
            shards: Which stretches of whole parameters the tensors are, if they are no more.
            task: As of the reader.
        """
        device = device or next((tensor.device for tensor in vector.values()), torch.device("cpu"))
        whole = {} if shards is None else shards.shapes
        shapes = {name: whole.get(name, tensor.shape) for name, tensor in vector.items()}
        weights = None
        if importance is not None:
            known = {name: tensor for name, tensor in importance.items() if name in vector}
            of_known = _stretches_of(known, device, shards)

            def weights(name: str, part: slice) -> Tensor | None:
                return of_known(name, part) if name in known else None

        values = _stretches_of(vector, device, shards)
        return cls(shapes, values, device, chunk_size, weights, shards, task)

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(shape.numel() for shape in self.shapes.values())

    def only(self, name: str) -> Reader:
        """Read nothing but the parameter of this name."""
        return replace(self, shapes={name: self.shapes[name]}, importance=None)

    def read(self, name: str, part: slice) -> Tensor:
        """Read a stretch of a flattened parameter.

        Args:
            name: Name of the parameter.
            part: First element, and the one after the last.

        Returns:
            float32 [n]; must not be changed, and is valid until the thread's next call.
        """
        return values_of(self.chunk(name, part))

    def pieces(self, unit: Unit = "element") -> list[Piece]:
        """The chunks that `map` reads: name and stretch of the flattened parameter."""
        return list(cut(self.shapes, unit, self.chunk_size or chunk_size(self.device), self.shards))

    def map(self, function: Callable[[Tensor], Result], unit: Unit = "element") -> list[Result]:
        """Apply a function to every chunk.

        Args:
            function: Maps a chunk, float32 [n], which it must not change or keep, to a result.
            unit: What no cut may go through.

        Returns:
            The results in the order of parameters and chunks, or of processes where parameters
            are sharded.
        """
        return self.map_chunks(lambda chunk: function(values_of(chunk)), unit)

    def map_chunks(
        self, function: Callable[[Chunk], Result], unit: Unit = "element"
    ) -> list[Result]:
        """Do as `map` with a function that takes differences of weights too."""
        found = over(lambda piece: function(self.chunk(*piece)), self.pieces(unit), self.device)
        return found if self.shards is None else self.shards.everywhere(found)

    def sample(self, count: int, run: int = 256) -> Tensor:
        """Read about `count` values, evenly spread, in runs of up to `run`: float32 [n]."""
        share = min(1.0, count / max(self.size, 1))
        parts = []
        for name, shape in self.shapes.items():
            area = span_of(name, shape, self.shards)
            size = area.stop - area.start
            wanted = math.ceil(size * share)
            runs = max(1, math.ceil(wanted / run))
            length = wanted // runs
            for i in range(runs):
                start = area.start + i * (size - length) // max(runs - 1, 1)
                parts.append(self.read(name, slice(start, start + length)).clone())
        if self.shards is not None:
            parts = self.shards.everywhere(parts)
        return torch.cat(parts) if parts else torch.empty(0, device=self.device)


def chunk_size(device: torch.device) -> int:
    """Number of elements of a chunk, if nobody chooses another one; no result depends on it."""
    # On a CPU a chunk and the temporaries of a rule shall stay in the caches; other devices want
    # few launches.
    return 1 << 20 if device.type == "cpu" else 1 << 24


def cut(
    shapes: Mapping[str, torch.Size],
    unit: Unit,
    size: int,
    within: Shards | slice | None = None,
) -> Iterator[Piece]:
    """Cut parameters, or the stretch `within` of them, which begins and ends where units do.

    Into chunks of `size` elements, or more where a unit has more; none of empty parameters.
    """
    for name, shape in shapes.items():
        numel, step = shape.numel(), size
        if unit == "parameter" or (unit == "row" and len(shape) < 2):
            step = max(numel, 1)
        elif unit == "row":
            row = max(numel // max(shape[0], 1), 1)
            step = max(size // row, 1) * row
        area = within if isinstance(within, slice) else span_of(name, shape, within)
        for start in range(area.start, area.stop, step):
            yield name, slice(start, min(start + step, area.stop))


def span_of(name: str, shape: torch.Size, shards: Shards | None) -> slice:
    """The stretch of a flattened parameter that this process has: all, or that of its shard."""
    return slice(0, shape.numel()) if shards is None else shards.span(name)


def divide(total: Tensor, count: int, out: Tensor) -> None:
    """Write total / count to out; CUDA multiplies by the reciprocal of a plain number."""
    torch.div(total, torch.full_like(total[:1], count), out=out)


def over(
    function: Callable[[Piece], Result], pieces: list[Piece], device: torch.device
) -> list[Result]:
    """Apply a function to every chunk: in threads on a CPU, one after another elsewhere."""
    if device.type == "cpu":
        return in_threads(function, pieces)
    return [function(piece) for piece in pieces]


def check_finite(vector: Mapping[str, Tensor], what: str, size: int | None) -> None:
    """Refuse what is not finite in float32; in chunks, as everything is read."""
    reader = Reader.of(vector, chunk_size=size)
    finite = zip(reader.pieces(), reader.map(is_finite), strict=True)
    broken = {name for (name, _), fine in finite if not fine}
    if broken:
        raise not_finite(what, [name for name in vector if name in broken])


def _stretches_of(
    tensors: Mapping[str, Tensor], device: torch.device, shards: Shards | None
) -> Callable[[str, slice], Tensor]:
    flat = {name: tensor.detach().reshape(-1) for name, tensor in tensors.items()}
    first = {name: 0 if shards is None else shards.span(name).start for name in flat}

    def read(name: str, part: slice) -> Tensor:
        here = slice(part.start - first[name], part.stop - first[name])
        return flat[name][here].to(device, torch.float32)

    return read
