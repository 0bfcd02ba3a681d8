"""What a stream has merged so far: the base, what was folded, and the weights that follow."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cl_merge.errors import InputError, listing, unknown_name
from cl_merge.mergers import Merger
from cl_merge.mergers.stack import StackMerger
from cl_merge.stream_merger.base_weights import BaseWeights
from cl_merge.stream_merger.buffers import MergedBuffers
from cl_merge.stream_merger.sharding import own_state, shards_of, whole_state
from cl_merge.task_vectors.growth import can_hold, check_grown
from cl_merge.task_vectors.module_weights import floating_buffers, parameters_of, weights_of
from cl_merge.task_vectors.scales import Scales, scaled
from cl_merge.task_vectors.selection import Selection
from cl_merge.task_vectors.shards import Shards
from cl_merge.task_vectors.task_vector import TaskVector, check_same_layout

LEFT_OUT = ("trained", "base")


class MergedModel:
    """The merged model of a stream, after any number of tasks.

    Where parameters are sharded over processes, each keeps a stretch of every one.

    Args:
        merger: What folds the tasks; also an attribute.
        scales: The scale of the merged task vector; also an attribute.
        selection: Which parameters are merged.
        buffers: As of `StreamMerger`; the attribute is what holds them.
        left_out: As of `StreamMerger`.
        device: As of `StreamMerger`.
        keep_frozen: As of `BaseWeights`.

    Attributes:
        base: The weights before they first move.
        at_end: Checksums of all parameters, as the last task left them.
    """

    def __init__(
        self,
        merger: Merger,
        scales: Scales,
        selection: Selection,
        *,
        buffers: str | None,
        left_out: str,
        device: str | torch.device | None,
        keep_frozen: bool,
    ) -> None:
        if left_out not in LEFT_OUT:
            raise unknown_name("choice of left_out", left_out, LEFT_OUT)
        self.merger, self.scales = merger, scales
        self.base = BaseWeights(device, keep_frozen=keep_frozen)
        self.buffers = MergedBuffers(buffers)
        self.at_end: dict[str, int] = {}
        self._left_out, self._selection, self._keep_frozen = left_out, selection, keep_frozen
        self._changes: dict[str, Tensor] | None = None

    def fresh(self) -> MergedModel:
        """One of the same settings that knows no task and no base."""
        return MergedModel(
            type(self.merger)(**self.merger.options),
            self.scales,
            self._selection,
            buffers=self.buffers.choice,
            left_out=self._left_out,
            device=self.base.device,
            keep_frozen=self._keep_frozen,
        )

    @property
    def shards(self) -> Shards | None:
        """Which stretches of parameters are kept here, if other processes keep the rest."""
        return self.base.shards

    def merged_base(self) -> dict[str, Tensor]:
        """The base of what is merged, as it is kept here."""
        base = self.base.parameters
        return {name: base[name] for name in self._selection.chosen(base)}

    def layout(self) -> dict[str, Tensor]:
        """Tensors of the names, shapes and dtypes of what is merged."""
        layout = self.base.layout
        return {name: layout[name] for name in self.merged_base()}

    def shard(self, live: Mapping[str, Tensor]) -> None:
        """Keep stretches only from now on, if others hold the rest of the live parameters."""
        shards = shards_of(live, cuts=self.merger.unit == "element")
        if self.shards is None and shards is not None:
            state = own_state(self._own_state(), shards)
            self.base.shards = self.merger.shards = shards
            self._load_own_state(state, None)

    def merged_here(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is merged, of live tensors; what is left out may be anything.

        Raises:
            InputError: If a parameter that is merged has gone or shrunk.
        """
        layout = self.layout()
        try:
            check_grown(live, layout, layout, "the module")
        except InputError as error:
            raise InputError(
                f"{error}. Leave out from the first task on what comes and goes, as in "
                "exclude=['heads.*']"
            ) from None
        return {name: live[name] for name in layout}

    def checked_live(self, module: nn.Module) -> dict[str, Tensor]:
        """The parameters and buffers of a module that can hold what is merged, or `InputError`."""
        if self.merger.tasks == 0:
            raise InputError("nothing to install: no task has been trained and merged yet")
        if not self.base.parameters:
            raise InputError(
                f"the Merger '{self.merger.name}' has folded task vectors before, but the weights "
                "that they start from are not known until a task begins; give a fresh one"
            )
        layout, live = self.layout(), weights_of(module)
        here = {name: live[name] for name in layout if name in live}
        if len(here) < len(layout):
            # Where no name fits, all of them together may tell of a prefix.
            check_same_layout(here or live, layout, "the module", "that of the tasks")
        check_grown(live, layout, layout, "the module")
        return live

    def changes(self) -> Iterable[tuple[str, Tensor]]:
        """The merged task vector, a parameter at a time: names, and float32 tensors."""
        if not (isinstance(self.merger, StackMerger) or self.merger.unit == "parameter"):
            return self.merger.items()
        if self._changes is None:  # it takes too long to compute for every evaluation
            with torch.inference_mode(False):
                self._changes = dict(self.merger.items())
        return self._changes.items()

    def merged(self) -> TaskVector:
        """The merged task vector, whole."""
        if self.shards is None:
            return self.merger.merged()
        wholes = {name: self.shards.whole(name, t).cpu() for name, t in self.changes()}
        return TaskVector(wholes, self.merger.metadata())

    def evaluation_buffers(self) -> dict[str, Tensor]:
        """The buffers of the merged model by name, where they are not those of the last task."""
        return self.buffers.values(self.base.buffers)

    def values(
        self,
        live: Mapping[str, Tensor],
        scales: Scales | None = None,
        changes: Iterable[tuple[str, Tensor]] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """What the merged model holds, of what is not as the last task left it.

        Args:
            live: Parameters and buffers that are to hold it.
            scales: None for the scales in use.
            changes: The merged task vector; None computes it.

        Yields:
            Names and whole tensors.
        """
        merged = self.merged_base()
        for name, value in scaled(merged, changes or self.changes(), scales or self.scales):
            yield name, self.base.whole(name, value)
        base = self.base.parameters if self._left_out == "base" else {}
        left = ((name, kept) for name, kept in base.items() if name not in merged)
        rest = ((name, self.base.whole(name, kept)) for name, kept in left)
        for name, value in chain(rest, self.evaluation_buffers().items()):
            if name in live and can_hold(live[name], value.shape):
                yield name, value

    def written(self, module: nn.Module) -> dict[str, Tensor]:
        """What of a module the merged weights are written to: what has trained, and buffers."""
        live = parameters_of(module)
        here = {name: live[name] for name in self.base.parameters if name in live}
        return here | floating_buffers(module)

    def folded(self, at_end: dict[str, int]) -> None:
        """Note that a task was folded, which left parameters of these checksums."""
        self.at_end, self._changes = at_end, None

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on, as plain values and live tensors.

        Where parameters are sharded, only the first process has the tensors.
        """
        return whole_state(self._own_state(), self.shards, self.merger)

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None) -> None:
        """Go on from what `state_dict` returned; its tensors are copied.

        Raises:
            InputError: If what has been merged is left out now.
        """
        self._load_own_state(own_state(state, self.shards), device)
        names = self.merged_base()
        if lost := [name for name in state["merger"]["accumulators"] if name not in names]:
            raise InputError(
                f"the tasks in the saved state merged {listing(lost)}, which include and exclude "
                "leave out now; choose the parameters that were merged then"
            )

    def backup(self) -> Callable[[], None]:
        """Copy the state; what is returned goes back to it, in this process."""
        # The base has tensors that are replaced, not changed, and needs no copies of them.
        folded = {"merger", "buffer_averages"}
        state = {
            key: copy.deepcopy(kept) if key in folded else copy.copy(kept)
            for key, kept in self._own_state().items()
        }
        scales = self.scales

        def undo() -> None:
            self._load_own_state(state, None)
            self.scales = scales

        return undo

    def move_to(self, device: torch.device) -> None:
        """Move everything that is kept, unless a device was asked for."""
        kept = next(iter(self.base.parameters.values()), None)
        if self.base.device is None and kept is not None and kept.device != device:
            self._load_own_state(self._own_state(), device)

    def _own_state(self) -> dict[str, Any]:
        """What this process keeps of the state: all of it, unless parameters are sharded."""
        return {
            **self.base.state_dict(),
            **self.buffers.state_dict(),
            "merger": self.merger.state_dict(),
            "at_end": self.at_end,
        }

    def _load_own_state(self, state: Mapping[str, Any], device: torch.device | None) -> None:
        device = device or self.base.device
        # An evaluation runs in inference mode, whose tensors are of no use to the next training.
        with torch.inference_mode(False):
            self.merger.load_state_dict(state["merger"], device)
            self.base.load_state_dict(state, device)
            self.buffers.load_state_dict(state, device)
        self.folded(dict(state.get("at_end", {})))
