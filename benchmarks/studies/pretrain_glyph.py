"""Pre-train the embedded model ``glyph``: a small CLIP, on characters drawn from fonts.

    python -m cl_merge.benchmarks.studies.pretrain_glyph --out FOLDER

It needs neither network nor data: characters come from the fonts that matplotlib
carries, captions from their Unicode names.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Generator, Tensor, nn

import cl_merge.models.towers  # noqa: F401 - registers the image tower
from cl_merge.benchmarks.datasets.catalog import find_data
from cl_merge.benchmarks.datasets.characters import CHARACTERS, column, uniform
from cl_merge.benchmarks.datasets.digits import NAMES, digits
from cl_merge.benchmarks.studies import harness
from cl_merge.benchmarks.studies.glyph_shapes import HELD_OUT, Atlas, captions, shapes
from cl_merge.errors import InputError
from cl_merge.models.pretrained import load_clip
from cl_merge.models.zero_shot import zero_shot_head
from cl_merge.storage.files import save_tensors

log = logging.getLogger("pretrain_glyph")

# The architecture and the preprocessing: those of the model that comes along.
_CONFIG = files("cl_merge.models.glyph") / "open_clip_config.json"
HANDWRITTEN = "handwritten"
_DIGITS = 10  # the first of the characters
_SIDE = 32  # of the drawn images in pixels
# Characters are drawn finer than needed: what a low resolution does to them comes afterwards.
_FINE = 48


@dataclass
class Recipe:
    """How the model is trained."""

    steps: int = 6000
    batch: int = 128  # images per step
    lr: float = 2e-3  # peak of AdamW, after a linear warm-up; a cosine to zero follows
    weight_decay: float = 0.05  # on matrices and kernels; norms and biases have none
    warmup: int = 200
    handwritten: float = 0.6  # share of images drawn along the thinned stroke, not the outline
    digits: float = 0.5  # share of images that are digits; the others are any of the 62 characters
    captioned: int = 32  # images per step that also meet a caption of their own style
    seed: int = 0

    def factor(self, step: int) -> float:
        """The share of the peak learning rate at a step."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1)))
        return min((step + 1) / self.warmup, cosine)


Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images, normalised, float32 [B, 3, 32, 32]; their classes, indices into `CHARACTERS`, int64 [B];
one caption of each character, in a style of its own, int64 [62, 16]; a caption of each of the first
images, int64 [captioned, 16]."""


def main(arguments: Sequence[str] | None = None, fonts: Sequence[str] | None = None) -> None:
    """Train on all fonts or on some, save and measure the model."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="images per step")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of everything random")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", force=True)
    log.setLevel(logging.INFO)
    model = pretrain(Recipe(steps=chosen.steps, batch=chosen.batch, seed=chosen.seed), fonts)
    save(model, chosen.out)
    log.info("unseen fonts, zero-shot: %.1f %%", unseen_fonts_accuracy(model))
    log.info("scikit-learn's digits, zero-shot: %.1f %%", digits_accuracy(chosen.out))


def pretrain(recipe: Recipe, fonts: Sequence[str] | None = None, *, every: int = 500) -> nn.Module:
    """Train the model, log the loss each so many steps, and return it in evaluation mode."""
    if recipe.captioned > recipe.batch:
        raise InputError(f"batch={recipe.batch}; expected at least {recipe.captioned}")
    torch.manual_seed(recipe.seed)
    model: nn.Module = CLIP(**json.loads(_CONFIG.read_text())["model_cfg"])
    batches = drawn_batches(Atlas(shapes(fonts)), SimpleTokenizer(context_length=16), recipe)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.factor)
    begin, average = time.perf_counter(), 0.0
    for step in range(1, recipe.steps + 1):
        loss = contrastive_loss(model, *next(batches))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average += 0.02 * (loss.item() - average)
        if step % every == 0 or step == recipe.steps:
            seconds, smooth = time.perf_counter() - begin, average / (1 - 0.98**step)
            log.info("step %d/%d, %.0f s, loss %.3f", step, recipe.steps, seconds, smooth)
    return model.eval()


