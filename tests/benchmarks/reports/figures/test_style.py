"""Colours can be seen on white and on dark pages, and told apart with any colour vision."""

from itertools import combinations

import matplotlib as mpl
import numpy as np
import pytest

from cl_merge.benchmarks.reports.figures.style import (
    COLOURS,
    GREY,
    OTHERS,
    STATISTICS,
    UNMERGED,
    colour_of,
    figure_style,
    look_of,
)
from cl_merge.mergers import MERGERS

# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(colour):
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    light = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (light[1] + 0.05) / (light[0] + 0.05)


def lab(rgb):
    xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ) @ np.clip(rgb, 0, 1)
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


PALETTES = {*COLOURS.values(), *UNMERGED.values(), *STATISTICS.values(), *OTHERS, GREY}


@pytest.mark.parametrize("colour", sorted(PALETTES))
def test_every_colour_shows_on_white_and_on_a_dark_page(colour):
    assert contrast(colour, "#ffffff") >= 3
    assert contrast(colour, "#16181d") >= 3


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize(("palette", "least"), [(COLOURS, 20), (UNMERGED, 10), (STATISTICS, 15)])
def test_colours_of_one_picture_differ_for_every_colour_vision(palette, least, vision):
    matrix = np.array(VISIONS[vision])
    for one, other in combinations(sorted(set(palette.values())), 2):
        assert np.linalg.norm(lab(matrix @ linear(one)) - lab(matrix @ linear(other))) > least


def test_a_merger_has_one_colour_whatever_its_training():
    for merger in MERGERS:
        looks = [look_of(merger, training) for training in ("sequential", "independent", "lwf")]
        assert {look["color"] for look in looks} == {colour_of(merger)}
        assert len({str(look["linestyle"]) for look in looks}) == 3


def test_class_statistics_do_not_look_like_what_they_stand_beside():
    looks = [look_of("magmax", "sequential", kind) for kind in (None, "aligned", "both")]
    looks.append(look_of(None, "sequential", "base"))
    assert len({look["color"] for look in looks}) == 4


def test_what_is_not_merged_differs_by_colour_marker_and_dashes():
    looks = [look_of(None, training) for training in UNMERGED]
    for part in ("color", "marker", "linestyle"):
        assert len({str(look[part]) for look in looks}) == len(looks)


def test_the_users_settings_count_for_nothing_and_are_back_afterwards():
    with mpl.rc_context({"font.size": 31, "axes.grid": False}):
        with figure_style():
            assert mpl.rcParams["font.size"] == 10
        assert mpl.rcParams["font.size"] == 31
