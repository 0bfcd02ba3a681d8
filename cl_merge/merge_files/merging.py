"""Merge files: one stretch of a parameter at a time, over all tasks, into the output."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_merge import __version__
from cl_merge.errors import InputError, listing, unknown_name
from cl_merge.kernels.finite import is_finite
from cl_merge.kernels.parallel import in_threads
from cl_merge.merge_files.adapter import (
    AdapterFit,
    AdapterWriter,
    LoraRank,
    adapter_plan,
    write_adapter,
)
from cl_merge.merge_files.grown import GrownVector
from cl_merge.merge_files.hashing import BLOCK
from cl_merge.merge_files.inputs import Inputs, Progress
from cl_merge.merge_files.plan import Plan, make_plan
from cl_merge.mergers import Merger
from cl_merge.mergers.base import fold_chunk, zeros
from cl_merge.mergers.chunks import Accumulators, Piece, ResultInfo, Unit, chunk_size, cut
from cl_merge.mergers.registry import fresh_merger
from cl_merge.storage import Weights, Writer, check_output, open_weights, write_weights
from cl_merge.stream_merger.buffers import BUFFERS
from cl_merge.task_vectors.scales import Scales
from cl_merge.task_vectors.selection import Selection
from cl_merge.task_vectors.task_vector import check_scale, moved

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_HELD_BYTES = 16  # for each element of a block: what waits for a global count
_NO_HASH = "0" * 32
_Sink = Writer | AdapterWriter
_NOT_WRITTEN = {".pt", ".pth", ".bin", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz"}


@dataclass(frozen=True)
class Merged:
    """What a merge of files did.

    Attributes:
        path: The output.
        merged: Number of tensors that were merged.
        buffers: Number of floating-point buffers, which were chosen.
        copied: Number of tensors that were taken from the base.
        bytes_read: Bytes of all inputs' tensors, each time they were read.
        seconds: How long it took.
        provenance: What the output's metadata say of how it was made.
        adapter: How near the adapter comes to what was merged, if one was asked for.
    """

    path: Path
    merged: int
    buffers: int
    copied: int
    bytes_read: int
    seconds: float
    provenance: Mapping[str, str] = field(repr=False)
    adapter: AdapterFit | None = None


def merge_checkpoints(
    base: str | Path,
    tasks: Sequence[str | Path],
    output: str | Path,
    *,
    method: str | Merger = "magmax",
    scale: float | Mapping[str, float] | None = None,
    weights: Sequence[float] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    importances: Sequence[str | Path] = (),
    buffers: str | None = None,
    lora_rank: LoraRank | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
    block_size: int = BLOCK,
    **options: Any,
) -> Merged:
    """Merge fine-tuned checkpoints, or task vectors, into a base, from files to a file.

    Inputs are safetensors files, sharded folders, Hugging Face and open_clip folders, checkpoints
    of PyTorch and Lightning, and task vectors. They are read through memory maps, a stretch of a
    parameter at a time over all tasks, so that memory depends neither on their size nor, for most
    methods, on their number. The output appears when it is whole; see `write_weights`.

    The result is that of a `MergeCallback` with the same task vectors, bit for bit: computed in
    float32 (float64 where the weights are) and rounded once to the base's dtype. Tensors that are
    not floating point or not selected are the base's, and need not match; statistics of batch norms
    and other buffers are never merged. Of tied parameters, one suffices.

    Args:
        base: The weights before fine-tuning.
        tasks: Fine-tuned weights or task vectors, in the order of the tasks.
        output: A name that ends in ``.safetensors`` for one file, any other for a folder with the
            base's configuration files in it.
        method: A name that `get_merger` knows, or a fresh `Merger`.
        scale: Factor of the merged task vector; a mapping from patterns to factors for layers;
            None takes the one that the method was published with.
        weights: A factor of each task vector before they are merged, negative to take something
            away; none for 1 each. Methods that average divide by the number of tasks, not by the
            sum of the weights.
        include: Patterns of the parameters to merge, as in ``"visual.*"``; empty for all.
        exclude: Patterns of parameters not to merge.
        importances: For methods that weigh elements, as ``"fisher"``: a file for each task.
        buffers: What floating-point buffers hold, such as batch-norm statistics, which are told by
            their names: ``"trained"`` those of the last task, ``"base"``, or ``"average"`` their
            mean over tasks. None means ``"trained"``, with a warning that names those that differ.
        lora_rank: Where all tasks are LoRA adapters: merge them into one of this rank, a folder of
            peft with the dtype of the first, instead of into the base. Its factors are the nearest
            ones to each merged matrix; ``adapter`` of the result says how near. ``"auto"`` is the
            largest sum of the ranks of the tasks, with which methods that average or add up lose
            nothing.
        shard_bytes: In a folder, the most bytes of one file.
        overwrite: Whether an output file that exists may be replaced.
        progress: Given the number of bytes to be read; returns what is told of bytes that were.
        block_size: Elements that a thread works on at a time, and that are hashed together: the
            hashes of inputs in the metadata of the output depend on it, nothing else does.
        **options: Options of the method.

    Returns:
        What was done.

    Raises:
        InputError: If an input is damaged, does not match the base, or holds NaN or infinity; if a
            value overflows in the base's dtype; or if the method, an option, a pattern or the
            output is wrong.
        StorageError: If the output cannot be written.

    Example::

        merge_checkpoints("base.safetensors", ["task0.safetensors", "task1.safetensors"],
                          "merged.safetensors", method="ties", density=0.3)
    """
    begin = time.perf_counter()
    merger = fresh_merger(method, options)
    if buffers is not None and buffers not in BUFFERS:
        raise unknown_name("choice of buffers", buffers, BUFFERS)
    factors = _checked_weights(weights, len(tasks))
    _check_name(output)
    check_output(output, [base, *tasks, *importances], overwrite=overwrite)
    if merger.weighted and len(importances) != len(tasks):
        raise InputError(
            f"'{merger.name}' needs the importance of each element: {len(tasks)} files, one for "
            f"each task, but {len(importances)} were given"
        )
    if importances and not merger.weighted:
        raise InputError(f"'{merger.name}' takes no importances; leave them out")
    selection = Selection(include, exclude)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_weights(path)) for path in (base, *tasks, *importances)]
        vectors, weighing = opened[1 : len(tasks) + 1], opened[len(tasks) + 1 :]
        plan = make_plan(opened[0], vectors, selection, weighing)
        block = block_size
        if lora_rank is not None:
            plan, rank, block = adapter_plan(plan, lora_rank)
            merger.chunk_size = block  # whole matrices, which are factored as they come
        scales = Scales.read(scale, merger.published_scale)
        scales.check(plan.merged)
        passes = 1 if type(merger).prepare is Merger.prepare else 2
        inputs = Inputs(plan, progress, passes=passes, block=block_size, factors=factors)
        work = _Work(plan, merger, scales, inputs, block, buffers or "trained")
        made = {
            "format": "pt",  # which transformers insists on
            "cl_merge.version": __version__,
            "cl_merge.method": method if isinstance(method, str) else merger.name,
            "cl_merge.options": json.dumps(merger.options),
            "cl_merge.scale": json.dumps(scales.plain()),
            "cl_merge.include": json.dumps(list(selection.include)),
            "cl_merge.exclude": json.dumps(list(selection.exclude)),
            "cl_merge.buffers": buffers or "trained",
            "cl_merge.weights": json.dumps(factors),
            "cl_merge.inputs": _described(plan, [_NO_HASH] * len(opened)),
        }
        entries = {n: (plan.base.dtype(n), plan.base.shape(n)) for n in plan.base.names}
        writing: AbstractContextManager[_Sink] = write_weights(
            output,
            entries,
            {**plan.base.metadata, **made},
            like=plan.base,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
        )
        if lora_rank is not None:
            writing = write_adapter(output, plan, rank, made, overwrite=overwrite)
        with writing as writer:
            work.run(writer)
            hashes = [content.hexdigest() for content in work.inputs.hashes]
            if lora_rank is not None:
                hashes[0] = ""  # of the base only names and shapes were read
            made["cl_merge.inputs"] = _described(plan, hashes)
            writer.amend(made)
    _warn(work.inputs, hashes, buffers)
    return Merged(
        Path(output),
        len(plan.merged) + sum(map(len, plan.twins.values())),
        len(plan.buffers),
        len(plan.copied),
        work.inputs.count.read,
        time.perf_counter() - begin,
        made,
        writer.fit() if isinstance(writer, AdapterWriter) else None,
    )


def _described(plan: Plan, hashes: Sequence[str]) -> str:
    """What the metadata say of the inputs."""
    roles = ["base", *["task"] * len(plan.tasks), *["importance"] * len(plan.importances)]
    inputs = (plan.base, *plan.tasks, *plan.importances)
    entries = [
        {
            # Of "." and "..", too, the name is that of the folder.
            "file": Path(os.path.abspath(weights.path)).name,
            "kind": weights.kind,
            "role": role,
            **({"xxh3_128": of_content} if of_content else {}),
        }
        for weights, role, of_content in zip(inputs, roles, hashes, strict=True)
    ]
    return json.dumps(entries)


def _checked_weights(weights: Sequence[float], tasks: int) -> list[float]:
    """The factor of each task."""
    if weights and len(weights) != tasks:
        raise InputError(f"{len(weights)} weights for {tasks} tasks; give one for each task")
    return [check_scale(weight) for weight in weights] or [1.0] * tasks


def _check_name(output: str | Path) -> None:
    """Refuse names of files that are not written; a folder of such a name would surprise."""
    suffix = Path(output).suffix.lower()
    if suffix in _NOT_WRITTEN and not Path(output).is_dir():
        raise InputError(
            f"the output '{output}' is no folder by its name, but files that end in {suffix} are "
            "not written; expected a name that ends in .safetensors, or that of a folder"
        )


def _warn(inputs: Inputs, hashes: list[str], buffers: str | None) -> None:
    """Tell what no one would do on purpose."""
    seen: dict[str, Weights] = {}
    for weights, of_content in zip(inputs.all, hashes, strict=True):
        first = seen.setdefault(of_content, weights)
        if first.path != weights.path:
            log.warning("'%s' holds the same as '%s'", weights.path, first.path)
        elif first is not weights:
            log.warning("'%s' is given more than once", weights.path)
    if inputs.differing:
        log.warning(
            "tensors that are not merged differ between the inputs; the base's were taken: %s",
            listing(sorted(inputs.differing)),
        )
    if inputs.left_out:
        log.warning(
            "tensors that the base lacks, or has in another shape, were left out: %s",
            listing(sorted(inputs.left_out)),
        )
    if inputs.moved_buffers and buffers is None:
        log.warning(
            "floating-point buffers differ and are not merged: %s. The last task's were taken; "
            "choose with buffers: trained, base or average",
            listing(sorted(inputs.moved_buffers)),
        )


class _Work:
    """One merge under way."""

    def __init__(
        self,
        plan: Plan,
        merger: Merger,
        scales: Scales,
        inputs: Inputs,
        block_size: int,
        buffers: str,
    ) -> None:
        self._plan = plan
        self._merger = merger
        self._scales = scales
        self._block_size = block_size
        self._buffers = buffers
        self.inputs = inputs
        self._prepared: list[Any] = []  # by task
        self._counts: list[int] = []
        self._waiting: list[tuple[Piece, Accumulators | None]] = []
        self._lock = threading.Lock()
        self._held = 0

    def run(self, writer: _Sink) -> None:
        """Read everything, and write every tensor of the output."""
        merged, copied = self._plan.merged, self._plan.copied
        readers = [self.inputs.reader(task) for task in range(len(self._plan.tasks))]
        self._prepared = in_threads(self._merger.prepare, readers)
        # A thread takes a block at a time: whole parameters where the rule needs them.
        unit: Unit = "element" if self._merger.unit == "element" else "parameter"
        in_threads(lambda block: self._merge_block(writer, *block), self._blocks(merged, unit))
        total = sum(self._counts)
        # The stretches whose result depends on all others, now that it is known.
        in_threads(lambda waiting: self._finish(writer, *waiting, total), self._waiting)

        def copy(block: Piece) -> None:
            writer.write(block[0], block[1].start, self.inputs.copied(*block))

        def choose(block: Piece) -> None:
            values = self.inputs.buffer(*block, self._buffers)
            writer.write(block[0], block[1].start, values)

        in_threads(copy, self._blocks(copied, "element"))
        in_threads(choose, self._blocks(self._plan.buffers, "element"))
        tied = [name for names in self._plan.twins.values() for name in names]
        in_threads(lambda block: self.inputs.copied(*block), self._blocks(tied, "element"))
        self.inputs.differing.difference_update(tied)
        for index, name, shape in self.inputs.rest():  # which only the hashes know
            for _, part in cut({name: shape}, "element", self._block_size):
                self.inputs.read(index, name, part, hashed=True)

    def _blocks(self, names: list[str], unit: Unit) -> list[Piece]:
        shapes = {name: self._plan.base.shape(name) for name in names}
        return list(cut(shapes, unit, self._block_size))

    def _merge_block(self, writer: _Sink, name: str, block: slice) -> None:
        shapes = {name: self._plan.base.shape(name)}
        size = self._merger.chunk_size or chunk_size(_CPU)
        for piece in cut(shapes, self._merger.unit, size, block):
            base = self.inputs.read(0, *piece, hashed=True)
            state = self._fold(piece, base, hashed=True)
            number, depends = self._merger.global_count(state)
            self._counts.append(number)
            if depends:
                self._waiting.append((piece, state if self._has_room(state) else None))
            else:
                self._write(writer, piece, base, state, 0)

    def _fold(self, piece: Piece, base: Tensor, *, hashed: bool) -> Accumulators:
        state: Accumulators = {}
        for task, prepared in enumerate(self._prepared):
            state |= zeros(self._merger.new_accumulators(task), base.shape, _CPU)
            grown = self._plan.tasks[task]
            if isinstance(grown, GrownVector) and piece[0] not in grown.vector.names:
                continue  # it came after this task
            vector = self.inputs.reader(task, base, hashed=hashed)
            fold_chunk(self._merger, state, vector, piece, task, prepared)
        return state

    def _has_room(self, state: Accumulators) -> bool:
        """Whether it may be held in memory until all is counted; else it is made once more."""
        size = sum(tensor.nbytes for tensor in state.values())
        with self._lock:
            fits = self._held + size <= _HELD_BYTES * self._block_size
            self._held += size if fits else 0
        return fits

    def _finish(self, writer: _Sink, piece: Piece, state: Accumulators | None, total: int) -> None:
        name, part = piece
        base = self._plan.base.read(name, part.start, part.stop)
        self._write(writer, piece, base, state or self._fold(piece, base, hashed=False), total)

    def _write(
        self, writer: _Sink, piece: Piece, base: Tensor, state: Accumulators, total: int
    ) -> None:
        name, part = piece
        merged = torch.zeros(base.shape)
        shape, tasks = self._plan.base.shape(name), len(self._plan.tasks)
        self._merger.compute(state, merged, ResultInfo(name, shape, part.start, tasks, total))
        result = self._rounded(base, merged, self._scales.of(name))
        if result is None:
            raise self.inputs.broken_result(name)
        for each in (name, *self._plan.twins.get(name, ())):
            writer.write(each, part.start, result)

    def _rounded(self, base: Tensor, merged: Tensor, scale: float) -> Tensor | None:
        """Add a merged stretch to the base's; None where it leaves what the base's dtype holds."""
        if base.itemsize > 1:
            result = moved(base, merged, scale)
            return result if is_finite(result) else None
        # Types of one byte have no infinity to show it.
        result = moved(base.float(), merged, scale)
        fits = bool((result.abs() <= torch.finfo(base.dtype).max).all())
        return result.to(base.dtype) if fits else None
