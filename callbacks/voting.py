"""What classifies images in an evaluation: the text head and class statistics together."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from cl_merge.callbacks.features import Features, features_under
from cl_merge.class_statistics import StreamStatistics, fused_map, unit
from cl_merge.errors import InputError
from cl_merge.models.zero_shot import ZeroShotHead

TWO_ENCODERS = ("both", "base")

# Bounds the memory of logits in float64.
_ROWS_AT_ONCE = 8192


class Classifier:
    """Class statistics and text head of a stream, on a device.

    Args:
        kind: As of `ClassStatistics`.
        statistics: What was learned.
        head: The text head; None leaves the decision to the statistics.
        features: Makes image features and labels of module and batch.
        base: The base weights and buffers; used by the kinds with two encoders.
        device: Where it works; None is the CPU.

    Attributes:
        features: The function; may be set.
        fused_map: The map of the features, float64 [D, D], of kind ``"aligned"``.

    Raises:
        InputError: If text head and statistics differ in their number of classes.
    """

    def __init__(
        self,
        kind: str,
        statistics: StreamStatistics,
        head: ZeroShotHead | None,
        features: Features,
        base: Mapping[str, Tensor],
        device: torch.device | None,
    ) -> None:
        device = device or torch.device("cpu")
        if head is not None and len(head.weight) != statistics.classes:
            raise InputError(
                f"statistics of {statistics.classes} classes beside a text head of "
                f"{len(head.weight)}; expected as many"
            )
        self.fused_map: Tensor | None = None
        self.features = features
        # Copied only if it is elsewhere; from then on it is there for every batch.
        self._base = {n: t.to(device) for n, t in base.items()} if kind in TWO_ENCODERS else {}
        self._text = head
        self._vote = statistics.vote
        if head is not None and kind == "aligned":
            merged = statistics.gaussians()["merged"]
            self.fused_map = fused_map(merged, head.weight, statistics.vote)
            self._map = self.fused_map.to(device=device, dtype=torch.float32)
        self._discriminants = {
            encoder: copy.deepcopy(found).float().to(device)
            for encoder, found in statistics.discriminants().items()
        }

    def __call__(
        self,
        module: nn.Module,
        batch: Any,
        features: Tensor,
        classes: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Classify a batch.

        Args:
            module: The module, which holds the merged weights.
            batch: What `features` takes.
            features: Its features under the merged weights, [B, D].
            classes: Labels of the K classes to choose among; None for all.

        Returns:
            Log-probabilities, or logits of kind ``"aligned"``, float32 [B, K].
        """
        of = {"merged": features, "base": features}  # without base weights the module holds them
        if "base" in self._discriminants and self._base:
            of["base"] = features_under(self._base, module, self.features, batch)
        # As in the text head: half precision would round too coarsely.
        with torch.autocast(features.device.type, enabled=False):
            if self._text is not None and self.fused_map is not None:
                fused: Tensor = self._text(features.float() @ self._map.T, classes)
                return fused
            scores = [self._scores(name, of[name], classes) for name in self._discriminants]
            mean = torch.stack(scores).mean(dim=0)
            if self._text is None:
                return mean.log_softmax(dim=1)
            return self._vote.combine(self._text(features, classes), mean)

    def of_images(
        self,
        module: nn.Module,
        images: Tensor,
        features: Tensor,
        classes: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Classify images, float [B, 3, H, W], as `CLIPClassifier.classify` is asked to."""
        # The labels, of which a batch would be made too, play no part.
        return self(module, (images, None), features, classes)

    def _scores(
        self, encoder: str, features: Tensor, classes: Tensor | Sequence[int] | None
    ) -> Tensor:
        scores = self._discriminants[encoder].scores(unit(features))
        if classes is None:
            return scores
        return scores[:, torch.as_tensor(classes, dtype=torch.long, device=scores.device)]


def lets_others_classify(module: nn.Module) -> bool:
    """Whether a module asks its attribute `classify` instead of its head, as `CLIPClassifier`."""
    return "classify" in vars(module) and text_head(module) is not None


def check_head_classifies(module: Any) -> None:
    """Raise `InputError` if something classifies instead of the head of such a module already."""
    if module.classify is not None:
        raise InputError(
            "something else classifies instead of the module's head: a second ClassStatistics of "
            "this trainer, or a function of your own; expected "
            f"{type(module).__name__}.classify to be None"
        )


def text_head(module: nn.Module) -> ZeroShotHead | None:
    """A module's attribute ``head``, if that is a text head."""
    head = getattr(module, "head", None)
    return head if isinstance(head, ZeroShotHead) else None


def check_text_head(module: nn.Module) -> None:
    """Raise `InputError` if a module has no text head, for the kind that cannot do without."""
    if text_head(module) is None:
        raise InputError(
            "statistics of kind 'aligned' change the features that a text head classifies, but "
            f"{type(module).__name__} has no text head 'head'; use another kind"
        )


def number_of_classes(
    module: nn.Module, given: int | None, kept: StreamStatistics | None = None
) -> int:
    """How many classes a module knows, by its text head or else by what its user gave.

    `InputError` if it does not tell, or what is kept already is of another number.
    """
    head = text_head(module)
    known = given if head is None else len(head.class_names)
    if known is None:
        raise InputError(
            f"{type(module).__name__} has no text head 'head' that tells how many classes there "
            "are; give ClassStatistics(classes=...)"
        )
    if given not in (None, known):
        raise InputError(
            f"classes={given}, but the text head of {type(module).__name__} has {known}; leave "
            "classes out"
        )
    if kept is not None and kept.classes != known:
        raise InputError(
            f"the class statistics are of {kept.classes} classes, but {type(module).__name__} has "
            f"{known}; use a new ClassStatistics"
        )
    return known


@torch.no_grad()
def text_logits(module: L.LightningModule, features: Tensor) -> Tensor | None:
    """Logits [N, C] of unit features [N, D] on the CPU by a text head; None without one."""
    head = text_head(module)
    if head is None:
        return None
    if head.weight.shape[1] != features.shape[1]:
        raise InputError(
            f"image features have length {features.shape[1]}, but the text head of "
            f"{type(module).__name__} takes {head.weight.shape[1]}; give "
            "ClassStatistics(features=...) those that the head takes"
        )
    # In float64, where the bits hardly depend on how many are multiplied at once.
    rows = head.weight.detach().cpu().double()
    parts = torch.split(features, _ROWS_AT_ONCE)
    return torch.cat([(part.double() @ rows.T).float() for part in parts])