def drawn_batches(atlas: Atlas, tokenizer: Any, recipe: Recipe) -> Iterator[Batch]:
    """Draw characters and caption them, without end.

    Everything is drawn from one generator, in an order that the committed weights depend on.
    """
    size, random = recipe.batch, Generator().manual_seed(recipe.seed)
    known = {(shape.character, shape.style) for shape in atlas.shapes}
    known |= {(character, HANDWRITTEN) for character in CHARACTERS}
    styles_of = {c: sorted(style for other, style in known if other == c) for c in CHARACTERS}
    shapes_of = [(atlas.classes == index).nonzero().flatten() for index in range(len(CHARACTERS))]
    tokens: dict[tuple[str, str], Tensor] = {}

    def one_of(items: Any) -> Any:
        return items[int(torch.randint(0, len(items), (1,), generator=random))]

    def caption(character: str, style: str) -> Tensor:
        if (character, style) not in tokens:
            tokens[character, style] = tokenizer(captions(character, style))
        found: Tensor = one_of(tokens[character, style])
        return found

    of_digits = round(size * recipe.digits)
    while True:
        drawn = [
            torch.randint(0, most, (count,), generator=random)
            for most, count in ((_DIGITS, of_digits), (len(CHARACTERS), size - of_digits))
        ]
        classes = torch.cat(drawn)[torch.randperm(size, generator=random)]
        rows = torch.stack([one_of(shapes_of[label]) for label in classes.tolist()])
        by_hand = torch.rand(size, generator=random) < recipe.handwritten
        fields = torch.where(by_hand[:, None, None], atlas.strokes[rows], atlas.outlines[rows])
        pen = 1.0 + 4.0 * torch.rand(size, generator=random)
        bold = -0.5 + 2.0 * torch.rand(size, generator=random)
        images = draw(fields, torch.where(by_hand, pen, bold), random)
        class_texts = [caption(c, str(one_of(styles_of[c]))) for c in CHARACTERS]
        shown = [atlas.shapes[row] for row in rows[: recipe.captioned]]
        own_texts = [
            caption(shape.character, HANDWRITTEN if handwritten else shape.style)
            for shape, handwritten in zip(shown, by_hand, strict=False)
        ]
        yield normalised(images), classes, torch.stack(class_texts), torch.stack(own_texts)


def normalised(images: Tensor) -> Tensor:
    """Scale images from [0, 1] to [-1, 1], as the model's own transform does."""
    return (images - 0.5) / 0.5


def contrastive_loss(
    model: Any, images: Tensor, classes: Tensor, class_texts: Tensor, own_texts: Tensor
) -> Tensor:
    """Tell apart all characters by a caption of each, and the styles by the images' own captions.

    The first term is what a zero-shot classifier does. In the second, captions of the same
    character count as right too, with a third of the weight of the image's own.
    """
    # Half precision where it is safe makes a step a third faster on processors that have it.
    with torch.autocast("cpu", torch.bfloat16):
        encoded = (
            model.encode_image(images),
            model.encode_text(torch.cat([class_texts, own_texts])),
        )
    features, texts = (F.normalize(rows.float(), dim=-1) for rows in encoded)
    logits = model.logit_scale.exp().clamp(max=50) * features @ texts.T
    characters = F.cross_entropy(logits[:, : len(CHARACTERS)], classes, label_smoothing=0.05)
    captioned = len(own_texts)
    pairs, labels = logits[:captioned, len(CHARACTERS) :], classes[:captioned]
    right = (labels[:, None] == labels).float() + 2 * torch.eye(captioned)
    right = right / right.sum(dim=1, keepdim=True)
    styles = F.cross_entropy(pairs, right) + F.cross_entropy(pairs.T, right)
    return characters + 0.25 * styles


def save(model: nn.Module, folder: Path) -> None:
    """Write a model as a folder that open_clip loads, in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(_CONFIG.read_text())
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_tensors(folder / "open_clip_model.safetensors", half, {"format": "pt"})


@torch.no_grad()
def unseen_fonts_accuracy(model: Any, seed: int = 0) -> float:
    """Zero-shot accuracy in per cent on all 62 characters in fonts that training never drew."""
    tokenizer = SimpleTokenizer(context_length=16)
    atlas = Atlas(shapes(HELD_OUT))
    random = Generator().manual_seed(seed)
    images = draw(atlas.outlines, torch.zeros(len(atlas)), random)
    texts = [
        F.normalize(model.encode_text(tokenizer(captions(c, "serif"))), dim=-1) for c in CHARACTERS
    ]
    rows = torch.stack([text.mean(dim=0) for text in texts])
    found = (model.encode_image(normalised(images)) @ F.normalize(rows, dim=-1).T).argmax(dim=1)
    return 100.0 * float((found == atlas.classes).float().mean())


@torch.no_grad()
def digits_accuracy(folder: Path) -> float:
    """Zero-shot accuracy of a saved model in per cent on all of scikit-learn's digits, unseen."""
    clip = load_clip(f"local-dir:{folder}")
    head = zero_shot_head(clip, NAMES, find_data("digits").recipe["prompts"])
    hits = []
    for split in digits().values():
        images = torch.stack([clip.test_transform(image) for image in split["image"]])
        found = head(clip.model.visual(images)).argmax(dim=1)  # type: ignore[operator]
        hits.append(found == torch.tensor(split["label"]))
    return 100.0 * float(torch.cat(hits).double().mean())


