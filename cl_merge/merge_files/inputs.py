"""Read stretches of all inputs of a merge; on the way, count, hash and check what is in them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from cl_merge.errors import InputError, listing
from cl_merge.kernels import Chunk, Difference, values_of
from cl_merge.kernels.finite import is_finite, not_finite
from cl_merge.merge_files.contents import RUNNING_VARIANCE
from cl_merge.merge_files.grown import GrownVector
from cl_merge.merge_files.hashing import ContentHash
from cl_merge.merge_files.plan import Plan
from cl_merge.mergers.chunks import Reader
from cl_merge.mergers.importances import is_importance
from cl_merge.storage import Weights

Progress = Callable[[int], Callable[[int], None]]
"""Given the number of bytes to come; returns what is told of bytes read, from several threads."""

_CPU = torch.device("cpu")


class ByteCount:
    """Counts the bytes that are read, on several threads, and tells as many as were announced."""

    def __init__(self, progress: Progress | None, announced: int) -> None:
        self.read = 0
        self._to_come = announced
        self._lock = threading.Lock()
        self._tell = progress(announced) if progress is not None else None

    def took(self, values: Tensor) -> None:
        """Count values that were read."""
        with self._lock:
            self.read += values.nbytes
            # What turns out to be needed once more was not announced.
            announced = min(values.nbytes, self._to_come)
            self._to_come -= announced
        if self._tell is not None:
            self._tell(announced)


class Inputs:
    """The base, the tasks, whose merged tensors are read `passes` times, and the importances."""

    def __init__(
        self,
        plan: Plan,
        progress: Progress | None,
        passes: int,
        block: int,
        factors: Sequence[float],
    ) -> None:
        self.all = [plan.base, *plan.tasks, *plan.importances]
        self.hashes = [ContentHash(weights, block) for weights in self.all]
        self.differing: set[str] = set()  # tensors that are not merged but not the base's either
        self.left_out: set[str] = set()  # tensors of tasks that the base has not, or in other shape
        self.moved_buffers: set[str] = set()
        # Everything once; in each pass before, the tasks, and the base beside fine-tuned weights.
        base = bytes_of(plan.base, plan.merged)
        to_read = sum(bytes_of(weights, plan.base.names) for weights in self.all)
        for task in plan.tasks * (passes - 1):
            to_read += bytes_of(task, plan.merged) + (0 if plan.is_added(task) else base)
        self.count = ByteCount(progress, to_read)
        self._plan = plan
        self._shapes = {name: plan.base.shape(name) for name in plan.merged}
        self._factors = factors
        self._held = [set(weights.names) for weights in self.all]

    def read(self, index: int, name: str, part: slice, *, hashed: bool = False) -> Tensor:
        """Read a stretch of one of the inputs, in its own dtype, and hash it if that is wanted."""
        values = self.all[index].read(name, part.start, part.stop)
        if hashed:
            self.hashes[index].update(name, part.start, values)
        self.count.took(values)
        return values

    def reader(self, task: int, base: Tensor | None = None, *, hashed: bool = False) -> Reader:
        """Read a task as a finite task vector; `base` is that stretch of the base, if at hand."""
        is_added = self._plan.is_added(self._plan.tasks[task])
        factor = self._factors[task]

        def chunk(name: str, part: slice) -> Chunk:
            found = change(name, part)
            return found if factor == 1 else values_of(found) * factor

        def change(name: str, part: slice) -> Chunk:
            values = self.read(1 + task, name, part, hashed=hashed)
            if not is_added:
                before = self.read(0, name, part) if base is None else base
                return Difference(values, before, lambda: self.broken(task))
            vector = values.to(torch.float32)
            if not is_finite(vector):
                raise self.broken(task)
            return vector

        def importance(name: str, part: slice) -> Tensor | None:
            index, grams = 1 + len(self._plan.tasks) + task, self._plan.grams
            if name not in self._held[index]:
                return None
            values = self.read(index, name, part, hashed=hashed).to(torch.float32)
            if not is_finite(values) or not is_importance(values, grams=grams):
                wrong = "is negative, NaN or infinite; expected 0 or more"
                if grams:
                    wrong = (
                        "is no Gram matrix: not symmetric, negative on its diagonal, or not finite"
                    )
                raise InputError(f"'{self.all[index].path}': the importance of '{name}' {wrong}")
            return values

        shapes, weights = self._shapes, self._plan.tasks[task]
        if base is None and isinstance(weights, GrownVector):
            # Thresholds and the like are of the task vector as it was.
            held = weights.vector
            shapes = {name: held.shape(name) for name in held.names if name in shapes}
        return Reader(
            shapes,
            chunk,
            _CPU,
            importance=importance if self._plan.importances else None,
            task=task,
        )

    def copied(self, name: str, part: slice) -> Tensor:
        """Read a stretch of a tensor that is not merged, and compare it; returns the base's."""
        base, tuned = self._unmerged(name, part)
        if not all(_same(values, base) for values in tuned):
            self.differing.add(name)
        return base

    def buffer(self, name: str, part: slice, choice: str) -> Tensor:
        """Read a stretch of a buffer as it is after merging, in the dtype of whatever it is from.

        `choice` is as of `MergedBuffers`.
        """
        base, after = self._unmerged(name, part)
        for values in (base, *after):
            # Types of one byte cannot be compared.
            if name.endswith(RUNNING_VARIANCE) and bool((values.to(torch.float64) < 0).any()):
                raise InputError(
                    f"'{name}' holds a negative variance in one of the inputs, which gives NaN. A "
                    "file in which statistics were merged as weights is like that; merge others"
                )
        if not all(_same(values, base) for values in after):
            self.moved_buffers.add(name)
        if choice == "base" or not after:
            return base
        if choice == "average":
            return torch.stack([values.to(torch.float64) for values in after]).mean(dim=0)
        return after[-1]

    def _unmerged(self, name: str, part: slice) -> tuple[Tensor, list[Tensor]]:
        """Read a stretch that is not merged: of the base, and of fine-tuned weights like it."""
        base, tuned = self.read(0, name, part, hashed=True), []
        for index in range(1, len(self.all)):
            if self._is_alike(index, name):
                values = self.read(index, name, part, hashed=True)
                tuned += [values] if self._is_tuned(index) else []
        return base, tuned

    def _is_tuned(self, index: int) -> bool:
        """Whether an input is fine-tuned weights, and no task vector or importance."""
        return index <= len(self._plan.tasks) and not self.all[index].is_task_vector

    def _is_alike(self, index: int, name: str) -> bool:
        """Whether an input and the base both have a tensor, of one shape and kind of numbers."""
        if name not in self._held[0] or name not in self._held[index]:
            return False  # task vectors lack what did not train
        base, theirs = self._plan.base, self.all[index]
        ours, given = base.dtype(name), theirs.dtype(name)
        same_kind = ours == given or (ours.is_floating_point and given.is_floating_point)
        return same_kind and theirs.shape(name) == base.shape(name)

    def rest(self) -> list[tuple[int, str, torch.Size]]:
        """What an input has that the base has not, or not so; notes the names."""
        merged, found = set(self._plan.merged), []
        for index, weights in enumerate(self.all[1:], start=1):
            for name in weights.names:
                if name not in merged and not self._is_alike(index, name):
                    found.append((index, name, weights.shape(name)))
                    if self._is_tuned(index):
                        self.left_out.add(name)
        return found

    def broken(self, task: int) -> InputError:
        """Make the error for a task vector that is not finite: which tensors of which input."""
        weights, base = self._plan.tasks[task], self._plan.base
        is_added = self._plan.is_added(weights)
        if not is_added and (names := self._not_finite(base)):
            return self._broken_base(names)
        if names := self._not_finite(weights):
            return not_finite(f"'{weights.path}'", names)

        def change_of(name: str) -> Tensor:
            values = weights.read(name)
            if is_added:
                return values.to(torch.float32)
            return Difference(values, base.read(name)).values()

        names = [name for name in self._plan.merged if not is_finite(change_of(name))]
        of_both = f"the difference of '{weights.path}' and the base"
        what = f"'{weights.path}'" if is_added else of_both
        return not_finite(f"{what} in float32", names)

    def broken_result(self, name: str) -> InputError:
        """Make the error for a merged tensor that is not finite although all task vectors are."""
        base = self._plan.base
        if names := self._not_finite(base):
            return self._broken_base(names)
        return self.overflow(name, " after merging; use a smaller scale, or a wider dtype")

    def overflow(self, name: str, advice: str = "; use a wider dtype") -> InputError:
        """Make the error for a tensor that the dtype in which it is written cannot hold."""
        dtype = str(self._plan.written(name)).removeprefix("torch.")
        return InputError(f"'{name}' overflows {dtype}{advice}")

    def _broken_base(self, names: list[str]) -> InputError:
        return InputError(
            f"the base '{self._plan.base.path}': NaN or infinity in {listing(names)}. If they are "
            "meant to be there, do not merge these tensors (exclude); else the file is damaged"
        )

    def _not_finite(self, weights: Weights) -> list[str]:
        """Names of the merged tensors in which an input has NaN or infinity."""
        names = self._plan.merged
        return [name for name in names if not is_finite(weights.read(name).to(torch.float64))]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two stretches have the same bits; of two dtypes, once the wider one is rounded."""
    if one.dtype != other.dtype:
        narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        one, other = one.to(narrow), other.to(narrow)
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def bytes_of(weights: Weights, names: Iterable[str]) -> int:
    """Bytes of the tensors of these names, as far as a checkpoint has them."""
    held = set(weights.names)
    return sum(
        weights.shape(name).numel() * weights.dtype(name).itemsize for name in names if name in held
    )
