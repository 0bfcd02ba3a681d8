"""How figures look: colours on white and on dark pages, files that fit into any page."""

import math
import re
import statistics
from itertools import combinations
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from cl_merge.benchmarks.reports.figures.style import (
    GREY,
    INK,
    PALETTE,
    figure_style,
    look_of,
    new_canvas,
    number,
    over_seeds,
    save_drawing,
    seeds_note,
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


MERGED = ("magmax", "average", "task-arithmetic", "random-mix", "ties")
TRAININGS = ("sequential", "independent", "lwf", "ewc", "drift-penalty")
STATISTICS = ("base", "aligned", "both")


@pytest.mark.parametrize("colour", sorted({*PALETTE, GREY}))
def test_every_colour_shows_on_white_and_on_a_dark_page(colour):
    assert contrast(colour, "#ffffff") >= 3
    assert contrast(colour, "#16181d") >= 3


PANELS = {
    "merged": ([look_of(merger, "sequential") for merger in MERGED], 20),
    "not merged": ([look_of(None, training) for training in TRAININGS], 10),
    "statistics": ([look_of("magmax", "sequential", kind) for kind in STATISTICS], 15),
}


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("panel", PANELS)
def test_colours_of_one_panel_differ_for_every_colour_vision(panel, vision):
    looks, least = PANELS[panel]
    matrix = np.array(VISIONS[vision])
    for one, other in combinations([look["color"] for look in looks], 2):
        assert np.linalg.norm(lab(matrix @ linear(one)) - lab(matrix @ linear(other))) > least


def test_a_merger_has_one_colour_whatever_its_training():
    for merger in MERGERS:
        looks = [look_of(merger, training) for training in ("sequential", "independent", "lwf")]
        assert len({look["color"] for look in looks}) == 1
        assert len({str(look["linestyle"]) for look in looks}) == 3


def test_no_two_mergers_of_a_picture_look_alike():
    looks = {name: look_of(name, "sequential") for name in MERGERS if name != "max-abs"}
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == len(looks)


def test_magmax_looks_like_nothing_that_it_is_compared_with():
    others = [look_of(None, training) for training in TRAININGS]
    others += [look_of("magmax", "sequential", kind) for kind in STATISTICS]
    assert look_of("magmax", "sequential")["color"] not in {look["color"] for look in others}


def test_what_is_not_merged_differs_by_colour_marker_and_dashes():
    looks = [look_of(None, training) for training in TRAININGS]
    for part in ("color", "marker", "linestyle"):
        assert len({str(look[part]) for look in looks}) == len(looks)


def test_the_users_settings_count_for_nothing_and_are_back_afterwards():
    with mpl.rc_context({"font.size": 31, "axes.grid": False}):
        with figure_style():
            assert mpl.rcParams["font.size"] == 10
        assert mpl.rcParams["font.size"] == 31


def test_each_point_has_its_mean_and_sample_standard_deviation():
    line = over_seeds([[1.0, 5.0], [2.0, 5.0], [6.0, 8.0]])
    assert line.mean.tolist() == [3.0, 6.0]
    assert line.spread == pytest.approx((statistics.stdev([1, 2, 6]), statistics.stdev([5, 5, 8])))


def test_one_seed_has_no_spread_and_missing_values_do_not_count():
    line = over_seeds([[1.0, None, None], [None, None, 3.0]])
    assert line.mean[::2].tolist() == [1.0, 3.0]
    assert math.isnan(line.mean[1])
    assert all(math.isnan(spread) for spread in line.spread)


def test_tables_have_rounded_numbers_and_none_for_what_is_no_number():
    assert number(12.3456) == 12.3
    assert number(0.12345, 3) == 0.123
    assert number(math.nan) is None


def test_captions_say_what_bands_are():
    assert seeds_note(1) == "One seed."
    assert seeds_note(3).startswith("Mean over 3 seeds; the band is one standard deviation")


def draw():
    canvas = new_canvas(2.0)
    axes = canvas.add_subplot()
    axes.plot([0, 1], [0, 1], "o-", color="#d55e00", label="a line")
    axes.imshow([[0.0, 1.0]], interpolation="none", extent=(0, 0.5, 0, 0.5))
    axes.legend()
    return canvas


def saved(folder, name="birds-3-curve"):
    with figure_style():
        save_drawing(draw(), folder / f"{name}.svg", 'What "it" <shows>.')
    return (folder / f"{name}.svg").read_text()


@pytest.fixture(scope="module")
def svg(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("svg"))


def test_it_is_one_element_with_words_for_readers_of_the_screen(svg):
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("}svg")
    assert (root.get("role"), root.get("aria-label")) == ("img", 'What "it" <shows>.')


def test_letters_are_letters_in_the_colour_of_the_page(svg):
    assert re.search(r"<text[^>]*>a line</text>", svg)
    assert INK not in svg
    assert "currentColor" in svg


def test_nothing_is_painted_behind_the_picture(svg):
    background = re.search(r"<path[^>]*style=\"([^\"]*)\"", svg)
    assert "fill: none" in background[1]


def test_every_reference_is_met_and_no_id_is_that_of_another_picture(tmp_path, svg):
    ids, others = (
        re.findall(r'\bid="([^"]+)"', text) for text in (svg, saved(tmp_path, "birds-3-matrix"))
    )
    assert len(ids) == len(set(ids))
    assert not set(ids) & set(others)
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)
    assert used
    assert {a or b for a, b in used} <= set(ids)


def test_the_same_picture_is_the_same_bytes(tmp_path, svg):
    assert saved(tmp_path) == svg
    first = (tmp_path / "birds-3-curve.png").read_bytes()
    saved(tmp_path)
    assert (tmp_path / "birds-3-curve.png").read_bytes() == first
