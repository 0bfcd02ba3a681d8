"""Tensors that grow: a head with rows for new classes, whose old entries are its leading block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cl_merge.errors import InputError, listing


def can_hold(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Whether a tensor has as many dimensions as the shape, and each at least as long."""
    return tensor.ndim == len(shape) and all(
        size >= least for size, least in zip(tensor.shape, shape, strict=True)
    )


def leading(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The leading block of a tensor: a view of the given shape, what it was before it grew."""
    if tensor.shape == torch.Size(shape):  # sharded tensors are no others, and have no such views
        return tensor
    return tensor[tuple(slice(size) for size in shape)]


def grown(before: Tensor, born: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Extend a tensor to a larger shape.

    Args:
        before: What becomes the leading block.
        born: Values of the shape, of which those outside the leading block are used; None for 0.
        shape: The new shape.

    Returns:
        A new tensor, with the dtype and on the device of `before`.

    Example:
        >>> grown(torch.tensor([1.0, 2.0]), torch.tensor([7.0, 8.0, 9.0]), (3,))
        tensor([1., 2., 9.])
    """
    # What is made in inference mode cannot be changed outside of it.
    with torch.inference_mode(False), torch.no_grad():
        result = before.new_zeros(shape) if born is None else born.detach().to(before, copy=True)
        leading(result, before.shape).copy_(before)
    return result


def check_grown(
    live: Mapping[str, Tensor], before: Mapping[str, Tensor], names: Iterable[str], what: str
) -> None:
    """Make sure that tensors of these names are still there, and have not shrunk.

    Raises:
        InputError: Names those that have; `what` is how the error calls their owner.
    """
    names = list(names)
    gone = [name for name in names if name not in live]
    if gone:
        raise InputError(f"{what} no longer has {listing(gone)}, which earlier tasks trained")
    shrunk = [
        f"{name} {tuple(live[name].shape)} instead of {tuple(before[name].shape)}"
        for name in names
        if not can_hold(live[name], before[name].shape)
    ]
    if shrunk:
        raise InputError(
            f"{what} has other shapes than in earlier tasks: {listing(shrunk)}; parameters may "
            "grow, with the former entries in front, but not shrink"
        )
