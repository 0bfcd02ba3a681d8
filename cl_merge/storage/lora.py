"""LoRA adapters of peft as task vectors: the products of their factors."""

from __future__ import annotations

import functools
import json
import math
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.errors import InputError, listing
from cl_merge.storage.weights import StoredTensor, Weights

CONFIG = "adapter_config.json"

_PREFIX = "base_model.model."
_FACTORS = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

# What changes more than the product of two factors, and what is in use then.
_REFUSED = {
    "use_dora": "DoRA scales the columns of the base too",
    "lora_bias": "it has biases of its own",
    "megatron_config": "its layers are split over devices",
    "alora_invocation_tokens": "it is active after some tokens only",
    "use_qalora": "it pools its inputs",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "it is more than the product of two factors",
    "monteclora_config": "it is more than the product of two factors",
    "velora_config": "it is more than the product of two factors",
    "target_parameters": "it targets parameters that are no weights of layers",
    "layer_replication": "it repeats layers of the base",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it replaces rows of an embedding",
}
_MERGE_FIRST = "merge it into its base (peft: model.merge_and_unload()) and give the result"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft."""
    return (folder / CONFIG).is_file()


def adapter_weights(folder: Path, factors: Weights) -> Weights:
    """Make the task vector of an adapter: for each layer, scaling times B A, by the base's name.

    Args:
        folder: The adapter's folder.
        factors: What its file of weights holds.

    Returns:
        Weights of kind ``"LoRA adapter"``, which are task vectors, float32; products are computed
        as they are read.

    Raises:
        InputError: If it is no LoRA adapter, or changes more than such products say.

    Reference:
        Hu et al., LoRA, ICLR 2022; rank-stabilised scaling: Kalajdzievski, 2023.
    """
    config = _read_config(folder)
    pairs: dict[str, dict[str, str]] = {}
    others = []
    for name in factors.names:
        if match := _FACTORS.fullmatch(name.removeprefix(_PREFIX)):
            pairs.setdefault(match["module"], {})[match["factor"]] = name
        else:
            others.append(name)
    others += [module for module, names in pairs.items() if len(names) != 2]
    if others:
        raise InputError(
            f"'{folder}' holds more than factors A and B of layers: {listing(others)}; "
            f"{_MERGE_FIRST}"
        )
    if not pairs:
        raise InputError(f"'{folder}' holds no factors A and B of layers; save the adapter again")
    transposed, lock = bool(config.get("fan_in_fan_out")), threading.Lock()

    @functools.lru_cache(maxsize=max(4, torch.get_num_threads()))  # each may be at another one
    def product(module: str) -> Tensor:
        b, a = (
            factors.read(name).view(factors.shape(name)).to(torch.float64)
            for name in (pairs[module]["B"], pairs[module]["A"])
        )
        change = (b @ a).mul_(scalings[module])
        # Whole, and rounded once: no result depends on how it is read.
        return (change.T if transposed else change).to(torch.float32).reshape(-1)

    def read(module: str, start: int, stop: int) -> Tensor:
        with lock:  # threads that need the same one wait for it
            whole = product(module)
        return whole[start:stop]

    tensors, ranks, scalings = {}, {}, {}
    for module, names in pairs.items():
        left, right = (factors.shape(names[key]) for key in "BA")
        if len(left) != 2 or len(right) != 2:
            raise InputError(f"'{folder}': '{module}' is no linear layer; {_MERGE_FIRST}")
        if not all(factors.dtype(name).is_floating_point for name in names.values()):
            raise InputError(f"'{folder}': the factors of '{module}' are integers; dequantise them")
        if not left[1] == right[0] > 0:
            raise InputError(
                f"'{folder}': factor B of '{module}' is {tuple(left)} and A is {tuple(right)}, "
                "which have no product; save the adapter again"
            )
        scalings[module] = _scaling(folder, config, module, right[0])
        shape = (right[1], left[0]) if transposed else (left[0], right[1])
        tensors[weight_of(module)] = StoredTensor(
            torch.float32, torch.Size(shape), functools.partial(read, module)
        )
        ranks[weight_of(module)] = right[0]
    return AdapterWeights(folder, tensors, factors, config, ranks)


def weight_of(module: str) -> str:
    """Name of the matrix that the factors of a module change."""
    return f"{module}.weight"


def factor_of(weight: str, factor: Literal["A", "B"]) -> str:
    """Name of a factor in a file of peft, of the matrix of this name."""
    return f"{_PREFIX}{weight.removesuffix('.weight')}.lora_{factor}.weight"


class AdapterWeights(Weights):
    """The task vector of an adapter, which closes the file of its factors.

    Attributes:
        config: What its configuration says.
        ranks: Number of columns of B, and rows of A, by the name of the matrix that they change.
        factor_dtype: Dtype of the factors.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, StoredTensor],
        factors: Weights,
        config: Mapping[str, Any],
        ranks: Mapping[str, int],
    ) -> None:
        super().__init__(folder, "LoRA adapter", tensors, factors.metadata)
        self.is_task_vector = True
        self.config = config
        self.ranks = ranks
        self.factor_dtype = factors.dtype(factors.names[0])
        self._factors = factors

    @override
    def close(self) -> None:
        super().close()
        self._factors.close()


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    try:
        config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"'{path}' is no configuration of an adapter") from error
    if kind != "LORA":
        raise InputError(f"'{folder}' is an adapter of type {kind}, not LORA; {_MERGE_FIRST}")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise InputError(f"'{folder}' has {key}: {reason}; {_MERGE_FIRST}")
    if (config.get("bias") or "none") != "none":
        raise InputError(f"'{folder}' has bias={config['bias']}: it trains biases; {_MERGE_FIRST}")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise InputError(
            f"'{folder}' has init_lora_weights={start}, which changed the base's weights too; save "
            "it as a plain adapter (peft: path_initial_model_for_weight_conversion)"
        )
    return config


def _scaling(folder: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """By what the product of a layer's factors is multiplied."""
    try:
        alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        if not math.isfinite(alpha):
            raise ValueError(f"it is {alpha}")
    except (TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        raise InputError(
            f"'{folder / CONFIG}' gives no number lora_alpha for '{module}' ({error})"
        ) from error
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(patterns: Any, module: str, default: Any) -> Any:
    """What the first pattern that ends a module's name says, as peft reads it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
