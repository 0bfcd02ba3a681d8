"""Draw a few pictures for own_data.yaml, as a stand-in for one's own.

    python own_data.py FOLDER
    cl-merge run data=own_data.yaml source=FOLDER

A folder per split, in it a folder per class, in it the images: FOLDER/train/a/0.png and so on.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CLASSES = "aehkmrst"
COUNTS = {"train": 20, "test": 10}


def main(folder: Path) -> None:
    """Draw letters at random places, grey on noise."""
    random = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                draw(name, random).save(folder / split / name / f"{number}.png")
    print(f"wrote {sum(COUNTS.values()) * len(CLASSES)} pictures to {folder}")


def draw(letter: str, random: np.random.Generator) -> Image.Image:
    """Draw a letter, 32 x 32 pixels."""
    image = Image.fromarray(random.integers(0, 120, (32, 32), dtype=np.uint8))
    place = (16 + int(random.integers(-2, 3)), 16 + int(random.integers(-2, 3)))
    font = ImageFont.load_default(size=int(random.integers(18, 26)))
    ImageDraw.Draw(image).text(place, letter, fill=255, font=font, anchor="mm")
    return image


if __name__ == "__main__":
    main(Path(sys.argv[1]))
