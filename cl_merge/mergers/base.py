"""What all mergers share: the bookkeeping around a rule that works on chunks."""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_merge.errors import InputError, listing, task_name
from cl_merge.kernels.finite import is_finite, not_finite
from cl_merge.mergers.chunks import End, Place, Reader, Unit, chunk_size, cut, over
from cl_merge.task_vectors.task_vector import TaskVector, check_floating, check_same_layout

_GROUP = 1 << 22  # elements

Accumulators = dict[str, Tensor]
"""What a rule keeps for a stretch of elements: tensors [n] of equal length, by name."""


class Merger(ABC):
    """Reduces task vectors to one, a task at a time, in memory that does not grow with the tasks.

    A subclass is a rule: the accumulators that it keeps for every element, `fold`, which takes up a
    chunk of a task vector, and `finish`, which reads the merged values off the accumulators. These
    work on flat chunks and touch nothing else, on several threads at once, so that whoever holds
    the data may drive them: this class does it one task at a time over all parameters,
    `merge_checkpoints` one chunk at a time over all tasks. `survey` and `tally` are for rules that
    must look at a whole task vector, or at all accumulators, first.

    Attributes:
        name: Name of the method.
        published_scale: Scale at which its paper applies the merged task vector.
        accumulators: Dtypes of what is kept for every element, by name; all start at zero.
        unit: What a chunk holds whole: ``"element"``, any stretch of a flattened parameter;
            ``"row"``, whole rows of matrices; ``"parameter"``, one whole parameter.
        weighted: Whether a task vector comes with the importance of each of its elements.
        tasks: Number of task vectors folded so far.

    Example:
        >>> class Largest(Merger):
        ...     name = "largest"
        ...     published_scale = 1.0
        ...     accumulators = {"merged": torch.float32}
        ...
        ...     def fold(self, kept, chunk, place):
        ...         torch.maximum(kept["merged"], chunk, out=kept["merged"])
        ...
        ...     def finish(self, kept, out, end):
        ...         out.copy_(kept["merged"])
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

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Who folds in another way than the class it derives from must not inherit its short cut.
        if "fold" in vars(cls) and "fold_tuned" not in vars(cls):
            cls.fold_tuned = Merger.fold_tuned  # type: ignore[method-assign]

    def __init__(self) -> None:
        self.tasks = 0
        self._shapes: dict[str, torch.Size] = {}
        self._device = torch.device("cpu")
        self._kept: dict[str, Accumulators] = {}

    # The rule.

    def new_accumulators(self, task: int) -> Mapping[str, torch.dtype]:
        """Tell what to add to the accumulators before a task is folded.

        Args:
            task: Index of the task, from 0.

        Returns:
            Dtypes by name: `accumulators` before the first task, nothing later.
        """
        return self.accumulators if task == 0 else {}

    def survey(self, vector: Reader) -> Any:
        """Look at one whole task vector before its chunks are folded.

        Args:
            vector: Reads the task vector in chunks.

        Returns:
            What `fold` shall find in ``place.survey``.
        """
        return None

    @abstractmethod
    def fold(self, kept: Accumulators, chunk: Tensor, place: Place) -> None:
        """Take up one chunk of one task vector, in place.

        Args:
            kept: This stretch of the accumulators, each [n].
            chunk: The values of the task vector, float32 [n]; must not be changed or kept.
            place: Which task and which stretch this is.
        """

    def fold_tuned(
        self, kept: Accumulators, tuned: Tensor, base: Tensor, place: Place
    ) -> bool | None:
        """Take up one chunk of fine-tuned weights, to the same bits as `fold` of tuned - base.

        For rules that a compiled loop does in one pass; others leave it as it is.

        Args:
            kept: This stretch of the accumulators, each [n].
            tuned: Fine-tuned weights, floating point [n]; must not be changed or kept.
            base: Those of the base, of the same dtype.
            place: Which task and which stretch this is.

        Returns:
            Whether all of tuned - base is finite; None if nothing was done.
        """
        return None

    def tally(self, kept: Accumulators) -> tuple[int, bool]:
        """Count something over all accumulators, after the last task and before the first result.

        Args:
            kept: A stretch of the accumulators, each [n].

        Returns:
            A number, of which `finish` is given the sum over all stretches, and whether the result
            of this stretch depends on that sum.
        """
        return 0, False

    @abstractmethod
    def finish(self, kept: Accumulators, out: Tensor, end: End) -> None:
        """Read the merged values off the accumulators, which stay as they are.

        Args:
            kept: A stretch of the accumulators, each [n].
            out: Where the merged values go, float32 [n].
            end: Which stretch this is, after how many tasks.
        """

    # The bookkeeping: one task at a time, over all parameters.

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

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
        reader = Reader.of(vector, self._device if self.tasks else None)
        device = reader.device
        survey = self.survey(reader)
        if self.tasks == 0:
            self._device = device
            self._shapes = dict(reader.shapes)
            self._kept = {name: {} for name in vector}
        self._grow(self.new_accumulators(self.tasks))
        weights = Reader.of(importance or {}, device)

        def fold(piece: tuple[str, slice]) -> None:
            name, stretch = piece
            weight = weights.read(name, stretch) if weights.shapes else None
            shape = self._shapes[name]
            place = Place(name, shape, stretch.start, self.tasks, survey, weight)
            self.fold(_part(self._kept[name], stretch), reader.read(name, stretch), place)

        over(fold, list(cut(self._shapes, self.unit, chunk_size(device))), device)
        self.tasks += 1

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
        tally = self._total_tally()
        for names in self._groups():
            yield from self._finished(names, tally).items()

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
            "accumulators": self._kept,
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
        self.tasks = state["tasks"]
        with torch.inference_mode(False):
            self._kept = {
                name: {
                    key: tensor.detach().to(device or tensor.device, copy=True)
                    for key, tensor in kept.items()
                }
                for name, kept in state["accumulators"].items()
            }
        self._shapes = {name: _any(kept).shape for name, kept in self._kept.items()}
        self._device = next((_any(k).device for k in self._kept.values()), torch.device("cpu"))

    def _check(
        self,
        vector: Mapping[str, Tensor],
        importance: Mapping[str, Tensor] | None,
    ) -> None:
        what = task_name(self.tasks)
        check_floating(vector, what)
        if self.tasks:
            check_same_layout(vector, self._like(), what, "the tasks before")
        _check_finite(vector, what)
        if self.weighted != (importance is not None):
            raise InputError(
                f"{what}: '{self.name}' needs the importance of each element beside the task vector"
                if self.weighted
                else f"{what}: '{self.name}' takes no importance; leave it out"
            )
        if importance is not None:
            what = f"the importance of {what}"
            check_same_layout(importance, vector, what, "the task vector")
            _check_finite(importance, what)
            negative = [name for name, tensor in importance.items() if bool((tensor < 0).any())]
            if negative:
                raise InputError(f"{what} is negative in {listing(negative)}; expected 0 or more")

    def _groups(self) -> Iterator[list[str]]:
        """Parameters to finish together: enough for all threads, few beside the accumulators."""
        group, size = [], 0
        for name, shape in self._shapes.items():
            group.append(name)
            size += shape.numel()
            if size >= _GROUP:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _finished(self, names: list[str], tally: int) -> dict[str, Tensor]:
        shapes = {name: self._shapes[name] for name in names}
        merged = {
            name: _zeros(shape, torch.float32, self._device) for name, shape in shapes.items()
        }

        def finish(piece: tuple[str, slice]) -> None:
            name, stretch = piece
            end = End(name, shapes[name], stretch.start, self.tasks, tally)
            self.finish(_part(self._kept[name], stretch), merged[name].view(-1)[stretch], end)

        over(finish, list(cut(shapes, self.unit, chunk_size(self._device))), self._device)
        return merged

    def _like(self) -> dict[str, Tensor]:
        return {name: torch.empty(shape, device="meta") for name, shape in self._shapes.items()}

    def _grow(self, accumulators: Mapping[str, torch.dtype]) -> None:
        for name, kept in self._kept.items():
            for key, dtype in accumulators.items():
                kept[key] = _zeros(self._shapes[name], dtype, self._device)

    def _total_tally(self) -> int:
        if type(self).tally is Merger.tally:
            return 0
        pieces = list(cut(self._shapes, self.unit, chunk_size(self._device)))
        tallies = over(lambda p: self.tally(_part(self._kept[p[0]], p[1])), pieces, self._device)
        return sum(number for number, _ in tallies)


def _check_finite(vector: Mapping[str, Tensor], what: str) -> None:
    broken = set()
    for device in {tensor.device for tensor in vector.values()}:
        here = {name: tensor for name, tensor in vector.items() if tensor.device == device}
        reader = Reader.of(here, device)
        pieces = list(cut(reader.shapes, "element", chunk_size(device)))
        good = over(partial(_is_finite, reader), pieces, device)
        broken |= {name for (name, _), fine in zip(pieces, good, strict=True) if not fine}
    if broken:
        raise not_finite(what, [name for name in vector if name in broken])


def _is_finite(reader: Reader, piece: tuple[str, slice]) -> bool:
    return is_finite(reader.read(*piece))


def _part(kept: Accumulators, stretch: slice) -> Accumulators:
    return {name: tensor.view(-1)[stretch] for name, tensor in kept.items()}


def _any(kept: Accumulators) -> Tensor:
    """Pick one of the accumulators, which all have the parameter's shape and device."""
    return next(iter(kept.values()))


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Tensors made in inference mode cannot be changed outside it, but a merger is used in both.
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)
