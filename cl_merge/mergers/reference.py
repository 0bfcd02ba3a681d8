"""The rules as they stand in the papers: pure functions on a stack of task vectors.

A stack holds one task vector a row, ``[tasks, n]``, all parameters in a row where a rule looks at
whole task vectors; the rules on matrices take one parameter of all tasks, ``[tasks, rows,
columns]``. Each function is a few lines to be checked against its paper, on any floating-point
dtype and device, and holds everything in memory. The mergers give the same up to rounding, in
constant memory; their tests compare the two in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def magmax(stack: Tensor) -> Tensor:
    """The value of largest magnitude, the later task's on equality.

    Marczak et al., MagMax, ECCV 2024, section 4: τ_merged = τ_k, k = argmax_t abs(τ_t).
    """
    last = len(stack) - 1 - stack.flip(0).abs().argmax(dim=0)
    return stack.gather(0, last[None])[0]


def average(stack: Tensor) -> Tensor:
    """The mean over tasks (Wortsman et al., Model Soups, ICML 2022, the uniform soup)."""
    return stack.mean(dim=0)


def task_arithmetic(stack: Tensor) -> Tensor:
    """The sum over tasks (Ilharco et al., Task Arithmetic, ICLR 2023, section 4)."""
    return stack.sum(dim=0)


def random_mix(stack: Tensor, draws: Tensor) -> Tensor:
    """Each element from a task drawn uniformly, by reservoir sampling.

    `draws` are uniform numbers from 0 to 1, [tasks, n]. Marczak et al., MagMax, ECCV 2024,
    "RandMix"; Vitter, ACM TOMS 1985, algorithm R.
    """
    merged = stack[0]
    for task in range(1, len(stack)):
        merged = torch.where(draws[task] <= 1 / (task + 1), stack[task], merged)
    return merged


def trim(stack: Tensor, density: float) -> Tensor:
    """Set to zero what lies below the k-th magnitude of each task, k = n - floor(density n).

    Yadav et al., TIES-Merging, NeurIPS 2023, algorithm 1, step 1.
    """
    rank = stack.shape[1] - int(density * stack.shape[1])
    if rank == 0:
        return stack
    thresholds = stack.abs().kthvalue(rank, dim=1, keepdim=True).values
    return torch.where(stack.abs() >= thresholds, stack, 0)


def elect_sign(stack: Tensor) -> Tensor:
    """The sign of the sum over tasks, [n]; that of the majority where it is zero (TIES, step 2)."""
    signs = stack.sum(dim=0).sign()
    return torch.where(signs == 0, signs.sum().sign(), signs)


def merge_elected(stack: Tensor, signs: Tensor) -> Tensor:
    """The mean of the values of the elected sign; zero where there is none (TIES, step 3)."""
    agree = (stack.sign() == signs) & (stack != 0)
    return (stack * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def ties(stack: Tensor, density: float = 0.2) -> Tensor:
    """Trim, elect a sign, merge what has it (Yadav et al., TIES-Merging, NeurIPS 2023)."""
    trimmed = trim(stack, density)
    return merge_elected(trimmed, elect_sign(trimmed))


def keep_and_rescale(stack: Tensor, stays: Tensor, probability: Tensor | float) -> Tensor:
    """Divide the values that stay by the probability of staying, and drop the others."""
    return torch.where(stays, stack / probability, 0)


def dare(stack: Tensor, density: float, draws: Tensor) -> Tensor:
    """Keep each value with the probability `density`, rescale it, and sum up over tasks.

    `draws` are uniform numbers from 0 to 1, [tasks, n]. Yu et al., Language Models are Super Mario,
    ICML 2024, section 3.
    """
    return keep_and_rescale(stack, draws < density, density).sum(dim=0)


def dare_ties(stack: Tensor, density: float, draws: Tensor) -> Tensor:
    """Keep and rescale as in `dare`, then elect and merge as in `ties`."""
    kept = keep_and_rescale(stack, draws < density, density)
    return merge_elected(kept, elect_sign(kept))


def della(stack: Tensor, density: float, epsilon: float, draws: Tensor, row: int) -> Tensor:
    """Drop smaller values of each row with higher probability, then elect and merge.

    `density` is the mean probability to stay, `draws` are as in `dare`, and n is a multiple of
    `row`, the length of a row of the weight matrix. Deep, Bhardwaj & Poria, DELLA-Merging, 2024,
    section 3.
    """
    dropped = drop_probability(stack, density, epsilon, row)
    kept = keep_and_rescale(stack, draws >= dropped, 1 - dropped)
    return merge_elected(kept, elect_sign(kept))


def drop_probability(stack: Tensor, density: float, epsilon: float, row: int) -> Tensor:
    """DELLA's p = p_min + ε r / n, r the rank of a value in its row of length n, 0 the largest."""
    magnitudes = stack.abs().reshape(-1, row)
    ranks = magnitudes.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return 1 - density - epsilon / 2 + epsilon * ranks.reshape(stack.shape) / row


