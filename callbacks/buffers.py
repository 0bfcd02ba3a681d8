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
    """Keeps the buffers before any training and, if chosen, their mean over tasks.

    The choice is one of ``"trained"``, ``"base"`` and ``"average"``; None means ``"trained"``, with
    a warning that names the buffers that moved.
    """

    def __init__(self, choice: str | None) -> None:
        if choice is not None and choice not in BUFFERS:
            raise unknown_name("choice of buffers", choice, BUFFERS)
        self.base: dict[str, Tensor] = {}
        self._choice = choice
        self._average = Average()

    def keep_base(self, module: nn.Module, device: torch.device | None) -> None:
        """Keep the buffers as they are before any training; no device leaves them in theirs."""
        self.base = copies(floating_buffers(module), device)

    def fold(self, module: nn.Module) -> None:
        """Take up what a task left."""
        buffers = floating_buffers(module)
        live = {name: buffers[name].to(before.device) for name, before in self.base.items()}
        moved = [name for name, before in self.base.items() if not torch.equal(live[name], before)]
        if self._choice is None and moved:
            rank_zero_warn(
                f"{len(moved)} floating-point buffers moved during training and are not merged: "
                f"{listing(moved)}. Evaluation uses those of the last task; choose with "
                "MergeCallback(buffers='trained' | 'base' | 'average'), or freeze them"
            )
            self._choice = "trained"
        if self._choice == "average":
            self._average.update(live)

    def values(self) -> dict[str, Tensor]:
        """What to put into the module for an evaluation; empty to leave its buffers as they are."""
        if self._choice == "base":
            return self.base
        return dict(self._average.items()) if self._choice == "average" else {}

    def to(self, device: torch.device) -> None:
        """Move everything to a device."""
        self.load_state_dict(self.state_dict(), device)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on, as tensors and plain values."""
        return {"base_buffers": self.base, "buffer_average": self._average.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None) -> None:
        """Go on from copies of a state's tensors; no device leaves them in theirs."""
        self.base = copies(state["base_buffers"], device)
        self._average.load_state_dict(state["buffer_average"], device)
