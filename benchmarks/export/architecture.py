"""What open_clip calls the architecture of a run's model."""

from __future__ import annotations

from typing import Any

from cl_merge.config.schema import RunConfig
from cl_merge.models.pretrained import resolve

# What `lite` is made of; its package holds these weights under a name of its own.
_LITE_TEXT = "sentence-transformers/all-MiniLM-L6-v2"


def model_config(config: RunConfig) -> dict[str, Any]:
    """Describe the architecture of a run's model as open_clip does; reads no weights.

    Args:
        config: Of the run.

    Returns:
        What stands in ``open_clip_config.json`` as ``model_cfg``, with the run's image size, if it
        gives one.

    Raises:
        InputError: If the model is not there any more.
    """
    found = _lite() if config.model == "lite" else _known(config.model)
    if config.image_size is not None:
        found["vision_cfg"]["image_size"] = config.image_size
    return found


def own_tower(config: dict[str, Any]) -> str | None:
    """Find an image tower that comes with this package, so that nothing else can build it.

    Args:
        config: As of `model_config`.

    Returns:
        Its name; None for towers of open_clip and timm.
    """
    import timm

    import cl_merge.models.towers

    name: str | None = config["vision_cfg"].get("timm_model_name")
    if name is None or not timm.is_model(name):
        return None
    maker: Any = timm.models.model_entrypoint(name)
    return name if maker.__module__ == cl_merge.models.towers.__name__ else None


def _known(model: str) -> dict[str, Any]:
    import open_clip

    source = resolve(model)
    found: dict[str, Any] = open_clip.get_model_config(source.config)
    return found | ({"quick_gelu": True} if source.quick_gelu else {})


def _lite() -> dict[str, Any]:
    """As in `cl_merge.models.lite`, with the public names of what it is made of."""
    return {
        "embed_dim": 384,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {
            "hf_model_name": _LITE_TEXT,
            "hf_tokenizer_name": _LITE_TEXT,
            "hf_model_pretrained": False,
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": None,
            "context_length": 256,
        },
    }
