"""Format ``open_clip``: a folder that open_clip loads as ``local-dir:FOLDER``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cl_merge.benchmarks.export.architecture import model_config, own_tower
from cl_merge.benchmarks.export.comparing import check_same, check_text
from cl_merge.benchmarks.export.side_files import preprocessing
from cl_merge.benchmarks.runs.trained_run import FinishedRun, Restored
from cl_merge.storage.files import save_tensors

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def reason(run: FinishedRun) -> str | None:
    """Say why open_clip cannot build a run's model by itself.

    Args:
        run: The run.

    Returns:
        The reason; None if it can.
    """
    tower = own_tower(model_config(run.config))
    if tower is None:
        return None
    return f"its image tower '{tower}' comes with cl_merge, and open_clip alone cannot build it"


def write(restored: Restored, folder: Path) -> None:
    """Write the configuration, the weights of both towers, and the tokenizer if it has files.

    Args:
        restored: The model of a finished run.
        folder: Where.

    Raises:
        InputError: If open_clip does not give the run's logits with what was written.
    """
    model: Any = restored.clip.model
    config = model_config(restored.run.config)
    config["vision_cfg"]["image_size"] = restored.clip.image_size
    save_tensors(folder / WEIGHTS, model.state_dict(), {"format": "pt"})
    local = _write_text_parts(restored, folder)
    content = {"model_cfg": config, "preprocess_cfg": preprocessing(restored)}
    if local:  # what stands there later is on the hub, which need not be reached now
        name = config["text_cfg"]["hf_model_name"]
        config["text_cfg"]["hf_model_name"] = str(folder)
        _write_config(content, folder)
        _check(restored, folder)
        config["text_cfg"]["hf_model_name"] = name
    _write_config(content, folder)
    if not local:
        _check(restored, folder)


def _write_text_parts(restored: Restored, folder: Path) -> bool:
    """Write what the text tower needs beside its weights; tell whether it is one of the hub's."""
    if restored.run.config.model == "lite":
        from transformers import AutoTokenizer

        from cl_merge.models.lite import _packaged_weights

        _, source = _packaged_weights()
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        cast(Any, restored.clip.model).text.config.save_pretrained(folder)
        return True
    save = getattr(restored.clip.tokenizer, "save_pretrained", None)
    if save is not None:
        save(folder)
    return False


def _write_config(content: dict[str, Any], folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check(restored: Restored, folder: Path) -> None:
    import open_clip

    again = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

    def logits(images: Tensor) -> Tensor:
        found: Tensor = restored.model.head(again.visual(images))
        return found

    check_same("open_clip", logits, restored)
    with torch.no_grad():
        check_text("open_clip", lambda texts: again.encode_text(tokenizer(texts)), restored)
