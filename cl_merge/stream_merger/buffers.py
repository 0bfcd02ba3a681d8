"""What the floating-point buffers of a merged model hold: they are not merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cl_merge.errors import unknown_name
from cl_merge.mergers import Average

BUFFERS = ("trained", "base", "average")


class MergedBuffers:
    """The buffers of the merged model, as was chosen.

    Args:
        choice: ``"trained"``, those of the last task; ``"base"``; ``"average"``, the mean over the
            tasks that had them; or None, which is ``"trained"`` and not yet said to be.
    """

    def __init__(self, choice: str | None) -> None:
        if choice is not None and choice not in BUFFERS:
            raise unknown_name("choice of buffers", choice, BUFFERS)
        self.choice = choice
        self._averages: dict[str, Average] = {}

    def fold(self, base: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> list[str]:
        """Take up the buffers that a task left; returns the names of those that moved."""
        here = {name: live[name].to(base[name].device) for name in base if name in live}
        if self.choice == "average":
            for name, buffer in here.items():
                known = self._averages.get(name)
                if known is None or known.merged()[name].shape != buffer.shape:
                    self._averages[name] = Average()
                self._averages[name].update({name: buffer})
        return [name for name, buffer in here.items() if not torch.equal(buffer, base[name])]

    def values(self, base: dict[str, Tensor]) -> dict[str, Tensor]:
        """The buffers by name; none where they stay those of the last task."""
        if self.choice == "base":
            return base
        return {name: average.merged()[name] for name, average in self._averages.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on, as plain values and live tensors."""
        averages = {name: average.state_dict() for name, average in self._averages.items()}
        return {"buffer_averages": averages}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None) -> None:
        """Go on from what `state_dict` returned."""
        averages = dict(state.get("buffer_averages", {}))
        if "buffer_average" in state:  # as it was written before buffers could join
            together = state["buffer_average"]
            for name, sums in together["accumulators"].items():
                averages[name] = together | {"accumulators": {name: sums}}
        self._averages = {name: Average() for name in averages}
        for name, average in self._averages.items():
            average.load_state_dict(averages[name], device)
