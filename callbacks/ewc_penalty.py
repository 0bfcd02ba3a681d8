"""The penalty of elastic weight consolidation, in plain torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_merge.callbacks.fisher import Classify, requiring_gradients, sample_fisher
from cl_merge.callbacks.outputs import Loss, outputs_of
from cl_merge.errors import InputError
from cl_merge.task_vectors.growth import grown, leading
from cl_merge.task_vectors.module_weights import (
    copies,
    dense_gradient,
    evaluating,
    parameters_of,
    trained_parameters,
)


class EWCPenalty:
    """Elastic weight consolidation in any training loop; `EWC` is the same for a Lightning trainer.

    After each task call `end_task`. From then on the penalty ``weight / 2 * sum F (p - p*)^2`` goes
    into the loss, or its gradient into those of the parameters.

    Args:
        weight: Factor of the penalty.
        decay: Share of the former F in the running average over tasks.
        from_zero: Start the running average at zero, which multiplies the first estimate by
            ``1 - decay``; False takes the first estimate whole.

    Attributes:
        fisher: The running average F, by parameter name; empty before the first task ended.
        anchor: The weights p*, by parameter name.

    Raises:
        InputError: If the decay is out of its range.

    Example:
        >>> import torch
        >>> module, penalty = torch.nn.Linear(2, 2), EWCPenalty(weight=10.0)
        >>> float(penalty(module))
        0.0
        >>> images, labels = torch.randn(8, 2), torch.randint(2, (8,))
        >>> penalty.end_task(module, [(images, labels)], lambda batch: (module(batch[0]), batch[1]))
        >>> loss = torch.nn.functional.cross_entropy(module(images), labels) + penalty(module)

    Reference:
        As of `EWC`.
    """

    def __init__(self, weight: float = 1e4, *, decay: float = 0.5, from_zero: bool = True) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"decay={decay} of EWC; expected 0 or more, below 1")
        self.weight, self.decay, self.from_zero = weight, decay, from_zero
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def __call__(self, module: nn.Module) -> Tensor:
        """Compute the penalty of a module, a scalar with a graph; 0 before the first task ended."""
        terms = [
            (fisher * self._move(name, parameter, fisher).square()).sum()
            for name, parameter, fisher in self._penalised(module)
        ]
        first = next(module.parameters())
        return 0.5 * self.weight * torch.stack(terms).sum() if terms else first.new_zeros(())

    @torch.no_grad()
    def add_gradients(self, module: nn.Module, factor: float = 1.0) -> Tensor | None:
        """Add the penalty's gradient to those of a module's parameters, before the optimizer steps.

        It takes no graph, and no memory beyond one parameter at a time.

        Args:
            module: The module.
            factor: By what to multiply the gradient.

        Returns:
            The penalty, a scalar; None where nothing is penalised.
        """
        penalties = []
        for name, parameter, fisher in self._penalised(module):
            move = self._move(name, parameter, fisher)
            pull = fisher * move
            leading(dense_gradient(parameter), fisher.shape).add_(pull, alpha=self.weight * factor)
            penalties.append(move.mul_(pull).sum())
        return 0.5 * self.weight * torch.stack(penalties).sum() if penalties else None

    def end_task(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        classify: Classify,
        *,
        loss: Loss | None = None,
        samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Estimate F of a task that ended, and move the anchor to its weights.

        Args:
            module: The module with the weights of the task.
            batches: The task's training batches.
            classify: Makes logits [B, K] and targets [B] of a batch.
            loss: As of `EWC`.
            samples: Use at most so many samples; None uses all.
            generator: Draws labels from the predictions; None takes the true ones.
        """
        trained = self.parameters(module)
        with torch.enable_grad(), evaluating(module), requiring_gradients(trained):
            estimate = sample_fisher(
                trained,
                batches,
                classify,
                generator=generator,
                limit=samples,
                outputs=outputs_of(loss),
            )
        self.remember(trained, estimate)

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that train, and those that a task before has trained, frozen or not."""
        trained = trained_parameters(module)
        return {n: p for n, p in parameters_of(module).items() if n in trained or n in self.fisher}

    def remember(self, parameters: Mapping[str, Tensor], estimate: Mapping[str, Tensor]) -> None:
        """Take an estimate into the running average, which may be changed, and move the anchor."""
        for name, new in estimate.items():
            average = self.fisher.get(name)
            if average is not None:
                born = None if self.from_zero else new
                average = grown(average, born, new.shape) if average.shape != new.shape else average
                self.fisher[name] = average.mul_(self.decay).add_(new, alpha=1.0 - self.decay)
            else:
                self.fisher[name] = new.mul_(1.0 - self.decay) if self.from_zero else new
        self.anchor |= copies(parameters)

    def move_to(self, device: torch.device) -> None:
        """Move F and the anchor to a device."""
        self.fisher = {name: tensor.to(device) for name, tensor in self.fisher.items()}
        self.anchor = {name: tensor.to(device) for name, tensor in self.anchor.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on, as live tensors."""
        return {"fisher": self.fisher, "anchor": self.anchor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; its tensors are copied."""
        self.fisher, self.anchor = copies(state["fisher"]), copies(state["anchor"])

    def _penalised(self, module: nn.Module) -> Iterable[tuple[str, nn.Parameter, Tensor]]:
        """Names of what trains, the parameters, and F of the entries that there were before."""
        for name, parameter in trained_parameters(module).items():
            if (fisher := self.fisher.get(name)) is not None:
                yield name, parameter, fisher

    def _move(self, name: str, parameter: Tensor, fisher: Tensor) -> Tensor:
        """How far the entries that there were before have moved: p - p*."""
        return leading(parameter, fisher.shape).to(fisher.dtype) - self.anchor[name]
