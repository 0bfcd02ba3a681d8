"""Merge files: one stretch of a parameter at a time, over all tasks, into the output."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cl_merge.errors import InputError, listing
from cl_merge.kernels.finite import is_finite
from cl_merge.kernels.parallel import in_threads
from cl_merge.merge_files.byte_count import Progress
from cl_merge.merge_files.hashing import BLOCK, BlockHash, ContentHash
from cl_merge.merge_files.inputs import Inputs
from cl_merge.merge_files.plan import Plan, make_plan
from cl_merge.merge_files.provenance import describe_merge
from cl_merge.mergers import Merger, get_merger
from cl_merge.mergers.base import Accumulators
from cl_merge.mergers.chunks import End, Place, Unit, chunk_size, cut, stretches
from cl_merge.storage import Weights, Writer, check_output, open_weights, write_weights
from cl_merge.task_vectors.scales import Scales
from cl_merge.task_vectors.selection import Selection
from cl_merge.task_vectors.task_vector import moved

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_HOLD = 1 << 26  # bytes


@dataclass(frozen=True)
class Merged:
    """What a merge of files did.

    Attributes:
        path: The output.
        merged: Number of tensors that were merged.
        copied: Number of tensors that were taken from the base.
        bytes_read: Bytes of all inputs' tensors, each time they were read.
        seconds: How long it took.
        provenance: What the output's metadata say of how it was made.
    """

    path: Path
    merged: int
    copied: int
    bytes_read: int
    seconds: float
    provenance: Mapping[str, str] = field(repr=False)


def merge_checkpoints(
    base: str | Path,
    tasks: Sequence[str | Path],
    output: str | Path,
    *,
    method: str | Merger = "magmax",
    scale: float | Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    importances: Sequence[str | Path] = (),
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Merged:
    """Merge fine-tuned checkpoints, or task vectors, into a base, from files to a file.

    Inputs are safetensors files, sharded folders, Hugging Face and open_clip folders, checkpoints
    of PyTorch and Lightning, and task vectors; see `cl_merge.storage`. They are read through
    memory maps, a stretch of a parameter at a time over all tasks, so that memory depends neither
    on their size nor, for most methods, on their number. The output appears when it is whole: a
    merge that fails leaves nothing, and one that is killed no output; see `write_weights`.

    The result is that of a `MergeCallback` with the same task vectors, bit for bit: computed in
    float32 (float64 where the weights are) and rounded once to the base's dtype. Tensors that are
    not floating point or not selected are the base's.

    Args:
        base: The weights before fine-tuning.
        tasks: Fine-tuned weights or task vectors, in the order of the tasks.
        output: A name that ends in ``.safetensors`` for one file, any other for a folder with the
            base's configuration files in it.
        method: A name that `get_merger` knows, or a fresh `Merger`.
        scale: Factor of the merged task vector; a mapping from patterns to factors for layers;
            None takes the one that the method was published with.
        include: Patterns of the parameters to merge, as in ``"visual.*"``; empty for all.
        exclude: Patterns of parameters not to merge.
        importances: For methods that weigh elements, as ``"fisher"``: a file for each task.
        shard_bytes: In a folder, the most bytes of one file.
        overwrite: Whether an output file that exists may be replaced.
        progress: Given the number of bytes to be read; returns what is told of bytes that were.
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
    merger = method if isinstance(method, Merger) else get_merger(method, **options)
    check_output(output, [base, *tasks, *importances], overwrite=overwrite)
    if merger.weighted and len(importances) != len(tasks):
        raise InputError(
            f"'{merger.name}' needs the importance of each element: {len(tasks)} files, one for "
            f"each task, but {len(importances)} were given"
        )
    if importances and not merger.weighted:
        raise InputError(f"'{merger.name}' takes no importances; leave them out")
    with ExitStack() as stack:
        opened = [stack.enter_context(open_weights(path)) for path in (base, *tasks, *importances)]
        vectors, weights = opened[1 : len(tasks) + 1], opened[len(tasks) + 1 :]
        plan = make_plan(opened[0], vectors, Selection(include, exclude), weights)
        scales = Scales.read(scale, merger.published_scale)
        scales.check(plan.merged)
        work = _Work(plan, merger, scales, progress)
        made = describe_merge(plan, merger, method, scales, Selection(include, exclude))
        entries = {n: (plan.base.dtype(n), plan.base.shape(n)) for n in plan.base.names}
        with write_weights(
            output,
            entries,
            {**plan.base.metadata, **made},
            like=plan.base,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
        ) as writer:
            work.run(writer)
            made = work.with_hashes(made)
            writer.amend(made)
    work.warn()
    return Merged(
        Path(output),
        len(plan.merged),
        len(plan.copied),
        work.bytes_read,
        time.perf_counter() - begin,
        made,
    )


