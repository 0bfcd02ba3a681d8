"""What all mergers share: what a rule is, and the one way in which it is run."""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from cl_merge.errors import InputError, listing, task_name
from cl_merge.kernels.finite import is_finite, not_finite
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
from cl_merge.task_vectors.task_vector import TaskVector, check_floating, check_same_layout

__all__ = ["Accumulators", "ChunkInfo", "Merger", "Reader", "ResultInfo", "takes_differences"]

_CPU = torch.device("cpu")
_GROUP = 1 << 22  # elements

Fold = TypeVar("Fold", bound=Callable[..., None])


class Merger(ABC):
    """Reduces task vectors to one, a task at a time, in memory that does not grow with the tasks.

    A subclass is a rule: the accumulators that it keeps for every element, `fold`, which takes up a
    chunk of a task vector, and `compute`, which reads the merged values off the accumulators. These
    work on flat chunks and touch nothing else, on several threads at once, so that whoever holds
    the data may drive them: this class does it one task at a time over all parameters,
    `merge_checkpoints` one chunk at a time over all tasks. `prepare` and `global_count` are for
    rules that must look at a whole task vector, or at all accumulators, first.

    Attributes:
        name: Name of the method.
        published_scale: Scale at which its paper applies the merged task vector.
        accumulators: Dtypes of what is kept for every element, by name; all start at zero.
        unit: What a chunk never cuts through: ``"element"``, chunks are any stretches of flattened
            parameters; ``"row"``, whole rows of matrices; ``"parameter"``, whole parameters.
        weighted: Whether a task vector comes with the importance of each of its elements.
        chunk_size: Elements of a chunk; None for what suits the device. No result depends on it.

    Example:
        >>> class Largest(Merger):
        ...     name = "largest"
        ...     published_scale = 1.0
        ...     accumulators = {"merged": torch.float32}
        ...
        ...     def fold(self, state, chunk, info):
        ...         torch.maximum(state["merged"], chunk, out=state["merged"])
        ...
        ...     def compute(self, state, out, info):
        ...         out.copy_(state["merged"])
        >>> merger = Largest()
        >>> merger.update({"weight": torch.tensor([1.0, 2.0])})
        >>> merger.update({"weight": torch.tensor([3.0, -1.0])})
        >>> merger.merged()["weight"]
        tensor([3., 2.])
    """

    name: ClassVar[str]
    published_scale: ClassVar[float]
    accumulators: ClassVar[Mapping[str, torch.dtype]] = {}
    unit: ClassVar[Unit] = "element"
    weighted: ClassVar[bool] = False
    chunk_size: int | None = None

    def __init__(self) -> None:
        self._folding = Folding({})

    @property
    def tasks(self) -> int:
        """Number of task vectors folded so far."""
        return self._folding.tasks

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

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

    def update(
        self, vector: Mapping[str, Tensor], importance: Mapping[str, Tensor] | None = None
    ) -> None:
        """Fold one task vector.

        Args:
            vector: Floating-point tensors of any shape and dtype, by parameter name. The first task
                fixes names and shapes, and the device on which the accumulators are kept.
            importance: How much each element matters, of the same names and shapes and not
                negative; needed by mergers that are `weighted`, and only by them.

        Raises:
            InputError: If names or shapes are not those of the first task, a value is not finite,
                or the importance is missing or not needed. Nothing has been folded then.
        """
        self._check(vector, importance)
        device = self._folding.device if self.tasks else None
        reader = Reader.of(vector, device, chunk_size=self.chunk_size, importance=importance)
        prepared = self.prepare(reader)
        if self.tasks == 0:
            self._folding = Folding(reader.shapes, reader.device)
        self._folding.fold(self, reader, prepared)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Make the merged values, a parameter at a time.

        Yields:
            Name and merged values, a new float32 tensor in the parameter's shape, in the order of
            the first task vector.

        Raises:
            InputError: If nothing was folded.
        """
        if self.tasks == 0:
            raise InputError(f"nothing to merge: '{self.name}' was given no task vector")
        global_count, _ = self._folding.global_count(self)
        yield from self._folding.results(self, global_count)

    def merged(self) -> TaskVector:
        """Merge what was folded so far; more can be folded afterwards.

        Returns:
            The merged task vector in float32. Its metadata tell method, options and number of
            tasks.

        Raises:
            InputError: If nothing was folded.
        """
        options = json.dumps(self.options)
        metadata = {"method": self.name, "options": options, "tasks": str(self.tasks)}
        return TaskVector(dict(self.items()), metadata)

    def state_dict(self) -> dict[str, Any]:
        """Hand out everything that is needed to go on, for `torch.save`.

        Returns:
            Plain values and tensors; the tensors are the live accumulators, not copies.
        """
        return {
            "method": self.name,
            "options": self.options,
            "tasks": self.tasks,
            "accumulators": self._folding.accumulators,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        """Go on from a state.

        Args:
            state: What `state_dict` returned; its tensors are copied.
            device: Where the accumulators shall be; None leaves them where they were saved.

        Raises:
            InputError: If it is the state of another method or of other options.
        """
        theirs, ours = (state["method"], state["options"]), (self.name, self.options)
        if theirs != ours:
            raise InputError(
                f"the saved state is of method '{theirs[0]}' with options {theirs[1]}, but this "
                f"merger is '{ours[0]}' with options {ours[1]}; make it with the saved ones"
            )
        with torch.inference_mode(False):
            accumulators = {
                name: {
                    key: tensor.detach().to(device or tensor.device, copy=True)
                    for key, tensor in saved.items()
                }
                for name, saved in state["accumulators"].items()
            }
        # All accumulators of a parameter have its shape, and all are on one device.
        firsts = {name: next(iter(made.values())) for name, made in accumulators.items()}
        on = next((first.device for first in firsts.values()), torch.device("cpu"))
        self._folding = Folding({name: first.shape for name, first in firsts.items()}, on)
        self._folding.accumulators, self._folding.tasks = accumulators, state["tasks"]

    def _check(self, vector: Mapping[str, Tensor], importance: Mapping[str, Tensor] | None) -> None:
        what = task_name(self.tasks)
        check_floating(vector, what)
        if self.tasks:
            shapes = self._folding.shapes.items()
            before = {name: torch.empty(shape, device="meta") for name, shape in shapes}
            check_same_layout(vector, before, what, "the tasks before")
        _check_finite(vector, what, self.chunk_size)
        if self.weighted != (importance is not None):
            raise InputError(
                f"{what}: '{self.name}' needs the importance of each element beside the task vector"
                if self.weighted
                else f"{what}: '{self.name}' takes no importance; leave it out"
            )
        if importance is not None:
            what = f"the importance of {what}"
            check_same_layout(importance, vector, what, "the task vector")
            _check_finite(importance, what, self.chunk_size)
            negative = [name for name, tensor in importance.items() if bool((tensor < 0).any())]
            if negative:
                raise InputError(f"{what} is negative in {listing(negative)}; expected 0 or more")


def takes_differences(fold: Fold) -> Fold:
    """Mark a `Merger.fold` that only hands its chunk to folds of `cl_merge.kernels`.

    Those take up fine-tuned weights and their base in one pass, without a task vector in between.
    The mark is the function's own: who overrides `fold` is given tensors again.
    """
    fold.takes_differences = True  # type: ignore[attr-defined]
    return fold


class Folding:
    """The accumulators of a rule over parameters, or over the stretch `within` of a flattened one.

    A merger has one over all parameters, into which it folds a task at a time. A merge of files has
    one for each chunk, into which it folds all tasks. Both give the same bits.
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
        # By parameter; of its shape, or [n] for a stretch of it.
        self.accumulators: dict[str, Accumulators] = {name: {} for name in shapes}
        self._within = within

    def fold(self, rule: Merger, vector: Reader, prepared: Any) -> None:
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

        over(fold, self._pieces(rule, self.shapes), self.device)
        self.tasks += 1

    def global_count(self, rule: Merger) -> tuple[int, bool]:
        """Count over all accumulators, and tell whether the result depends on the global count."""
        pieces = self._pieces(rule, self.shapes)
        counted = over(lambda p: rule.global_count(self._state(*p)), pieces, self.device)
        return sum(number for number, _ in counted), any(depends for _, depends in counted)

    def results(self, rule: Merger, global_count: int) -> Iterator[tuple[str, Tensor]]:
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

    def _pieces(self, rule: Merger, shapes: Mapping[str, torch.Size]) -> list[tuple[str, slice]]:
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


def _check_finite(vector: Mapping[str, Tensor], what: str, size: int | None) -> None:
    """Refuse what is not finite in float32; in chunks, as everything is read."""
    broken = set()
    for device in {tensor.device for tensor in vector.values()}:
        here = {name: tensor for name, tensor in vector.items() if tensor.device == device}
        reader = Reader.of(here, device, chunk_size=size)
        finite = zip(reader.pieces(), reader.map(is_finite), strict=True)
        broken |= {name for (name, _), fine in finite if not fine}
    if broken:
        raise not_finite(what, [name for name in vector if name in broken])
