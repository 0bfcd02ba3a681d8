"""A classifier and images to measure with, which need no hub and no files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl_merge.models.classifier import CLIPClassifier
from cl_merge.models.zero_shot import ZeroShotHead

_CLASSES = 100


def random_work(
    model: str, count: int, image_size: int | None = None
) -> tuple[CLIPClassifier, Tensor, Tensor]:
    """Make a classifier under a random head, and random images.

    Args:
        model: As in ``cl-merge run``; a plain architecture of open_clip's has random weights.
        count: Number of images N.
        image_size: Height and width of the images; the model's own without it.

    Returns:
        The classifier for 100 classes, images, float [N, 3, H, W], and labels, int64 [N].
    """
    visual, size = _encoder(model, image_size)
    images, labels = torch.randn(count, 3, size, size), torch.randint(0, _CLASSES, (count,))
    with torch.no_grad():
        width = visual.eval()(images[:1]).shape[1]
    rows = 100 * nn.functional.normalize(torch.randn(_CLASSES, width), dim=1)
    head = ZeroShotHead(rows, [f"class {i}" for i in range(_CLASSES)])
    return CLIPClassifier(visual, head, warmup_steps=0), images, labels


def _encoder(name: str, image_size: int | None) -> tuple[nn.Module, int]:
    import open_clip

    from cl_merge.models.pretrained import load_clip

    model: Any
    if name in open_clip.list_models():
        model = open_clip.create_model(name, force_image_size=image_size, load_weights=False)
    else:
        model = load_clip(name, image_size=image_size).model
    size = image_size or model.visual.image_size
    return model.visual, size if isinstance(size, int) else size[0]
