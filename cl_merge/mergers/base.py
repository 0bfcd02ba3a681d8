"""What all mergers share: what a rule is, and the one way in which it is run."""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_merge.errors import InputError, task_name
from cl_merge.mergers.chunks import (
    Accumulators,
    ChunkInfo,
    Piece,
    Reader,
    Result,
    ResultInfo,
    Unit,
    check_finite,
    chunk_size,
    cut,
    over,
    span_of,
)
from cl_merge.mergers.importances import check_importances, check_values, needed_of
from cl_merge.task_vectors.growth import grown
from cl_merge.task_vectors.shards import Shards, together
from cl_merge.task_vectors.task_vector import TaskVector, check_floating, check_same_layout

__all__ = ["Accumulators", "ChunkInfo", "Merger", "Reader", "ResultInfo"]

_GROUP = 1 << 22  # elements


class Merger(ABC):
    """Reduces task vectors to one, a task at a time, in memory that does not grow with the tasks.

    A subclass is a rule: the accumulators that it keeps for every element, `fold`, which takes up a
    chunk of a task vector, and `compute`, which reads the merged values off the accumulators. These
    work on flat chunks and touch nothing else, on several threads at once: this class drives them
    one task at a time over all parameters, `merge_checkpoints` one chunk at a time over all tasks.
    `prepare` and `global_count` are for rules that must look at a whole task vector, or at all
    accumulators, first.

    Attributes:
        tasks: Number of task vectors folded so far.
        name: Name of the method.
        published_scale: Scale at which its paper applies the merged task vector.
        accumulators: Dtypes of what is kept for every element, by name; all start at zero.
        unit: What a chunk never cuts through: ``"element"``, chunks are any stretches of flattened
            parameters; ``"row"``, whole rows of matrices; ``"parameter"``, whole parameters.
        weighted: Whether a task vector comes with the importance of each of its elements.
        grams: Whether they are Gram matrices of inputs, [n, n] for some of the matrices [m, n].
        needs_base: Whether the rule is one for changes, and makes no sense for weights themselves.
        takes_differences: Whether this class's own `fold` only hands its chunk to the folds of
            ``cl_merge.kernels``, which subtract the base from weights on the way. A subclass with
            another `fold` is given tensors again.
        chunk_size: Elements of a chunk; None for what suits the device. No result depends on it.
        shards: Which stretches of the parameters this process has, if others have the rest. Task
            vectors, accumulators and results are stretches then, and every process does the same.

    Example:
        >>> class Largest(Merger):
        ...     name = "largest"
        ...     published_scale = 1.0
        ...     accumulators = {"merged": torch.float32}
        ...
        ...     def fold(self, state, chunk, info):
        ...         torch.maximum(state["merged"], chunk, out=state["merged"])
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
    grams: ClassVar[bool] = False
    needs_base: ClassVar[bool] = True
    takes_differences: ClassVar[bool] = False
    chunk_size: int | None = None
    shards: Shards | None = None

    def __init__(self) -> None:
        self.tasks = 0
        self._shapes: dict[str, torch.Size] = {}  # of whole parameters
        self._device = torch.device("cpu")
        self._state: dict[str, Accumulators] = {}  # by parameter, in its shape or [n]

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

    def accumulator_shape(self, key: str, shape: torch.Size) -> torch.Size:
        """Tell the shape in which an accumulator of a parameter is kept: here, the parameter's.

        With ``unit = "parameter"`` all but the first accumulator may have another, such as that of
        a Gram matrix. When the parameter grows, what was there must stay the leading block.
        """
        return shape

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

    def fold_absent(self, state: Accumulators, prepared: Any) -> None:
        """Take note of a task before the parameter joined, for which `prepare` returned this."""
        return

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
        """Read the merged values off the accumulators: here, those of the first one.

        Args:
            state: A stretch of the accumulators, each [n], which must stay as they are.
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
        together(self.shards, lambda: self._check(vector, importance))
        device = self._device if self.tasks else None
        size, shards = self.chunk_size, self.shards
        reader = Reader.of(vector, device, size, importance, shards, self.tasks)
        prepared = self.prepare(reader)
        if self.tasks == 0:
            self._shapes, self._device = dict(reader.shapes), reader.device
            self._state = {name: {} for name in reader.shapes}
        for name, state in self._state.items():
            state |= self._zeros(name, self.new_accumulators(self.tasks))

        def fold(piece: Piece) -> None:
            fold_chunk(self, self._stretch(*piece), reader, piece, self.tasks, prepared)

        self._over(fold, self._shapes)
        self.tasks += 1

    def grow(self, shapes: Mapping[str, torch.Size]) -> bool:
        """Take in parameters that joined, or got new entries, after the last task.

        The tasks before did not change what is new: it counts as 0 in their task vectors.

        Args:
            shapes: Shapes of all parameters by name; those known before may have grown in any
                dimension, and the former entries are the leading block.

        Returns:
            Whether something is new to tasks that were folded.

        Example:
            >>> from cl_merge import get_merger
            >>> merger = get_merger("magmax")
            >>> merger.update({"head": torch.tensor([1.0])})
            >>> merger.grow({"head": torch.Size([2])})
            True
            >>> merger.update({"head": torch.tensor([0.5, -0.5])})
            >>> merger.merged()["head"]
            tensor([ 1.0000, -0.5000])
        """
        new = {name: shape for name, shape in shapes.items() if self._shapes.get(name) != shape}
        if not self.tasks or not new:
            return False
        kept = next(iter(self._state.values()))
        dtypes = {key: tensor.dtype for key, tensor in kept.items()}
        self._shapes |= new
        for name, shape in new.items():
            before = self._state.get(name, {})
            self._state[name] = self._zeros(name, dtypes)
            for key, tensor in before.items():
                if tensor.numel():  # else it keeps nothing, in whatever shape
                    kept_in = self.accumulator_shape(key, shape)
                    self._state[name][key] = grown(tensor, None, kept_in)
        return True

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Make the merged values, a parameter at a time.

        Yields:
            Name and merged values, a new float32 tensor in the parameter's shape, or the stretch
            of this process, in the order of the first task vector.

        Raises:
            InputError: If nothing was folded.
        """
        if self.tasks == 0:
            raise InputError(f"nothing to merge: '{self.name}' was given no task vector")
        counted = self._over(lambda piece: self.global_count(self._stretch(*piece)), self._shapes)
        total = sum(number for number, _ in counted)
        if self.shards is not None:
            total = sum(self.shards.everywhere([total]))
        # As many parameters at a time as keep all threads busy: few beside the accumulators.
        ends = accumulate(shape.numel() for shape in self._shapes.values())
        for _, group in groupby(zip(self._shapes, ends, strict=True), lambda x: x[1] // _GROUP):
            yield from self._results({name: self._shapes[name] for name, _ in group}, total).items()

    def merged(self) -> TaskVector:
        """Merge what was folded so far; more can be folded afterwards.

        Returns:
            The merged task vector in float32. Its metadata tell method, options and number of
            tasks.

        Raises:
            InputError: If nothing was folded.
        """
        return TaskVector(dict(self.items()), self.metadata())

    def metadata(self) -> dict[str, str]:
        """What a merged task vector tells of how it was made."""
        options = json.dumps(self.options)
        return {"method": self.name, "options": options, "tasks": str(self.tasks)}

    def state_dict(self) -> dict[str, Any]:
        """Hand out everything that is needed to go on, for `torch.save`.

        Returns:
            Plain values and tensors; the tensors are the live accumulators, not copies.
        """
        state = {"method": self.name, "options": self.options, "tasks": self.tasks}
        return {**state, "accumulators": self._state}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        """Go on from a state.

        Args:
            state: What `state_dict` returned; its tensors are copied.
            device: Where the accumulators shall be; None leaves them where they were saved.

        Raises:
            InputError: If it is the state of another method or of other options.
        """
        known = inspect.signature(type(self)).parameters.values()
        defaults = {option.name: option.default for option in known}  # what came since it was saved
        theirs = (state["method"], defaults | state["options"])
        ours = (self.name, self.options)
        if theirs != ours:
            raise InputError(
                f"the saved state is of method '{theirs[0]}' with options {theirs[1]}, but this "
                f"merger is '{ours[0]}' with options {ours[1]}; make it with the saved ones"
            )
        with torch.inference_mode(False):
            self._state = {
                name: {
                    key: tensor.detach().to(device or tensor.device, copy=True)
                    for key, tensor in saved.items()
                }
                for name, saved in state["accumulators"].items()
            }
        self.tasks, self._shapes = state["tasks"], {}
        # The first accumulator of a parameter has its shape, and all are on one device.
        for name, kept in self._state.items():
            first = next(iter(kept.values()))
            self._shapes[name] = first.shape if self.shards is None else self.shards.shapes[name]
            self._device = first.device

    def _over(
        self, function: Callable[[Piece], Result], shapes: Mapping[str, torch.Size]
    ) -> list[Result]:
        """Apply a function to every chunk that this process has of parameters."""
        size = self.chunk_size or chunk_size(self._device)
        pieces = list(cut(shapes, self.unit, size, self.shards))
        return together(self.shards, lambda: over(function, pieces, self._device))

    def _held(self, name: str, key: str | None = None) -> torch.Size:
        """In which shape an accumulator or the result of a parameter is kept."""
        shape = self._shapes[name]
        kept = shape if key is None else self.accumulator_shape(key, shape)
        if self.shards is None:
            return kept
        span = self.shards.span(name)
        return torch.Size([kept.numel() if kept != shape and span.stop else span.stop - span.start])

    def _zeros(self, name: str, dtypes: Mapping[str, torch.dtype]) -> Accumulators:
        with torch.inference_mode(False):  # or they could only be changed within it
            return {
                key: torch.zeros(self._held(name, key), dtype=dtype, device=self._device)
                for key, dtype in dtypes.items()
            }

    def _stretch(self, name: str, part: slice) -> Accumulators:
        return {key: self._part(name, tensor, part) for key, tensor in self._state[name].items()}

    def _part(self, name: str, held: Tensor, part: slice) -> Tensor:
        if self.unit == "parameter":
            return held.view(-1)
        first = span_of(name, self._shapes[name], self.shards).start
        return held.view(-1)[part.start - first : part.stop - first]

    def _results(self, shapes: Mapping[str, torch.Size], total: int) -> dict[str, Tensor]:
        with torch.inference_mode(False):
            merged = {name: torch.zeros(self._held(name), device=self._device) for name in shapes}

        def compute(piece: Piece) -> None:
            name, part = piece
            info = ResultInfo(name, shapes[name], part.start, self.tasks, total)
            self.compute(self._stretch(name, part), self._part(name, merged[name], part), info)

        self._over(compute, shapes)
        return merged

    def _check(self, vector: Mapping[str, Tensor], importance: Mapping[str, Tensor] | None) -> None:
        what = task_name(self.tasks)
        check_floating(vector, what)
        if self.tasks:
            before = {name: torch.empty(self._held(name), device="meta") for name in self._shapes}
            check_same_layout(vector, before, what, "the tasks before")
        check_finite(vector, what, self.chunk_size)
        if self.weighted != (importance is not None):
            needed = f"needs {needed_of(self.grams)} beside the task vector"
            needed = needed if self.weighted else "takes no importance; leave it out"
            raise InputError(f"{what}: '{self.name}' {needed}")
        if importance is not None:
            what = f"the importance of {what}"
            check_importances(importance, vector, what, "the task vector", grams=self.grams)
            check_finite(importance, what, self.chunk_size)
            check_values(importance, what, grams=self.grams)


def fold_chunk(
    rule: Merger, state: Accumulators, vector: Reader, piece: Piece, task: int, prepared: Any
) -> None:
    """Fold a stretch of a task vector, for which `rule.prepare` returned `prepared`."""
    name, part = piece
    owner = next(kind for kind in type(rule).__mro__ if "fold" in vars(kind))
    chunk = (vector.chunk if vars(owner).get("takes_differences") else vector.read)(name, part)
    beside = slice(0, vector.shapes[name][-1:].numel() ** 2) if rule.grams else part
    weight = vector.importance(name, beside) if vector.importance is not None else None
    info = ChunkInfo(name, vector.shapes[name], part.start, task, prepared, weight)
    rule.fold(state, chunk, info)  # type: ignore[arg-type]
