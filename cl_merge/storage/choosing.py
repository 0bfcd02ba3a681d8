"""Which mapping in a training checkpoint holds the weights, and what their tensors are called."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cl_merge.errors import InputError, listing
from cl_merge.storage.unpickling import is_placeholder

log = logging.getLogger(__name__)

T = TypeVar("T")

# Where libraries keep the weights that training changes. Averages of them, as `params_ema`, `ema`
# or `teacher`, are taken where they are the only weights, or by name.
_USUAL = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "module",
    "params",
    "net",
    "network",
    "weights",
)
# Tensors under such keys are no weights.
_TRAINING = re.compile("optimizer|^optim$|scheduler|scaler|rng_state|^callbacks$|^loops$")
_DEEPEST = 20  # a damaged file may hold a mapping within itself

_PREFIX = "module."  # what DistributedDataParallel puts before every name
# What torch.compile, FSDP and checkpointing of activations put between the names of modules.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_AVERAGED = "n_averaged"  # a count that torch.optim.swa_utils.AveragedModel adds

_SAVE = "torch.save(model.state_dict(), path)"


def choose_tensors(path: Path, content: Any, key: str = "") -> dict[str, Tensor]:
    """Choose the weights in what a file holds.

    They are the only mapping that holds tensors by name, at any depth; of several, the one with a
    usual name, such as ``state_dict`` or ``model``. What is no tensor is left out of it.

    Args:
        path: The file, for messages.
        content: What it holds.
        key: Where the weights are, with dots between the keys; empty to find out.

    Returns:
        The tensors by name, as the file has them.

    Raises:
        InputError: If there are no weights, or several, or a tensor cannot be used.
    """
    state, at = content, key
    if key:
        state = _under(content, key)
        if not _holds(state):
            has = listing(_holding(content)) if isinstance(content, Mapping) else "none"
            raise InputError(
                f"'{path}' has no weights under the key '{key}'; keys with some: {has}"
            )
    _check_has_tensors(path, state)
    for _ in range(_DEEPEST):
        inner = _inner(path, state, at)
        if not inner:
            return _checked(path, state)
        state, at = state[inner], f"{at}.{inner}" if at else inner
    raise InputError(f"'{path}' holds mappings within mappings without end; expected a state dict")


def plain_names(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out of the names what wrappers around a model, or around its parts, add to them."""
    found = unwrapped(path, tensors)
    while (names := [name for name in found if name != _AVERAGED]) and all(
        name.startswith(_PREFIX) for name in names
    ):
        found = {name.removeprefix(_PREFIX): found[name] for name in names}
    return found


def unwrapped(path: Path, tensors: Mapping[str, T]) -> dict[str, T]:
    """Leave out of the names the parts that only wrappers add, and no model has."""
    found: dict[str, T] = {}
    for name, tensor in tensors.items():
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in found:
            raise InputError(
                f"'{path}' has two tensors that are '{plain}' without the names of wrappers, one "
                f"of them '{name}'; save the state_dict() of the model without its wrapper"
            )
        found[plain] = tensor
    return found


def _inner(path: Path, state: Mapping[Any, Any], at: str) -> str:
    """Which key of a mapping leads to the weights; empty if they are the mapping itself."""
    holding = _holding(state)
    usual = [key for key in holding if key in _USUAL]
    direct = any(isinstance(key, str) and _is_tensor(value) for key, value in state.items())
    if not holding or (len(holding) == 1 and not direct):
        return "".join(holding)
    if len(usual) != 1:
        keys = [f"{at}.{key}" if at else key for key in holding]
        beside = " beside its own tensors" if direct else ""
        raise InputError(
            f"'{path}' holds several sets of weights ({listing(keys)}){beside}; write "
            f"'{path}:KEY' for the one that is meant, as in '{path}:{keys[0]}'"
        )
    others = [key for key in holding if key != usual[0]]
    if others:
        log.info("'%s': took '%s'; it also has %s", path, usual[0], listing(others))
    return usual[0]


def _holding(state: Mapping[Any, Any]) -> list[str]:
    """The keys of a mapping under which there are weights."""
    return [key for key, value in state.items() if _leads(key) and _holds(value)]


def _holds(value: object, seen: set[int] | None = None) -> bool:
    """Whether a value is a mapping that holds tensors by name, at any depth."""
    seen = set() if seen is None else seen
    if not isinstance(value, Mapping) or id(value) in seen:
        return False
    seen.add(id(value))
    return any(
        isinstance(key, str) and (_is_tensor(inner) or (_leads(key) and _holds(inner, seen)))
        for key, inner in value.items()
    )


def _leads(key: object) -> bool:
    return isinstance(key, str) and not _TRAINING.search(key)


def _under(content: object, key: str) -> object:
    """What is under a key with dots, of which some may be part of the keys; None for nothing."""
    if not isinstance(content, Mapping):
        return None
    if key in content:
        return content[key]
    for end in range(key.count("."), 0, -1):
        parts = key.split(".")
        found = _under(content.get(".".join(parts[:end])), ".".join(parts[end:]))
        if found is not None:
            return found
    return None


def _check_has_tensors(path: Path, content: object) -> None:
    if _holds(content):
        return
    values = content.values() if isinstance(content, Mapping) else [content]
    objects = sorted({value.origin for value in values if is_placeholder(value)})
    if objects:
        raise InputError(
            f"'{path}' holds Python objects ({listing(objects)}), which are not loaded because "
            f"that runs code; save only tensors and plain values, as {_SAVE}"
        )
    is_mapping = isinstance(content, Mapping)
    found = "no tensors by name" if is_mapping else f"a {type(content).__name__}"
    raise InputError(f"'{path}' holds {found}; expected a state dict, as saved by {_SAVE}")


def _checked(path: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, which must be plain; what is no tensor is left out, and told."""
    tensors, left_out = {}, []
    for name, value in state.items():
        if not _is_tensor(value):
            left_out.append(str(name))
        elif not isinstance(name, str):
            raise InputError(
                f"'{path}': {name!r} is the key of a tensor; expected a state dict, tensors by name"
            )
        elif not isinstance(value, Tensor) or not _is_plain(value):
            raise InputError(
                f"'{path}': '{name}' is a sparse, quantised, sharded or empty tensor; expected "
                "plain values: convert it with to_dense(), dequantize() or full_tensor()"
            )
        else:
            tensors[name] = value.detach()
    if left_out:
        log.info("'%s': left out what is no tensor: %s", path, listing(left_out))
    return tensors


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor) or (is_placeholder(value) and value.is_tensor)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
