"""Merge files: one stretch of a parameter at a time, over all tasks, into the output."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cl_merge import __version__
from cl_merge.errors import InputError, unknown_name
from cl_merge.merge_files.adapter import (
    AdapterFit,
    AdapterWriter,
    LoraRank,
    adapter_plan,
    write_adapter,
)
from cl_merge.merge_files.card import CARD, model_card
from cl_merge.merge_files.contents import check_several, take_off
from cl_merge.merge_files.hashing import BLOCK
from cl_merge.merge_files.inputs import Inputs, Progress
from cl_merge.merge_files.notices import warn
from cl_merge.merge_files.plan import Plan, make_plan
from cl_merge.merge_files.work import Work
from cl_merge.mergers import MERGERS, Merger
from cl_merge.mergers.importances import needed_of
from cl_merge.mergers.options import check_per_task
from cl_merge.mergers.registry import fresh_merger
from cl_merge.storage import Weights, Writer, check_output, open_weights, write_weights
from cl_merge.storage.hub import is_hub_id, short_names
from cl_merge.storage.weights import GROWN_BASE
from cl_merge.stream_merger.buffers import BUFFERS
from cl_merge.task_vectors.scales import Scales
from cl_merge.task_vectors.selection import Selection
from cl_merge.task_vectors.task_vector import check_scale

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
"""What can be written, by name."""

_NO_HASH = "0" * 32
_NOT_WRITTEN = {".pt", ".pth", ".bin", ".ckpt", ".tar", ".gguf", ".onnx", ".h5", ".msgpack", ".npz"}


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
    base: str | Path | None,
    tasks: Sequence[str | Path],
    output: str | Path,
    *,
    method: str | Merger = "magmax",
    scale: float | Mapping[str, float] | Callable[[list[str]], Any] | None = None,
    weights: Sequence[float] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    importances: Sequence[str | Path] = (),
    buffers: str | None = None,
    dtype: str | None = None,
    strip_prefix: str | None = None,
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
    float32 (float64 where the weights are) and rounded once. Floating-point dtypes may differ from
    input to input. Tensors that are not floating point or not selected are the base's, and need not
    match; statistics of batch norms and other buffers are never merged. Of tied parameters, one
    suffices.

    Args:
        base: The weights before fine-tuning. None merges the weights of the tasks as they are, by a
            method that needs no base, such as ``"average"`` and ``"slerp"``, in float32; what is
            not merged is that of the first.
        tasks: Fine-tuned weights or task vectors, in the order of the tasks.
        output: A name that ends in ``.safetensors`` for one file, any other for a folder with the
            base's configuration files in it, and a model card in place of the base's.
        method: A name that `get_merger` knows, or a fresh `Merger`.
        scale: Factor of the merged task vector; a mapping from patterns to factors for layers; a
            function that makes one of the names of all that is merged, such as
            ``partial(lines_scales, low=0.2, high=1.0)``; None takes the one that the method was
            published with.
        weights: A factor of each task vector before they are merged, negative to take something
            away; none for 1 each. Methods that average divide by the number of tasks, not by the
            sum of the weights.
        include: Patterns of the parameters to merge, as in ``"visual.*"``; empty for all.
        exclude: Patterns of parameters not to merge.
        importances: For methods that weigh elements, as ``"fisher"``: a file for each task. For
            ``"regmean"``: of Gram matrices, as `gram_matrices` collects them.
        buffers: What floating-point buffers hold, such as batch-norm statistics, which are told by
            their names: ``"trained"`` those of the last task, ``"base"``, or ``"average"`` their
            mean over tasks. None means ``"trained"``, without a base ``"base"``, which is the first
            task's, with a warning that names those that differ.
        dtype: Of all floating-point tensors of the output, buffers and those that are not merged
            included: ``"float32"``, ``"bfloat16"`` or ``"float16"``; None for those of the base. In
            a folder, ``config.json`` names it.
        strip_prefix: What to take off the names of tasks and importances that begin with it and
            that the base has not, such as ``"model."`` of a Lightning module; without a base, off
            all names.
        lora_rank: Where all tasks are LoRA adapters: merge them into one of this rank, a folder of
            peft, instead of into the base; in the dtype of the first if `dtype` names no other. Its
            factors are the nearest ones to each merged matrix; ``adapter`` of the result says how
            near. ``"auto"`` is the largest sum of the ranks of the tasks, with which methods that
            average or add up lose nothing. With it, any method and scale goes without a base.
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
            value overflows in the dtype that is written; or if the method, an option, a pattern or
            the output is wrong.
        StorageError: If the output cannot be written.

    Example::

        merge_checkpoints("base.safetensors", ["task0.safetensors", "task1.safetensors"],
                          "merged.safetensors", method="ties", density=0.3)
    """
    begin = time.perf_counter()
    check_several(tasks=tasks, importances=importances)
    if not tasks:
        raise InputError("no task to merge; give at least one checkpoint or task vector")
    merger = fresh_merger(method, options, merge_checkpoints)
    adapters = lora_rank is not None
    if adapters and strip_prefix is not None:
        raise InputError("lora_rank keeps the names of adapters; leave strip_prefix out")
    if base is None and not adapters:
        _check_without_base(merger, scale)
    no_base, first = base is None, tasks[0] if base is None else base
    if buffers is not None and buffers not in BUFFERS:
        raise unknown_name("choice of buffers", buffers, BUFFERS)
    if dtype is not None and dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    check_per_task(merger.options, len(tasks))
    factors = _checked_weights(weights, len(tasks))
    _check_name(output)
    check_output(output, [first, *tasks, *importances], overwrite=overwrite)
    _check_importances(merger, len(tasks), len(importances))
    selection = Selection(include, exclude)
    with ExitStack() as stack:
        opened = _opened(stack, [Path(path) for path in (first, *tasks, *importances)])
        vectors, weighing = opened[1 : len(tasks) + 1], opened[len(tasks) + 1 :]
        if strip_prefix is not None:
            take_off(strip_prefix, None if no_base else opened[0], opened[0 if no_base else 1 :])
        written = DTYPES[dtype] if dtype is not None else None
        plan = make_plan(
            opened[0],
            vectors,
            selection,
            weighing,
            written,
            grams=merger.grams,
            no_base=no_base,
            adapters=adapters,
        )
        block = block_size
        if lora_rank is not None:
            plan, rank, block = adapter_plan(plan, lora_rank)
            merger.chunk_size = block  # whole matrices, which are factored as they come
        given = scale(plan.merged) if callable(scale) else scale
        scales = Scales.read(given, merger.published_scale)
        scales.check(plan.merged)
        passes = 1 if type(merger).prepare is Merger.prepare else 2
        inputs = Inputs(plan, progress, passes=passes, block=block_size, factors=factors)
        of_buffers = buffers or ("base" if no_base else "trained")
        work = Work(plan, merger, scales, inputs, block, of_buffers)
        # What is merged is no base of the vectors that lack what came later.
        own = {key: value for key, value in plan.base.metadata.items() if key != GROWN_BASE}
        made = {
            "format": "pt",  # which transformers insists on
            "cl_merge.version": __version__,
            "cl_merge.method": method if isinstance(method, str) else merger.name,
            "cl_merge.options": json.dumps(merger.options),
            "cl_merge.scale": json.dumps(scales.plain()),
            "cl_merge.include": json.dumps(list(selection.include)),
            "cl_merge.exclude": json.dumps(list(selection.exclude)),
            "cl_merge.buffers": of_buffers,
            "cl_merge.weights": json.dumps(factors),
            "cl_merge.strip_prefix": strip_prefix or "",
            "cl_merge.inputs": _described(plan, [_NO_HASH] * len(opened)),
        }
        writing: AbstractContextManager[Writer | AdapterWriter]
        if lora_rank is None:
            card = model_card(Path(os.path.abspath(output)).name, plan, merger, made)
            writing = write_weights(
                output,
                {n: (plan.written(n), plan.base.shape(n)) for n in plan.base.names},
                {**own, **made},
                like=plan.base,
                texts={CARD: card, **_config(plan.base, dtype)},
                shard_bytes=shard_bytes,
                overwrite=overwrite,
            )
        else:
            writing = write_adapter(
                output, plan, rank, made, dtype=DTYPES.get(dtype or ""), overwrite=overwrite
            )
        with writing as writer:
            work.run(writer)
            hashes = [content.hexdigest() for content in work.inputs.hashes]
            if lora_rank is not None:
                hashes[0] = ""  # of the base only names and shapes were read
            made["cl_merge.inputs"] = _described(plan, hashes)
            writer.amend(made)
    warn(plan, work.inputs, hashes, buffers)
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


