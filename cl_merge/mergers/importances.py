"""What comes with a task vector for methods that weigh: of each element, or Gram matrices."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from cl_merge.errors import InputError, listing
from cl_merge.task_vectors.task_vector import check_same_layout


def needed_of(grams: bool) -> str:
    """What a method that weighs needs of each task, for messages."""
    of_layers = "the Gram matrices of the inputs of layers, as gram_matrices collects them"
    return of_layers if grams else "the importance of each element"


def check_importances(
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    what: str,
    than: str,
    *,
    grams: bool,
) -> None:
    """Check names and shapes of importances, or of Gram matrices, against parameters.

    Args:
        given: Tensors by name, which may hold nothing.
        wanted: The parameters, which may hold nothing.
        what: What `given` is called in messages.
        than: Likewise for `wanted`.
        grams: Whether they are Gram matrices, of some of the matrices among the parameters.

    Raises:
        InputError: Names what is wrong.
    """
    if not grams:
        check_same_layout(given, wanted, what, than)
        return
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    held = given.keys() & shapes.keys()
    if not held:
        raise InputError(
            f"{what} has no Gram matrix of what is merged, but has {listing(list(given))}; "
            f"expected names of weights, such as {listing(list(shapes), limit=1)}"
        )
    wrong = [
        f"{name} {tuple(given[name].shape)} for a weight of shape {shapes[name]}"
        for name in sorted(held)
        if len(shapes[name]) != 2 or tuple(given[name].shape) != (shapes[name][1],) * 2
    ]
    if wrong:
        raise InputError(
            f"{what} has no Gram matrices of inputs: {listing(wrong)}; expected [n, n] for a "
            "weight [m, n]"
        )


def check_same_weighed(names: Collection[str], before: Collection[str], what: str) -> None:
    """Make sure that there are Gram matrices of the same weights as in the tasks before."""
    missing, extra = sorted(set(before) - set(names)), sorted(set(names) - set(before))
    if missing or extra:
        raise InputError(
            f"{what} has Gram matrices of other weights than the tasks before; missing: "
            f"{listing(missing)}; extra: {listing(extra)}"
        )


def check_values(given: Mapping[str, Tensor], what: str, *, grams: bool) -> None:
    """Make sure that all importances are 0 or more, and that Gram matrices can be some."""
    wrong = [name for name, tensor in given.items() if not is_importance(tensor, grams=grams)]
    if wrong and grams:
        raise InputError(
            f"{what} is no symmetric matrix, with a diagonal of 0 or more: {listing(wrong)}"
        )
    if wrong:
        raise InputError(f"{what} is negative in {listing(wrong)}; expected 0 or more")


def is_importance(values: Tensor, *, grams: bool) -> bool:
    """Whether finite values can be importances, or all those of a Gram matrix."""
    if not grams:
        return not bool((values < 0).any())
    size = round(values.numel() ** 0.5)
    matrix = values.view(size, size)
    slack = 1e-4 * float(matrix.diagonal().abs().max()) if size else 0.0
    near = torch.allclose(matrix, matrix.T, rtol=1e-3, atol=slack)
    return near and not bool((matrix.diagonal() < 0).any())
