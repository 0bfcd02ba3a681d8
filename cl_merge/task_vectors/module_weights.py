"""The weights of a live module: which of them train, how to copy them and put others in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from cl_merge.task_vectors.growth import leading
from cl_merge.task_vectors.shards import local, part_of, reshard

# What `torch.compile` puts in front of the names inside the part that it wraps.
_COMPILED = "_orig_mod."


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by name, tied ones once; a compiled part has the names of the plain one.

    Where they are sharded, these are the sharded ones, also after a forward pass has gathered them.
    """
    reshard(module)
    return {_plain(name): parameter for name, parameter in module.named_parameters()}


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Find the parameters that a task can change.

    By name, the floating-point parameters that require a gradient; tied ones once.
    """
    return {name: p for name, p in parameters_of(module).items() if trains(p)}


def trains(parameter: nn.Parameter) -> bool:
    """Whether a task can change a parameter: a floating-point one that requires a gradient."""
    return parameter.requires_grad and parameter.is_floating_point()


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """All buffers by name; a compiled part has the names of the plain one."""
    return {_plain(name): buffer for name, buffer in module.named_buffers()}


def floating_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Find the floating-point buffers that `state_dict` saves, such as batch-norm statistics.

    Sparse ones, such as the adjacency of a graph, are none of them.
    """
    # Not from `state_dict`, which modules override in ways of their own.
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }
    return {
        _plain(name): buffer
        for name, buffer in module.named_buffers()
        if name not in transient and buffer.is_floating_point() and _is_dense(buffer)
    }


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and floating-point buffers of a module by name, live."""
    return parameters_of(module) | floating_buffers(module)


def with_names_of(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors the names and dtypes of a module's own, for `torch.func.functional_call`.

    Names of compiled parts differ; what the module does not have is left out.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    here = {name: tensor for name, tensor in own.items() if _plain(name) in tensors}
    return {name: tensors[_plain(name)].to(tensor.dtype) for name, tensor in here.items()}


def copies(
    tensors: Mapping[str, Tensor], device: str | torch.device | None = None
) -> dict[str, Tensor]:
    """Copy tensors, detached, to a device or to where they are."""
    return {
        name: tensor.detach().to(device=device or tensor.device, copy=True)
        for name, tensor in tensors.items()
    }


def dense_gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter, to be added to; zeros where it has none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.is_sparse:
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad


@torch.no_grad()
def install(
    live: Mapping[str, Tensor], values: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> None:
    """Write values into live tensors, in place: storage, dtype and device stay as they are.

    Of a tensor that has grown since, the rest stays as it is. Sharded tensors take their part of
    whole values. Buffers that a module has made anew in an evaluation are written to as well.
    """
    for name, value in values.items() if isinstance(values, Mapping) else values:
        # Outside of inference mode a tensor that was made in it cannot be written to.
        with torch.inference_mode() if live[name].is_inference() else nullcontext():
            target = leading(live[name], value.shape)
            local(target).copy_(part_of(value, target))


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


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Sum up the bits of each tensor: a number that changes with its values, on any device.

    Of a sharded tensor those that this process has. Sparse tensors are left out.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if _is_dense(tensor)}
    sums = [_sum_of_bits(local(tensor.detach())) for tensor in tensors.values()]
    if len({total.device for total in sums}) > 1:
        sums = [total.cpu() for total in sums]
    return dict(zip(tensors, torch.stack(sums).tolist() if sums else [], strict=True))


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided


def _sum_of_bits(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    data = (flat if flat.storage_offset() == 0 else flat.clone()).view(torch.uint8)
    words = len(data) // 8 * 8  # sums of 64 bits are the fastest ones
    return data[:words].view(torch.int64).sum() + data[words:].sum()


def _plain(name: str) -> str:
    return name.replace(_COMPILED, "")
