"""The weights of a live module: which of them train, how to copy them and put others in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cl_merge.errors import InputError, listing


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Find the parameters that a task can change.

    By name, the floating-point parameters that require a gradient; tied ones once.
    """
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point()
    }


def check_same_parameters(
    before: Mapping[str, Tensor], live: Mapping[str, Tensor], who: str
) -> None:
    """Check that the parameters that train today, if any, are those of the first task.

    `before` is empty if this is the first; `who` is what depends on it, for the message.
    """
    if not live:
        raise InputError("the module has no floating-point parameter that requires a gradient")
    missing, extra = before.keys() - live.keys(), live.keys() - before.keys()
    if before and (missing or extra):
        raise InputError(
            "the parameters that train are not those of the first task; no longer training: "
            f"{listing(sorted(missing))}; new: {listing(sorted(extra))}. Keep requires_grad as it "
            f"was, or use a new {who}"
        )


def floating_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Find the floating-point buffers that `state_dict` saves, such as batch-norm statistics."""
    saved = module.state_dict(keep_vars=True)
    return {
        name: buffer
        for name, buffer in module.named_buffers()
        if name in saved and buffer.is_floating_point()
    }


def copies(
    tensors: Mapping[str, Tensor], device: str | torch.device | None = None
) -> dict[str, Tensor]:
    """Copy tensors, detached, to a device or to where they are."""
    return {
        name: tensor.detach().to(device=device or tensor.device, copy=True)
        for name, tensor in tensors.items()
    }


@torch.no_grad()
def install(
    live: Mapping[str, Tensor], values: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> None:
    """Write values into live tensors, in place: storage, dtype and device stay as they are."""
    for name, value in values.items() if isinstance(values, Mapping) else values:
        live[name].copy_(value)


@contextmanager
def swapped(
    live: Mapping[str, Tensor], values: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> Iterator[None]:
    """Hold other values in live tensors for a while; bit for bit the former ones come back."""
    before = copies(live)
    try:
        install(live, values)
        yield
    finally:
        install(live, before)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Hold a module in evaluation mode for a while; every part comes back in its own mode."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
