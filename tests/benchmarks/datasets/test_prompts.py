"""Prompts and class names, as settings give them."""

import re

import open_clip
import pytest

from cl_merge.benchmarks.datasets.prompts import read_class_names, read_prompts
from cl_merge.errors import InputError


def test_prompts_of_open_clip_are_read_from_the_package():
    found = read_prompts("open_clip:OPENAI_IMAGENET_TEMPLATES")
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    assert len(found) == len(templates) == 80
    assert all(prompt.count("{}") == 1 for prompt in found)
    named = [prompt.format("newt") for prompt in found]
    assert named == [template("newt") for template in templates]


def test_prompts_are_a_list_or_one():
    assert read_prompts(["a {}.", "the {}."]) == ["a {}.", "the {}."]
    assert read_prompts("a {}.") == ["a {}."]


@pytest.mark.parametrize("value", [None, [], 3])
def test_prompts_that_are_none_are_named(value):
    with pytest.raises(InputError, match=f"^prompts={re.escape(str(value))}; expected a list"):
        read_prompts(value)


def test_a_list_that_open_clip_does_not_have_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'open_clip:OPENAI_IMAGENET_TEMPLATES'"):
        read_prompts("open_clip:OPENAI_IMAGENET_TEMPLATE")


def test_class_names_are_replaced_by_a_list_or_by_patterns_in_order():
    assert read_class_names(None, ["a", "b"]) == ["a", "b"]
    assert read_class_names(["x", "y"], ["a", "b"]) == ["x", "y"]
    patterns = {"^[0-9]+[.]": "", "_": " "}
    assert read_class_names(patterns, ["001.Sooty_Tern", "Tern"]) == ["Sooty Tern", "Tern"]
    assert read_class_names({"(a)(b)": r"\2\1"}, ["ab"]) == ["ba"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["x"], "class_names has 1 names, but the data set has 2 classes"),
        ("x", "class_names=x; expected a list of names, or patterns with their replacements"),
        ({"(": ""}, "class_names: '(' is no regular expression"),
    ],
)
def test_wrong_class_names_are_named(value, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        read_class_names(value, ["a", "b"])
