"""Moments of feature vectors by class, exact whatever the order, and their distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_merge.errors import InputError

# Steps of 2^-20 are a hundredth of what float16 resolves in a unit vector's elements.
STEP = 2.0**-20
# Whole numbers up to 2^20 in magnitude: so many products sum up exactly in float64 ...
ROWS_AT_ONCE = 2**13
# ... and so many in int64, which 2^23 vectors along one axis would just overflow.
MOST_ROWS = 2**23 - 1
# The square of what vectors are rounded to: below it a variance is rounding.
_NO_VARIANCE = 2.0**-40


class TensorState:
    """Something whose attributes that are tensors are its state."""

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` returned, with copies on the CPU."""
        for name in self.tensors():
            setattr(self, name, tensors[name].to(device="cpu", copy=True))


class FeatureMoments(TensorState):
    """The first two moments of unit feature vectors, exact whatever the order.

    By class their number and their sum, over all classes the sum of their products. A vector's
    elements are rounded to multiples of 2^-20 and summed as whole numbers, so that the order of
    vectors and moments, and how they are spread over batches and processes, does not change a bit.

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

    def update(self, vectors: Tensor, labels: Tensor) -> None:
        """Add vectors, elements at most 1 in magnitude, float [B, D], of classes, int64 [B].

        `InputError` if a vector is not finite or too long, or 2^23 or more come together.
        """
        vectors, labels = vectors.detach().cpu(), labels.detach().cpu()
        if not bool(torch.isfinite(vectors).all()):
            raise InputError("image features are NaN or infinite: the model has diverged")
        if vectors.numel() and float(vectors.abs().max()) > 1.0 + 1e-6:
            raise InputError("expected unit feature vectors; normalise them with unit()")
        _check_number(int(self.counts.sum()) + len(vectors))
        for start in range(0, len(vectors), ROWS_AT_ONCE):
            rows, classes = (x[start : start + ROWS_AT_ONCE] for x in (vectors, labels))
            whole = (rows.double() / STEP).round().clamp(-1 / STEP, 1 / STEP)
            self.counts += torch.bincount(classes, minlength=len(self.counts))
            self.sums.index_add_(0, classes, whole.long())
            self.products += (whole.T @ whole).long()

    def add(self, other: FeatureMoments) -> None:
        """Add moments of other vectors; `InputError` for another shape, or 2^23 vectors or more."""
        if other.sums.shape != self.sums.shape:
            raise InputError(
                f"moments of {list(other.sums.shape)} classes and features do not fit those of "
                f"{list(self.sums.shape)}"
            )
        _check_number(int(self.counts.sum()) + int(other.counts.sum()))
        self.counts += other.counts
        self.sums += other.sums
        self.products += other.products

    def first(self, features: int) -> FeatureMoments:
        """The moments of the first so many elements of the vectors."""
        part = FeatureMoments(len(self.counts), features)
        sums, products = self.sums[:, :features], self.products[:features, :features]
        part.load_tensors({"counts": self.counts, "sums": sums, "products": products})
        return part

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Sum over processes, by a function that sums an int64 tensor over all of them."""
        self.load_tensors({name: total(tensor) for name, tensor in self.tensors().items()})
        _check_number(int(self.counts.sum()))


@dataclass(frozen=True)
class ClassGaussians:
    """A normal distribution for each class, all with one covariance.

    Attributes:
        counts: Vectors of each class, float64 [C]; 0 for a class not seen.
        means: Their means, float64 [C, D]; 0 for a class not seen.
        scatter: Sum over all vectors of (v - mean)(v - mean)^T, float64 [D, D].

    Example:
        >>> moments = FeatureMoments(classes=1, features=2)
        >>> moments.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        >>> ClassGaussians.of(moments).scatter
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]], dtype=torch.float64)
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, moments: FeatureMoments) -> ClassGaussians:
        """Read the distributions off exact moments of C classes and D features."""
        counts = moments.counts.double()
        means = moments.sums.double() * STEP / counts.clamp(min=1)[:, None]
        products = moments.products.double() * STEP**2
        return cls(counts, means, products - (means * counts[:, None]).T @ means)

    @property
    def seen(self) -> Tensor:
        """Which classes have vectors, bool [C]."""
        return self.counts > 0

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the scatter: vectors less classes, at least 1."""
        return max(int(self.counts.sum()) - int(self.seen.sum()), 1)

    def covariance(self) -> tuple[Tensor, float]:
        """The covariance within classes, float64 [D, D], and the share of the identity in it."""
        sample = self.scatter / self.freedom
        size = float(sample.diagonal().mean())
        identity = torch.eye(len(sample), dtype=torch.float64)
        if size <= _NO_VARIANCE:  # no class has two different vectors: as good as any
            return identity, 1.0
        share = oas_shrinkage(sample, self.freedom)
        return (1.0 - share) * sample + share * size * identity, share

    def second_moment(self) -> tuple[Tensor, Tensor]:
        """Mean vector, float64 [D], and mean of v v^T, float64 [D, D], over all vectors."""
        total = self.counts.sum().clamp(min=1)
        weighted = self.means * self.counts[:, None]
        return weighted.sum(dim=0) / total, (self.scatter + weighted.T @ self.means) / total

    def total_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean vector, float64 [D], and the covariance of all vectors around it, float64 [D, D]."""
        mean, second = self.second_moment()
        return mean, second - mean[:, None] * mean


def oas_shrinkage(covariance: Tensor, freedom: float) -> float:
    """How much of the identity to mix into a sample covariance: oracle approximating shrinkage.

    For p features, n degrees of freedom and the sample covariance S the share is, at most 1,

    .. math:: ((1 - 2/p) tr(S^2) + tr(S)^2) / ((n + 1 - 2/p) (tr(S^2) - tr(S)^2 / p))

    Args:
        covariance: S, float64 [D, D].
        freedom: n: vectors less the means that were subtracted from them.

    Reference:
        Chen, Wiesel, Eldar & Hero, Shrinkage Algorithms for MMSE Covariance Estimation, IEEE
        Transactions on Signal Processing 2010, equation 23.

    Example:
        >>> oas_shrinkage(torch.eye(2, dtype=torch.float64), freedom=10)
        1.0
    """
    size = len(covariance)
    square = float(covariance.diagonal().sum() ** 2)
    squares = float((covariance * covariance).sum())
    spread = (freedom + 1.0 - 2.0 / size) * (squares - square / size)
    if spread <= 0.0:
        return 1.0
    return min(1.0, ((1.0 - 2.0 / size) * squares + square) / spread)


def unit(features: Tensor) -> Tensor:
    """Scale features, float [B, D], to length 1 in float32, as the text head does."""
    return F.normalize(features.float(), dim=-1)


def _check_number(vectors: int) -> None:
    if vectors > MOST_ROWS:
        raise InputError(f"more than {MOST_ROWS} images; their sums would not be exact")
