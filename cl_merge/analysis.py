"""What task vectors look like: the pruning curve, sign conflicts, direction consistency, origins.

Functions of several task vectors read them one at a time and once: a generator that loads files
will do, and memory does not depend on the number of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.errors import InputError, unknown_name
from cl_merge.kernels.random_bits import random_bits
from cl_merge.mergers.base import Accumulators, ChunkInfo, Merger, Reader, ResultInfo
from cl_merge.mergers.max_magnitude import MaxMagnitude
from cl_merge.mergers.options import checked_share
from cl_merge.mergers.threshold import magnitude_of_rank, trim_threshold
from cl_merge.seeds import derive_seed
from cl_merge.task_vectors.task_vector import TaskVector

KEPT = ("highest", "lowest", "random")
"""Which entries `keep` can keep."""

_COUNT = torch.int32


def keep(vector: TaskVector, share: float, which: str = "highest", seed: int = 0) -> TaskVector:
    """Prune a task vector: keep a share of its entries and set the others to zero.

    Of d entries, ranked over the whole vector, n = round(share * d) are kept, at least one, and
    those whose magnitude equals that of the n-th. At random, each entry is kept with probability
    `share`, and a larger share keeps all that a smaller one keeps.

    Args:
        vector: Floating-point tensors of any shape and dtype.
        share: Share of the entries that stays, above 0 and up to 1.
        which: ``"highest"`` or ``"lowest"`` magnitude, or ``"random"``.
        seed: Chooses the random numbers, which depend on it, on parameter name and element alone.

    Returns:
        A new task vector in float32, of the same names, shapes and metadata.

    Raises:
        InputError: If an argument is wrong, or a value is not finite in float32.

    Example:
        >>> vector = TaskVector({"weight": torch.tensor([4.0, 0.1, -3.0, 1.0, 2.0])})
        >>> keep(vector, 0.4)["weight"]
        tensor([ 4.,  0., -3.,  0.,  0.])
        >>> keep(vector, 0.4, "lowest")["weight"]
        tensor([0.0000, 0.1000, 0.0000, 1.0000, 0.0000])

    Reference:
        Marczak et al., MagMax, ECCV 2024, the figure of accuracy against the share of task-vector
        parameters kept.
    """
    share = checked_share("share", share)
    if which not in KEPT:
        raise unknown_name("choice of entries", which, KEPT)
    vector = TaskVector({name: tensor.float() for name, tensor in vector.items()}, vector.metadata)
    vector.check_finite("the task vector")
    stays = _drawn(share, seed) if which == "random" else _ranked(vector, share, which)
    return TaskVector(
        {name: torch.where(stays(name, tensor), tensor, 0) for name, tensor in vector.items()},
        vector.metadata,
    )


def sign_conflicts(vectors: Iterable[TaskVector], density: float = 0.2) -> float:
    """Measure how often tasks disagree on the direction of their largest changes.

    Each task vector is trimmed on its own, as in TIES, to the share `density`. A position counts if
    at least one task keeps a non-zero value there, and it is in conflict if one task keeps a
    positive and another a negative value. Hence disjoint choices are no conflict, and more
    positions count with more tasks, unless they choose the same ones.

    Args:
        vectors: One task vector per task, of equal names and shapes; read once.
        density: Share of each task vector that stays, above 0 and up to 1.

    Returns:
        Conflicting positions divided by positions that count, 0 to 1; NaN if none counts. 0 for a
        single task.

    Raises:
        InputError: If there is no task vector, they do not match, a value is not finite, or the
            density is outside (0, 1].

    Example:
        >>> vectors = [
        ...     TaskVector({"weight": torch.tensor([4.0, 3.0, -2.0, 0.1, 0.2])}),
        ...     TaskVector({"weight": torch.tensor([4.0, -3.0, 0.1, 2.0, 0.2])}),
        ... ]
        >>> sign_conflicts(vectors, density=0.4)
        0.25

    Reference:
        Marczak et al., MagMax, ECCV 2024, the figure of sign conflicts among the top 20 % of
        parameters; after Yadav et al., TIES-Merging, NeurIPS 2023, section 3.
    """
    signs = _Signs(density=density)
    _fold(vectors, signs)
    return signs.share()


def sign_conflict_curve(vectors: Iterable[TaskVector], density: float = 0.2) -> list[float]:
    """Measure after every task how often the tasks so far disagree, in one pass.

    Args:
        vectors: As for `sign_conflicts`, in the order of the tasks.
        density: As for `sign_conflicts`.

    Returns:
        A number per task: the t-th, counted from 1, is `sign_conflicts` of the first t vectors.

    Example:
        >>> up, down = torch.tensor([4.0, 3.0, 0.1]), torch.tensor([4.0, -3.0, 0.2])
        >>> vectors = [TaskVector({"weight": values}) for values in (up, up, down)]
        >>> sign_conflict_curve(vectors, density=0.5)
        [0.0, 0.0, 0.5]
    """
    signs = _Signs(density=density)
    curve: list[float] = []
    _fold(vectors, signs, after=lambda: curve.append(signs.share()))
    return curve


@dataclass(frozen=True)
class DirectionConsistency:
    """How consistently entries moved, by how large they became; see `direction_consistency`.

    Attributes:
        upper: Largest magnitude that belongs to each bin, ascending; a bin begins above the one
            before.
        counts: Number of entries in each bin.
        consistency: Mean consistency of each bin, 0 to 1; NaN where a bin is empty.
    """

    upper: tuple[float, ...]
    counts: tuple[int, ...]
    consistency: tuple[float, ...]


def direction_consistency(
    vectors: Iterable[TaskVector], bins: int = 10, sequential: bool = True
) -> DirectionConsistency:
    """Compare the magnitude of merged entries with how consistently tasks moved them.

    The consistency of an entry is abs(sum of sign(u_t)) / (number of non-zero u_t) over its updates
    u_t by task t: 1 if all moved it the same way, 0 if as many moved it up as down. Random signs
    score about sqrt(2 / (pi * T)) for T updates.

    The entries of the max-magnitude merge are cut into bins at the quantiles of their magnitude,
    over all parameters. Equal magnitudes share a bin, and entries that no task moved are left out.

    Args:
        vectors: One per task, in the order of the tasks, of equal names and shapes; read once.
        bins: Number of bins.
        sequential: Whether each task started from the weights of the one before, so that its update
            is u_t = tau_t - tau_(t-1), u_0 = tau_0. If not, all tasks started from the base:
            u_t = tau_t.

    Returns:
        Bounds, sizes and mean consistencies of the bins.

    Raises:
        InputError: If there is no task vector, they do not match, a value is not finite, or `bins`
            is no whole number above 0.

    Example:
        >>> vectors = [
        ...     TaskVector({"weight": torch.tensor([1.0, 2.0, 0.2, 0.0])}),
        ...     TaskVector({"weight": torch.tensor([3.0, 4.0, 0.1, 0.3])}),
        ... ]
        >>> result = direction_consistency(vectors, bins=2)
        >>> result.counts, result.consistency
        ((2, 2), (0.5, 1.0))

    Reference:
        Marczak et al., MagMax, ECCV 2024, the figure of magnitude against consistency.
    """
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 1:
        raise InputError(f"bins must be a whole number above 0, not {bins!r}")
    largest, consistency = MaxMagnitude(), _Consistency(sequential=sequential)
    _fold(vectors, largest, consistency)
    merged = largest.merged()
    # At the quantiles of the entries that are not zero.
    moved = sum(int(tensor.count_nonzero()) for tensor in merged.values())
    zeros = merged.numel() - moved
    upper = [_magnitude(merged, zeros + round(i * moved / bins)) for i in range(1, bins + 1)]
    counts, sums = torch.zeros(bins, dtype=torch.int64), torch.zeros(bins, dtype=torch.float64)
    for name, values in consistency.items():
        magnitudes, counting = merged[name].abs(), merged[name] != 0
        limits = torch.tensor(upper[:-1], device=magnitudes.device)
        bins_of = torch.bucketize(magnitudes[counting], limits)
        counts += torch.bincount(bins_of, minlength=bins).cpu()
        sums += torch.bincount(bins_of, values[counting].double(), minlength=bins).cpu()
    means = (sums / counts).tolist()
    return DirectionConsistency(tuple(upper), tuple(counts.tolist()), tuple(means))


def origin(vectors: Iterable[TaskVector]) -> dict[str, list[float]]:
    """Tell which task the entries of the max-magnitude merge come from, by parameter.

    Args:
        vectors: One task vector per task, of equal names and shapes; read once.

    Returns:
        For each parameter the share of its non-zero merged entries that each task contributes: one
        number per task, 1 in total, or all 0 if no task changed the parameter. On equal magnitudes
        the entry is the later task's, as in the merge.

    Raises:
        InputError: If there is no task vector, they do not match, or a value is not finite.

    Example:
        >>> first = TaskVector({"weight": torch.tensor([3.0, -1.0, 2.0, 4.0])})
        >>> second = TaskVector({"weight": torch.tensor([1.0, 0.5, -2.0, 3.0])})
        >>> origin([first, second])
        {'weight': [0.75, 0.25]}
    """
    return {
        name: [count / max(sum(counts), 1) for count in counts]
        for name, counts in origin_counts(vectors).items()
    }


def origin_counts(vectors: Iterable[TaskVector]) -> dict[str, list[int]]:
    """Count how many entries of the max-magnitude merge come from which task, by parameter.

    Args:
        vectors: As for `origin`.

    Returns:
        For each parameter the number of its non-zero merged entries that each task contributes: one
        number per task. Counts of several parameters may be added up, as for a layer.

    Example:
        >>> first = TaskVector({"weight": torch.tensor([3.0, -1.0, 2.0, 4.0, 0.0])})
        >>> second = TaskVector({"weight": torch.tensor([1.0, 0.5, -2.0, 3.0, 0.0])})
        >>> origin_counts([first, second])
        {'weight': [3, 1]}
    """
    origins = _Origin()
    _fold(vectors, origins)
    return {
        name: torch.bincount(numbers.flatten().int(), minlength=origins.tasks + 1)[1:].tolist()
        for name, numbers in origins.items()
    }


# Mergers whose results are a figure for every element instead of a weight.


class _Signs(Merger):
    """Count which signs are left at an element after trimming as in TIES: 0, 1 or 2."""

    name = "sign-conflicts"
    accumulators: ClassVar = {"positive": torch.bool, "negative": torch.bool}

    def __init__(self, *, density: float) -> None:
        super().__init__()
        self.density = checked_share("density", density)

    @override
    def prepare(self, vector: Reader) -> float:
        return trim_threshold(vector, self.density)

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        stays = chunk.abs() >= info.prepared
        state["positive"].logical_or_(stays & (chunk > 0))
        state["negative"].logical_or_(stays & (chunk < 0))

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        out.copy_(state["positive"]).add_(state["negative"])

    def share(self) -> float:
        """Conflicting positions divided by those that count; NaN if none counts."""
        counting = conflicting = 0
        for _, number in self.items():
            counting += int((number > 0).count_nonzero())
            conflicting += int((number > 1).count_nonzero())
        return conflicting / counting if counting else float("nan")


class _Consistency(Merger):
    """Divide the sum of the updates' signs by their number; 0 where there was no update."""

    name = "direction-consistency"
    accumulators: ClassVar = {"last": torch.float32, "signs": _COUNT, "updates": _COUNT}

    def __init__(self, *, sequential: bool) -> None:
        super().__init__()
        self.sequential = sequential

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        signs = (chunk - state["last"]).sign_().to(_COUNT)
        state["signs"].add_(signs)
        state["updates"].add_(signs.abs_())
        if self.sequential:  # else it stays zero: every task started from the base
            state["last"].copy_(chunk)

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        torch.div(state["signs"].abs(), state["updates"].clamp(min=1), out=out)


