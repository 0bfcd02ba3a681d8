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
)


class WeightSwap:
    """Puts weights into a module and takes them out again, and notices if others changed them."""

    def __init__(self) -> None:
        self._module = nn.Module()  # that has them
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
        self._module, self._before = module, copies(parameters | buffers)
        try:
            install(parameters | buffers, values)
            self._put_in = checksums(parameters)
        except BaseException:
            self.take_out({})
            raise

    def changed(self) -> list[str]:
        """Names of the parameters that do not hold what was put in."""
        now = self._now()
        return [name for name, put_in in self._put_in.items() if now.get(name) != put_in]

    def take_out(self, trained: Mapping[str, int]) -> list[str]:
        """Write the former weights back, bit for bit; nothing happens where none are kept.

        Args:
            trained: Checksums of parameters, as training left them.

        Returns:
            Names of the parameters that something else changed meanwhile. Where it has put the
            trained weights back, they stay, and none are named. Buffers of another shape, which the
            module has made anew meanwhile, stay too.
        """
        if self._before is None:
            return []
        changed, before, live = self.changed(), self._before, weights_of(self._module)
        if changed and all(trained.get(name) == total for name, total in self._now().items()):
            changed, before = [], {n: t for n, t in before.items() if n not in self._put_in}
        self._module, self._before, self._put_in = nn.Module(), None, {}
        install(live, {n: t for n, t in before.items() if n in live and live[n].shape == t.shape})
        return changed

    def _now(self) -> dict[str, int]:
        live = parameters_of(self._module)
        return checksums({name: live[name] for name in self._put_in if name in live})
