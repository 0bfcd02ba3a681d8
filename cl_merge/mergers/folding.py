"""What a rule is, and the one way in which it is run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from cl_merge.mergers.chunks import (
    Accumulators,
    ChunkInfo,
    Reader,
    ResultInfo,
    Unit,
    chunk_size,
    cut,
    over,
)

_CPU = torch.device("cpu")
_GROUP = 1 << 22  # elements

Fold = TypeVar("Fold", bound=Callable[..., None])


class Rule(ABC):
    """What a merger adds to the bookkeeping of `Merger`, which tells what these mean."""

    name: ClassVar[str]
    published_scale: ClassVar[float]
    accumulators: ClassVar[Mapping[str, torch.dtype]] = {}
    unit: ClassVar[Unit] = "element"
    weighted: ClassVar[bool] = False
    chunk_size: int | None = None

    def new_accumulators(self, task: int) -> Mapping[str, torch.dtype]:
        """Tell what to add to the accumulators before a task is folded.

        Args:
            task: Index of the task, from 0.

        Returns:
            Dtypes by name: ``accumulators`` before the first task, nothing later.
        """
        return self.accumulators if task == 0 else {}

    def prepare(self, vector: Reader) -> Any:
        """Look at one whole task vector before its chunks are folded.

        Args:
            vector: Reads the task vector in chunks.

        Returns:
            What `fold` shall find in ``info.prepared``.
        """
        return None

    @abstractmethod
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        """Take up one chunk of one task vector, in place.

        Args:
            state: This stretch of the accumulators, each [n].
            chunk: The values of the task vector, float32 [n]; must not be changed or kept.
            info: Which task and which stretch this is.
        """

    def global_count(self, state: Accumulators) -> tuple[int, bool]:
        """Count something over all accumulators, after the last task and before the first result.

        Args:
            state: A stretch of the accumulators, each [n].

        Returns:
            A number, of which `compute` is given the sum over all stretches, and whether the result
            of this stretch depends on that sum.
        """
        return 0, False

    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        """Read the merged values off the accumulators, which stay as they are.

        Without a `compute` of its own, what a rule merges is its first accumulator.

        Args:
            state: A stretch of the accumulators, each [n].
            out: Where the merged values go, float32 [n].
            info: Which stretch this is, after how many tasks.
        """
        out.copy_(next(iter(state.values())))


def takes_differences(fold: Fold) -> Fold:
    """Mark a `Merger.fold` that only hands its chunk to folds of `cl_merge.kernels`.

    Those take up fine-tuned weights and their base in one pass, without a task vector in between.
    The mark is the function's own: who overrides `fold` is given tensors again.
    """
    fold.takes_differences = True  # type: ignore[attr-defined]
    return fold


class Folding:
    """The accumulators of a rule over some stretches of parameters.

    A merger has one over all parameters, into which it folds a task at a time. A merge of files has
    one for each chunk, into which it folds all tasks. Both give the same bits.

    Args:
        shapes: Shapes of the parameters by name.
        device: Where the accumulators are.
        within: Only this stretch of each flattened parameter; None for all of it.

    Attributes:
        tasks: Number of task vectors folded so far.
        accumulators: By parameter; of its shape, or [n] for a stretch of it.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        device: torch.device = _CPU,
        within: slice | None = None,
    ) -> None:
        self.shapes = dict(shapes)
        self.device = device
        self.tasks = 0
        self.accumulators: dict[str, Accumulators] = {name: {} for name in shapes}
        self._within = within

    def fold(self, rule: Rule, vector: Reader, prepared: Any) -> None:
        """Take up one task vector, of which `rule.prepare` returned `prepared`."""
        for name, made in self.accumulators.items():
            for key, dtype in rule.new_accumulators(self.tasks).items():
                made[key] = self._zeros(name, dtype)
        compiled = hasattr(type(rule).fold, "takes_differences")
        read = vector.chunk if compiled else vector.read

        def fold(piece: tuple[str, slice]) -> None:
            name, part = piece
            chunk = read(name, part)
            weight = vector.importance(name, part) if vector.importance is not None else None
            shape = self.shapes[name]
            info = ChunkInfo(name, shape, part.start, self.tasks, prepared, weight)
            rule.fold(self._state(name, part), chunk, info)  # type: ignore[arg-type]
            vector.check(chunk)

        over(fold, self._pieces(rule, self.shapes), self.device)
        self.tasks += 1

    def global_count(self, rule: Rule) -> tuple[int, bool]:
        """Count over all accumulators, and tell whether the result depends on the global count."""
        pieces = self._pieces(rule, self.shapes)
        counted = over(lambda p: rule.global_count(self._state(*p)), pieces, self.device)
        return sum(number for number, _ in counted), any(depends for _, depends in counted)

    def results(self, rule: Rule, global_count: int) -> Iterator[tuple[str, Tensor]]:
        """Compute the merged values, float32 of the accumulators' shape, a parameter at a time."""
        for shapes in self._groups():
            merged = {name: self._zeros(name, torch.float32) for name in shapes}

            def compute(piece: tuple[str, slice], merged: dict[str, Tensor] = merged) -> None:
                name, part = piece
                info = ResultInfo(name, self.shapes[name], part.start, self.tasks, global_count)
                out = merged[name].view(-1)[self._local(part)]
                rule.compute(self._state(name, part), out, info)

            over(compute, self._pieces(rule, shapes), self.device)
            yield from merged.items()

    def nbytes(self) -> int:
        """Bytes of all accumulators."""
        return sum(t.nbytes for made in self.accumulators.values() for t in made.values())

    def _groups(self) -> Iterator[dict[str, torch.Size]]:
        """Parameters to compute together: enough for all threads, few beside the accumulators."""
        group: dict[str, torch.Size] = {}
        size = 0
        for name, shape in self.shapes.items():
            group[name] = shape
            size += shape.numel()
            if size >= _GROUP:
                yield group
                group, size = {}, 0
        if group:
            yield group

    def _pieces(self, rule: Rule, shapes: Mapping[str, torch.Size]) -> list[tuple[str, slice]]:
        size = rule.chunk_size or chunk_size(self.device)
        return list(cut(shapes, rule.unit, size, self._within))

    def _state(self, name: str, part: slice) -> Accumulators:
        local = self._local(part)
        return {key: tensor.view(-1)[local] for key, tensor in self.accumulators[name].items()}

    def _local(self, part: slice) -> slice:
        first = self._within.start if self._within is not None else 0
        return slice(part.start - first, part.stop - first)

    def _zeros(self, name: str, dtype: torch.dtype) -> Tensor:
        within, shape = self._within, self.shapes[name]
        shape = shape if within is None else torch.Size([within.stop - within.start])
        # Tensors made in inference mode cannot be changed outside it, but a merger is used in both.
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=dtype, device=self.device)
