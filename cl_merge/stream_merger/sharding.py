"""What a stream keeps where parameters are sharded: its state in one piece, and in parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from cl_merge.mergers import Merger
from cl_merge.storage.quantize import stored
from cl_merge.task_vectors.shards import Shards, is_sharded


def shards_of(live: Mapping[str, Tensor], *, cuts: bool) -> Shards | None:
    """How to keep parameters, if one of them is sharded; `cuts` as of `Shards`."""
    sharded = [tensor for tensor in live.values() if is_sharded(tensor)]
    return Shards(cuts=cuts, device=sharded[0].device) if sharded else None


def stored_stretches(
    vector: Mapping[str, Tensor], store: str, shards: Shards | None
) -> dict[str, Tensor]:
    """What comes back of a task vector, whole or in stretches, from a store."""
    if shards is None or store == "float32":
        return stored(vector, store)
    back: dict[str, Tensor] = {}
    for name, stretch in vector.items():
        tensor = stored({name: shards.whole(name, stretch)}, store)[name]
        back[name] = shards.own_part(name, tensor).to(stretch.device, copy=True)
    return back


def whole_state(state: Mapping[str, Any], shards: Shards | None, merger: Merger) -> dict[str, Any]:
    """The state of a stream as one process has it; only the first of several has the tensors."""
    if shards is None:
        return dict(state)

    def gathered(tensors: Mapping[str, Tensor], key: str | None = None) -> dict[str, Tensor]:
        shapes = {name: shards.shapes[name] for name in tensors}
        if key is not None:
            shapes = {name: merger.accumulator_shape(key, shape) for name, shape in shapes.items()}
        return shards.gathered(tensors, shapes)

    return _mapped(state, gathered)


def own_state(state: Mapping[str, Any], shards: Shards | None) -> dict[str, Any]:
    """What this process keeps of the state that one process had."""
    if shards is None:
        return dict(state)
    every = state["merger"]["accumulators"]
    shards.add({name: next(iter(kept.values())) for name, kept in every.items()})

    def own(tensors: Mapping[str, Tensor], key: str | None = None) -> dict[str, Tensor]:
        if key is None:
            shards.add(tensors)
        return {name: shards.own_part(name, tensor) for name, tensor in tensors.items()}

    return _mapped(state, own)


def _mapped(state: Mapping[str, Any], change: Callable[..., dict[str, Tensor]]) -> dict[str, Any]:
    """The state with all tensors by parameter changed, those of the merger by their keys."""
    merger, every = dict(state["merger"]), state["merger"]["accumulators"]
    keys = dict.fromkeys(key for kept in every.values() for key in kept)
    changed = {key: change({name: kept[key] for name, kept in every.items()}, key) for key in keys}
    names = {name: None for of_key in changed.values() for name in of_key}
    merger["accumulators"] = {
        name: {key: of_key[name] for key, of_key in changed.items()} for name in names
    }
    parts = {key: change(state[key]) for key in ("base", "frozen_base") if key in state}
    return {**state, **parts, "merger": merger}
