"""What was written, compared with the model that it was written of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cl_merge.benchmarks.runs.trained_run import Restored
from cl_merge.class_statistics import unit
from cl_merge.errors import InputError

# Of the largest logit, and of what a feature counts; other orders of summation differ by less.
_TOLERANCE = 1e-4
_OF_FEATURES = 1e-6


def probe(size: int) -> Tensor:
    """Make images to compare with, float32 [2, 3, size, size], the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, size, size, generator=generator)


@torch.no_grad()
def check_logits(form: str, written: Callable[[Tensor], Tensor], restored: Restored) -> None:
    """Make sure that what was written gives the logits [B, C] of the run's model."""
    images = probe(restored.clip.image_size)
    expected, found = restored.model(images), written(images)
    apart = float((found - expected).abs().max())
    largest = max(float(expected.abs().max()), 1.0)
    if not apart <= _TOLERANCE * largest + _OF_FEATURES * _steepness(restored):
        raise InputError(
            f"format {form} does not give the model's logits: they differ by {apart:.3g}, the "
            f"largest being {largest:.3g}; this version of its library does not go with torch "
            f"{torch.__version__}"
        )


@torch.no_grad()
def check_features(
    form: str,
    encode_images: Callable[[Tensor], Tensor],
    encode_texts: Callable[[list[str]], Tensor],
    restored: Restored,
) -> None:
    """Make sure that both towers that were written encode as the run's model does."""
    check_logits(form, lambda images: restored.model.head(encode_images(images)), restored)
    texts = [f"a photo of a {name}." for name in restored.run.class_names[:8]]
    model: Any = restored.clip.model
    expected = unit(model.encode_text(restored.clip.tokenizer(texts)))
    apart = float((unit(encode_texts(texts)) - expected).abs().max())
    if not apart <= _TOLERANCE:
        raise InputError(
            f"format {form} does not encode texts as model '{restored.run.config.model}' does: "
            f"unit features differ by {apart:.3g}; the formats torch and onnx need no text tower"
        )


def _steepness(restored: Restored) -> float:
    """By how much a logit can change where unit features change by one.

    Of features that hardly vary class statistics make much, and of their rounding, too.
    """
    found = restored.voting.statistics if restored.voting is not None else None
    if found is None:
        return 0.0
    lengths = [each.steepness for each in found.discriminants().values()]
    return found.vote.statistics * max(lengths)