def breadcrumbs(stack: Tensor, beta: float = 0.85, gamma: float = 0.007) -> Tensor:
    """Sum up the task vectors of one parameter without their smallest and largest changes.

    Davari & Belilovsky, Model Breadcrumbs, ECCV 2024, section 3.
    """
    size = stack.shape[1]
    ordered = stack.abs().sort(dim=1).values
    least = ordered[:, int(beta * size), None]
    most = ordered[:, size - int(gamma * size) - 1, None]
    return torch.where((stack.abs() >= least) & (stack.abs() <= most), stack, 0).sum(dim=0)


def consensus(stack: Tensor, threshold: float = 0.4, least: int = 2) -> Tensor:
    """Keep of the sum what at least some number of tasks use.

    Wang et al., Localizing Task Information, ICML 2024, sections 4 and 5: by its TALL mask, a task
    uses an element if abs(τ_t) > λ abs(τ - τ_t).
    """
    total = stack.sum(dim=0)
    used = stack.abs() > threshold * (total - stack).abs()
    return torch.where(used.sum(dim=0) >= min(least, len(stack)), total, 0)


def emr(stack: Tensor) -> Tensor:
    """The largest value that has the sign of the sum (Huang et al., EMR-Merging, NeurIPS 2024)."""
    signs = stack.sum(dim=0).sign()
    return signs * (stack * signs).amax(dim=0).clamp(min=0)


def ema(stack: Tensor, decay: float = 0.5) -> Tensor:
    """The exponential moving average over tasks, which begins with the first.

    Stojanovski, Roth & Akata, Momentum-based Weight Interpolation, 2022.
    """
    merged = stack[0]
    for vector in stack[1:]:
        merged = decay * merged + (1 - decay) * vector
    return merged


def fisher(stack: Tensor, importances: Tensor) -> Tensor:
    """The mean weighted with importances, [tasks, n]; the plain mean where all of them are zero.

    Matena & Raffel, Fisher-Weighted Averaging, NeurIPS 2022, equation 4.
    """
    weights = torch.where(importances.sum(dim=0) == 0, 1, importances)
    return (weights * stack).sum(dim=0) / weights.sum(dim=0)


def regmean(stack: Tensor, grams: Tensor, off_diagonal: float = 0.9) -> Tensor:
    """The minimum T of Σ tr((T - τ_t) G_t (T - τ_t)ᵀ) for matrices [tasks, m, n], G [tasks, n, n].

    Jin et al., Dataless Knowledge Fusion, ICLR 2023; G_t with its off-diagonal part shrunk.
    """
    diagonal = torch.eye(grams.shape[1], dtype=torch.bool)
    shrunk = torch.where(diagonal, grams, off_diagonal * grams)
    merged: Tensor = (stack @ shrunk).sum(dim=0) @ torch.linalg.inv(shrunk.sum(dim=0))
    return merged


