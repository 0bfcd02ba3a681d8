"""The life cycle of merging along a stream: a task begins and ends, the result is put in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_merge.errors import InputError, listing, task_name, unknown_name
from cl_merge.mergers import Merger
from cl_merge.mergers.registry import as_merger
from cl_merge.storage.quantize import check_store
from cl_merge.stream_merger.folder import prepare_folder, write_task
from cl_merge.stream_merger.merged_model import MergedModel
from cl_merge.stream_merger.messages import (
    tell_merged,
    warn_of_buffers,
    warn_of_moved,
    warn_of_start,
)
from cl_merge.stream_merger.sharding import stored_stretches
from cl_merge.stream_merger.swap import WeightSwap
from cl_merge.task_vectors.module_weights import (
    checksums,
    install,
    parameters_of,
    weights_of,
)
from cl_merge.task_vectors.scales import Scales
from cl_merge.task_vectors.selection import Selection
from cl_merge.task_vectors.shards import together
from cl_merge.task_vectors.task_vector import TaskVector, check_same_dtypes

STARTS = ("sequential", "independent", "merged")


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
        model: What has been merged so far.
        selection: Which parameters are merged.

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
        self.module = module
        self.start = start
        self.selection = Selection(include, exclude)
        self._store = check_store(store)
        self._directory = Path(directory) if directory is not None else None
        merger = as_merger(method, options, type(self))
        self.model = MergedModel(
            merger,
            Scales.read(scale, merger.published_scale),
            self.selection,
            buffers=buffers,
            left_out=left_out,
            device=device,
            keep_frozen=start == "independent",
        )
        self._swap = WeightSwap()

    def __repr__(self) -> str:
        return f"<StreamMerger: {self.merger.name}, tasks={self.tasks}>"

    @property
    def merger(self) -> Merger:
        """What has folded the tasks so far."""
        return self.model.merger

    @property
    def scales(self) -> Scales:
        """The scale in use, which may be set; `InputError` if a pattern fits no parameter."""
        return self.model.scales

    @scales.setter
    def scales(self, scales: Scales) -> None:
        if self.model.at_end:  # has the names of all parameters, once a task has ended
            scales.check(self.model.at_end)
        self.model.scales = scales

    @property
    def tasks(self) -> int:
        """Number of tasks folded so far."""
        return self.merger.tasks

    @property
    def base(self) -> dict[str, Tensor]:
        """The weights before they first moved, by parameter name.

        Where parameters are sharded, the stretches that this process keeps, flattened.
        """
        return self.model.base.parameters

    @property
    def base_buffers(self) -> dict[str, Tensor]:
        """The floating-point buffers before any training, by name."""
        return self.model.base.buffers

    # A task, in the order of its steps.

    def begin_task(self) -> None:
        """Begin a task: put the weights in that it starts from, and note the base of what is new.

        Call it before the optimizer is made, which may copy weights.

        Raises:
            InputError: If a pattern fits nothing, a parameter is not initialized yet, or one that
                is merged has gone, shrunk or changed its dtype.
            StorageError: If the directory cannot be written to.
        """
        self.restore_start()
        self.note_base()

    def restore_start(self) -> None:
        """Put in the weights that the next task starts from; `begin_task` does this by itself."""
        if self.tasks and self.start == "merged":
            self.install()
        if self.tasks and self.start == "independent":
            self.model.base.restore(self._module)

    def note_base(self, *, resumed: bool = False) -> None:
        """Note the values that what is new has before it moves; `begin_task` does this by itself.

        Args:
            resumed: Whether the state is one of within the task, which has noted the rest.

        Raises:
            InputError: As `begin_task`.
            StorageError: As `begin_task`.
        """
        live = parameters_of(self._module)
        self.model.shard(live)
        before = self.model.layout()
        if not self.base:
            self.check_names(name for name, p in live.items() if p.is_floating_point())
            if self._directory is not None:
                prepare_folder(self._directory)
        here = self.model.merged_here(live)
        check_same_dtypes(here, before, "the module", "the base")
        kept = [name for name in before if here[name].shape == before[name].shape]
        self.model.base.note(self._module, resumed=resumed)
        now, left = self.model.base.at_start, self.model.at_end
        other = [name for name in kept if now[name] != left.get(name, now[name])]
        if other and self.start == "sequential" and not resumed:
            warn_of_start(self.tasks, other)

    def check_names(self, names: Iterable[str]) -> None:
        """Make sure that all patterns fit names, also of what is frozen, or raise `InputError`."""
        self.scales.check(self.selection.names(names))

    def watch(self) -> None:
        """Note the base of what has been unfrozen, before the optimizer's next step."""
        self.model.base.watch()

    def task_vector(self, module: nn.Module | None = None) -> TaskVector:
        """The difference of a module's weights to the base, of the parameters that are merged.

        Args:
            module: None for the one in training.

        Returns:
            The task vector as it comes back from the store, float32 by parameter name, on `device`.

        Raises:
            InputError: If a parameter is missing, or a value is not finite.
        """
        base = self.model.merged_base()
        if not base:
            raise InputError("nothing that include and exclude choose has been trained")
        try:
            weights = parameters_of(self._module if module is None else module)
            live = self.model.base.own(self.model.merged_here(weights))
            vector = together(self.model.shards, lambda: TaskVector.between(base, live))
        except InputError as error:
            raise InputError(f"{task_name(self.tasks)}: {error}") from error
        return TaskVector(stored_stretches(vector, self._store, self.model.shards))

    def end_task(
        self, importance: Mapping[str, Tensor] | None = None, *, write: bool = True
    ) -> TaskVector:
        """End a task: fold what it changed.

        Args:
            importance: For methods that weigh elements: how much each one matters, not negative,
                in the shapes of the parameters by name. For ``"regmean"``: Gram matrices.
            write: Whether to write files to the directory, if there is one.

        Returns:
            The task vector.

        Raises:
            InputError: If the task vector or the importance is refused; nothing has been folded.
            StorageError: If a file cannot be written; likewise.
        """
        task, vector = self.tasks, self.task_vector()
        if importance is not None:
            held = {name: tensor for name, tensor in importance.items() if name in vector}
            importance = {name: tensor.to(vector[name].device) for name, tensor in held.items()}
        layout = self.model.layout()
        has_grown = self.merger.grow({name: layout[name].shape for name in vector})
        if write and self._directory is not None:
            # First, so that a task that cannot be written is not folded.
            base = self.model.merged_base() if has_grown else {}
            write_task(
                self._directory,
                task,
                vector,
                importance,
                base,
                store=self._store,
                shards=self.model.shards,
            )
        self.merger.update(vector, importance)
        self.model.folded(checksums(parameters_of(self._module)))
        moved_buffers = self.model.buffers.fold(self.base_buffers, weights_of(self._module))
        if moved_buffers and self.model.buffers.choice is None:
            warn_of_buffers(moved_buffers)
            self.model.buffers.choice = "trained"
        if moved := self.model.base.moved_while_frozen(self.model.at_end):
            warn_of_moved(moved)
        tell_merged(self.merger, task, layout, next(iter(vector.values())).device)
        return vector

    # The result.

    def merged(self) -> TaskVector:
        """The merged task vector, float32 by parameter name; on the CPU if it was sharded."""
        return self.model.merged()

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
        live = self.model.checked_live(target)
        if self.module is not None and target is not self.module:
            here, merged = weights_of(self.module), self.model.merged_base()
            rest = [name for name in here if name in live and name not in merged]
            install(live, {n: here[n] for n in rest if here[n].shape == live[n].shape})
        install(live, self.model.values(live))

    @contextmanager
    def merged_weights(self) -> Iterator[None]:
        """Hold the merged weights in the module for a while; the former ones come back.

        Raises:
            InputError: If no task has been folded yet, the merged weights are in already, or
                something else changed the weights meanwhile; the former ones are back.
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
        live = self.model.checked_live(self._module)
        self._swap.put_in(self._module, self.base, self.model.values(live))

    def swap_out(self) -> list[str]:
        """Put the former weights back, bit for bit; nothing happens where none are kept.

        Returns:
            Names of the parameters that something else changed meanwhile, if it has not put back
            what the last task left.
        """
        return self._swap.take_out(self.model.at_end)

    def changed(self) -> list[str]:
        """Names of the parameters that do not hold what `swap_in` has put in."""
        return self._swap.changed()

    def holds_trained(self) -> bool:
        """Whether the module holds the weights that the last task left."""
        return checksums(parameters_of(self._module)) == self.model.at_end

    # The state.

    def reset(self) -> None:
        """Forget all tasks and the base, for a new stream."""
        self.model = self.model.fresh()

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on, as plain values and live tensors.

        Where parameters are sharded, all processes must call it, and the first one has the tensors.
        """
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        """Go on from what `state_dict` returned; its tensors are copied.

        Args:
            state: The state, of the same method and options.
            device: Where its tensors shall be; None is `device`, or where they were saved.

        Raises:
            InputError: If include and exclude leave out what has been merged.
        """
        if self.module is not None:
            self.model.shard(parameters_of(self.module))
        self.model.load_state_dict(state, device)

    def backup(self) -> Callable[[], None]:
        """Copy the state; what is returned goes back to it, in this process."""
        return self.model.backup()

    def move_state_to(self, device: torch.device) -> None:
        """Move the base, the merger and the buffers, unless a `device` was asked for.

        Where the parameters of the module are sharded, this process keeps its stretches only.
        """
        if self.module is not None:
            self.model.shard(parameters_of(self.module))
        self.model.move_to(device)

    @property
    def _module(self) -> nn.Module:
        if self.module is None:
            raise InputError("StreamMerger has no module; give it one, or set StreamMerger.module")
        return self.module
