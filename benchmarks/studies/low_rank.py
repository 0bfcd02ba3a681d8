"""Low-rank adapters of an image encoder, one for each of its matrices."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

RANK = 16


class LowRank(nn.Module):
    """Adds the product of two factors to a weight, taken as a matrix [out, n]: LoRA.

    The left factor [out, r] starts at zero, the right one [r, n] at random, uniform up to
    1 / sqrt(n) of both signs.

    Attributes:
        stretch: Factor of the product.

    Reference:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022.
    """

    def __init__(self, weight: Tensor, rank: int = RANK) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.left = nn.Parameter(weight.new_empty(rows, rank))
        self.right = nn.Parameter(weight.new_empty(rank, columns))
        self.stretch = 1.0
        self.reset()

    def reset(self) -> None:
        """Start afresh."""
        bound = self.right.shape[1] ** -0.5
        nn.init.zeros_(self.left)
        nn.init.uniform_(self.right, -bound, bound)

    @override
    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.stretch * (self.left @ self.right).view_as(weight)


def add_adapters(module: nn.Module, rank: int = RANK) -> dict[str, LowRank]:
    """Freeze a module, and give its matrices of more than `rank` rows and columns adapters.

    Matrices are the weights of linear layers, and of convolutions but for depth-wise ones.

    Returns:
        The adapters, by the former names of the weights.
    """
    module.requires_grad_(False)
    found = {}
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or getattr(layer, "groups", 1) > 1:
            continue
        if min(layer.weight.flatten(1).shape) > rank:
            found[f"{name}.weight"] = LowRank(layer.weight, rank)
            parametrize.register_parametrization(layer, "weight", found[f"{name}.weight"])
    return found


def adapted(module: nn.Module, name: str) -> nn.Parameter:
    """The weight, by its former name, that an adapter adds to."""
    layer = module.get_submodule(name.removesuffix(".weight"))
    found: nn.Parameter = layer.parametrizations.weight.original  # type: ignore[union-attr, assignment]
    return found


class Perturbation(Callback):
    """Trains with what adapters add times 0.5, 1 or 1.5, drawn for each batch.

    Reference:
        Qiu et al., Train with Perturbation, Infer after Merging, NeurIPS 2025.
    """

    def __init__(self, adapters: dict[str, LowRank], seed: int) -> None:
        self._adapters = adapters
        self._generator = torch.Generator().manual_seed(seed)

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        drawn = int(torch.randint(3, (1,), generator=self._generator))
        self._stretch((0.5, 1.0, 1.5)[drawn])

    @override
    def on_train_end(self, *_: Any) -> None:
        self._stretch(1.0)

    def _stretch(self, factor: float) -> None:
        for adapter in self._adapters.values():
            adapter.stretch = factor
