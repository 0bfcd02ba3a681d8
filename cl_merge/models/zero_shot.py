"""The frozen classifier that a CLIP-style model makes of class names and prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_merge.errors import InputError
from cl_merge.models.pretrained import Clip


class ZeroShotHead(nn.Module):
    """Classify image features by the text embeddings of the classes' names.

    The logit of class c is ``exp(logit_scale) * cos(image, text_c)``; there is no bias. The rows
    are a buffer: nothing in the head trains.

    Args:
        weight: ``[C, D]``, one row per class: its unit text embedding times ``exp(logit_scale)``.
            Copied, as float32.
        class_names: The ``C`` names, in the order of the rows.

    Raises:
        InputError: If the names are empty or repeat, or if there is not one row per name.

    Example:
        >>> import torch
        >>> head = ZeroShotHead(10 * torch.eye(2), ["cat", "dog"])
        >>> head(torch.tensor([[3.0, 4.0]]))
        tensor([[6., 8.]])
        >>> head(torch.tensor([[3.0, 4.0]]), classes=[1])
        tensor([[8.]])

    Reference:
        Radford et al., CLIP, ICML 2021, section 3.1.2.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, class_names: Sequence[str]) -> None:
        super().__init__()
        self.class_names = _checked_class_names(class_names)
        if weight.ndim != 2 or len(weight) != len(self.class_names):
            raise InputError(
                f"a head of {len(self.class_names)} classes needs a weight of shape "
                f"[{len(self.class_names)}, features], not {list(weight.shape)}"
            )
        self.register_buffer("weight", weight.detach().to(torch.float32, copy=True))

    def forward(self, features: Tensor, classes: Tensor | Sequence[int] | None = None) -> Tensor:
        """Score image features against all classes or some of them.

        Args:
            features: Of any floating-point type, not normalised, ``[B, D]``.
            classes: Row numbers of the ``K`` classes to score, in the order wanted; all without it.

        Returns:
            Logits, float32 also under mixed precision, ``[B, K]`` or ``[B, C]``.
        """
        weight = self.weight
        if classes is not None:
            weight = weight[torch.as_tensor(classes, dtype=torch.long, device=weight.device)]
        # Autocast would multiply in half precision, which rounds logits of 100 * cos to steps of
        # 1/16 and more: enough to change the winner among similar classes.
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(F.normalize(features.float(), dim=-1), weight.float())

    def extra_repr(self) -> str:
        """Show the number of classes and features when the module is printed."""
        classes, features = self.weight.shape
        return f"classes={classes}, features={features}"


@torch.no_grad()
def zero_shot_head(
    clip: Clip,
    class_names: Sequence[str],
    templates: str | Sequence[str],
    *,
    batch_size: int = 256,
) -> ZeroShotHead:
    """Make a classifier from class names and prompts; the text tower is not needed afterwards.

    Every prompt of a class is encoded and L2-normalised; the row of the class is their mean,
    L2-normalised, times ``exp(logit_scale)``.

    Args:
        clip: The model, as :func:`cl_merge.load_clip` returns it; left in evaluation mode.
        class_names: The names of the ``C`` classes, in the order of the labels.
        templates: Prompts with one ``{}`` each, where the name goes; one prompt may be a string.
        batch_size: How many prompts to encode at once.

    Raises:
        InputError: If a name is empty or repeats, a template has no ``{}`` or several, or the batch
            size is not positive.

    Example:
        >>> clip = load_clip("glyph")  # doctest: +SKIP
        >>> head = zero_shot_head(clip, ["zero", "one"], "the digit {}.")  # doctest: +SKIP
        >>> logits = head(clip.model.visual(images))  # doctest: +SKIP

    Reference:
        Radford et al., CLIP, ICML 2021, section 3.1.4 (prompt ensembling).
    """
    names = _checked_class_names(class_names)
    templates = _checked_templates(templates)
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}; expected 1 or more")
    prompts = [template.replace("{}", name) for name in names for template in templates]
    model: Any = clip.model.eval()
    device = model.logit_scale.device
    # Folding each batch into the sum of its class keeps memory at one row per class, whatever the
    # number of prompts. The mean differs from the sum only by a factor, which normalising removes.
    owners = torch.arange(len(names), device=device).repeat_interleave(len(templates))
    sums: Tensor | None = None
    for start in range(0, len(prompts), batch_size):
        tokens = clip.tokenizer(prompts[start : start + batch_size]).to(device)
        rows = F.normalize(model.encode_text(tokens).float(), dim=-1)
        if sums is None:
            sums = rows.new_zeros(len(names), rows.shape[1])
        sums.index_add_(0, owners[start : start + batch_size], rows)
    assert sums is not None  # noqa: S101 - there is a class and a template, hence a batch
    return ZeroShotHead(F.normalize(sums, dim=-1) * model.logit_scale.float().exp(), names)


def _checked_class_names(class_names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(class_names, str):
        raise InputError(f"class names must be a list of strings, not the string {class_names!r}")
    names = tuple(class_names)
    if not names:
        raise InputError("no class names: a zero-shot head needs at least one")
    for position, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"class name {position} is {name!r}; expected a non-empty string")
    repeated = [repr(name) for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise InputError(f"class names must differ, but these repeat: {', '.join(repeated)}")
    return names


def _checked_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    checked = (templates,) if isinstance(templates, str) else tuple(templates)
    if not checked:
        raise InputError("no templates: a zero-shot head needs one, such as 'a photo of a {}.'")
    for template in checked:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise InputError(
                f"template {template!r} must hold '{{}}' exactly once, where the class name goes"
            )
    return checked
