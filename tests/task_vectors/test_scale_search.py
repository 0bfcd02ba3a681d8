"""The search for a scale: where it looks, and what it takes where counts are equal."""

import re

import pytest

from cl_merge.errors import InputError
from cl_merge.task_vectors.scale_search import block_groups, read_groups, search_scale


def recorded(accuracy):
    """A count of 10000 images by scale, and the scales that were asked for."""
    asked = []

    def count(scales):
        asked.append(scales)
        return round(10000 * accuracy(scales))

    return count, asked


@pytest.mark.parametrize("peak", [0.0, 0.02, 0.05, 0.13, 0.3, 0.45, 0.72, 1.0, 1.48, 1.5, 2.2, 3.0])
def test_a_single_peak_is_found_within_half_a_step(peak):
    count, asked = recorded(lambda scales: 1 - abs(scales.of("w") - peak) / 4)
    found = search_scale(count)
    assert abs(found.scales.of("w") - peak) <= (0.0250001 if peak > 0.1 else 0.0125001)
    assert found.evaluated == len(asked) == len(set(asked)) <= 22


def test_most_searches_take_twelve_evaluations():
    count, asked = recorded(lambda scales: 1 - abs(scales.of("w") - 0.5))
    assert search_scale(count).scales.plain() == 0.5
    assert sorted(scales.plain() for scales in asked) == [
        *(0.1, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.9, 1.1, 1.3, 1.5),
    ]


def test_on_a_plateau_the_middle_is_taken():
    count, _ = recorded(lambda scales: 1.0 if 0.29 < scales.of("w") < 1.11 else 0.5)
    assert search_scale(count).scales.plain() == 0.7


def test_of_two_equal_peaks_the_smaller_scale_is_taken():
    count, _ = recorded(lambda scales: 1.0 if scales.of("w") in (0.3, 1.1) else 0.5)
    assert search_scale(count).scales.plain() == 0.3


def test_groups_move_away_from_the_common_scale_where_that_is_strictly_better():
    peaks = {"a.w": 0.5, "b.w": 0.7, "c.w": 0.5}
    count, asked = recorded(
        lambda scales: 1 - sum(abs(scales.of(n) - p) for n, p in peaks.items()) / 10
    )
    found = search_scale(count, groups=["a.*", "b.*"])
    assert found.scales.plain() == {"a.*": 0.5, "b.*": 0.7, "*": 0.5}
    assert found.correct == 10000
    assert len(asked) == len(set(asked)) == 12 + 2 * 4


def test_groups_that_make_no_difference_leave_one_scale():
    count, _ = recorded(lambda scales: 1 - abs(scales.of("w") - 0.5))
    assert search_scale(count, groups=["other"]).scales.plain() == 0.5


def test_blocks_are_the_outermost_numbers_in_names():
    names = ["stem.w", "stages.0.0.w", "stages.0.1.w", "stages.1.0.w"]
    assert block_groups(names) == ["stages.0.*", "stages.1.*", "*"]
    assert block_groups(["0.weight", "2.weight"]) == ["0.*", "2.*"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("blocks", "unknown grouping 'blocks'; did you mean 'block'? Known: block"),
        (3, "groups=3; expected 'block' or a list of patterns"),
        ([1], "groups=[1]; expected 'block' or a list of patterns"),
    ],
)
def test_other_groups_are_refused(given, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        read_groups(given)
