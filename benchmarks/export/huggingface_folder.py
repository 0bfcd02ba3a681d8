"""Format ``huggingface``: a folder that transformers loads as ``CLIPModel``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from cl_merge.benchmarks.export.comparing import check_features
from cl_merge.benchmarks.export.open_clip_folder import model_config
from cl_merge.benchmarks.export.side_files import preprocessing
from cl_merge.benchmarks.runs.trained_run import FinishedRun, Restored
from cl_merge.errors import InputError

# The settings of open_clip's models that CLIPModel knows; any other must have its default.
_MODEL = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
_VISION = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
_VISION |= {"patch_dropout"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_VOCABULARY = 49408

# Names of tensors in open_clip, as patterns, and what stands there in transformers.
_NAMES = {
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.attn\.": ".self_attn.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"^visual\.class_embedding": "vision_model.embeddings.class_embedding",
    r"^visual\.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.conv1": "vision_model.embeddings.patch_embedding",
    r"^visual\.ln_pre": "vision_model.pre_layrnorm",
    r"^visual\.ln_post": "vision_model.post_layernorm",
    r"^token_embedding": "text_model.embeddings.token_embedding",
    r"^positional_embedding": "text_model.embeddings.position_embedding.weight",
    r"^ln_final": "text_model.final_layer_norm",
}
# Stored as [in, out]; linear layers have it the other way round.
_TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def reason(run: FinishedRun) -> str | None:
    """Say why transformers' CLIPModel cannot be a run's model; None if it can."""
    return misfit(model_config(run.config))


def misfit(config: Mapping[str, Any]) -> str | None:
    """Say what in an architecture of open_clip CLIPModel does not know; None if it knows all."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        return f"its image tower '{vision['timm_model_name']}' is none of CLIPModel's"
    if not isinstance(vision.get("layers", 12), int):
        return "its image tower is a residual network, and CLIPModel has vision transformers only"
    if "hf_model_name" in text:
        return f"its text tower '{text['hf_model_name']}' is none of CLIPModel's"
    odd = _odd_settings(config)
    return f"CLIPModel does not know its {', '.join(odd)}" if odd else None


def write(restored: Restored, folder: Path) -> None:
    """Write a ``CLIPModel`` with its ``CLIPProcessor``."""
    transformers: Any = import_module("transformers")  # whose annotations are not whole
    mode = preprocessing(restored)["resize_mode"]
    if mode == "longest":
        raise InputError(
            f"format huggingface cannot prepare images for model '{restored.run.config.model}': "
            f"CLIPProcessor has no resize_mode '{mode}'; formats that can: open_clip, torch, onnx"
        )
    model = transformers.CLIPModel(_config(restored)).eval()
    source: Any = restored.clip.model
    model.load_state_dict(converted(source.state_dict()))
    with _without_bars():
        model.save_pretrained(folder)
        _processor(restored).save_pretrained(folder)
        _check(restored, folder)


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an open_clip ``CLIP`` to those of a ``CLIPModel``."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        renamed = name
        for pattern, replacement in _NAMES.items():
            renamed = re.sub(pattern, replacement, renamed)
        if name in _TURNED:
            found[_TURNED[name]] = tensor.T.contiguous()
        elif ".in_proj_" in name:
            for which, third in zip("qkv", tensor.chunk(3), strict=True):
                found[renamed.replace("in_proj_", f"{which}_proj.")] = third.clone()
        elif name != "attn_mask":  # which is made anew
            found[renamed] = tensor
    return found


def _odd_settings(config: Mapping[str, Any]) -> list[str]:
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    odd = sorted(config.keys() - _MODEL)
    for known, kind, given in (
        (_VISION, CLIPVisionCfg, config["vision_cfg"]),
        (_TEXT, CLIPTextCfg, config["text_cfg"]),
    ):
        usual = asdict(kind())
        odd += [key for key in given if key not in known and given[key] != usual.get(key)]
    if config["text_cfg"].get("vocab_size", _VOCABULARY) != _VOCABULARY:
        odd.append("vocab_size")
    return odd


def _config(restored: Restored) -> Any:
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    from transformers import CLIPConfig

    config = model_config(restored.run.config)
    vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])

    def tower(of: CLIPVisionCfg | CLIPTextCfg, **more: Any) -> dict[str, Any]:
        return {
            "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
            "projection_dim": config["embed_dim"],
            "hidden_size": of.width,
            "intermediate_size": int(of.width * of.mlp_ratio),
            "num_hidden_layers": of.layers,
            **more,
        }

    return CLIPConfig(
        projection_dim=config["embed_dim"],
        vision_config=tower(
            vision,
            num_attention_heads=vision.width // vision.head_width,
            image_size=restored.clip.image_size,
            patch_size=vision.patch_size,
        ),
        text_config=tower(
            text,
            num_attention_heads=text.heads,
            max_position_embeddings=text.context_length,
            vocab_size=text.vocab_size,
            bos_token_id=_VOCABULARY - 2,
            eos_token_id=_VOCABULARY - 1,
            pad_token_id=_VOCABULARY - 1,
        ),
    )


def _processor(restored: Restored) -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    transformers: Any = import_module("transformers")
    source: Any = restored.clip.model
    known = SimpleTokenizer()
    # Transformers' names for the first and the last token; their numbers are the same.
    renamed = {known.sot_token_id: "<|startoftext|>", known.eot_token_id: "<|endoftext|>"}
    tokenizer = transformers.CLIPTokenizer(
        vocab={renamed.get(number, word): number for word, number in known.encoder.items()},
        merges=list(known.bpe_ranks),
        model_max_length=len(source.positional_embedding),
    )
    images = preprocessing(restored)
    height, width = images["size"]
    squash = images["resize_mode"] == "squash"
    return transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(
            size={"height": height, "width": width} if squash else {"shortest_edge": height},
            crop_size={"height": height, "width": width},
            do_center_crop=not squash,
            resample=_RESAMPLING[images["interpolation"]],
            image_mean=images["mean"],
            image_std=images["std"],
        ),
        tokenizer,
    )


# As PIL counts them.
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "random": 3}


def _check(restored: Restored, folder: Path) -> None:
    transformers: Any = import_module("transformers")
    written = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = transformers.CLIPProcessor.from_pretrained(folder, local_files_only=True).tokenizer

    def encode_texts(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return _features(written.get_text_features(**tokens))

    check_features(
        "huggingface",
        lambda images: _features(written.get_image_features(images)),
        encode_texts,
        restored,
    )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from showing progress bars for what takes no time."""
    logging: Any = import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _features(found: Any) -> Tensor:
    """Features of what transformers returns: a tensor before version 5, an output since."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return features
