"""How to load an exported classifier, as a snippet that works as it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cl_merge.benchmarks.export.side_files import preprocessing
from cl_merge.benchmarks.runs.trained_run import Restored

_OPEN_CLIP = """\
import json

import open_clip
import torch
from PIL import Image, ImageOps

model, _, transform = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
model.eval()
classes = json.load(open("FOLDER/classes.json"))
with torch.no_grad():
    rows = [model.encode_text(tokenizer(PROMPTS), normalize=True).mean(0) for c in classes]
    head = torch.nn.functional.normalize(torch.stack(rows), dim=-1) * model.logit_scale.exp()
    image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")
    image = transform(image)[None]
    probabilities = (model.encode_image(image, normalize=True) @ head.T).softmax(-1)[0]
print(classes[probabilities.argmax()]["name"], probabilities.max().item())
"""

_HUGGINGFACE = """\
import json

import torch
from PIL import Image, ImageOps
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("FOLDER").eval()
processor = CLIPProcessor.from_pretrained("FOLDER")
classes = json.load(open("FOLDER/classes.json"))


def encode(texts):
    tokens = processor(text=texts, padding=True, truncation=True, return_tensors="pt")
    features = model.text_projection(model.text_model(**tokens).pooler_output)
    return torch.nn.functional.normalize(features, dim=-1)


with torch.no_grad():
    rows = [encode(PROMPTS).mean(0) for c in classes]
    head = torch.nn.functional.normalize(torch.stack(rows), dim=-1) * model.logit_scale.exp()
    image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")
    pixels = processor(images=image, return_tensors="pt")
    features = model.visual_projection(model.vision_model(**pixels).pooler_output)
    logits = torch.nn.functional.normalize(features, dim=-1) @ head.T
    probabilities = logits.softmax(-1)[0]
print(classes[probabilities.argmax()]["name"], probabilities.max().item())
"""

_PREPARE = """\
import json

import numpy as np
LIBRARY
from PIL import Image, ImageOps

classes = json.load(open("FOLDER/classes.json"))


def prepare(path):
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
RESIZE
    pixels = np.asarray(image, dtype=np.float32) / 255
    pixels = (pixels - np.float32(MEAN)) / np.float32(STD)
    return pixels.transpose(2, 0, 1)[None]

"""

_TORCH = """
program = torch.export.load("FOLDER/model.pt2").module()
with torch.no_grad():
    probabilities = program(torch.from_numpy(prepare("image.png"))).softmax(-1)[0]
print(classes[probabilities.argmax()]["name"], probabilities.max().item())
"""

_ONNX = """
session = onnxruntime.InferenceSession("FOLDER/model.onnx")
(logits,) = session.run(["logits"], {"images": prepare("image.png")})
probabilities = np.exp(logits[0] - logits[0].max())
probabilities /= probabilities.sum()
print(classes[probabilities.argmax()]["name"], probabilities.max())
"""

_SNIPPETS = {
    "open_clip": _OPEN_CLIP,
    "huggingface": _HUGGINGFACE,
    "torch": _PREPARE.replace("LIBRARY", "import torch") + _TORCH,
    "onnx": _PREPARE.replace("LIBRARY", "import onnxruntime") + _ONNX,
}
_LITE = """
When open_clip builds the model it looks up the text tower's architecture on the Hugging Face hub (a
few hundred bytes, later from its cache). Without a connection, write the path of this folder as
`hf_model_name` into `open_clip_config.json`: the same description lies here as `config.json`.
"""
_UNKNOWN_PROMPTS = """
The prompts that the run's text head was made of are not known any more; those above are an example.
"""


def usage_of(restored: Restored, form: str, classes: Sequence[Mapping[str, Any]]) -> str:
    """Show how to load an export: a section of its card."""
    images, known = preprocessing(restored), "prompts" in classes[0]
    fill = {
        "PROMPTS": 'c["prompts"]' if known else '["a photo of a " + c["name"]]',
        "RESIZE": _resize(images),
        "MEAN": str(images["mean"]),
        "STD": str(images["std"]),
    }
    snippet = _SNIPPETS[form]
    for word, text in fill.items():
        snippet = snippet.replace(word, text)
    note = _LITE if form == "open_clip" and restored.run.config.model == "lite" else ""
    note += "" if known or form in ("torch", "onnx") else _UNKNOWN_PROMPTS
    return f"## How to load it\n\n```python\n{snippet}```\n{note}"


def _resize(images: Mapping[str, Any]) -> str:
    """The lines that bring a PIL image to the model's size, as open_clip does."""
    height, width = images["size"]
    how = f"Image.Resampling.{images['interpolation'].upper()}"
    if images["resize_mode"] == "squash":
        return f"    image = image.resize(({width}, {height}), {how})"
    if images["resize_mode"] == "longest":
        return (
            f"    image = ImageOps.pad(image, ({width}, {height}), {how}, {images['fill_color']})"
        )
    return f"""\
    width, height = (side * {height} // min(image.size) for side in image.size)
    image = image.resize((width, height), {how})
    left, top = round((width - {width}) / 2), round((height - {height}) / 2)
    image = image.crop((left, top, left + {width}, top + {height}))"""
