"""The folder in which a stream writes its task vectors."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from cl_merge.errors import listing
from cl_merge.storage.files import save_tensors, storage_errors
from cl_merge.storage.weights import GROWN_BASE
from cl_merge.stream_merger.messages import is_first_process
from cl_merge.task_vectors.shards import Shards
from cl_merge.task_vectors.task_vector import TaskVector

log = logging.getLogger("cl_merge.stream_merger")


def prepare_folder(folder: Path) -> None:
    """Make a folder as a stream begins, and warn of the files of another one.

    Raises:
        StorageError: If it cannot be written to.
    """
    if not is_first_process():
        return
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=folder).close()
    if former := sorted(path.name for path in folder.glob("task*.safetensors")):
        log.warning(
            "'%s' has task vectors of another stream: %s. Those that this one does not replace "
            "stay; use a folder of its own, or remove them",
            folder,
            listing(former),
        )


def write_task(
    folder: Path,
    task: int,
    vector: TaskVector,
    importance: Mapping[str, Tensor] | None,
    grown_base: dict[str, Tensor],
    *,
    store: str,
    shards: Shards | None,
) -> None:
    """Write a task's vector and importance, and the base if it has grown."""
    if shards is not None:
        vector, grown_base = TaskVector(shards.gathered(vector)), shards.gathered(grown_base)
    if not is_first_process():
        return
    vector.save(folder / f"task{task}.safetensors", store=store)
    if importance is not None:
        save_tensors(folder / f"importance{task}.safetensors", importance, {})
    if grown_base:
        save_tensors(folder / "base.safetensors", grown_base, {GROWN_BASE: "1"})