def _opened(stack: ExitStack, paths: list[Path]) -> list[Weights]:
    """Open all inputs: what is here first, so that nothing is downloaded in vain."""
    order = sorted(range(len(paths)), key=lambda index: is_hub_id(paths[index]))
    opened = {index: stack.enter_context(open_weights(paths[index])) for index in order}
    return [opened[index] for index in range(len(paths))]


def _described(plan: Plan, hashes: Sequence[str]) -> str:
    """What the metadata say of the inputs."""
    roles = ["base", *["task"] * len(plan.tasks), *["importance"] * len(plan.importances)]
    inputs = (plan.base, *plan.tasks, *plan.importances)
    names = short_names([weights.path for weights in inputs])
    described = list(zip(inputs, names, roles, hashes, strict=True))[plan.no_base :]
    entries = [
        {
            "file": name,
            "kind": weights.kind,
            "role": role,
            **({"xxh3_128": of_content} if of_content else {}),
        }
        for weights, name, role, of_content in described
    ]
    return json.dumps(entries)


def _check_without_base(merger: Merger, scale: Any) -> None:
    if merger.needs_base:
        without = [name for name, kind in MERGERS.items() if not kind.needs_base]
        raise InputError(
            f"'{merger.name}' merges changes and needs the base; without one there are "
            f"{', '.join(without)}"
        )
    if scale is not None:
        raise InputError("a scale is of changes to a base, and there is none; leave it out")


