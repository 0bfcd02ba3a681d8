"""Open checkpoints of any kind."""

from __future__ import annotations

from pathlib import Path

from cl_merge.errors import InputError
from cl_merge.storage.choosing import unwrapped
from cl_merge.storage.hub import download, is_hub_id
from cl_merge.storage.layouts import (
    INDEX,
    PICKLE_INDEX,
    PICKLES,
    find_weights,
    in_shard,
    read_index,
    split_key,
)
from cl_merge.storage.lora import adapter_weights, is_adapter
from cl_merge.storage.pickled import sharded_torch_weights, torch_weights
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
              or else with one or several of `torch.save`; or the index itself;
            - a ``.pt``, ``.pth``, ``.pth.tar``, ``.ckpt`` or ``.bin`` file of `torch.save`: a state
              dict, or a training checkpoint of Lightning, open_clip or others. Only tensors and
              plain values are read from it, never code. ``"file.pt:KEY"`` is the state dict under
              that key, with dots for keys within keys, where the file holds several;
            - an id of the Hugging Face hub, ``"org/name"`` or ``"org/name@revision"``, where there
              is no such path: its weights, configuration and tokenizer are downloaded.

    Returns:
        The opened checkpoint, to be closed after use.

    Raises:
        InputError: If it is missing, damaged, of another kind or newer than this cl_merge, or holds
            several state dicts.

    Example::

        with open_weights("model.safetensors") as weights:
            for name in weights.names:
                print(name, weights.shape(name), weights.read(name, 0, 10))
    """
    path = Path(path)
    try:
        file, key = split_key(path)
        if is_hub_id(file):
            file = download(file)
        if not file.is_dir():
            weights = _open_file(file, key)
        else:
            weights = _open_file(find_weights(file), key)
            if is_adapter(file):
                weights = adapter_weights(file, weights)
            else:
                weights.folder = file
        weights.path = path
        return weights
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror or error})") from error


def _open_file(path: Path, key: str) -> Weights:
    if not path.is_file():
        raise InputError(f"there is no file or folder '{path}'; check the path")
    is_pickle = path.name.lower().endswith(PICKLES)
    if key and not is_pickle:
        raise InputError(
            f"'{path}' has no keys such as '{key}', as only a checkpoint of torch.save has; leave "
            "the key out"
        )
    if path.name.endswith(INDEX):
        weights = _open_shards(path)
        weights.folder = path.parent
    elif path.name.endswith(PICKLE_INDEX):
        weights = sharded_torch_weights(path, read_index(path))
        weights.folder = path.parent
    elif path.suffix.lower() == ".safetensors":
        weights = _open_safetensors(path)
    elif is_pickle:
        weights = torch_weights(path, key)
    else:
        raise InputError(
            f"'{path}' is no checkpoint by its name; expected a folder, or a file that ends in "
            f".safetensors, {', '.join(PICKLES)}"
        )
    former = unwrapped(path, {name: name for name in weights.names})
    weights.rename({name: plain for plain, name in former.items()})
    weights.file_name = path.name
    return weights


def _open_shards(index: Path) -> Weights:
    files = []
    for path, names in read_index(index).items():
        file = SafetensorsFile(path)
        file.locations = in_shard(path, index, names, file.locations)
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
