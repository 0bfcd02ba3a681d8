"""What the tensors of a checkpoint are: parameters, what training keeps beside them, quantised."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import torch

from cl_merge.errors import InputError, listing
from cl_merge.storage import Weights

RUNNING_VARIANCE = "running_var"

# By the last part of their names: statistics of batch norms; positions and masks; what averages
# count with; noise schedules of diffusion models. All of them are buffers where they come from.
_BUFFERS = {
    *("running_mean", RUNNING_VARIANCE, "num_batches_tracked"),
    *("position_ids", "inv_freq", "relative_position_index", "attn_mask", "masked_bias"),
    *("num_updates", "n_averaged", "decay"),
    *("betas", "alphas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
    *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "lvlb_weights"),
    *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
}

# Likewise, beside or in place of weights of few bits: GPTQ, AWQ and the like; bitsandbytes; fp8.
_QUANTISED = {
    *("qweight", "qzeros", "g_idx", "weight_packed", "scales_and_zeros"),
    *("SCB", "absmax", "quant_map", "nested_absmax", "weight_format"),
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale"),
}


def is_buffer(name: str) -> bool:
    """Whether a tensor of this name is what a module keeps beside its parameters."""
    return name.rpartition(".")[2] in _BUFFERS


def floating(weights: Weights) -> list[str]:
    """Names of the floating-point tensors, in the order of the checkpoint."""
    return [name for name in weights.names if weights.dtype(name).is_floating_point]


def parameters(weights: Weights) -> list[str]:
    """Names of the floating-point tensors that are no buffers, in the order of the checkpoint."""
    return [name for name in floating(weights) if not is_buffer(name)]


def quantised(weights: Weights) -> str:
    """What shows that a checkpoint's weights are quantised; nothing if they are not."""
    found = [
        name
        for name in weights.names
        if name.rpartition(".")[2] in _QUANTISED or ".quant_state." in name
    ]
    if found:
        return listing(found)
    config = weights.folder / "config.json" if weights.folder is not None else None
    if config is None or not config.is_file():
        return ""
    try:
        told = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    except (ValueError, AttributeError):  # what is no configuration tells nothing
        return ""
    method = told.get("quant_method", "of some kind") if isinstance(told, dict) else "of some kind"
    return f"quantization_config ({method}) in config.json" if told else ""


def check_mergeable(weights: Weights) -> None:
    """Refuse quantised checkpoints, whose numbers are codes that have no sum.

    Raises:
        InputError: Names what shows it.
    """
    if sign := quantised(weights):
        raise InputError(
            f"'{weights.path}' is quantised: {sign}. Merge the weights before quantisation, or "
            "dequantise them first, as transformers' model.dequantize() does"
        )


def check_several(**given: object) -> None:
    """Refuse one path where several are wanted; a text is a sequence, too.

    Raises:
        InputError: Names the argument.
    """
    for key, value in given.items():
        if isinstance(value, (str, os.PathLike)):
            raise InputError(f"{key} must be a list of files, as in ['{value}']")


def take_off(prefix: str, base: Weights | None, others: Sequence[Weights]) -> None:
    """Take a prefix off the names of all checkpoints but the base, where the base has not the name.

    Raises:
        InputError: If no name begins with it, or two tensors would have one name.
    """
    kept = set(base.names) if base is not None else set()
    if not prefix or not any([weights.strip(prefix, kept) for weights in others]):
        than = " and is none of the base's" if base is not None else ""
        raise InputError(
            f"strip_prefix '{prefix}': no name in {_paths(others)} begins with it{than}"
        )


def _paths(every: Sequence[Weights]) -> str:
    return listing(f"'{weights.path}'" for weights in every)


def is_twin(weights: Weights, name: str, other: str) -> bool:
    """Whether two matrices of a checkpoint hold the same, as tied ones do that are stored twice.

    Matrices of one value, such as zeros, tell nothing.
    """
    shape = weights.shape(name)
    if len(shape) < 2 or shape != weights.shape(other) or not shape.numel():
        return False
    if weights.dtype(name) != weights.dtype(other):
        return False
    stops = min(shape.numel(), 4096), shape.numel()  # the first values tell most matrices apart

    def equal(stop: int) -> bool:
        one, two = (weights.read(each, 0, stop).view(torch.uint8) for each in (name, other))
        return torch.equal(one, two)

    def varied(stop: int) -> bool:
        values = weights.read(name, 0, stop)
        return bool((values != values[0]).any())

    return all(map(equal, stops)) and any(map(varied, stops))
