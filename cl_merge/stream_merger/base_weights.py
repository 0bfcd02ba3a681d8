"""The base of a stream: the weights before they first move, whenever they begin to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cl_merge.errors import InputError, listing
from cl_merge.stream_merger.messages import warn_of_frozen
from cl_merge.task_vectors.growth import can_hold, grown
from cl_merge.task_vectors.module_weights import (
    checksums,
    copies,
    floating_buffers,
    install,
    parameters_of,
    trained_parameters,
    trains,
)
from cl_merge.task_vectors.shards import Shards


class BaseWeights:
    """Keeps the value that each parameter and floating-point buffer had before it first moved.

    Parameters that do not train yet are watched, for they may begin to. What joins later, or grows
    new entries, has the value that it is born with as its base.

    Args:
        device: Where the copies are kept, also an attribute; None is where the module has them.
        keep_frozen: Keep, on the CPU, copies of parameters that do not train too: some may move
            without a gradient, as the teacher of a self-supervised model does.

    Attributes:
        parameters: The base of every parameter that has trained, by name.
        buffers: The base of every floating-point buffer, by name.
        at_start: Checksums of all parameters when the task began, by name.
        shards: Which stretches of parameters are kept here, if other processes keep the rest.
    """

    def __init__(self, device: str | torch.device | None, *, keep_frozen: bool) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.at_start: dict[str, int] = {}
        self.shards: Shards | None = None
        self.device, self._keep_frozen = _checked_device(device), keep_frozen
        self._frozen: list[tuple[str, nn.Parameter]] = []
        self._frozen_base: dict[str, Tensor] = {}

    @property
    def layout(self) -> dict[str, Tensor]:
        """Tensors of the names and shapes of `parameters`, which are whole."""
        if self.shards is None:
            return self.parameters
        shapes = self.shards.shapes
        return {
            name: torch.empty(shapes[name], dtype=base.dtype, device="meta")
            for name, base in self.parameters.items()
        }

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is kept here of live tensors."""
        if self.shards is None:
            return dict(tensors)
        self.shards.add(tensors)
        return {name: self.shards.own(name, tensor) for name, tensor in tensors.items()}

    def whole(self, name: str, kept: Tensor) -> Tensor:
        """The whole of what is kept here of a parameter."""
        return kept if self.shards is None else self.shards.whole(name, kept)

    def note(self, module: nn.Module, *, resumed: bool) -> None:
        """Note the base of what is new, as a task begins.

        Args:
            module: The module, with the weights that the task starts from.
            resumed: Whether the task began before, and `load_state_dict` has told how.

        Raises:
            InputError: If a parameter is not initialized yet.
        """
        live = parameters_of(module)
        if lazy := [name for name, parameter in live.items() if is_lazy(parameter)]:
            raise InputError(
                f"the shapes of lazy parameters are not known yet: {listing(lazy)}; run one batch "
                "through the module first"
            )
        if not trained_parameters(module):
            warn_of_frozen()
        now = checksums(live)
        self.at_start = now | self.at_start if resumed else now
        for name, before in self.layout.items():
            after = live.get(name)
            if after is None or after.shape == before.shape:
                continue
            if self.shards is not None:
                self.shards.add({name: after})  # raises
            if can_hold(after, before.shape):
                self.parameters[name] = grown(before, after, after.shape)
            else:  # another parameter of this name
                self.parameters |= copies({name: after}, self.device)
        self._frozen = [(name, p) for name, p in live.items() if name not in self.parameters]
        self.watch()
        if self._keep_frozen:
            new = {name: p for name, p in self._frozen if name not in self._frozen_base}
            self._frozen_base |= copies(self.own(new), "cpu")
        for name, buffer in floating_buffers(module).items():
            if name not in self.buffers or self.buffers[name].shape != buffer.shape:
                self.buffers |= copies({name: buffer}, self.device)

    def watch(self) -> None:
        """Note the base of parameters that require a gradient since the last call."""
        joined = {name: p for name, p in self._frozen if trains(p)}
        if joined:
            self.parameters |= copies(self.own(joined), self.device)
            self._frozen = [(name, p) for name, p in self._frozen if name not in joined]

    def restore(self, module: nn.Module) -> None:
        """Put the base into a module, as far as the module has it."""
        live = parameters_of(module) | floating_buffers(module)
        kept = self._frozen_base | self.parameters
        values = ((name, self.whole(name, value)) for name, value in kept.items() if name in live)
        for name, value in chain(values, self.buffers.items()):
            if name in live and can_hold(live[name], value.shape):
                install(live, {name: value})

    def moved_while_frozen(self, now: Mapping[str, int]) -> list[str]:
        """Names of the parameters that have moved in this task although nothing trained them.

        `now` has the checksums of these parameters, and may have others.
        """
        here = [name for name, _ in self._frozen if name in now and name in self.at_start]
        return [name for name in here if now[name] != self.at_start[name]]

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on, as plain values and live tensors."""
        moved: Iterable[str] = ()
        if self.shards is not None:  # all processes must tell of the same
            moved = self._frozen_base
        elif self._keep_frozen:
            moved = self.moved_while_frozen(checksums(dict(self._frozen)))
        return {
            "base": self.parameters,
            "base_buffers": self.buffers,
            "frozen_base": {name: self._frozen_base[name] for name in moved},
            "at_start": self.at_start,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None) -> None:
        """Go on from what `state_dict` returned, or what was written before there were all keys."""
        self.parameters = copies(state["base"], device)
        self.buffers = copies(state["base_buffers"], device)
        self._frozen_base = copies(state.get("frozen_base", {}))
        self.at_start = dict(state.get("at_start", {}))


def _checked_device(device: str | torch.device | None) -> torch.device | None:
    try:
        return torch.device(device) if device is not None else None
    except RuntimeError as error:
        raise InputError(
            f"device={device}: no such device; expected as in 'cpu', 'cuda'"
        ) from error
