"""Class statistics inside the image projection, so that the text head alone classifies by them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cl_merge.class_statistics.discriminant import Discriminant
from cl_merge.class_statistics.moments import ClassGaussians
from cl_merge.class_statistics.vote import Vote
from cl_merge.errors import InputError

# Of the mean square of the text head's rows, or of the mean variance of features.
_RIDGE = 1e-5
_SMALL_RIDGE = 1e-4


def fused_map(gaussians: ClassGaussians, head: Tensor, vote: Vote) -> Tensor:
    r"""Find the linear map of image features that makes the text head vote with the statistics.

    The text head scores unit features m by H m. The discriminant scores them by W m + b, and as
    u . m is 1 for the u that fits it best, by (W + b u^T) m, which is linear. With fewer classes
    than features there is a matrix A with H A equal to that but for what all classes share, and so

    .. math:: P = t I + s A, \quad H P m = t H m + s (W m + b)

    The text head divides by the length of P m, which is the same for all classes of an image: it
    predicts what a vote of both predicts. P is one more linear layer at the end of the encoder, or
    is multiplied into the last one (`fused_projection`). Classes not seen get the text head's
    logits times t, and of A what the average seen class gets.

    Args:
        gaussians: Statistics of the features of the encoder, C classes and D features.
        head: Rows of the text head, float [C, D].
        vote: The factors t of the text and s of the statistics.

    Returns:
        P, float64 [D, D], such that features on average keep their length: new features are
        ``features @ P.T``.
    """
    head = head.detach().cpu().double()
    discriminant = Discriminant.of(gaussians)
    seen = gaussians.seen
    mean, second = gaussians.second_moment()
    identity = torch.eye(len(second), dtype=torch.float64)
    ridge = _SMALL_RIDGE * second.trace() / len(second)
    constant = torch.linalg.solve(second + ridge * identity, mean)
    target = discriminant.weight + discriminant.bias.masked_fill(~seen, 0.0)[:, None] * constant
    target = (target - target[seen].mean(dim=0)) * seen[:, None]
    rows = head - head[seen].mean(dim=0)
    strength = _RIDGE * float((rows * rows).sum()) / len(second)
    statistics = torch.linalg.solve(rows.T @ rows + strength * identity, rows.T @ target)
    mixed = vote.text * identity + vote.statistics * statistics
    length = float((mixed @ second @ mixed.T).trace() / second.trace())
    if length <= 0.0:  # the statistics alone decide, of a single class: nothing to tell apart
        return identity
    scaled: Tensor = mixed / math.sqrt(length)
    return scaled


def fused_projection(visual: nn.Module, fused: Tensor) -> tuple[str, Tensor]:
    """Multiply a map of the features into the last linear layer of an image encoder.

    Args:
        visual: An image encoder of open_clip that ends with a linear projection without a bias:
            a parameter ``proj`` [width, D], or a layer ``head.proj`` with a weight [D, width].
        fused: P of `fused_map`, float64 [D, D].

    Returns:
        The name of the projection's parameter in the encoder, and its new value.

    Raises:
        InputError: If the encoder ends otherwise.
    """
    parameters = dict(visual.named_parameters())
    proj, layer = parameters.get("proj"), parameters.get("head.proj.weight")
    if proj is not None and proj.ndim == 2:
        return "proj", (proj.detach().double().cpu() @ fused.T).to(proj.dtype)
    if layer is not None and layer.ndim == 2 and "head.proj.bias" not in parameters:
        return "head.proj.weight", (fused @ layer.detach().double().cpu()).to(layer.dtype)
    raise InputError(
        f"{type(visual).__name__} does not end with a linear projection without bias ('proj' or "
        "'head.proj.weight'), which the statistics could be multiplied into; use them beside the "
        "text head instead"
    )
