"""scikit-learn's handwritten digits as a data set of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import datasets

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# The digits touch the edges of their 8 x 8 pixels. Characters in pictures have a margin, and so
# have those that the embedded model learned from: there the longer side takes 44 of 64 pixels.
_MARGIN = 2
_TEST_SHARE = 0.2


def digits() -> datasets.DatasetDict:
    """Load the 1,797 handwritten digits, split once and for all, without a network.

    Returns:
        Splits ``train`` (1,437) and ``test`` (360), each class in the same proportion in both, with
        columns ``image`` (RGB, 12 x 12 pixels: the digit and a margin) and ``label``
        (``ClassLabel`` with the names ``zero`` to ``nine``).

    Example:
        >>> digits()["test"].num_rows
        360

    Reference:
        Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
        Repository, 1998.
    """
    import datasets
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    rows = {"image": [_picture(values) for values in pixels], "label": labels.tolist()}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))}
    )
    everything = datasets.Dataset.from_dict(rows, features=features)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=_TEST_SHARE, stratify=labels, random_state=0
    )
    return datasets.DatasetDict(
        {"train": everything.select(sorted(train)), "test": everything.select(sorted(test))}
    )


def _picture(values: np.ndarray) -> Image.Image:
    """Make a picture of 64 values from 0 (paper) to 16 (ink)."""
    grey = np.round(values.reshape(8, 8) * (255 / 16)).astype(np.uint8)
    return Image.fromarray(np.pad(grey, _MARGIN)).convert("RGB")
