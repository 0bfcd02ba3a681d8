"""The life cycle of merging along a stream: a task begins and ends, the result is put in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_merge.errors import InputError, listing, task_name, unknown_name
from cl_merge.mergers import Merger
from cl_merge.mergers.registry import as_merger
from cl_merge.mergers.stack import StackMerger
from cl_merge.storage.files import save_tensors
from cl_merge.storage.quantize import check_store, stored
from cl_merge.storage.weights import GROWN_BASE
from cl_merge.stream_merger.base_weights import BaseWeights
from cl_merge.stream_merger.buffers import MergedBuffers
from cl_merge.stream_merger.messages import (
    is_first_process,
    tell_merged,
    warn_of_buffers,
    warn_of_moved,
    warn_of_start,
)
from cl_merge.stream_merger.swap import WeightSwap, weights_of
from cl_merge.task_vectors.growth import can_hold, check_grown
from cl_merge.task_vectors.module_weights import checksums, install, parameters_of
from cl_merge.task_vectors.scales import Scales, scaled
from cl_merge.task_vectors.selection import Selection
from cl_merge.task_vectors.task_vector import TaskVector, check_same_dtypes, check_same_layout

STARTS = ("sequential", "independent", "merged")
LEFT_OUT = ("trained", "base")


class StreamMerger:
    """Merges the tasks that a module learns one after another, in any training loop.

    Around the training of each task stand `begin_task` and `end_task`; in `merged_weights` the
    module holds the merged weights for a while, after `install` for good.

    The base of a parameter is its value before it first moves. Parameters may begin to train later,
    in the middle of a task (then call `watch` after unfreezing), join, or grow new entries between
    tasks, as the head of a class-incremental model does: what is new has the value it is born with
    as its base, and counts as unchanged in the tasks before.

    Args:
        module: What learns; may be set later, as the attribute `module`.
        method: As for `MergeCallback`; so are all others.
        scale: A number, or numbers by pattern; None takes the one of the method.
        start: ``"sequential"``, ``"independent"`` or ``"merged"``.
        buffers: ``"trained"``, ``"base"`` or ``"average"``; None is ``"trained"`` with a warning.
        left_out: ``"trained"`` or ``"base"``.
        include: Patterns on the names of the parameters to merge.
        exclude: Patterns on the names of those to leave out.
        store: In how many bits task vectors are written.
        directory: Where to write each task vector, and the base once parameters joined or grew.
        device: Where base and merged vector are kept; None is where the module trains.
        **options: Options of the method.

    Attributes:
        module: The module in training.
        merger: What has folded the tasks so far.
        scales: The scale in use.

    Raises:
        InputError: If the method, an option, a pattern or a value is wrong.

    Example:
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(module.weight)
        >>> stream = StreamMerger(module, "magmax", scale=1.0)
        >>> for change in (torch.tensor([[1.0, 0.0]]), torch.tensor([[-3.0, 2.0]])):
        ...     stream.begin_task()
        ...     _ = module.weight.data.add_(change)  # the training
        ...     _ = stream.end_task()
        >>> with stream.merged_weights():
        ...     module.weight.data
        tensor([[-2.,  2.]])
    """

    def __init__(
        self,
        module: nn.Module | None,
        method: str | Merger | type[Merger] = "magmax",
        *,
        scale: float | Mapping[str, float] | Scales | None = None,
        start: str = "sequential",
        buffers: str | None = None,
        left_out: str = "trained",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        store: str = "float32",
        directory: str | Path | None = None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        if start not in STARTS:
            raise unknown_name("start", start, STARTS)
        if left_out not in LEFT_OUT:
            raise unknown_name("choice of left_out", left_out, LEFT_OUT)
        self.module = module
        self.merger = as_merger(method, options)
        self.start = start
        self.scales = Scales.read(scale, self.merger.published_scale)
        self._selection = Selection(include, exclude)
        self._store = check_store(store)
        self._buffers, self._left_out = MergedBuffers(buffers), left_out
        self._directory = Path(directory) if directory is not None else None
        self._base = BaseWeights(device, keep_frozen=start == "independent")
        self._at_end: dict[str, int] = {}  # checksums of all parameters, as the last task left them
        self._swap = WeightSwap()
        self._changes: dict[str, Tensor] | None = None

    @property
    def tasks(self) -> int:
        """Number of tasks folded so far."""
        return self.merger.tasks

    @property
    def base(self) -> dict[str, Tensor]:
        """The weights before they first moved, by parameter name."""
        return self._base.parameters

    @property
    def base_buffers(self) -> dict[str, Tensor]:
        """The floating-point buffers before any training, by name."""
        return self._base.buffers

    # A task, in the order of its steps.

    def begin_task(self) -> None:
        """Begin a task: put the weights in that it starts from, and note the base of what is new.

        Call it before the optimizer is made, which may copy weights.

        Raises:
            InputError: If a pattern fits nothing, nothing trains, or a parameter that is merged has
                gone, shrunk or changed its dtype.
        """
        self.restore_start()
        self.note_base()

    def restore_start(self) -> None:
        """Put in the weights that the next task starts from; `begin_task` does this by itself."""
        if self.tasks and self.start == "merged":
            self.install()
        if self.tasks and self.start == "independent":
            self._base.restore(self._module)

    def note_base(self, *, resumed: bool = False) -> None:
        """Note the values that what is new has before it moves; `begin_task` does this by itself.

        Args:
            resumed: Whether the state is one of within the task, which has noted the rest.

        Raises:
            InputError: As `begin_task`.
        """
        live, before = parameters_of(self._module), self._merged_base()
        if not self.base:
            self.check_names(name for name, p in live.items() if p.is_floating_point())
        here = self._merged_here(live)
        check_same_dtypes(here, before, "the module", "the base")
        kept = [name for name in before if here[name].shape == before[name].shape]
        self._base.note(self._module, resumed=resumed)
        now, left = self._base.at_start, self._at_end
        other = [name for name in kept if now[name] != left.get(name, now[name])]
        if other and self.start == "sequential" and not resumed:
            warn_of_start(self.tasks, other)

    def check_names(self, names: Iterable[str]) -> None:
        """Make sure that all patterns fit names, also of what is frozen, or raise `InputError`."""
        self.scales.check(self._selection.names(names))

    def watch(self) -> None:
        """Note the base of what has been unfrozen, before the optimizer's next step."""
        self._base.watch()

    def task_vector(self) -> TaskVector:
        """The difference of the module's weights to the base, of the parameters that are merged.

        Returns:
            The task vector as it comes back from the store, float32 by parameter name, on `device`.

        Raises:
            InputError: If a parameter is missing, or a value is not finite.
        """
        base = self._merged_base()
        if not base:
            raise InputError("nothing that include and exclude choose has been trained")
        try:
            vector = TaskVector.between(base, self._merged_here(parameters_of(self._module)))
        except InputError as error:
            raise InputError(f"{task_name(self.tasks)}: {error}") from error
        return TaskVector(stored(vector, self._store))

    def end_task(
        self, importance: Mapping[str, Tensor] | None = None, *, write: bool = True
    ) -> TaskVector:
        """End a task: fold what it changed.

        Args:
            importance: For methods that weigh elements: how much each one matters, not negative,
                in the shapes of the parameters by name.
            write: Whether to write files to the directory, if there is one.

        Returns:
            The task vector.

        Raises:
            InputError: If the task vector or the importance is refused; nothing has been folded.
        """
        task, vector = self.tasks, self.task_vector()
        if importance is not None:
            importance = {name: importance[name].to(t.device) for name, t in vector.items()}
        has_grown = self.merger.grow({name: tensor.shape for name, tensor in vector.items()})
        self.merger.update(vector, importance)
        self._changes = None
        self._at_end = checksums(parameters_of(self._module))
        moved_buffers = self._buffers.fold(self.base_buffers, weights_of(self._module))
        if moved_buffers and self._buffers.choice is None:
            warn_of_buffers(moved_buffers)
            self._buffers.choice = "trained"
        if moved := self._base.moved_while_frozen(self._at_end):
            warn_of_moved(moved)
        tell_merged(self.merger, task, vector)
        if write and self._directory is not None and is_first_process():
            vector.save(self._directory / f"task{task}.safetensors", store=self._store)
            if importance is not None:
                save_tensors(self._directory / f"importance{task}.safetensors", importance, {})
            if has_grown:
                path = self._directory / "base.safetensors"
                save_tensors(path, self._merged_base(), {GROWN_BASE: "1"})
        return vector

    # The result.

    def changes(self) -> Iterable[tuple[str, Tensor]]:
        """The merged task vector, a parameter at a time: names, and float32 tensors."""
        if not (isinstance(self.merger, StackMerger) or self.merger.unit == "parameter"):
            return self.merger.items()
        if self._changes is None:  # it takes too long to compute for every evaluation
            with torch.inference_mode(False):
                self._changes = dict(self.merger.items())
        return self._changes.items()

    def evaluation_buffers(self) -> dict[str, Tensor]:
        """The buffers of the merged model by name, where they are not those of the last task."""
        return self._buffers.values(self.base_buffers)

    def install(self, module: nn.Module | None = None) -> None:
        """Put the merged weights into a module, to stay.

        Args:
            module: None for the one in training. Another one of the same parameters may be frozen,
                compiled, or of another precision; what is not merged comes from the one in
                training, if that is known and the shapes agree.

        Raises:
            InputError: If no task has been folded yet, or the module has not these parameters.
        """
        target = self._module if module is None else module
        live = self._checked_live(target)
        if self.module is not None and target is not self.module:
            here, merged = weights_of(self.module), self._merged_base()
            rest = [name for name in here if name in live and name not in merged]
            install(live, {n: here[n] for n in rest if here[n].shape == live[n].shape})
        install(live, self._values(live))

    @contextmanager
    def merged_weights(self) -> Iterator[None]:
        """Hold the merged weights in the module for a while; the former ones come back.

        Raises:
            InputError: If no task has been folded yet, or something else changed the weights
                meanwhile; the former ones are back.
        """
        self.swap_in()
        try:
            yield
        except BaseException:
            self.swap_out()
            raise
        if changed := self.swap_out():
            raise InputError(f"something else changed the merged weights: {listing(changed)}")

    def swap_in(self) -> None:
        """Put the merged weights in until `swap_out`."""
        live = self._checked_live(self._module)
        self._swap.put_in(self._module, self.base, self._values(live))

    def swap_out(self) -> list[str]:
        """Put the former weights back, bit for bit; nothing happens where none are kept.

        Returns:
            Names of the parameters that something else changed meanwhile, if it has not put back
            what the last task left.
        """
        return self._swap.take_out(self._module, self._at_end)

    def changed(self) -> list[str]:
        """Names of the parameters that do not hold what `swap_in` has put in."""
        return self._swap.changed(self._module)

    def holds_trained(self) -> bool:
        """Whether the module holds the weights that the last task left."""
        return checksums(parameters_of(self._module)) == self._at_end

    # The state.

    def reset(self) -> None:
        """Forget all tasks and the base, for a new stream."""
        self.merger = type(self.merger)(**self.merger.options)
        self._base = BaseWeights(self._base.device, keep_frozen=self.start == "independent")
        self._buffers = MergedBuffers(self._buffers.choice)
        self._at_end, self._changes = {}, None

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on, as plain values and live tensors."""
        return {
            **self._base.state_dict(),
            **self._buffers.state_dict(),
            "merger": self.merger.state_dict(),
            "at_end": self._at_end,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        """Go on from what `state_dict` returned; its tensors are copied.

        Args:
            state: The state, of the same method and options.
            device: Where its tensors shall be; None is `device`, or where they were saved.
        """
        device = device or self._base.device
        # An evaluation runs in inference mode, whose tensors are of no use to the next training.
        with torch.inference_mode(False):
            self.merger.load_state_dict(state["merger"], device)
            self._base.load_state_dict(state, device)
            self._buffers.load_state_dict(state, device)
        self._at_end, self._changes = dict(state.get("at_end", {})), None

    def move_state_to(self, device: torch.device) -> None:
        """Move the base, the merger and the buffers, unless a `device` was asked for."""
        kept = next(iter(self.base.values()), None)
        if self._base.device is None and kept is not None and kept.device != device:
            self.load_state_dict(self.state_dict(), device)

    @property
    def _module(self) -> nn.Module:
        if self.module is None:
            raise InputError("StreamMerger has no module; give it one, or set StreamMerger.module")
        return self.module

    def _merged_base(self) -> dict[str, Tensor]:
        return {name: self.base[name] for name in self._selection.chosen(self.base)}

    def _merged_here(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is merged, of live tensors; what is left out may be anything."""
        base = self._merged_base()
        try:
            check_grown(live, base, base, "the module")
        except InputError as error:
            raise InputError(
                f"{error}. Leave out from the first task on what comes and goes, as in "
                "exclude=['heads.*']"
            ) from None
        return {name: live[name] for name in base}

    def _checked_live(self, module: nn.Module) -> dict[str, Tensor]:
        """The parameters and buffers of a module that can hold what is merged."""
        if self.tasks == 0:
            raise InputError("nothing to install: no task has been trained and merged yet")
        if not self.base:
            raise InputError(
                f"the Merger '{self.merger.name}' has folded task vectors before, but the weights "
                "that they start from are not known until a task begins; give a fresh one"
            )
        merged, live = self._merged_base(), weights_of(module)
        here = {name: live[name] for name in merged if name in live}
        if len(here) < len(merged):
            # Where no name fits, all of them together may tell of a prefix.
            check_same_layout(here or live, merged, "the module", "that of the tasks")
        check_grown(live, merged, merged, "the module")
        return live

    def _values(self, live: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What the merged model holds, of what is not as the last task left it."""
        merged = self._merged_base()
        yield from scaled(merged, self.changes(), self.scales)
        rest = dict(self.evaluation_buffers())
        if self._left_out == "base":
            rest |= {name: value for name, value in self.base.items() if name not in merged}
        for name, value in rest.items():
            if name in live and can_hold(live[name], value.shape):
                yield name, value
