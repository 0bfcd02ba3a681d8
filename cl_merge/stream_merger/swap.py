"""Other weights in a module for a while, in a loop where others change weights too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from cl_merge.task_vectors.module_weights import (
    checksums,
    copies,
    floating_buffers,
    install,
    parameters_of,
)


class WeightSwap:
    """Puts weights into a module and takes them out again, and notices if others changed them."""

    def __init__(self) -> None:
        self._before: dict[str, Tensor] | None = None
        self._put_in: dict[str, int] = {}

    def put_in(self, module: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
        """Write values into parameters and buffers, until `take_out`."""
        live = weights_of(module)
        self._before = copies(live)
        install(live, values)
        self._put_in = checksums(parameters_of(module))

    def changed(self, module: nn.Module) -> list[str]:
        """Names of the parameters that do not hold what was put in."""
        now = checksums(parameters_of(module))
        return [name for name, put_in in self._put_in.items() if now.get(name) != put_in]

    def take_out(self, module: nn.Module, trained: Mapping[str, int]) -> list[str]:
        """Write the former weights back, bit for bit; nothing happens where none are kept.

        Args:
            module: The module.
            trained: Checksums of all parameters, as training left them.

        Returns:
            Names of the parameters that something else changed meanwhile. Where it has put the
            trained weights back, they stay, and none are named.
        """
        before, self._before = self._before, None
        if before is None:
            return []
        changed = self.changed(module)
        if changed and checksums(parameters_of(module)) == trained:
            return []
        install(weights_of(module), before)
        return changed


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and floating-point buffers of a module by name, live."""
    return parameters_of(module) | floating_buffers(module)
