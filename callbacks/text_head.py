"""What class statistics ask of a module's text head, and of a module that has none."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn

from cl_merge.errors import InputError
from cl_merge.models.zero_shot import ZeroShotHead

# Bounds the memory of the logits where the module is.
_ROWS_AT_ONCE = 8192


def text_head(module: nn.Module) -> ZeroShotHead | None:
    """Find a module's text head.

    Args:
        module: Any module.

    Returns:
        Its attribute ``head``, if that is one.
    """
    head = getattr(module, "head", None)
    return head if isinstance(head, ZeroShotHead) else None


def needed_text_head(module: nn.Module) -> ZeroShotHead:
    """Find a module's text head, where nothing goes without it.

    Args:
        module: Any module.

    Returns:
        Its attribute ``head``.

    Raises:
        InputError: If it has none.
    """
    head = text_head(module)
    if head is None:
        raise InputError(
            "statistics of kind 'aligned' change the features that a text head classifies, but "
            f"{type(module).__name__} has no text head 'head'; use another kind"
        )
    return head


def number_of_classes(module: nn.Module, given: int | None) -> int:
    """Tell how many classes a module knows.

    Args:
        module: Any module.
        given: What its user says; None asks its text head.

    Returns:
        The number.

    Raises:
        InputError: If neither tells, or they differ.
    """
    head = text_head(module)
    if head is None and given is None:
        raise InputError(
            f"{type(module).__name__} has no text head 'head' that tells how many classes there "
            "are; give ClassStatistics(classes=...)"
        )
    found = given if head is None else len(head.class_names)
    assert found is not None  # noqa: S101 - one of the two tells
    if given not in (None, found):
        raise InputError(
            f"classes={given}, but the text head of {type(module).__name__} has {found}; leave "
            "classes out"
        )
    return found


@torch.no_grad()
def text_logits(module: L.LightningModule, features: Tensor) -> Tensor | None:
    """Classify features by a module's text head.

    Args:
        module: Any module.
        features: On the CPU, float [N, D].

    Returns:
        Logits on the CPU, float32 [N, C]; None if it has no text head.

    Raises:
        InputError: If the head takes features of another length.
    """
    head = text_head(module)
    if head is None:
        return None
    if head.weight.shape[1] != features.shape[1]:
        raise InputError(
            f"image features have length {features.shape[1]}, but the text head of "
            f"{type(module).__name__} takes {head.weight.shape[1]}; give "
            "ClassStatistics(features=...) those that the head takes"
        )
    parts = torch.split(features, _ROWS_AT_ONCE)
    return torch.cat([head(part.to(module.device)).cpu() for part in parts])
