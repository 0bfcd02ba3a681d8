"""Selections of parameters by patterns."""

import re

import pytest

from cl_merge.errors import InputError
from cl_merge.task_vectors.selection import Selection

NAMES = ["visual.conv.weight", "visual.conv.bias", "visual.proj", "head.bias"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([], [], NAMES),
        (["visual.*"], [], NAMES[:3]),
        ([], ["*.bias"], ["visual.conv.weight", "visual.proj"]),
        (["visual.*"], ["*.bias"], ["visual.conv.weight", "visual.proj"]),
        (["head.*", "visual.p*"], [], ["visual.proj", "head.bias"]),
    ],
)
def test_include_takes_exclude_leaves_out_and_the_order_stays(include, exclude, expected):
    assert Selection(include, exclude).names(NAMES) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"include": ["visual.pro"]},
            "include: the pattern 'visual.pro' fits no parameter; did you mean 'visual.proj'? "
            "Patterns fit whole names, as in 'visual.*'",
        ),
        (
            {"exclude": ["zzz"]},
            "exclude: the pattern 'zzz' fits no parameter. Patterns fit whole names, as in "
            "'visual.*'",
        ),
        (
            {"include": ["head.*"], "exclude": ["*.bias"]},
            "include=head.* and exclude=*.bias leave no parameter to merge",
        ),
    ],
)
def test_patterns_that_choose_nothing_are_named(options, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        Selection(**options).names(NAMES)


def test_a_pattern_that_is_no_list_is_refused_at_once():
    with pytest.raises(InputError, match=r"^include must be a list of patterns, as in \['v\*'\]$"):
        Selection(include="v*")