def slerp(stack: Tensor, t: float = 0.5) -> Tensor:
    """Interpolate between the two task vectors of one parameter along an arc.

    Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985, section 3.3.
    """
    first, second = stack
    cosine = float(first @ second / (first.norm() * second.norm()))
    merged: Tensor
    if abs(cosine) <= 0.9995:
        angle = math.acos(cosine)
        merged = math.sin((1 - t) * angle) * first + math.sin(t * angle) * second
        return merged / math.sin(angle)
    merged = (1 - t) * first + t * second  # nearly parallel, or a vector of zeros: NaN
    return merged


def isotropic(stack: Tensor) -> Tensor:
    """The sum of matrices [tasks, m, n] with all singular values replaced by their mean.

    Marczak et al., No Task Left Behind, ICML 2025, "Iso-C".
    """
    left, values, right = _svd(stack.sum(dim=0))
    return values.mean() * (left @ right)


def isotropic_tasks(stack: Tensor, common: float = 0.8) -> Tensor:
    """Iso-C of the main directions of the sum, and of what they leave of each of the tasks.

    For matrices [tasks, m, n]. Marczak et al., No Task Left Behind, ICML 2025, "Iso-CTS".
    """
    size = min(stack.shape[1:])
    each = min(round((size - int(common * size)) / len(stack)), size // len(stack))
    shared = size - each * len(stack)
    left, values, right = _svd(stack.sum(dim=0))
    left, values, right = left[:, :shared], values[:shared], right[:shared]
    of_tasks = _svd(stack - left @ (left.T @ stack))
    lefts = torch.cat([left, *of_tasks[0][:, :, :each]], dim=1)
    rights = torch.cat([right, *of_tasks[2][:, :each]])
    total = values.sum() + of_tasks[1][:, :each].sum()
    return total / size * (_orthogonal(lefts) @ _orthogonal(rights))


def singular_vectors(stack: Tensor) -> Tensor:
    """The main singular vectors of matrices [tasks, m, n], made orthogonal to those of other tasks.

    Gargiulo et al., Task Singular Vectors, CVPR 2025, "TSV-Merge".
    """
    left, values, right = _svd(stack)
    rank = max(values.shape[1] // len(stack), 1)
    lefts, rights = torch.cat(list(left[:, :, :rank]), dim=1), torch.cat(list(right[:, :rank]))
    return (_orthogonal(lefts) * values[:, :rank].reshape(-1)) @ _orthogonal(rights)


def opcm(stack: Tensor, alpha: float = 0.5) -> Tensor:
    """Add of each matrix [tasks, m, n] what is orthogonal to the sum before, in one length.

    For a model of one matrix; with more of them, the lengths are those of whole task vectors.
    Tang et al., Merging Models on the Fly Without Retraining, NeurIPS 2025.
    """
    total = stack[0]
    for task in stack[1:]:
        left, values, right = _svd(total)
        main = int((values.cumsum(0) <= alpha * values.sum()).count_nonzero())
        entries = left.T @ task @ right.T
        excluded = torch.eye(len(values), dtype=torch.bool)
        excluded[:main, :main] = True
        total = total + task - left @ (entries * excluded) @ right
    lengths: Tensor = stack.flatten(1).norm(dim=1)
    return total * (lengths.mean() / float(total.norm()))


def wudi(stack: Tensor) -> Tensor:
    """The minimum T of Σ ‖(T - τ_t) τ_tᵀ‖² / ‖τ_t‖² for matrices [tasks, m, n].

    Cheng et al., Whoever Started the Interference Should End It, ICML 2025.
    """
    grams = stack.mT @ stack / stack.square().sum(dim=(1, 2), keepdim=True)
    inverse: Tensor = torch.linalg.pinv(grams.sum(dim=0), hermitian=True)
    return (stack @ grams).sum(dim=0) @ inverse


def nufilt(stack: Tensor, rank: int = 128) -> Tensor:
    """Add of each matrix [tasks, m, n] what leaves the main input directions of the sum alone.

    Qiu et al., Null-Space Filtering, ICLR 2026: W + τ (I - V Vᵀ), with the main right singular
    vectors V of W.
    """
    total = stack[0]
    for task in stack[1:]:
        right = _svd(total)[2][:rank]
        total = total + task - task @ right.T @ right
    return total


def dop(stack: Tensor, alpha: float = 0.8) -> Tensor:
    """Solve P W + W Q = 2 Σ aᵢ τᵢ τᵢᵀ τᵢ for what was merged and each next matrix [tasks, m, n].

    Yang et al., Dual Projections, NeurIPS 2025, with a fixed weight, as one system of m n linear
    equations.
    """
    merged = stack[0]
    for task in stack[1:]:
        pair = ((alpha, merged), (1 - alpha, task))
        rows = sum((a * t @ t.T for a, t in pair), torch.zeros(()))
        columns = sum((a * t.T @ t for a, t in pair), torch.zeros(()))
        known = sum((2 * a * t @ t.T @ t for a, t in pair), torch.zeros(()))
        system = torch.kron(rows, torch.eye(len(columns)).to(rows))
        system = system + torch.kron(torch.eye(len(rows)).to(rows), columns)
        merged = torch.linalg.solve(system, known.reshape(-1)).view(merged.shape)
    return merged


def model_stock(stack: Tensor) -> Tensor:
    """The mean of the task vectors of one parameter, [tasks, n], times k cos / (1 + (k - 1) cos).

    Jang, Yun & Han, Model Stock, ECCV 2024, section 4; cos is the mean over all pairs, from 0.
    """
    count, units = len(stack), _units(stack)
    pairs = torch.combinations(torch.arange(count))
    cosine = (units[pairs[:, 0]] * units[pairs[:, 1]]).sum(dim=1).mean().clamp(min=0)
    return count * cosine / (1 + (count - 1) * cosine) * stack.mean(dim=0)


def sce(stack: Tensor, density: float = 1.0) -> Tensor:
    """Select by variance, weigh by squares, erase the minority's sign: one parameter, [tasks, n].

    Wan et al., FuseChat, 2024, "SCE".
    """
    variance = (stack - stack.mean(dim=0)).square().mean(dim=0)
    count = int(density * int((variance > 0).sum()))
    least = variance.sort(descending=True).values[count - 1] if count else math.inf
    kept = torch.where((variance >= least) | (density == 1), stack, 0)
    weights = kept.square().sum(dim=1, keepdim=True) * (kept.sign() == kept.sum(dim=0).sign())
    weights = weights * (kept != 0)
    return (weights * kept).sum(dim=0) / weights.sum(dim=0).masked_fill(weights.sum(dim=0) == 0, 1)


def karcher(stack: Tensor, steps: int = 200) -> Tensor:
    """The middle on the sphere of the directions of one parameter, [tasks, n], in the mean length.

    Karcher, Riemannian Center of Mass, 1977: follow the mean of the logarithm maps.
    """
    units = _units(stack)
    middle = units.mean(dim=0) / units.mean(dim=0).norm()
    for _ in range(steps):
        cosines = (units @ middle).clamp(-1, 1)[:, None]
        across = units - cosines * middle
        angles = cosines.acos()
        step = (angles * across / across.norm(dim=1, keepdim=True).clamp(min=1e-12)).mean(dim=0)
        turned = step.norm().cos() * middle + torch.sinc(step.norm() / math.pi) * step
        middle = turned / turned.norm()
    merged: Tensor = stack.norm(dim=1).mean() * middle
    return merged


def _units(stack: Tensor) -> Tensor:
    """Each row in length 1, or zero."""
    lengths: Tensor = stack.norm(dim=1, keepdim=True)
    return stack / lengths.masked_fill(lengths == 0, 1)


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, or rows (Schönemann, Psychometrika 1966)."""
    left, _, right = _svd(matrix)
    return left @ right


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right
