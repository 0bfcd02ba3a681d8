"""The built-in data set of letters and digits."""

import hashlib

import numpy as np
import pytest
import torch

from cl_merge import load_clip
from cl_merge.benchmarks.datasets.catalog import find_data, open_data
from cl_merge.benchmarks.datasets.characters import CHARACTERS, LOOKS, SIDE, characters
from cl_merge.models.zero_shot import zero_shot_head

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def drawn():
    return characters()


def pixels(split) -> np.ndarray:
    return np.stack([np.asarray(image) for image in split["image"]])


def digest(split) -> str:
    return hashlib.sha256(pixels(split).tobytes()).hexdigest()


def test_every_class_has_as_many_pictures_of_every_look(drawn):
    for split, each in (("train", 8), ("test", 3)):
        pairs = list(zip(drawn[split]["label"], drawn[split]["look"], strict=True))
        assert {pairs.count(pair) for pair in set(pairs)} == {each}
        assert len(set(pairs)) == 62 * len(LOOKS)
    facts = find_data("characters").facts
    assert facts == {"train": 62 * 40, "test": 62 * 15, "classes": 62}


def test_class_names_tell_the_two_cases_apart(drawn):
    names = drawn["train"].features["label"].names
    assert len(names) == len(set(names)) == len(CHARACTERS)
    assert (names[0], names[10], names[36]) == ("digit zero", "capital letter a", "small letter a")


def test_the_pictures_are_the_same_every_time_and_all_differ(drawn):
    again = open_data("builtin:characters")
    assert [digest(again[split]) for split in again] == [digest(drawn[split]) for split in drawn]
    everything = np.concatenate([pixels(drawn["train"]), pixels(drawn["test"])])
    assert everything.shape == (62 * 55, SIDE, SIDE, 3)
    assert len({picture.tobytes() for picture in everything}) == len(everything)


def test_looks_look_different(drawn):
    grey = pixels(drawn["train"]).mean(axis=3)
    looks = np.asarray(drawn["train"]["look"])
    of = {name: grey[looks == index] for index, name in enumerate(LOOKS)}
    border = {name: found[:, 0].mean() for name, found in of.items()}
    assert border["negative"] < 90 < 150 < min(v for k, v in border.items() if k != "negative")
    rough = {name: np.abs(np.diff(found[:, :3], axis=2)).mean() for name, found in of.items()}
    assert rough["noisy"] > 3 * rough["slanted"]
    assert rough["textured"] > 1.5 * rough["slanted"]


def test_small_letters_are_small(drawn):
    # Their outlines are alike, so only the size tells the cases apart.
    dark = pixels(drawn["train"]).mean(axis=3)
    labels, looks = (np.asarray(drawn["train"][column]) for column in ("label", "look"))

    def height(character: str) -> float:
        rows = (labels == CHARACTERS.index(character)) & (looks == LOOKS.index("negative"))
        ink = dark[rows].max(axis=2)
        threshold = (ink.min(axis=1) + ink.max(axis=1)) / 2
        return float((ink > threshold[:, None]).sum(axis=1).mean())

    for letter in "cosvwxz":
        assert height(letter) < 0.85 * height(letter.upper())


def test_the_embedded_model_reads_many_but_not_nearly_all(drawn):
    clip = load_clip("glyph")
    head = zero_shot_head(
        clip, drawn["test"].features["label"].names, find_data("characters").recipe["prompts"]
    )
    images = torch.stack([clip.test_transform(image) for image in drawn["test"]["image"]])
    with torch.inference_mode():
        found = head(clip.model.visual(images)).argmax(dim=1)
    accuracy = (found == torch.tensor(drawn["test"]["label"])).float().mean().item()
    assert 0.5 < accuracy < 0.75
