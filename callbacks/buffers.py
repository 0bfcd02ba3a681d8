"""What floating-point buffers, which are not merged, hold while merged weights are evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from cl_merge.errors import listing, unknown_name
from cl_merge.mergers import Average
from cl_merge.task_vectors.module_weights import copies, floating_buffers

BUFFERS = ("trained", "base", "average")


class EvaluationBuffers:
    """Keeps what the choice of buffers needs: those before any training, and their mean over tasks.

    Args:
        choice: ``"trained"``, ``"base"`` or ``"average"``; None means ``"trained"``, with a warning
            that names the buffers that moved.

    Attributes:
        base: The buffers before any training, by name.

    Raises:
        InputError: If the choice is none of these.
    """

    def __init__(self, choice: str | None) -> None:
        if choice is not None and choice not in BUFFERS:
            raise unknown_name("choice of buffers", choice, BUFFERS)
        self.base: dict[str, Tensor] = {}
        self._choice = choice
        self._average = Average()

    def keep_base(self, module: nn.Module, device: torch.device | None) -> None:
        """Keep the buffers as they are before any training.

        Args:
            module: The module.
            device: Where; None leaves them where they are.
        """
        self.base = copies(floating_buffers(module), device)

    def fold(self, module: nn.Module) -> None:
        """Take up what a task left.

        Args:
            module: The module.
        """
        live = floating_buffers(module)
        changed = [
            name
            for name, before in self.base.items()
            if not torch.equal(live[name].to(before.device), before)
        ]
        if self._choice is None and changed:
            rank_zero_warn(
                f"{len(changed)} floating-point buffers moved during training and are not merged: "
                f"{listing(changed)}. Evaluation uses those of the last task; choose with "
                "MergeCallback(buffers='trained' | 'base' | 'average'), or freeze them"
            )
            self._choice = "trained"
        if self._choice == "average":
            self._average.update({name: live[name].to(b.device) for name, b in self.base.items()})

    def values(self) -> dict[str, Tensor]:
        """What to put into the module for an evaluation; empty to leave its buffers as they are."""
        if self._choice == "base":
            return self.base
        if self._choice == "average":
            return dict(self._average.items())
        return {}

    def to(self, device: torch.device) -> None:
        """Move what is kept to a device."""
        self.base = copies(self.base, device)
        self._average.load_state_dict(self._average.state_dict(), device)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on, as tensors and plain values."""
        return {"base_buffers": self.base, "buffer_average": self._average.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None) -> None:
        """Go on from a state.

        Args:
            state: What `state_dict` returned; its tensors are copied.
            device: Where they go; None leaves them where they are.
        """
        self.base = copies(state["base_buffers"], device)
        self._average.load_state_dict(state["buffer_average"], device)