def draw(fields: Tensor, thickness: Tensor, random: Generator) -> Tensor:
    """Draw characters, each distorted in its own way: float32 [B, 3, 32, 32] from 0 to 1.

    Bent, sheared, scaled and moved; drawn with an uneven pen; sometimes with a gap; seen at a low
    resolution; in random colours, dark on light or light on dark, with noise. The fields are
    float32 [B, 64, 64]; up to the thickness, float32 [B], there is ink; both in pixels of a field.
    """
    count = len(fields)
    distance = F.grid_sample(
        fields[:, None], _bent_grid(count, random), padding_mode="border", align_corners=False
    )
    radius = column(thickness) * (1 + 0.25 * _smooth_noise(count, 1, 4, random))
    softness = column(uniform(count, 0.6, 1.6, random))
    ink = torch.sigmoid((radius - distance) / softness)
    return _coloured(_at_low_resolution(_with_gaps(ink, random), random), random)


def _bent_grid(count: int, random: Generator) -> Tensor:
    """Where each pixel looks: rotation, shear, scale, shift, and two scales of smooth bending."""
    angle, shear = uniform(count, -0.26, 0.26, random), uniform(count, -0.45, 0.45, random)
    # The grid of a smaller character reaches further.
    wide, high = (1 / uniform(count, low, 1.15, random) for low in (0.6, 0.8))
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([cos * wide, (shear * cos - sin) * wide], dim=1)
    second = torch.stack([sin * high, (shear * sin + cos) * high], dim=1)
    shift = torch.stack([uniform(count, -m, m, random) for m in (0.1, 0.08)], dim=1)
    affine = torch.cat([torch.stack([first, second], dim=1), shift[:, :, None]], dim=2)
    grid = F.affine_grid(affine, [count, 1, _FINE, _FINE], align_corners=False)
    for cells, most in ((3, 0.16), (5, 0.10)):
        amount = column(uniform(count, 0, most, random))
        grid = grid + (amount * _smooth_noise(count, 2, cells, random)).permute(0, 2, 3, 1)
    return grid


def _with_gaps(ink: Tensor, random: Generator) -> Tensor:
    """Rub a spot out of every third character: hands leave loops open that printers close."""
    count = len(ink)
    x, y = (column(uniform(count, -0.6, 0.6, random)) for _ in range(2))
    radius = uniform(count, 0.05, 0.22, random) * (torch.rand(count, generator=random) < 0.3)
    axis = torch.linspace(-1, 1, _FINE)
    distance = ((axis - x) ** 2 + (axis[:, None] - y) ** 2).sqrt()
    kept = torch.sigmoid((distance - column(radius)) * 20)
    return ink * torch.where(column(radius) > 0, kept, 1.0)


def _at_low_resolution(ink: Tensor, random: Generator) -> Tensor:
    """Average over coarse pixels and blow them up again; [B, 1, 32, 32]."""
    # Scans of single characters are often that small. The resolution differs by eighths of the
    # batch, since one call resizes to one size.
    parts = []
    for part in ink.chunk(8):
        low, smooth = torch.rand(2, generator=random).tolist()
        side = int(torch.randint(9, 21, (1,), generator=random)) if low < 0.75 else _SIDE
        mode = "bicubic" if smooth < 0.7 else "bilinear"
        coarse = F.adaptive_avg_pool2d(part, side)
        parts.append(F.interpolate(coarse, size=(_SIDE, _SIDE), mode=mode, align_corners=False))
    return torch.cat(parts).clamp(0, 1)


def _coloured(ink: Tensor, random: Generator) -> Tensor:
    """Choose ink and paper, dark and light either way round and half of them grey; add noise."""
    count = len(ink)
    grey = column(torch.rand(count, generator=random) < 0.5)
    colours = torch.rand(2, count, 3, 1, 1, generator=random)
    colours = torch.where(grey, colours.mean(dim=2, keepdim=True), colours)
    darker = 0.35 * colours[0] * column(torch.rand(count, generator=random))
    lighter = 1 - 0.35 * colours[1] * column(torch.rand(count, generator=random))
    dark_ink = column(torch.rand(count, generator=random) < 0.5)
    pen, paper = torch.where(dark_ink, darker, lighter), torch.where(dark_ink, lighter, darker)
    strength = column(uniform(count, 0.6, 1.0, random))
    image = paper + (pen - paper) * ink * strength
    noise = torch.randn(image.shape, generator=random)
    return (image + noise * column(uniform(count, 0, 0.08, random))).clamp(0, 1)


def _smooth_noise(count: int, channels: int, cells: int, random: Generator) -> Tensor:
    """Normal noise on a coarse grid, interpolated; [B, channels, fine, fine]."""
    coarse = torch.randn(count, channels, cells, cells, generator=random)
    return F.interpolate(coarse, size=(_FINE, _FINE), mode="bicubic", align_corners=True)


if __name__ == "__main__":
    main()
