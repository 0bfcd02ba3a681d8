"""A LoRA adapter of LoRA adapters: what was merged, factored again, a matrix at a time."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cl_merge.errors import InputError, listing
from cl_merge.kernels.finite import is_finite
from cl_merge.merge_files.plan import Plan
from cl_merge.mergers.matrices import on_one_thread
from cl_merge.mergers.options import checked_count
from cl_merge.storage import Weights, Writer, write_weights
from cl_merge.storage.lora import CONFIG, AdapterWeights, factor_of
from cl_merge.storage.weights import StoredTensor

LoraRank = int | Literal["auto"]

_FILE = "adapter_model.safetensors"
_EXTRA = 16  # directions that are searched for beside the wanted ones
_ROUNDS = 8
_SEED = 0


@dataclass(frozen=True)
class AdapterFit:
    """How near an adapter comes to what was merged.

    Attributes:
        rank: Of all its factors.
        error: Length of what is missing, as a share of the length of the whole merged task vector.
        worst: The same of the matrix where it is largest.
        worst_name: Name of that matrix.
    """

    rank: int
    error: float
    worst: float
    worst_name: str


def adapter_plan(plan: Plan, rank: LoraRank) -> tuple[Plan, int, int]:
    """Merge nothing but the matrices that adapters change, from zero: the changes themselves.

    Returns the plan, the rank of the output, and the number of elements of the largest matrix.

    Raises:
        InputError: If a task is no LoRA adapter, or the rank none that a matrix can have.
    """
    others = [str(task.path) for task in plan.tasks if not isinstance(task, AdapterWeights)]
    if others:
        raise InputError(
            f"lora_rank: only LoRA adapters merge into one, and these are none: {listing(others)}. "
            "What they change beside matrices of linear layers would be lost; leave lora_rank out "
            "to merge into the base"
        )
    shapes = {name: plan.base.shape(name) for name in plan.merged}
    tensors = {name: StoredTensor(torch.float32, shapes[name], _zeros) for name in shapes}
    base = Weights(plan.base.path, plan.base.kind, tensors)
    whole = max(shape.numel() for shape in shapes.values())
    plan = replace(plan, base=base, buffers=[], copied=[], twins={}, dtype=None)
    return plan, _rank(plan, rank), whole


@contextmanager
def write_adapter(
    output: str | Path,
    plan: Plan,
    rank: int,
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Iterator[AdapterWriter]:
    """Write a folder of peft, as `write_weights` does, in the first adapter's dtype or another.

    Yields:
        What takes the merged change of each matrix, whole, and factors it.
    """
    if Path(output).suffix.lower() == ".safetensors":
        raise InputError(f"the output '{output}' is a file, but an adapter is a folder; name one")
    first = _adapter(plan.tasks[0])
    dtype = dtype or first.factor_dtype
    entries, transposed = {}, bool(first.config.get("fan_in_fan_out"))
    for name in plan.merged:
        rows, columns = plan.base.shape(name)[:: -1 if transposed else 1]
        entries[factor_of(name, "A")] = (dtype, torch.Size([rank, columns]))
        entries[factor_of(name, "B")] = (dtype, torch.Size([rows, rank]))
    config = {
        "peft_type": "LORA",
        "task_type": first.config.get("task_type"),
        "base_model_name_or_path": first.config.get("base_model_name_or_path"),
        "revision": first.config.get("revision"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # the scaling is within the factors
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(name.removesuffix(".weight") for name in plan.merged),
    }
    with write_weights(
        output,
        entries,
        metadata,
        file_name=_FILE,
        texts={CONFIG: json.dumps(config, indent=2) + "\n"},
        shard_bytes=sum(dtype.itemsize * shape.numel() for dtype, shape in entries.values()),
        overwrite=overwrite,
    ) as writer:
        yield AdapterWriter(writer, plan, rank, transposed, dtype)


class AdapterWriter:
    """Factors merged matrices, and counts what is lost; made by `write_adapter`."""

    def __init__(
        self, writer: Writer, plan: Plan, rank: int, transposed: bool, dtype: torch.dtype
    ) -> None:
        self._writer = writer
        self._plan = plan
        self._rank = rank
        self._transposed = transposed
        self._dtype = dtype
        self._squares: dict[str, tuple[float, float]] = {}  # of what is missing, and of all
        self._lock = threading.Lock()
        self.amend = writer.amend

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write the change of one matrix, float32, from any thread."""
        matrix = values.view(self._plan.base.shape(name))
        matrix = matrix.T if self._transposed else matrix
        left, right = (part.to(self._dtype) for part in factors(matrix, self._rank))
        if not (is_finite(left) and is_finite(right)):
            dtype = str(self._dtype).removeprefix("torch.")
            raise InputError(f"the factors of '{name}' overflow {dtype}; use a wider dtype")
        with on_one_thread():
            missing = matrix - left.float() @ right.float()
            squares = _square(missing), _square(matrix)
        with self._lock:
            self._squares[name] = squares
        self._writer.write(factor_of(name, "B"), 0, left)
        self._writer.write(factor_of(name, "A"), 0, right)

    def fit(self) -> AdapterFit:
        """Tell, after the last matrix, how near the adapter comes."""
        missing, whole = (math.fsum(part) for part in zip(*self._squares.values(), strict=True))
        shares = {name: _share(*self._squares[name]) for name in self._plan.merged}
        worst = max(shares, key=lambda name: shares[name])
        return AdapterFit(self._rank, _share(missing, whole), shares[worst], worst)


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Find the factors whose product is nearest to a matrix, those of its singular vectors.

    Where the rank is small beside the matrix, the subspace of the first vectors is searched from
    random directions that are always the same: the error is then within a thousandth or so of the
    least one, and none where the matrix has no higher rank.

    Args:
        matrix: float32 [m, n].
        rank: r; where it is more than m or n, the rest is zeros.

    Returns:
        B, [m, r], and A, [r, n], each with the root of the singular values.

    Reference:
        Halko et al., Finding Structure with Randomness, SIAM Review 2011, algorithm 4.4.
    """
    with on_one_thread():
        left, values, right = _decomposed(matrix, rank)
        roots = values[:rank].sqrt()
        b, a = matrix.new_zeros(matrix.shape[0], rank), matrix.new_zeros(rank, matrix.shape[1])
        b[:, : len(roots)] = left[:, : len(roots)] * roots
        a[: len(roots)] = roots[:, None] * right[: len(roots)]
    return b, a


def _decomposed(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    searched = rank + _EXTRA
    if 4 * searched >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right
    generator = torch.Generator().manual_seed(_SEED)
    spanned = torch.randn(matrix.shape[1], searched, generator=generator)
    for _ in range(_ROUNDS):
        spanned = torch.linalg.qr(matrix @ spanned).Q
        spanned = torch.linalg.qr(matrix.T @ spanned).Q
    left, values, right = torch.linalg.svd(matrix @ spanned, full_matrices=False)
    return left, values, right @ spanned.T


def _rank(plan: Plan, wanted: LoraRank) -> int:
    most = max(min(plan.base.shape(name)) for name in plan.merged)
    if wanted == "auto":
        sums = (sum(_adapter(task).ranks[name] for task in plan.tasks) for name in plan.merged)
        return min(max(sums), most)
    rank = checked_count("lora_rank", wanted, least=1)
    if rank > most:
        raise InputError(
            f"lora_rank={rank} is more than any adapted matrix can have; expected 1 to {most}"
        )
    return rank


def _adapter(task: Weights) -> AdapterWeights:
    assert isinstance(task, AdapterWeights)  # noqa: S101 - `adapter_plan` has made sure
    return task


def _zeros(start: int, stop: int) -> Tensor:
    return torch.zeros(stop - start)


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _share(missing: float, whole: float) -> float:
    return math.sqrt(missing / whole) if whole > 0 else 0.0
