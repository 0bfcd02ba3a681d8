"""Counts, sums and products of feature vectors by class, exact whatever the order."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_merge.errors import InputError

# Steps of 2^-20 are a hundredth of what float16 resolves in a unit vector's elements.
_STEP = 2.0**-20
# Whole numbers up to 2^20 in magnitude: so many products sum up exactly in float64 ...
_ROWS_AT_ONCE = 2**13
# ... and so many in int64, which 2^23 vectors along one axis would just overflow.
_MOST_ROWS = 2**23 - 1


class FeatureMoments:
    """The first two moments of unit feature vectors, exact whatever the order.

    By class their number and their sum, over all classes the sum of their products. A vector's
    elements are rounded to multiples of 2^-20 and summed as whole numbers, so that neither the
    order of the vectors, nor how they are spread over batches and processes, nor the order in which
    moments are added up changes a bit.

    Args:
        classes: Number of classes, C.
        features: Length of the vectors, D.

    Attributes:
        counts: Vectors of each class, int64 [C].
        sums: Their sums in steps of 2^-20, int64 [C, D].
        products: Sum over all vectors of v v^T in steps of 2^-40, int64 [D, D].

    Example:
        >>> moments = FeatureMoments(classes=2, features=2)
        >>> moments.update(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([0, 1]))
        >>> moments.counts
        tensor([1, 1])
        >>> (moments.sums * 2.0**-20)[1]
        tensor([0.6000, 0.8000])
    """

    def __init__(self, classes: int, features: int) -> None:
        self.counts = torch.zeros(classes, dtype=torch.int64)
        self.sums = torch.zeros(classes, features, dtype=torch.int64)
        self.products = torch.zeros(features, features, dtype=torch.int64)

    @property
    def step(self) -> float:
        """What one stands for in `sums`; its square in `products`."""
        return _STEP

    def update(self, vectors: Tensor, labels: Tensor) -> None:
        """Add vectors.

        Args:
            vectors: Elements of at most 1 in magnitude, as of `unit`, float [B, D].
            labels: Their classes, int64 [B].

        Raises:
            InputError: If a vector is not finite or too long, or 2^23 or more come together.
        """
        vectors, labels = vectors.detach().cpu(), labels.detach().cpu()
        if not bool(torch.isfinite(vectors).all()):
            raise InputError("image features are NaN or infinite: the model has diverged")
        if vectors.numel() and float(vectors.abs().max()) > 1.0 + 1e-6:
            raise InputError("expected unit feature vectors; normalise them with unit()")
        _check_number(int(self.counts.sum()) + len(vectors))
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            rows, classes = (x[start : start + _ROWS_AT_ONCE] for x in (vectors, labels))
            whole = (rows.double() / _STEP).round().clamp(-1 / _STEP, 1 / _STEP)
            self.counts += torch.bincount(classes, minlength=len(self.counts))
            self.sums.index_add_(0, classes, whole.long())
            self.products += (whole.T @ whole).long()

    def add(self, other: FeatureMoments) -> None:
        """Add the moments of other vectors, such as those that another machine has seen.

        Args:
            other: Of as many classes and features.

        Raises:
            InputError: If it is of another shape, or 2^23 vectors or more come together.
        """
        if other.sums.shape != self.sums.shape:
            raise InputError(
                f"moments of {list(other.sums.shape)} classes and features do not fit those of "
                f"{list(self.sums.shape)}"
            )
        _check_number(int(self.counts.sum()) + int(other.counts.sum()))
        self.counts += other.counts
        self.sums += other.sums
        self.products += other.products

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Sum over processes.

        Args:
            total: Sums an int64 tensor over all processes.

        Raises:
            InputError: If all processes together have 2^23 vectors or more.
        """
        for name, tensor in self.tensors().items():
            setattr(self, name, total(tensor).cpu())
        _check_number(int(self.counts.sum()))

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name."""
        return {"counts": self.counts, "sums": self.sums, "products": self.products}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> FeatureMoments:
        """Make moments of what `tensors` returned, as copies on the CPU."""
        made = cls(*tensors["sums"].shape)
        for name in made.tensors():
            setattr(made, name, tensors[name].to(device="cpu", copy=True))
        return made


def unit(features: Tensor) -> Tensor:
    """Scale features to length 1, as the text head does.

    Args:
        features: Float [B, D].

    Returns:
        Float32 [B, D].
    """
    return F.normalize(features.float(), dim=-1)


def _check_number(vectors: int) -> None:
    if vectors > _MOST_ROWS:
        raise InputError(f"more than {_MOST_ROWS} images; their sums would not be exact")
