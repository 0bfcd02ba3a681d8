"""Format ``huggingface``: a folder that transformers loads as ``CLIPModel``."""

from __future__ import annotations

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

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
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
        if name in _NAMES:
            found[_NAMES[name]] = tensor
        elif name in _TURNED:
            found[_TURNED[name]] = tensor.T.contiguous()
        elif name != "attn_mask":  # which is made anew
            found |= _of_block(name, tensor)
    return found


def _of_block(name: str, tensor: Tensor) -> dict[str, Tensor]:
    tower, _, inner = name.partition("transformer.resblocks.")
    number, _, part = inner.partition(".")
    model = {"visual.": "vision_model", "": "text_model"}[tower]
    layer = f"{model}.encoder.layers.{number}."
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        thirds = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{layer}self_attn.{which}_proj.{kind}": third.clone() for which, third in thirds}
    module, _, kind = part.rpartition(".")
    return {f"{layer}{_BLOCK[module]}.{kind}": tensor}


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
