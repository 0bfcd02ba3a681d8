"""Gram matrices of what goes into the linear layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl_merge.errors import InputError


def gram_matrices(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> dict[str, Tensor]:
    """Collect the Gram matrices of the inputs of a model's linear layers, for ``"regmean"``.

    That of a layer is the mean of x xᵀ over all its input vectors x, in all positions of all
    samples. A thousand samples of a task are plenty.

    Args:
        model: The model after its task; it is run in evaluation mode, without gradients.
        batches: Inputs of that task: tensors, sequences whose first entry is the input, or mappings
            of arguments by name; on the model's device.
        forward: Runs the model on a batch, if it is called in another way.

    Returns:
        float32 ``[inputs, inputs]`` on the model's device, by the name of the layer's weight.
        Layers that are not called as modules, as within `torch.nn.MultiheadAttention`, have none.

    Raises:
        InputError: If no linear layer was called.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> grams = gram_matrices(model, [torch.tensor([[1.0, 2.0], [3.0, 0.0]])])
        >>> grams["0.weight"]
        tensor([[5., 1.],
                [1., 2.]])
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(
        name: str, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        values = (*inputs, *named.values())[0]
        rows = values.detach().reshape(-1, values.shape[-1]).float()
        sums[name] = sums[name] + rows.T @ rows if name in sums else rows.T @ rows
        counts[name] = counts.get(name, 0) + len(rows)

    modes = {module: module.training for module in model.modules()}
    hooks = [
        module.register_forward_pre_hook(
            partial(add, f"{name}.weight" if name else "weight"), with_kwargs=True
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                (forward or _run)(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    found = {name: total / counts[name] for name, total in sums.items() if counts[name]}
    if not found:
        raise InputError("no linear layer of the model was called: there was no batch, or no layer")
    return found


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch[0] if isinstance(batch, list | tuple) else batch)
