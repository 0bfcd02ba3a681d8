"""What all mergers share: the bookkeeping around a rule, and the names to write rules with."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cl_merge.errors import InputError, listing, task_name
from cl_merge.kernels.finite import is_finite, not_finite
from cl_merge.mergers.chunks import Accumulators, ChunkInfo, Reader, ResultInfo, Unit
from cl_merge.mergers.folding import Folding, Rule, takes_differences
from cl_merge.task_vectors.task_vector import TaskVector, check_floating, check_same_layout

__all__ = [
    "Accumulators",
    "ChunkInfo",
    "Merger",
    "Reader",
    "ResultInfo",
    "Unit",
    "takes_differences",
]


class Merger(Rule):
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

    def _check(
        self,
        vector: Mapping[str, Tensor],
        importance: Mapping[str, Tensor] | None,
    ) -> None:
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


def _check_finite(vector: Mapping[str, Tensor], what: str, size: int | None) -> None:
    broken = set()
    for device in {tensor.device for tensor in vector.values()}:
        here = {name: tensor for name, tensor in vector.items() if tensor.device == device}
        reader = Reader.of(here, device, chunk_size=size)
        finite = zip(reader.pieces(), reader.map(is_finite), strict=True)
        broken |= {name for (name, _), fine in finite if not fine}
    if broken:
        raise not_finite(what, [name for name in vector if name in broken])
