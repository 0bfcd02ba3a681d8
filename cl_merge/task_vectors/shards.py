"""Parameters that are sharded over processes: each process keeps a stretch of every one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from cl_merge.errors import InputError

if TYPE_CHECKING:  # it takes a while to import, and only sharded tensors need it
    from torch.distributed.tensor import DTensor

Result = TypeVar("Result")


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a ``DTensor``, of which each process holds a part."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part_of(value: Tensor, live: Tensor) -> Tensor:
    """The part of a value that this process holds of a live tensor of the same shape."""
    if not is_sharded(live):
        return whole(value)
    if is_sharded(value):
        return local(value)
    # What distributed checkpoints ask of a tensor: a block of it, or none.
    blocks = live.__create_chunk_list__()  # type: ignore[no-untyped-call]
    for block in blocks:
        for dimension, (offset, size) in enumerate(zip(block.offsets, block.sizes, strict=True)):
            value = value.narrow(dimension, min(offset, value.shape[dimension]), size)
    return value if blocks else value.new_empty(local(live).shape)


def reshard(module: nn.Module) -> None:
    """Let the parameters of a module be the sharded ones, also after a forward pass.

    FSDP2 leaves those of the root gathered then; what is written to them would not last.
    """
    for part in module.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(part).__mro__):
            part.reshard()  # type: ignore[operator]


class Shards:
    """Cuts parameters up, so that each process keeps and merges a stretch of every one.

    Whatever the mesh, a process has a stretch of the flattened parameter, and knows where in it:
    rules find every element as on one process, and no element is kept twice. Rules that need whole
    parameters are given them by turns. All methods but `span` and `own_part` must be called on all
    processes alike.

    Args:
        cuts: Whether parameters are cut; otherwise each is kept whole, by one process.
        device: Where the processes can send tensors from.

    Attributes:
        shapes: Shapes of the whole parameters, by name.
    """

    def __init__(self, *, cuts: bool, device: torch.device) -> None:
        self.shapes: dict[str, torch.Size] = {}
        self._device = device
        self._cuts, self._spans = cuts, dict[str, slice]()
        self._owners: dict[str, int] = {}
        self._loads = [0] * dist.get_world_size()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take parameters in, by name.

        Raises:
            InputError: If one is known in another shape.
        """
        rank, processes = dist.get_rank(), dist.get_world_size()
        for name, tensor in tensors.items():
            shape, size = tensor.shape, tensor.numel()
            if self.shapes.setdefault(name, shape) != shape:
                raise InputError(
                    f"{name} is {tuple(shape)} instead of {tuple(self.shapes[name])}: sharded "
                    "parameters cannot grow; add new ones, or leave it out with exclude"
                )
            if name in self._spans:
                continue
            if self._cuts:
                each = -(-size // processes)
                self._spans[name] = slice(min(rank * each, size), min((rank + 1) * each, size))
            else:
                owner = self._owners[name] = self._loads.index(min(self._loads))
                self._loads[owner] += size
                self._spans[name] = slice(0, size if rank == owner else 0)

    def span(self, name: str) -> slice:
        """Which stretch of a flattened parameter this process keeps."""
        return self._spans[name]

    def own_part(self, name: str, tensor: Tensor) -> Tensor:
        """The stretch that this process keeps of a whole parameter: a view [n].

        Where parameters are not cut, the tensor may also be another one that belongs to it.
        """
        flat, span = tensor.detach().reshape(-1), self._spans[name]
        return flat[span] if self._cuts or span.stop == 0 else flat

    def own(self, name: str, tensor: Tensor) -> Tensor:
        """The stretch that this process keeps of a live parameter, a copy [n]."""
        return self.own_part(name, whole(tensor.detach())).clone()

    def whole(self, name: str, stretch: Tensor, shape: torch.Size | None = None) -> Tensor:
        """Gather a parameter, in its shape, of the stretches [n] that the processes keep.

        Where parameters are not cut, another tensor that belongs to one is gathered in its `shape`.
        """
        shape = self.shapes[name] if shape is None else shape
        size, processes = shape.numel(), dist.get_world_size()
        stretch = stretch.to(self._device)
        if self._cuts:
            each = -(-size // processes)
            sent = stretch.new_zeros(each)
            sent[: len(stretch)] = stretch
            result = stretch.new_empty(each * processes)
            dist.all_gather_into_tensor(_bytes(result), _bytes(sent))
        else:
            owner = self._owners[name]
            result = stretch if owner == dist.get_rank() else stretch.new_empty(size)
            dist.broadcast(_bytes(result), src=owner)
        return result[:size].view(shape)

    def gathered(
        self, stretches: Mapping[str, Tensor], shapes: Mapping[str, torch.Size] | None = None
    ) -> dict[str, Tensor]:
        """Gather parameters one after another on the CPU of the first process; others get none.

        `shapes` is for tensors that belong to parameters, as of `whole`.
        """
        shapes = self.shapes if shapes is None else shapes
        found = ((name, self.whole(name, part, shapes[name])) for name, part in stretches.items())
        return {name: tensor.cpu() for name, tensor in found if dist.get_rank() == 0}

    def everywhere(self, found: Sequence[Result]) -> list[Result]:
        """What all processes found, in the order of their ranks; tensors are on the CPU."""
        own: Any = tree_map_only(Tensor, lambda tensor: tensor.cpu(), list(found))
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, own)
        return [one for part in every for one in part]


def together(shards: Shards | None, work: Callable[[], Result]) -> Result:
    """Do work that one process may refuse; then all of them do, for the others would wait."""
    if shards is None:
        return work()
    done, refused = list[Result](), list[str]()
    try:
        done.append(work())
    except InputError as error:
        refused.append(str(error))
    if every := shards.everywhere(refused):
        raise InputError(every[0])
    return done[0]


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: not every backend can send every dtype."""
    return tensor.view(torch.uint8)
