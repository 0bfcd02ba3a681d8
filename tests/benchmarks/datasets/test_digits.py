"""scikit-learn's digits as a data set of images."""

from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits

from cl_merge.benchmarks.datasets.digits import NAMES, digits


@pytest.fixture(scope="module")
def splits():
    return digits()


def test_labels_are_named_and_each_class_has_its_share_of_both_splits(splits):
    assert {name: len(split) for name, split in splits.items()} == {"train": 1437, "test": 360}
    for split in splits.values():
        assert split.features["label"].names == list(NAMES)
        counts = Counter(split["label"])
        assert set(counts) == set(range(10))
        assert max(counts.values()) - min(counts.values()) <= 0.06 * len(split)


def test_the_split_is_always_the_same_and_loses_no_image(splits):
    again = digits()
    assert list(again["test"]["label"]) == list(splits["test"]["label"])
    labels = [label for split in splits.values() for label in split["label"]]
    assert Counter(labels) == Counter(load_digits().target.tolist())


def test_images_are_rgb_with_a_margin_around_the_pixels_of_the_source(splits):
    image = splits["train"][0]["image"]
    assert (image.mode, image.size) == ("RGB", (12, 12))
    grey = np.asarray(image)[..., 0]
    assert grey.sum() == grey[2:10, 2:10].sum() > 0
    # 0 to 16 became 0 to 255.
    source = load_digits().images[0]
    np.testing.assert_allclose(grey[2:10, 2:10], source * 255 / 16, atol=0.5)
