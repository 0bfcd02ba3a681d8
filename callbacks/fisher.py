"""Estimates of the diagonal of the Fisher information, of batches and of a task that ended."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from cl_merge.callbacks.batches import (
    LOGITS,
    Logits,
    own_samples,
    pairs_of,
    sum_over_processes,
    task_logits,
    training_batches,
    trying,
)
from cl_merge.callbacks.outputs import OUTPUTS, Outputs, check_classes, check_loss, outputs_of
from cl_merge.errors import InputError
from cl_merge.seeds import derive_seed
from cl_merge.task_vectors.module_weights import evaluating

Classify = Callable[[Any], tuple[Tensor, Tensor]]
"""Makes logits [B, K] and true targets [B] of a batch, with a graph."""

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


def published_fisher(
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    classify: Classify,
    gradients: dict[str, Tensor],
    *,
    total: Reduce = lambda tensor: tensor,
    processes: int = 1,
) -> dict[str, Tensor]:
    """The estimate of the published runs, with its quirks, to which their weight of 1e6 belongs.

    For every batch the gradient of the mean cross entropy towards the *predicted* labels is added
    to a running gradient, which is never reset and starts from the last gradient of the training;
    the square of this running gradient times the size of the batch is summed over batches and
    divided by ``(floor(N / B) + 1) * B``, for N samples in batches of B.

    Args:
        parameters: The P parameters, by name.
        batches: The training batches of the task.
        classify: Makes logits and targets.
        gradients: Where the running gradient starts, by name, each in its parameter's shape; added
            to in place.
        total: Sums over processes. Every batch is the union of the processes' batches, so that
            several processes give what one gives with larger batches.
        processes: How many there are.

    Returns:
        The estimate, by name, each in its parameter's shape.

    Reference:
        Marczak et al., MagMax, ECCV 2024, as published in code.
    """
    fisher = {name: torch.zeros_like(tensor) for name, tensor in gradients.items()}
    samples = largest = 0
    for batch in batches:
        logits, _ = classify(batch)
        size = int(total(torch.tensor(float(len(logits)), device=logits.device)))
        samples, largest = samples + size, max(largest, size)
        loss = F.cross_entropy(logits, logits.detach().argmax(dim=1))
        for name, gradient in _gradients(loss, parameters):
            gradients[name].add_(total(gradient), alpha=1.0 / processes)
        for name, gradient in gradients.items():
            fisher[name].addcmul_(gradient, gradient, value=size)
    if samples == 0:
        return fisher
    for estimate in fisher.values():
        estimate.div_((samples // largest + 1) * largest)
    return fisher


def sample_fisher(
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    classify: Classify,
    *,
    generator: torch.Generator | None = None,
    total: Reduce = lambda tensor: tensor,
    limit: int | None = None,
    outputs: Outputs = OUTPUTS["cross_entropy"],
) -> dict[str, Tensor]:
    """The mean over samples of the squared gradient of the log likelihood of a label.

    With the true labels this is the empirical Fisher, with labels drawn from the model's own
    prediction an unbiased estimate of the Fisher itself.

    Args:
        parameters: The P parameters, by name.
        batches: The training batches of the task; every sample is taken by itself.
        classify: Makes logits and targets.
        generator: Draws labels from the prediction, on the CPU; None takes the true ones.
        total: Sums over processes.
        limit: Take at most so many samples of this process.
        outputs: What logits mean.

    Returns:
        The estimate, by name, each in its parameter's shape, float32 or better.

    Reference:
        Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017; on the
        two kinds: Kunstner et al., Limitations of the empirical Fisher approximation, NeurIPS 2019.
    """
    fisher = zeros_for(parameters)
    count = 0
    for sample in itertools.islice(singles(batches), limit):
        logits, targets = classify(sample)
        if generator is not None:
            drawn = outputs.draw(logits.detach().float().cpu(), generator)
            targets = drawn.to(logits.device)
        for name, gradient in _gradients(outputs.likelihood(logits, targets), parameters):
            fisher[name].addcmul_(gradient, gradient)
        count += 1
    device = next(iter(fisher.values())).device
    samples = float(total(torch.tensor(float(count), device=device)))
    return {name: total(summed).div_(max(samples, 1.0)) for name, summed in fisher.items()}


@dataclass(frozen=True)
class TaskFisher:
    """Estimates the diagonal of the Fisher of a task in its fit, from single samples.

    Args:
        asking: The callback that asks for it, for messages.
        logits: As of `EWC`.
        loss: As of `EWC`.
        samples: Take at most so many samples of a task; None takes all.

    Raises:
        InputError: If the loss is wrong.
    """

    asking: str
    logits: Logits | None = None
    loss: str | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        check_loss(self.loss)

    @property
    def classify(self) -> Logits:
        """Makes logits and targets of module and batch."""
        give = f"{self.asking}(logits=...), {LOGITS}"
        if self.logits is not None:
            return pairs_of(self.logits, give)
        return partial(task_logits, asking=self.asking, give=give)

    def check(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, *, singly: bool = True
    ) -> None:
        """Try a task's first batch: what fails shows now, and not when the task has trained.

        Where samples will be taken `singly`, they must be such that `singles` can cut.
        """
        with trying(trainer, module):
            whole, targets = self.classify(module, batch)
            check_classes(whole, targets, self.loss, self.asking)
            if singly:
                check_cut(batch, whole, lambda single: self.classify(module, single)[0])

    def of(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        parameters: Mapping[str, nn.Parameter],
        seed: tuple[int, int] | None,
    ) -> dict[str, Tensor]:
        """The `sample_fisher` of parameters; labels are drawn from a seed, or the true ones."""
        generator = None
        if seed is not None:
            key = derive_seed("ewc", *seed, trainer.global_rank)
            generator = torch.Generator().manual_seed(key % 2**63)
        precision = fisher_precision(trainer, module.device)
        with torch.enable_grad(), precision, evaluating(module), requiring_gradients(parameters):
            return sample_fisher(
                parameters,
                training_batches(trainer, module),
                partial(self.classify, module),
                generator=generator,
                total=sum_over_processes(trainer, module),
                limit=own_samples(trainer, self.samples),
                outputs=outputs_of(self.loss),
            )


@contextmanager
def requiring_gradients(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let parameters require a gradient for a while, those too that a task has frozen."""
    frozen = [p for p in parameters.values() if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def fisher_precision(trainer: L.Trainer, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of the training, but for float16: squares of gradients need the range."""
    if trainer.precision == "16-mixed":
        return torch.autocast(device.type, enabled=False)
    return trainer.precision_plugin.forward_context()


def zeros_for(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Zeros in the shapes of parameters, float32 or better, where the parameters are."""
    return {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        for name, p in parameters.items()
    }


def _gradients(
    loss: Tensor, parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    # Not `backward`: that would add to `.grad` and, under DDP, wait for the other processes.
    tensors = list(parameters.values())
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
    for name, found in zip(parameters, gradients, strict=True):
        gradient = found.to_dense() if found.is_sparse else found
        yield name, gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def singles(batches: Iterable[Any]) -> Iterator[Any]:
    """Cut batches, of whatever structure, into batches of one sample."""
    for batch in batches:
        for index in range(batch_size(batch)):
            yield apply_to_collection(batch, Tensor, _row, index)


def batch_size(batch: Any) -> int:
    """The number of samples in a batch: the length of its first tensor with a dimension.

    `InputError` if there is none.
    """
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda t: sizes.append(len(t)) if t.ndim else None)
    if not sizes:
        raise _not_cut(batch)
    return sizes[0]


def check_cut(batch: Any, whole: Tensor, make: Callable[[Any], Tensor]) -> None:
    """Make sure that `singles` cuts a batch, of which `make` gave outputs for the whole one."""
    if batch_size(batch) > 1 and len(make(next(singles([batch])))) >= len(whole):
        raise _not_cut(batch)


def _not_cut(batch: Any) -> InputError:
    return InputError(
        f"a batch of type {type(batch).__name__} cannot be cut into single samples; let its loader "
        "make tensors [batch, ...] of all that the module takes, in tuples, lists or dictionaries"
    )


def _row(tensor: Tensor, index: int) -> Tensor:
    return tensor[index : index + 1] if tensor.ndim else tensor
