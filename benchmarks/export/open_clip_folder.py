"""Format ``open_clip``: a folder that open_clip loads as ``local-dir:FOLDER``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from cl_merge.benchmarks.export.comparing import check_features
from cl_merge.benchmarks.export.side_files import preprocessing
from cl_merge.benchmarks.runs.trained_run import FinishedRun, Restored
from cl_merge.config.schema import RunConfig
from cl_merge.models import lite
from cl_merge.models.pretrained import resolve
from cl_merge.storage.files import save_tensors


def reason(run: FinishedRun) -> str | None:
    """Say why open_clip cannot build a run's model by itself; None if it can."""
    import timm

    import cl_merge.models.towers

    tower = model_config(run.config)["vision_cfg"].get("timm_model_name")
    if tower is None or not timm.is_model(tower):
        return None
    maker: Any = timm.models.model_entrypoint(tower)
    if maker.__module__ != cl_merge.models.towers.__name__:
        return None
    return f"its image tower '{tower}' comes with cl_merge, and open_clip alone cannot build it"


def model_config(config: RunConfig) -> dict[str, Any]:
    """Describe a run's model as open_clip's ``model_cfg``, with the run's image size."""
    import open_clip

    if config.model == "lite":
        found = copy.deepcopy(lite.CONFIG)
    else:
        source = resolve(config.model)
        found = open_clip.get_model_config(source.config)
        found |= {"quick_gelu": True} if source.quick_gelu else {}
    if config.image_size is not None:
        found["vision_cfg"]["image_size"] = config.image_size
    return found


def write(restored: Restored, folder: Path) -> None:
    """Write the configuration, the weights of both towers, and the tokenizer if it has files."""
    model: Any = restored.clip.model
    config = model_config(restored.run.config)
    config["vision_cfg"]["image_size"] = restored.clip.image_size
    content = {"model_cfg": config, "preprocess_cfg": preprocessing(restored)}
    file = folder / "open_clip_config.json"
    save_tensors(folder / "open_clip_model.safetensors", model.state_dict(), {"format": "pt"})
    if restored.run.config.model == "lite":
        from transformers import AutoTokenizer

        _, source = lite.packaged_weights()
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        model.text.config.save_pretrained(folder)
        # What is named in the end is on the hub, which need not be reached now.
        config["text_cfg"]["hf_model_name"] = str(folder)
    elif hasattr(restored.clip.tokenizer, "save_pretrained"):
        restored.clip.tokenizer.save_pretrained(folder)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _check(restored, folder)
    if restored.run.config.model == "lite":
        config["text_cfg"]["hf_model_name"] = config["text_cfg"]["hf_tokenizer_name"]
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check(restored: Restored, folder: Path) -> None:
    import open_clip

    written = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    check_features(
        "open_clip",
        written.visual,
        lambda texts: written.encode_text(tokenizer(texts)),
        restored,
    )