def _check_importances(merger: Merger, tasks: int, importances: int) -> None:
    if merger.weighted and importances != tasks:
        raise InputError(
            f"'{merger.name}' needs {needed_of(merger.grams)}: {tasks} files, one for each task, "
            f"but {importances} were given"
        )
    if importances and not merger.weighted:
        raise InputError(f"'{merger.name}' takes no importances; leave them out")


def _checked_weights(weights: Sequence[float], tasks: int) -> list[float]:
    """The factor of each task."""
    if weights and len(weights) != tasks:
        raise InputError(f"{len(weights)} weights for {tasks} tasks; give one for each task")
    return [check_scale(weight, "a weight") for weight in weights] or [1.0] * tasks


def _check_name(output: str | Path) -> None:
    """Refuse names of files that are not written; a folder of such a name would surprise."""
    suffix = Path(output).suffix.lower()
    if suffix in _NOT_WRITTEN and not Path(output).is_dir():
        raise InputError(
            f"the output '{output}' is no folder by its name, but files that end in {suffix} are "
            "not written; expected a name that ends in .safetensors, or that of a folder"
        )


def _config(base: Weights, dtype: str | None) -> dict[str, str]:
    """``config.json`` of a folder, if it names another dtype than the one that is written."""
    path = base.folder / "config.json" if base.folder is not None else None
    if dtype is None or path is None or not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}  # what is no configuration is copied as it is
    return {path.name: json.dumps(_with_dtype(config, dtype), indent=2, ensure_ascii=False) + "\n"}


def _with_dtype(config: Any, dtype: str) -> Any:
    """A configuration, and the parts within it, with another dtype where they name one."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and isinstance(value, str)
        else _with_dtype(value, dtype)
        for key, value in config.items()
    }
