"""How parameters are cut into pieces that a rule can work on, and how a whole vector is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor

from cl_merge.kernels.parallel import in_threads

Unit = Literal["element", "row", "parameter"]
"""What a rule must see whole: nothing, the rows of a matrix, or a parameter."""

Result = TypeVar("Result")

# Elements per chunk. On a CPU a chunk and the temporaries of a rule shall stay in the caches;
# other devices want few launches. Results do not depend on it.
CPU_CHUNK = 1 << 20
DEVICE_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk of a task vector comes from.

    Attributes:
        name: Name of the parameter.
        shape: Shape of the whole parameter.
        start: Index of the chunk's first element in the flattened parameter.
        task: Index of the task, from 0.
        survey: What `Merger.survey` returned for this task.
        importance: How much each element matters, float32 [n], for mergers that are ``weighted``.
    """

    name: str
    shape: torch.Size
    start: int
    task: int
    survey: Any = None
    importance: Tensor | None = None


@dataclass(frozen=True, slots=True)
class End:
    """Where a chunk of the result belongs, after the last task.

    Attributes:
        name: Name of the parameter.
        shape: Shape of the whole parameter.
        start: Index of the chunk's first element in the flattened parameter.
        tasks: Number of tasks folded.
        tally: Sum of what `Merger.tally` returned for all chunks.
    """

    name: str
    shape: torch.Size
    start: int
    tasks: int
    tally: int = 0


@dataclass(frozen=True)
class Reader:
    """Reads one whole task vector in chunks, on several threads.

    Attributes:
        shapes: Shapes of the parameters by name.
        read: Reads a stretch of a flattened parameter, float32 [n], which need only be valid until
            the thread's next call.
        device: Where the values are.
    """

    shapes: Mapping[str, torch.Size]
    read: Callable[[str, slice], Tensor]
    device: torch.device

    @classmethod
    def of(cls, vector: Mapping[str, Tensor], device: torch.device | None = None) -> Self:
        """Read tensors in memory.

        Args:
            vector: Floating-point tensors of any shape and dtype, by parameter name.
            device: Where the chunks shall be; None takes the device of the first tensor.

        Returns:
            A reader.
        """
        device = device or next((tensor.device for tensor in vector.values()), torch.device("cpu"))
        flat = {name: tensor.detach().reshape(-1) for name, tensor in vector.items()}
        shapes = {name: tensor.shape for name, tensor in vector.items()}
        return cls(shapes, lambda n, part: flat[n][part].to(device, torch.float32), device)

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(shape.numel() for shape in self.shapes.values())

    def only(self, name: str) -> Reader:
        """Read one parameter.

        Args:
            name: Its name.

        Returns:
            A reader of nothing else.
        """
        return Reader({name: self.shapes[name]}, self.read, self.device)

    def map(self, function: Callable[[Tensor], Result]) -> list[Result]:
        """Apply a function to every chunk.

        Args:
            function: Maps a chunk, float32 [n], which it must not change or keep, to what is
                wanted.

        Returns:
            The results in the order of parameters and chunks.
        """
        pieces = list(cut(self.shapes, "element", chunk_size(self.device)))
        return over(lambda piece: function(self.read(*piece)), pieces, self.device)

    def sample(self, count: int, run: int = 256) -> Tensor:
        """Read a part of the values, evenly spread.

        Args:
            count: About how many.
            run: Up to how many neighbours to read at a time.

        Returns:
            Values, float32 [n].
        """
        share = min(1.0, count / max(self.size, 1))
        parts = []
        for name, shape in self.shapes.items():
            size = shape.numel()
            wanted = min(size, math.ceil(size * share))
            runs = max(1, math.ceil(wanted / run))
            length = wanted // runs
            for i in range(runs):
                start = i * (size - length) // max(runs - 1, 1)
                parts.append(self.read(name, slice(start, start + length)).clone())
        return torch.cat(parts) if parts else torch.empty(0, device=self.device)


def chunk_size(device: torch.device) -> int:
    """Number of elements of a chunk.

    Args:
        device: Where the values are.

    Returns:
        Few on a CPU, many elsewhere.
    """
    return CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK


def cut(shapes: Mapping[str, torch.Size], unit: Unit, size: int) -> Iterator[tuple[str, slice]]:
    """Cut parameters into chunks.

    Args:
        shapes: Shapes of the parameters by name.
        unit: What no cut may go through.
        size: Elements of a chunk, more where a unit has more.

    Yields:
        Name and stretch of the flattened parameter; none for empty parameters.
    """
    for name, shape in shapes.items():
        for stretch in stretches(shape, unit, size):
            yield name, stretch


def stretches(
    shape: torch.Size, unit: Unit, size: int, within: slice | None = None
) -> Iterator[slice]:
    """Cut one parameter into stretches.

    Args:
        shape: Its shape.
        unit: What no cut may go through.
        size: Elements of a stretch, more where a unit has more.
        within: Cut this stretch only, which begins and ends where units do.

    Yields:
        Stretches of the flattened parameter.
    """
    numel = shape.numel()
    step = size
    if unit == "parameter" or (unit == "row" and len(shape) < 2):
        step = max(numel, 1)
    elif unit == "row":
        row = max(numel // max(shape[0], 1), 1)
        step = max(size // row, 1) * row
    whole = within or slice(0, numel)
    for start in range(whole.start, whole.stop, step):
        yield slice(start, min(start + step, whole.stop))


def over(
    function: Callable[[tuple[str, slice]], Result],
    pieces: list[tuple[str, slice]],
    device: torch.device,
) -> list[Result]:
    """Apply a function to every chunk: in threads on a CPU, one after another elsewhere.

    Args:
        function: Called with name and stretch.
        pieces: What `cut` made.
        device: Where the values are.

    Returns:
        The results in order.
    """
    if device.type == "cpu":
        return in_threads(function, pieces)
    return [function(piece) for piece in pieces]
