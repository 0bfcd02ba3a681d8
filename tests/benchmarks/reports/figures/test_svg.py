"""Pictures fit into any page."""

import re
from xml.etree import ElementTree

import pytest

from cl_merge.benchmarks.reports.figures.style import INK, figure_style, new_canvas
from cl_merge.benchmarks.reports.figures.svg import save_png, save_svg


def draw():
    canvas = new_canvas(2.0)
    axes = canvas.add_subplot()
    axes.plot([0, 1], [0, 1], "o-", color="#d55e00", label="a line")
    axes.imshow([[0.0, 1.0]], interpolation="none", extent=(0, 0.5, 0, 0.5))
    axes.legend()
    return canvas


def saved(folder, name="birds-3-curve"):
    with figure_style():
        save_svg(draw(), folder / f"{name}.svg", 'The "title" & more', "What <it> shows.")
        save_png(draw(), folder / f"{name}.png")
    return (folder / f"{name}.svg").read_text()


@pytest.fixture(scope="module")
def svg(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("svg"))


def test_it_is_one_element_with_words_for_readers_of_the_screen(svg):
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("}svg")
    assert root.get("role") == "img"
    title, alt = root[0], root[1]
    assert (title.text, alt.text) == ('The "title" & more', "What <it> shows.")
    assert root.get("aria-labelledby") == f"{title.get('id')} {alt.get('id')}"


def test_letters_are_letters_in_the_colour_and_font_of_the_page(svg):
    assert re.search(r"<text[^>]*>a line</text>", svg)
    assert INK not in svg
    assert "currentColor" in svg
    assert "DejaVu" not in svg
    assert "system-ui, sans-serif" in svg


def test_nothing_is_painted_behind_the_picture(svg):
    background = re.search(r'id="[^"]*-patch_1">\s*<path[^>]*style="([^"]*)"', svg)
    assert "fill: none" in background[1]


def test_no_style_reaches_the_rest_of_the_page(svg):
    assert "<style" not in svg


def test_every_id_is_the_figures_own_and_every_reference_is_met(svg):
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    assert all(name.startswith("birds-3-curve-") for name in ids)
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)
    assert used
    assert {a or b for a, b in used} <= set(ids)


def test_the_same_picture_is_the_same_bytes(tmp_path, svg):
    assert saved(tmp_path) == svg
    first = (tmp_path / "birds-3-curve.png").read_bytes()
    saved(tmp_path)
    assert (tmp_path / "birds-3-curve.png").read_bytes() == first
