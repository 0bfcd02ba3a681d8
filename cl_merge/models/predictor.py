"""What classifies images by name: a classifier with its class names and its transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from cl_merge.data.images import as_rgb
from cl_merge.errors import InputError, was_interrupted
from cl_merge.models.classifier import CLIPClassifier

Picture: TypeAlias = Image.Image | NDArray[np.uint8] | Tensor | str | Path
"""One image: a PIL image, pixels, uint8 [H, W, 3], a file, or a transformed float tensor [3, H, W].
"""


class Guess(NamedTuple):
    """A class that an image may show.

    Attributes:
        name: The class.
        probability: From 0 to 1.
    """

    name: str
    probability: float


@dataclass(frozen=True)
class ImageClassifier:
    """A classifier that is ready to use.

    Attributes:
        model: Classifies: ``model(images)`` makes logits [B, C] of transformed images.
        class_names: Names of the C classes, in the order of the logits.
        transform: Turns a PIL image into a float32 tensor [3, H, W], without randomness.
    """

    model: CLIPClassifier
    class_names: tuple[str, ...]
    transform: Callable[[Any], Any]

    def predict(
        self, images: Picture | Sequence[Picture], top: int = 5, *, batch_size: int = 64
    ) -> list[list[Guess]]:
        """Say what images show.

        Args:
            images: PIL images, arrays of pixels, files, or transformed tensors; also one of them,
                or a batch: pixels, uint8 [B, H, W, 3], or transformed images, float [B, 3, H, W].
            top: How many classes to name; all where there are fewer.
            batch_size: How many images to classify at once.

        Returns:
            For each image its most probable classes, the first one first.

        Raises:
            InputError: If a file is no readable image, a tensor or array has another shape or type,
                or a number is below 1.

        Example::

            classifier = cl_merge.load("runs/digits-magmax")
            [[guess]] = classifier.predict("seven.png", top=1)
            print(guess.name, guess.probability)
        """
        for name, value in (("top", top), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"{name}={value}; expected 1 or more")
        given: Any = images
        single = isinstance(given, (Tensor, np.ndarray)) and given.ndim != 4
        single = single or isinstance(given, (Image.Image, str, Path))
        pictures: list[Picture] = [given] if single else list(given)
        found: list[list[Guess]] = []
        for start in range(0, len(pictures), batch_size):
            batch = torch.stack([self.prepare(p) for p in pictures[start : start + batch_size]])
            found += self._guesses(batch, top)
        return found

    def prepare(self, picture: Picture) -> Tensor:
        """Turn an image into what the model takes, float [3, H, W].

        A tensor is taken to be transformed already, an array to be pixels. `InputError` if it has
        another shape or type, or the image cannot be read.
        """
        if isinstance(picture, Tensor):
            if picture.ndim != 3 or picture.shape[0] != 3 or not picture.is_floating_point():
                raise InputError(
                    f"a tensor of shape {list(picture.shape)} and dtype {picture.dtype}; expected "
                    "transformed images, float [3, height, width] or [batch, 3, height, width]"
                )
            return picture
        if isinstance(picture, np.ndarray):
            picture = _from_pixels(picture)
        image = picture if isinstance(picture, Image.Image) else _opened(Path(picture))
        # Cameras store what they turn; images of a data set come upright.
        prepared: Tensor = self.transform(as_rgb(ImageOps.exif_transpose(image)))
        return prepared

    def _guesses(self, batch: Tensor, top: int) -> list[list[Guess]]:
        self.model.eval()
        with torch.inference_mode():
            probabilities = self.model(batch.to(self.model.device)).softmax(dim=1).cpu()
        best = probabilities.topk(min(top, len(self.class_names)), dim=1)
        return [
            [Guess(self.class_names[c], v) for c, v in zip(classes, values, strict=True)]
            for values, classes in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def _from_pixels(pixels: NDArray[Any]) -> Image.Image:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise InputError(
            f"an array of shape {list(pixels.shape)} and dtype {pixels.dtype}; expected pixels, "
            "uint8 [height, width, 3] or [batch, height, width, 3]"
        )
    return Image.fromarray(pixels)


def _opened(path: Path) -> Image.Image:
    """Read a file whole, so that one that is cut short shows now."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise InputError(f"there is no image '{path}'; check the path") from None
    # The readers behind PIL raise errors of their own for damaged files, with no common base.
    except Exception as error:
        if was_interrupted(error):
            raise
        reason = "no image" if "cannot identify" in str(error) else " ".join(str(error).split())
        raise InputError(f"'{path}' is no readable image ({reason})") from error
