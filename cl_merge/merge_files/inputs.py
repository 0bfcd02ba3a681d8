"""Read stretches of all inputs of a merge, and check what is in them on the way."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_merge.errors import InputError, listing
from cl_merge.kernels.finite import is_finite, not_finite
from cl_merge.merge_files.byte_count import ByteCount, Progress
from cl_merge.merge_files.hashing import BlockHash
from cl_merge.merge_files.plan import Plan, dtype_name
from cl_merge.mergers.chunks import Reader
from cl_merge.storage import Weights
from cl_merge.task_vectors.task_vector import subtract

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of a task's parameter.

    Attributes:
        values: Fine-tuned weights or a task vector, [n].
        base: The base's weights, [n]; None beside a task vector.
        importance: float32 [n], where there is one.
    """

    values: Tensor
    base: Tensor | None
    importance: Tensor | None


class Inputs:
    """The base, the tasks and the importances of a merge, as task vectors in float32.

    Args:
        plan: What is merged.
        progress: Shows how many bytes were read.
        passes: How often the tasks' merged tensors are going to be read.

    Attributes:
        count: Counts what is read.
        hashed: The inputs in order: base, tasks, importances.
        differing: Names of tensors that are not merged but differ between base and tasks.
    """

    def __init__(self, plan: Plan, progress: Progress | None, passes: int) -> None:
        self.hashed = [plan.base, *plan.tasks, *plan.importances]
        self.differing: set[str] = set()
        self._plan = plan
        self._names = {id(weights): set(weights.names) for weights in self.hashed}
        self._local = threading.local()
        self.count = ByteCount(progress, self._size(passes))

    def holds(self, weights: Weights, name: str) -> bool:
        """Tell whether an input has a tensor; task vectors lack those that did not train."""
        return name in self._names[id(weights)]

    def reader(self, task: int) -> Reader:
        """Read one whole task vector, for a survey.

        Args:
            task: Index of the task.

        Returns:
            A reader of float32 chunks.
        """
        shapes = {name: self._plan.base.shape(name) for name in self._plan.merged}

        def read(name: str, part: slice) -> Tensor:
            return self.vector(self.read(task, name, part), task)

        return Reader(shapes, read, _CPU)

    def read(
        self, task: int, name: str, part: slice, hashes: list[BlockHash] | None = None
    ) -> Stretch:
        """Read a stretch of a task.

        Args:
            task: Index of the task.
            name: Name of the parameter.
            part: Stretch of the flattened parameter.
            hashes: Take up what is read, the base's with the first task's.

        Returns:
            What was read.
        """
        weights, base, importance = self._plan.tasks[task], None, None
        values = weights.read(name, part.start, part.stop)
        self._took(values, hashes, 1 + task)
        if not weights.is_task_vector or (task == 0 and hashes is not None):
            base = self._plan.base.read(name, part.start, part.stop)
            if task == 0 or hashes is None:
                self._took(base, hashes, 0)
        if self._plan.importances:
            importance = self._importance(task, name, part, hashes)
        return Stretch(values, None if weights.is_task_vector else base, importance)

    def vector(self, read: Stretch, task: int) -> Tensor:
        """Make a task vector of what was read.

        Args:
            read: What `read` returned.
            task: Index of the task.

        Returns:
            float32 [n], valid until this thread's next call.

        Raises:
            InputError: If a value is not finite.
        """
        vector, fine = self._vector(read)
        if not fine:
            raise self.broken(task)
        return vector

    def copied(self, name: str, part: slice, hashes: list[BlockHash]) -> Tensor:
        """Read a stretch of a tensor that is not merged.

        Args:
            name: Its name.
            part: Stretch of the flattened tensor.
            hashes: Take up what is read.

        Returns:
            The base's values, in its dtype.
        """
        values = self._plan.base.read(name, part.start, part.stop)
        self._took(values, hashes, 0)
        for index, weights in enumerate(self.hashed[1:], start=1):
            if not self.holds(weights, name):
                continue
            theirs = weights.read(name, part.start, part.stop)
            self._took(theirs, hashes, index)
            is_tuned = index <= len(self._plan.tasks) and not weights.is_task_vector
            if is_tuned and not _same_bytes(theirs, values):
                self.differing.add(name)
        return values

    def _vector(self, read: Stretch) -> tuple[Tensor, bool]:
        """Make a task vector, and tell whether all of it is finite."""
        if read.base is None:
            vector = read.values.to(torch.float32)
            return vector, is_finite(vector)
        vector = self._buffer(read.values.numel())
        return vector, subtract(read.values, read.base, vector)

    def _importance(
        self, task: int, name: str, part: slice, hashes: list[BlockHash] | None
    ) -> Tensor:
        weights = self._plan.importances[task]
        raw = weights.read(name, part.start, part.stop)
        self._took(raw, hashes, 1 + len(self._plan.tasks) + task)
        importance = raw.to(torch.float32)
        if not is_finite(importance) or bool((importance < 0).any()):
            raise InputError(
                f"'{weights.path}': the importance of '{name}' is negative, NaN or infinite; "
                "expected 0 or more"
            )
        return importance

    def _size(self, passes: int) -> int:
        """Number of bytes to be read: each task's survey reads the base once more."""
        merged = {id(w): _bytes(w, self._plan.merged) for w in self.hashed}
        copied = sum(_bytes(w, self._plan.copied) for w in self.hashed)
        survey = sum(
            merged[id(task)] + (0 if task.is_task_vector else merged[id(self._plan.base)])
            for task in self._plan.tasks
        )
        return sum(merged[id(w)] for w in self.hashed) + copied + (passes - 1) * survey

    def _took(self, raw: Tensor, hashes: list[BlockHash] | None, index: int) -> None:
        if hashes is not None:
            hashes[index].update(raw)
        self.count.took(raw)

    def _buffer(self, size: int) -> Tensor:
        """Memory that this thread uses again and again, so that it stays in the cache."""
        buffer: Tensor | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.numel() < size:
            buffer = self._local.buffer = torch.empty(size, dtype=torch.float32)
        return buffer[:size]

    def broken(self, task: int) -> InputError:
        """Find out which tensors of which input are not finite.

        Args:
            task: Index of a task whose task vector is not.

        Returns:
            The error.
        """
        weights = self._plan.tasks[task]
        names = [] if weights.is_task_vector else self._not_finite(self._plan.base)
        if names:
            return self._broken_base(names)
        names = self._not_finite(weights)
        if names:
            return not_finite(f"'{weights.path}'", names)
        whole = [(n, slice(0, self._plan.base.shape(n).numel())) for n in self._plan.merged]
        too_large = [n for n, part in whole if not self._vector(self.read(task, n, part))[1]]
        if weights.is_task_vector:
            return not_finite(f"'{weights.path}' in float32", too_large)
        return not_finite(f"the difference of '{weights.path}' and the base in float32", too_large)

    def broken_result(self, name: str) -> InputError:
        """Find out why a merged tensor is not finite although all task vectors are.

        Args:
            name: Its name.

        Returns:
            The error.
        """
        base = self._plan.base
        names = self._not_finite(base)
        if names:
            return self._broken_base(names)
        return InputError(
            f"'{name}' overflows {dtype_name(base, name)} after merging; use a smaller scale, or "
            "convert the inputs to a wider dtype"
        )

    def _broken_base(self, names: list[str]) -> InputError:
        return InputError(
            f"the base '{self._plan.base.path}': NaN or infinity in {listing(names)}. If they are "
            "meant to be there, do not merge these tensors (exclude); else the file is damaged"
        )

    def _not_finite(self, weights: Weights) -> list[str]:
        """Names of the merged tensors in which an input has NaN or infinity."""
        return [
            name
            for name in self._plan.merged
            if not is_finite(weights.read(name).to(torch.float64))
        ]


def _bytes(weights: Weights, names: list[str]) -> int:
    held = set(weights.names)
    return sum(
        weights.shape(name).numel() * weights.dtype(name).itemsize for name in names if name in held
    )


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
