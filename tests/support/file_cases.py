"""Weights of every kind in files of every kind, and what merging them in memory gives."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cl_merge.mergers import MERGERS, get_merger, merge
from cl_merge.task_vectors.task_vector import TaskVector

METHODS = list(MERGERS)
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OTHERS = [torch.int64, torch.uint8, torch.bool]
SHAPES = [(), (0,), (3, 0), (1,), (7,), (5, 3), (4, 6), (2, 3, 2), (2, 2, 2, 3)]
LAYOUTS = st.dictionaries(
    st.text("abcü._ ", min_size=1, max_size=4),
    st.tuples(st.sampled_from([*FLOATS, *OTHERS]), st.sampled_from(SHAPES)),
    min_size=1,
    max_size=5,
).filter(lambda layout: any(dtype.is_floating_point for dtype, _ in layout.values()))
STORES = ["safetensors", "shards", "pt", "transposed pt", "ckpt", "task vector", "int8"]


def random_weights(layout, seed):
    """Weights; few values, so that sums cancel and magnitudes are equal."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(dtype, shape):
        steps = torch.randint(-6, 7, shape, generator=generator)
        if dtype.is_floating_point:
            return (steps / 8).to(dtype)
        return (steps > 0).to(dtype)

    return {name: tensor(dtype, shape) for name, (dtype, shape) in layout.items()}


def tuned(base, seed):
    """The base after training: floating-point tensors moved, integers counted on."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def moved(tensor):
        if not tensor.is_floating_point():
            return tensor
        change = torch.randn(tensor.shape, generator=generator)
        grid = torch.randint(-2, 3, tensor.shape, generator=generator) / 16
        rounded = torch.rand(tensor.shape, generator=generator) < 0.7
        return tensor + torch.where(rounded, grid, change / 10).to(tensor.dtype)

    return {name: moved(tensor) for name, tensor in base.items()}


def grams_of(base, seed):
    """Gram matrices of random inputs, of all matrices."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        name: torch.randn(9, tensor.shape[1], generator=generator)
        for name, tensor in base.items()
        if tensor.is_floating_point() and tensor.dim() == 2
    }
    return {name: rows.T @ rows / 9 for name, rows in inputs.items()}


def write(folder, name, weights, store, base=None):
    """Write weights, or their difference to a base, in one of `STORES`; returns where."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if store == "safetensors":
        save_file(plain(weights), folder / f"{name}.safetensors")
        return folder / f"{name}.safetensors"
    if store == "shards":
        return write_shards(folder / name, weights)
    if store == "pt":
        torch.save(weights, folder / f"{name}.pt")
        return folder / f"{name}.pt"
    if store == "transposed pt":
        torch.save({n: transposed(t) for n, t in weights.items()}, folder / f"{name}.pt")
        return folder / f"{name}.pt"
    if store == "ckpt":
        content = {"pytorch-lightning_version": "2.6.0", "epoch": 3, "state_dict": weights}
        torch.save(content, folder / f"{name}.ckpt")
        return folder / f"{name}.ckpt"
    vector = TaskVector.between(base, weights)
    vector.save(folder / f"{name}.safetensors", "float32" if store == "task vector" else store)
    return folder / f"{name}.safetensors"


def write_shards(folder, weights):
    """Write a file for each tensor, and the index that joins them."""
    folder.mkdir()
    homes = {name: f"model-{i}.safetensors" for i, name in enumerate(weights)}
    for name, file in homes.items():
        save_file(plain({name: weights[name]}), folder / file)
    index = {"metadata": {}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def plain(weights):
    return {name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}


def transposed(tensor):
    """The same values, the other way round in memory."""
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor


def in_memory(base, tasks, method, scale=None, importances=None, **options):
    """Merge as without files; tasks are weights or task vectors."""
    vectors = [t if isinstance(t, TaskVector) else TaskVector.between(base, t) for t in tasks]
    if importances:
        merger = get_merger(method, **options)
        for vector, importance in zip(vectors, importances, strict=True):
            merger.update(vector, importance)
        merged = merger.merged()
    else:
        merged = merge(vectors, method, **options)
    return merged.apply_to(base, MERGERS[method].published_scale if scale is None else scale)


def read(path):
    """All tensors of an output, a file or a folder."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_bits(one, two):
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype
        and one[name].shape == two[name].shape
        and raw(one[name]) == raw(two[name])
        for name in one
    )


def raw(tensor):
    flat = tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes()


def listed(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))
