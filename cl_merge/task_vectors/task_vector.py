"""The task vector: what fine-tuning changed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.errors import InputError, listing
from cl_merge.kernels import subtract, wide
from cl_merge.kernels.finite import is_finite, not_finite
from cl_merge.storage.files import load_tensors, save_tensors
from cl_merge.storage.quantize import check_store
from cl_merge.storage.quantized_file import STORE, load_quantized, save_quantized
from cl_merge.storage.weights import (
    PLAIN_VERSION,
    QUANTIZED_VERSION,
    TASK_VECTOR,
    newer_version,
)


class TaskVector(Mapping[str, Tensor]):
    """The difference of two sets of weights, by parameter name: fine-tuned minus base.

    A read-only mapping from names to floating-point tensors. `between` makes one from two state
    dicts, `apply_to` adds one to a state dict. Task vectors can be added, subtracted, negated and
    scaled: the results are new tensors in float32.

    Args:
        tensors: Floating-point tensors of any shape by parameter name; detached, not copied.
        metadata: Words that `save` writes beside the tensors, such as the task's name.

    Attributes:
        metadata: As given.

    Raises:
        InputError: If a tensor is not floating point.

    Example:
        >>> base = {"weight": torch.tensor([1.0, 2.0]), "steps": torch.tensor(3)}
        >>> tuned = {"weight": torch.tensor([1.5, 1.0]), "steps": torch.tensor(7)}
        >>> vector = TaskVector.between(base, tuned)
        >>> vector["weight"]
        tensor([ 0.5000, -1.0000])
        >>> vector.apply_to(base, scale=0.5)
        {'weight': tensor([1.2500, 1.5000]), 'steps': tensor(3)}

    Reference:
        Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, section 2.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        check_floating(tensors, "a task vector")
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.metadata = dict(metadata or {})

    @classmethod
    def between(cls, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> Self:
        """Subtract the base from fine-tuned weights.

        Args:
            base: Weights before fine-tuning, for example a state dict: any shapes and dtypes.
            tuned: Weights after it, of the same names, shapes and dtypes, on any device.

        Returns:
            tuned - base in float32 on the base's device, in the base's order. Inputs wider than
            float32 are subtracted before rounding. Integer and boolean tensors are left out, and
            complex ones that are the same.

        Raises:
            InputError: If names, shapes or dtypes differ, a value is not finite, or complex tensors
                differ.
        """
        _check_alike(base, tuned)
        complexes = [name for name, tensor in base.items() if tensor.is_complex()]
        moved = [n for n in complexes if not torch.equal(base[n], tuned[n].to(base[n].device))]
        if moved:
            raise InputError(
                f"complex tensors differ, which a task vector cannot hold: {listing(moved)}; leave "
                "them out, or take them apart with torch.view_as_real"
            )
        floating = [name for name, tensor in base.items() if tensor.is_floating_point()]
        return cls({name: _difference(name, base[name], tuned[name]) for name in floating})

    def apply_to(self, base: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        """Add this task vector to weights: base + scale * vector.

        Args:
            base: Weights that have at least this vector's names, in the same shapes.
            scale: Factor of the vector, lambda in the papers.

        Returns:
            New weights, computed in float32 or wider and rounded to the base's dtypes, on the
            base's devices. Tensors that the vector does not name are passed on as they are.

        Raises:
            InputError: If the base lacks a name of the vector or has it in another shape or as
                integers, or if the scale is not finite.
        """
        scale = check_scale(scale)
        _check_fits(self, base)
        return {
            name: moved(tensor, self[name], scale) if name in self else tensor
            for name, tensor in base.items()
        }

    def norm(self) -> float:
        """Euclidean norm over all values."""
        # Squares of small values leave float32's range.
        norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in self.values()]
        return math.hypot(*(float(norm) for norm in norms))

    def numel(self) -> int:
        """Number of values."""
        return sum(tensor.numel() for tensor in self.values())

    def check_finite(self, what: str) -> None:
        """Make sure that there is no NaN and no infinity.

        Args:
            what: How the error calls this vector, for example ``"task 3"``.

        Raises:
            InputError: If a value is not finite; names the tensors.
        """
        broken = [name for name, tensor in self.items() if not is_finite(tensor)]
        if broken:
            raise not_finite(what, broken)

    def save(self, path: str | Path, store: str = "float32") -> None:
        """Write the tensors and the metadata to a safetensors file, atomically.

        Args:
            path: Where the file shall be.
            store: How the values are written: ``"float32"``, in the tensors' own dtypes;
                ``"bf16"``; or ``"int8"``, ``"int4"`` and ``"int2"``, rounded to few bits as
                `cl_merge.storage.quantize.quantize` tells.

        Raises:
            InputError: If the store is unknown, or values are to be rounded and are not finite.
            StorageError: If the file cannot be written.
        """
        check_store(store)
        metadata = {key: text for key, text in self.metadata.items() if key != STORE}
        if store == "float32":
            save_tensors(path, self, {**metadata, TASK_VECTOR: PLAIN_VERSION})
        else:
            save_quantized(path, self, metadata, store)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote.

        Args:
            path: The file.

        Returns:
            The task vector on the CPU, with its metadata. What was rounded is float32, and the
            metadata tell the store as ``"cl_merge.store"``.

        Raises:
            InputError: If the file is missing, damaged, no task vector or of a newer version.
        """
        tensors, metadata = load_tensors(path)
        version = metadata.get(TASK_VECTOR)
        if version is None:
            raise InputError(
                f"'{path}' holds no task vector; if it holds weights, subtract the base from them: "
                "TaskVector.between(base, tuned)"
            )
        if version == QUANTIZED_VERSION:
            return cls(*load_quantized(Path(path)))
        if version != PLAIN_VERSION:
            raise newer_version(path, version)
        del metadata[TASK_VECTOR]
        return cls(tensors, metadata)

    @override
    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    @override
    def __len__(self) -> int:
        return len(self._tensors)

    @override
    def __eq__(self, other: object) -> bool:
        """Same names and equal tensors; metadata and the order of names do not count."""
        if not isinstance(other, TaskVector):
            return NotImplemented
        return self.keys() == other.keys() and all(
            torch.equal(tensor, other[name]) for name, tensor in self.items()
        )

    __hash__ = None  # type: ignore[assignment]

    @override
    def __repr__(self) -> str:
        return f"TaskVector({len(self)} tensors, {self.numel():,} values)"

    def __add__(self, other: TaskVector) -> TaskVector:
        return self._plus(other, 1.0)

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self._plus(other, -1.0)

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __mul__(self, factor: float) -> TaskVector:
        factor = check_scale(factor)
        return TaskVector({name: tensor.float() * factor for name, tensor in self.items()})

    __rmul__ = __mul__

    def _plus(self, other: TaskVector, sign: float) -> TaskVector:
        check_same_layout(other, self, "the second task vector", "the first")
        return TaskVector(
            {name: moved(tensor.float(), other[name], sign) for name, tensor in self.items()}
        )


def moved(base: Tensor, change: Tensor, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """Compute base + scale * change: a new tensor on the base's device, of its or another dtype.

    It is computed in float32 or wider; the change may be of any floating-point dtype.
    """
    computed = wide(base.dtype)
    result = base.detach().to(computed, copy=True)
    result.add_(change.detach().to(base.device, computed), alpha=scale)
    return result.to(dtype or base.dtype)


def check_scale(scale: Any, what: str = "the scale") -> float:
    """Make sure that a scale is a number that float32 holds; `what` is how the error calls it."""
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if number and abs(scale) <= torch.finfo(torch.float32).max:
        return float(scale)
    held = ", which float32 does not hold" if number and abs(scale) < math.inf else ""
    raise InputError(f"{what} must be a finite number, not {scale!r}{held}")


def check_floating(tensors: Mapping[str, Tensor], what: str) -> None:
    """Make sure that all tensors are floating point; `what` is how the error calls them."""
    check_weights(tensors, what)
    others = [f"{name} ({t.dtype})" for name, t in tensors.items() if not t.is_floating_point()]
    if others:
        raise InputError(f"{what} holds floating-point tensors only; leave out {listing(others)}")


def check_weights(tensors: Mapping[str, Tensor], what: str) -> None:
    """Make sure that something is tensors by name, and not a module or anything else."""
    expected = "expected tensors by name, such as model.state_dict()"
    if not isinstance(tensors, Mapping):
        raise InputError(f"{what} is of type {type(tensors).__name__}; {expected}")
    others = [f"{n} ({type(t).__name__})" for n, t in tensors.items() if not isinstance(t, Tensor)]
    if others:
        raise InputError(f"{what} holds other things than tensors: {listing(others)}; {expected}")


def check_same_layout(
    tensors: Mapping[str, Tensor],
    like: Mapping[str, Tensor],
    what: str,
    than: str,
    *,
    partly: bool = False,
    of_files: bool = False,
) -> None:
    """Make sure that two sets of tensors have the same names and shapes.

    `what` and `than` are how the error calls them; `partly` allows the first to lack names;
    `of_files` names what merging files can do about it.
    """
    missing = [] if partly else [name for name in like if name not in tensors]
    extra = [name for name in tensors if name not in like]
    if missing or extra:
        strip = ", or give strip_prefix" if of_files else ""
        hint = _prefix_hint(tensors, like, what, strip) or _prefix_hint(like, tensors, than)
        raise InputError(
            f"{what} has other tensors than {than}; missing: {listing(missing)}; "
            f"extra: {listing(extra)}.{hint} Both must come from one architecture"
        )
    shapes = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(like[name].shape)}"
        for name, tensor in tensors.items()
        if tensor.shape != like[name].shape
    ]
    if shapes:
        leave_out = "; exclude what is not to be merged" if of_files else ""
        raise InputError(f"{what} has other shapes than {than}: {listing(shapes)}{leave_out}")


def check_same_dtypes(
    tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], what: str, than: str
) -> None:
    """Make sure that two sets of tensors of the same names have the same dtypes."""
    dtypes = [
        f"{name} {tensor.dtype} instead of {like[name].dtype}".replace("torch.", "")
        for name, tensor in tensors.items()
        if tensor.dtype != like[name].dtype
    ]
    if dtypes:
        raise InputError(
            f"{what} has other dtypes than {than}: {listing(dtypes)}. Convert one of the two"
        )


def _prefix_hint(wrapped: Iterable[str], bare: Iterable[str], what: str, remedy: str = "") -> str:
    """Tell if names differ by a prefix, the usual mark of a wrapper around the model."""
    wrapped, known = list(wrapped), set(bare)
    ends = ((name, dot.end()) for name in wrapped for dot in re.finditer(r"\.", name))
    for prefix in dict.fromkeys(name[:end] for name, end in ends if name[end:] in known):
        plain = {name.removeprefix(prefix) for name in wrapped if name.startswith(prefix)}
        if known <= plain or (len(plain) == len(wrapped) and plain <= known):
            return f" Names in {what} begin with '{prefix}': save both in one way{remedy}."
    return ""


def _difference(name: str, base: Tensor, tuned: Tensor) -> Tensor:
    result = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    if subtract(tuned.detach().to(base.device), base.detach(), result):
        return result
    for what, tensor in (("the base", base), ("the fine-tuned weights", tuned)):
        if not is_finite(tensor.detach().to(wide(base.dtype))):
            raise not_finite(what, [name])
    raise not_finite("the difference of the weights in float32", [name])


def _check_alike(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
    check_weights(base, "the base")
    check_weights(tuned, "the fine-tuned model")
    check_same_layout(tuned, base, "the fine-tuned model", "the base")
    check_same_dtypes(tuned, base, "the fine-tuned model", "the base")


def _check_fits(vector: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    check_weights(base, "the base")
    missing = [name for name in vector if name not in base]
    if missing:
        raise InputError(
            f"the base lacks tensors that the task vector changes: {listing(missing)}. "
            "It must be the model that the task vector was made with"
        )
    check_floating({name: base[name] for name in vector}, "what a task vector changes")
    check_same_layout({name: base[name] for name in vector}, vector, "the base", "the task vector")
