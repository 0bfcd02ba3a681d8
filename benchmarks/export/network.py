"""The whole classifier as one plain network: images in, logits out."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_merge.benchmarks.runs.trained_run import Restored
from cl_merge.task_vectors.module_weights import copies, install


class Network(nn.Module):
    """Classify images with nothing but tensors, as the evaluation of a run does.

    What a run does with callbacks stands here in plain operations without branches, which torch and
    ONNX can write down: the text head alone, or its vote with class statistics. Of two encoders the
    second one is a copy of the first with the pre-trained weights.

    Args:
        restored: The model of a finished run.

    Example::

        network = Network(restore(read_run("runs/digits-magmax")))
        logits = network(images)  # [B, 3, H, W] to [B, C]
    """

    text: Tensor
    weights: Tensor
    biases: Tensor
    seen: Tensor

    def __init__(self, restored: Restored) -> None:
        super().__init__()
        self.visual = _plain_copy(restored.model.visual)
        self.base: nn.Module | None = None
        self.register_buffer("text", restored.model.head.weight.detach().clone())
        self._encoders: tuple[str, ...] = ()
        voting = restored.voting
        if voting is not None and voting.statistics is not None:
            found = voting.statistics.discriminants()
            self._encoders = tuple(found)
            self._vote = voting.statistics.vote
            if "base" in found and voting.base:
                self.base = _plain_copy(restored.model.visual)
                given = voting.base | voting.base_buffers
                prefix = "visual."
                own = {n.removeprefix(prefix): t for n, t in given.items() if n.startswith(prefix)}
                install(self.base.state_dict(), copies(own))
            weights = torch.stack([d.weight.float() for d in found.values()])
            biases = torch.stack([d.bias.float() for d in found.values()])
            seen = biases[0] > -torch.inf
            self.register_buffer("weights", weights)
            # Of classes not seen nothing is used; zeros keep infinities out of the arithmetic.
            self.register_buffer("biases", biases.masked_fill(~seen, 0.0))
            self.register_buffer("seen", seen)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: Transformed images, float32 [B, 3, H, W].

        Returns:
            Logits, float32 [B, C]; log-probabilities where class statistics vote.
        """
        merged = F.normalize(self.visual(images), dim=-1)
        text = F.linear(merged, self.text)
        if not self._encoders:
            return text
        features = {"merged": merged, "base": merged}
        if self.base is not None:
            features["base"] = F.normalize(self.base(images), dim=-1)
        scores = torch.stack(
            [
                F.linear(features[name], self.weights[place], self.biases[place])
                for place, name in enumerate(self._encoders)
            ]
        ).mean(dim=0)
        return self._vote.combine_seen(text, scores, self.seen)


def _plain_copy(visual: nn.Module) -> nn.Module:
    """Copy an image encoder without what only makes it faster here."""
    copied = copy.deepcopy(visual).to(memory_format=torch.contiguous_format)
    for module in copied.modules():
        module._forward_pre_hooks.clear()
    return copied
