"""Small finished runs to load, to predict with and to export."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from cl_merge import cli

SETTINGS = [
    "data=digits",
    "stream.tasks=2",
    "stream.images_per_class=8",
    "stream.test_fraction=0.1",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
]

TINY = {
    "model_cfg": {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 64,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {"context_length": 24, "width": 32, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
}


def tiny_vit(folder: Path) -> str:
    """A CLIP of two transformers with random weights, as a model's name."""
    import open_clip

    if not folder.exists():
        torch.manual_seed(0)
        config = json.loads(json.dumps(TINY["model_cfg"]))
        model = open_clip.CLIP(**config)
        # Otherwise all images look much alike to it.
        model.visual.conv1.weight.data *= 20
        folder.mkdir(parents=True)
        (folder / "open_clip_config.json").write_text(json.dumps(TINY))
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def finished(base: Path, name: str, *words: str) -> Path:
    """A run that is made when it is first asked for, once in a session."""
    folder = base / "finished" / name
    if not (folder / "results.json").exists():
        assert cli.main(["run", *SETTINGS, *words, f"out={folder}"]) == 0
    return folder


def glyph(factory) -> Path:
    """With the embedded model; its methods have the text head, and statistics of each kind."""
    beside = "compare=[streaming-lda,magmax-aligned,magmax-statistics,ties]"
    return finished(factory.getbasetemp(), "glyph", beside)


def vit(factory) -> Path:
    """The same with a vision transformer."""
    model = tiny_vit(factory.getbasetemp() / "vit")
    beside = "compare=[streaming-lda,magmax-aligned,magmax-statistics]"
    return finished(factory.getbasetemp(), "vit", f"model={model}", "optimizer.lr=1e-3", beside)


def aligned(factory) -> Path:
    """With a vision transformer, and statistics inside the image projection that it has left."""
    model = tiny_vit(factory.getbasetemp() / "vit")
    return finished(
        factory.getbasetemp(), "aligned", f"model={model}", "method=magmax-aligned", "compare=false"
    )
