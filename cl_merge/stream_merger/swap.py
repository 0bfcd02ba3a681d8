"""Other weights in a module for a while, in a loop where others change weights too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from cl_merge.errors import InputError
from cl_merge.task_vectors.module_weights import (
    checksums,
    copies,
    floating_buffers,
    install,
    parameters_of,
    weights_of,
    writable,
)


class WeightSwap:
    """Puts weights into a module and takes them out again, and notices if others changed them."""

    def __init__(self) -> None:
        self._before: dict[str, Tensor] | None = None
        self._put_in: dict[str, int] = {}

    def put_in(
        self, module: nn.Module, names: Iterable[str], values: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Write values into parameters of these names and into buffers, until `take_out`.

        Where that fails, the former ones are back. `InputError` if values are in already.
        """
        if self._before is not None:
            raise InputError(
                "the merged weights are in the module already; evaluate it as it is, or leave "
                "merged_weights() first"
            )
        live = parameters_of(module)
        parameters = {name: live[name] for name in names if name in live}
        buffers = floating_buffers(module)
        self._before, self._put_in = copies(parameters | buffers), {}
        try:
            install(parameters | buffers, values)
            self._put_in = checksums(parameters)
        except BaseException:
            self.take_out(module, {})
            raise

    def changed(self, module: nn.Module) -> list[str]:
        """Names of the parameters that do not hold what was put in."""
        return self._differing(self._now(module))

    def take_out(self, module: nn.Module, trained: Mapping[str, int]) -> list[str]:
        """Write the former weights back, bit for bit; nothing happens where none are kept.

        Args:
            module: The module.
            trained: Checksums of parameters, as training left them.

        Returns:
            Names of the parameters that something else changed meanwhile. Where it has put the
            trained weights back, they stay, and none are named. Buffers that the module has made
            anew meanwhile stay too.
        """
        before, self._before = self._before, None
        if before is None:
            return []
        now = self._now(module)
        changed = self._differing(now)
        if changed and all(trained.get(name) == total for name, total in now.items()):
            changed, before = [], {name: t for name, t in before.items() if name not in now}
        live = weights_of(module)
        here = {n: t for n, t in before.items() if n in live and live[n].shape == t.shape}
        install(live, {name: value for name, value in here.items() if writable(live[name])})
        return changed

    def _differing(self, now: Mapping[str, int]) -> list[str]:
        return [name for name, put_in in self._put_in.items() if now.get(name) != put_in]

    def _now(self, module: nn.Module) -> dict[str, int]:
        live = parameters_of(module)
        return checksums({name: live[name] for name in self._put_in if name in live})