class _Origin(MaxMagnitude):
    """Find the number of the task that an element comes from, counted from 1; 0 if it is zero."""

    name = "origin"
    accumulators: ClassVar = {"merged": torch.float32, "task": _COUNT}

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        super().fold(state, chunk, info)
        # Where the merge took this chunk up. A zero is taken up only over zeros: it is no one's.
        taken = (state["merged"] == chunk) & (chunk != 0)
        state["task"].masked_fill_(taken, info.task + 1)

    @override
    def compute(self, state: Accumulators, out: Tensor, info: ResultInfo) -> None:
        out.copy_(state["task"])


def _fold(
    vectors: Iterable[TaskVector], *mergers: Merger, after: Callable[[], None] = lambda: None
) -> None:
    for vector in vectors:
        for merger in mergers:
            merger.update(vector)
        del vector  # or it would still be held while a generator makes the next one
        after()
    if any(merger.tasks == 0 for merger in mergers):
        raise InputError("nothing to analyse: no task vector was given")


def _ranked(vector: TaskVector, share: float, which: str) -> Callable[[str, Tensor], Tensor]:
    number = max(1, round(share * vector.numel()))
    if which == "lowest":
        most = _magnitude(vector, number)
        return lambda _, tensor: tensor.abs() <= most
    least = _magnitude(vector, vector.numel() - number + 1)
    return lambda _, tensor: tensor.abs() >= least


def _drawn(share: float, seed: int) -> Callable[[str, Tensor], Tensor]:
    def stays(name: str, tensor: Tensor) -> Tensor:
        draws = random_bits(derive_seed(seed, name), 0, tensor.numel(), tensor.device)
        return draws.view(tensor.shape) <= int(share * 2.0**63) - 1  # they are 0 to 2^63 - 1

    return stays


def _magnitude(vector: TaskVector, rank: int) -> float:
    """Find the rank-th smallest magnitude, counted from 1, over float32 tensors; 0 for rank 0."""
    return magnitude_of_rank(Reader.of(vector), rank) if rank > 0 and vector.numel() else 0.0
