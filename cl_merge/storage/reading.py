"""Open checkpoints of any kind."""

from __future__ import annotations

from pathlib import Path

from cl_merge.errors import InputError, listing
from cl_merge.storage import pickled
from cl_merge.storage.layouts import INDEX, find_weights, read_index
from cl_merge.storage.lora import adapter_weights, is_adapter
from cl_merge.storage.pickled import torch_weights
from cl_merge.storage.quantized_file import quantized_weights
from cl_merge.storage.safetensors_format import SafetensorsFile, safetensors_weights
from cl_merge.storage.weights import (
    PLAIN_VERSION,
    QUANTIZED_VERSION,
    TASK_VECTOR,
    Weights,
    newer_version,
)


def open_weights(path: str | Path) -> Weights:
    """Open a checkpoint; reads what describes its tensors, not their values.

    Args:
        path: One of

            - a ``.safetensors`` file, of weights or a task vector;
            - a folder of peft with a LoRA adapter, which is a task vector;
            - a folder of Hugging Face or open_clip with one such file, with several and an index,
              or else with a file of `torch.save`; or the index itself;
            - a ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` file of `torch.save`: a state dict, or a
              training checkpoint of Lightning, open_clip or others. Only tensors and plain values
              are read from it, never code.

    Returns:
        The opened checkpoint, to be closed after use.

    Raises:
        InputError: If it is missing, damaged, of another kind or newer than this cl_merge.

    Example::

        with open_weights("model.safetensors") as weights:
            for name in weights.names:
                print(name, weights.shape(name), weights.read(name, 0, 10))
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return _open_file(path)
        weights = _open_file(find_weights(path))
        if is_adapter(path):
            return adapter_weights(path, weights)
        weights.path = weights.folder = path
        return weights
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror or error})") from error


def _open_file(path: Path) -> Weights:
    if not path.is_file():
        raise InputError(f"there is no file or folder '{path}'; check the path")
    if path.name.endswith(INDEX):
        weights = _open_shards(path)
        weights.folder = path.parent
    elif path.suffix.lower() == ".safetensors":
        weights = _open_safetensors(path)
    elif path.suffix.lower() in pickled.SUFFIXES:
        weights = torch_weights(path)
    else:
        raise InputError(
            f"'{path}' is no checkpoint by its name; expected a folder, or a file that ends in "
            f".safetensors, {', '.join(pickled.SUFFIXES)}"
        )
    weights.file_name = path.name
    return weights


def _open_shards(index: Path) -> Weights:
    files = []
    for path, names in read_index(index).items():
        file = SafetensorsFile(path)
        missing = [name for name in names if name not in file.locations]
        extra = sorted(set(file.locations) - set(names))
        if missing or extra:
            raise InputError(
                f"'{path}' does not hold what '{index.name}' says; missing: {listing(missing)}; "
                f"extra: {listing(extra)}. Download both again"
            )
        files.append(file)
    return safetensors_weights(index, files, "sharded safetensors")


def _open_safetensors(path: Path) -> Weights:
    file = SafetensorsFile(path)
    version = file.metadata.get(TASK_VECTOR)
    weights = safetensors_weights(path, [file], "safetensors" if version is None else "task vector")
    if version == QUANTIZED_VERSION:
        return quantized_weights(weights)
    if version not in (None, PLAIN_VERSION):
        raise newer_version(path, version)
    return weights
