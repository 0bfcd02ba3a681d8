"""What classifies images in an evaluation: the text head and class statistics together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_merge.callbacks.features import Features, WithWeights
from cl_merge.class_statistics import EnsembleHead, StatisticsHead, StreamStatistics, align
from cl_merge.models.zero_shot import ZeroShotHead

TWO_ENCODERS = ("both", "base")


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
        alignment: The map of the features, float64 [D, D], of kind ``"aligned"``.
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
        self.alignment: Tensor | None = None
        self._features = features
        # Copied only if it is elsewhere; from then on every batch finds it in its place.
        self._base = {n: t.to(device) for n, t in base.items()} if kind in TWO_ENCODERS else {}
        self._text = head
        self._heads = {
            name: StatisticsHead(found).to(device)
            for name, found in statistics.discriminants().items()
        }
        if head is not None:
            self._ensemble = EnsembleHead(head, list(self._heads.values()), statistics.vote)
            if kind == "aligned":
                merged = statistics.gaussians()["merged"]
                self.alignment = align(merged, head.weight, statistics.vote)
                self._map = self.alignment.to(device=device, dtype=torch.float32)

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
        if self._text is not None and self.alignment is not None:
            with torch.autocast(features.device.type, enabled=False):
                moved = features.float() @ self._map.T
            logits: Tensor = self._text(moved, classes)
            return logits
        others = {"merged": features}
        if "base" in self._heads:
            # Without base weights of its own the module holds them.
            before = WithWeights(module, self._features, self._base)
            others["base"] = before.read(batch) if self._base else features
        given = [others[name] for name in self._heads]
        if self._text is not None:
            voted: Tensor = self._ensemble(features, given, classes)
            return voted
        pairs = zip(self._heads.values(), given, strict=True)
        scores = [head(found, classes) for head, found in pairs]
        return torch.stack(scores).mean(dim=0).log_softmax(dim=1)

    def of_images(
        self,
        module: nn.Module,
        images: Tensor,
        features: Tensor,
        classes: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Classify images, as `CLIPClassifier.classify` is asked to.

        Args:
            module: The module, which holds the merged weights.
            images: Transformed images, float [B, 3, H, W].
            features: Their features under the merged weights, [B, D].
            classes: Labels of the K classes to choose among; None for all.

        Returns:
            As of a batch.
        """
        # The labels, of which a batch would be made too, play no part.
        return self(module, (images, None), features, classes)