class _Work:
    """One merge under way: the state that its threads share."""

    def __init__(
        self,
        plan: Plan,
        merger: Merger,
        scales: Scales,
        progress: Progress | None,
    ) -> None:
        self.plan = plan
        self.merger = merger
        self.scales = scales
        self._lock = threading.Lock()
        self._surveyed = type(merger).survey is not Merger.survey
        self._inputs = Inputs(plan, progress, passes=2 if self._surveyed else 1)
        self._hashes = [ContentHash() for _ in self._inputs.hashed]
        self._surveys: list[Any] = [None] * len(plan.tasks)
        self._tallies: list[int] = []
        self._waiting: list[tuple[str, slice, Accumulators | None]] = []
        self._held = 0
        for weights, content in zip(self._inputs.hashed, self._hashes, strict=True):
            for name in weights.names:
                if weights.shape(name).numel() == 0:  # there are no stretches of it to come
                    content.add(name, weights.dtype(name), weights.shape(name), 0, b"")

    @property
    def bytes_read(self) -> int:
        """Bytes of the inputs that were read, each time they were."""
        return self._inputs.count.read

    def run(self, writer: Writer) -> None:
        """Read everything, and write every tensor of the output."""
        if self._surveyed:
            self._surveys = in_threads(
                lambda task: self.merger.survey(self._inputs.reader(task)),
                range(len(self.plan.tasks)),
            )
        in_threads(lambda block: self._merge_block(writer, *block), self._blocks())
        tally = sum(self._tallies)
        # The stretches whose result depends on all others, now that it is known.
        in_threads(lambda waiting: self._finish(writer, *waiting, tally), self._waiting)
        in_threads(lambda block: self._copy_block(writer, *block), self._copied_blocks())

    def with_hashes(self, made: Mapping[str, str]) -> dict[str, str]:
        """Complete the provenance, now that everything has been read."""
        inputs = json.loads(made["cl_merge.inputs"])
        for entry, content in zip(inputs, self._hashes, strict=True):
            entry["xxh3_128"] = content.hexdigest()
        return {**made, "cl_merge.inputs": json.dumps(inputs)}

    def warn(self) -> None:
        """Tell what no one would do on purpose."""
        seen: dict[str, Weights] = {}
        for weights, content in zip(self._inputs.hashed, self._hashes, strict=True):
            first = seen.setdefault(content.hexdigest(), weights)
            if first.path != weights.path:
                log.warning("'%s' holds the same as '%s'", weights.path, first.path)
            elif first is not weights:
                log.warning("'%s' is given more than once", weights.path)
        differing = self._inputs.differing
        if differing:
            log.warning(
                "tensors that are not merged differ between the inputs; the base's were taken: %s",
                listing(sorted(differing)),
            )

    def _blocks(self) -> list[tuple[str, slice]]:
        """What a thread takes at a time: whole parameters where the rule needs them."""
        shapes = {name: self.plan.base.shape(name) for name in self.plan.merged}
        unit: Unit = "element" if self.merger.unit == "element" else "parameter"
        return list(cut(shapes, unit, BLOCK))

    def _copied_blocks(self) -> list[tuple[str, slice]]:
        shapes = {name: self.plan.base.shape(name) for name in self.plan.copied}
        return list(cut(shapes, "element", BLOCK))

    def _merge_block(self, writer: Writer, name: str, block: slice) -> None:
        hashes = [BlockHash() for _ in self._hashes]
        shape = self.plan.base.shape(name)
        for part in stretches(shape, self.merger.unit, chunk_size(_CPU), block):
            kept = self._fold(name, part, hashes)
            number, awaits = self.merger.tally(kept)
            self._tallies.append(number)
            if awaits:
                self._waiting.append((name, part, self._hold(kept)))
            else:
                self._write(writer, kept, name, part, 0)
        self._add_hashes(name, block, hashes)

    def _hold(self, kept: Accumulators) -> Accumulators | None:
        """Hold accumulators in memory, as far as there is room; the others are made once more."""
        size = sum(tensor.nbytes for tensor in kept.values())
        with self._lock:
            if self._held + size > _HOLD:
                return None
            self._held += size
        return kept

    def _finish(
        self, writer: Writer, name: str, part: slice, kept: Accumulators | None, tally: int
    ) -> None:
        kept = self._fold(name, part, None) if kept is None else kept
        self._write(writer, kept, name, part, tally)

    def _fold(self, name: str, part: slice, hashes: list[BlockHash] | None) -> Accumulators:
        kept: Accumulators = {}
        size, shape = part.stop - part.start, self.plan.base.shape(name)
        for task in range(len(self.plan.tasks)):
            read = self._inputs.read(task, name, part, hashes)
            for key, dtype in self.merger.new_accumulators(task).items():
                kept[key] = torch.zeros(size, dtype=dtype)
            place = Place(name, shape, part.start, task, self._surveys[task], read.importance)
            fine = None
            if read.base is not None:
                fine = self.merger.fold_tuned(kept, read.values, read.base, place)
            if fine is None:
                self.merger.fold(kept, self._inputs.vector(read, task), place)
            elif not fine:
                raise self._inputs.broken(task)
        return kept

    def _write(
        self, writer: Writer, kept: Accumulators, name: str, part: slice, tally: int
    ) -> None:
        shape, tasks = self.plan.base.shape(name), len(self.plan.tasks)
        merged = torch.zeros(part.stop - part.start, dtype=torch.float32)
        self.merger.finish(kept, merged, End(name, shape, part.start, tasks, tally))
        base = self.plan.base.read(name, part.start, part.stop)
        result = moved(base, merged, self.scales.of(name))
        # Types of one byte have no sum.
        if not is_finite(result if result.itemsize > 1 else result.float()):
            raise self._inputs.broken_result(name)
        writer.write(name, part.start, result)

    def _copy_block(self, writer: Writer, name: str, block: slice) -> None:
        hashes = [BlockHash() for _ in self._hashes]
        writer.write(name, block.start, self._inputs.copied(name, block, hashes))
        self._add_hashes(name, block, hashes)

    def _add_hashes(self, name: str, block: slice, hashes: list[BlockHash]) -> None:
        for weights, content, of_block in zip(
            self._inputs.hashed, self._hashes, hashes, strict=True
        ):
            if self._inputs.holds(weights, name):
                content.add(
                    name, weights.dtype(name), weights.shape(name), block.start, of_block.digest()
                )
