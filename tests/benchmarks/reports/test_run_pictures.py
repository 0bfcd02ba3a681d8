"""The pictures of a single run."""

import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from results_files import whole_results, write_results_file

from cl_merge.benchmarks.reports.run_pictures import PICTURES, draw_pictures


@pytest.fixture
def results():
    methods = {
        "magmax": {"training": "sequential", "merger": "magmax", "seen": [90.0, 88.0]},
        "sequential": {"training": "sequential", "seen": [90.0, 60.0]},
        "ties": {"training": "independent", "merger": "ties", "seen": [89.0, 80.0]},
    }
    return whole_results({"methods": methods})


@pytest.mark.slow
def test_a_run_has_two_pictures_on_white(results, tmp_path):
    draw_pictures(results, tmp_path)
    for name in PICTURES:
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.convert("RGB").getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.parametrize("seen", [[None, 70.0], [70.0]])
def test_methods_that_were_evaluated_once_are_drawn_too(tmp_path, seen):
    one = {"training": "sequential", "merger": "magmax", "seen": seen}
    draw_pictures(whole_results({"methods": {"magmax": one}, "tasks": [{}] * len(seen)}), tmp_path)
    assert {file.stem for file in tmp_path.iterdir()} == set(PICTURES)


def test_dollar_signs_in_names_are_no_formula(results, tmp_path):
    results["tasks"][0]["name"] = "US$_$1"
    results["data"] = "/photos/a$_$b"
    draw_pictures(results, tmp_path)
    assert {file.stem for file in tmp_path.iterdir()} == set(PICTURES)


def test_the_matrix_of_many_tasks_fits_a_screen(tmp_path):
    matrix = [[50.0] * 50] * 50
    one = {"training": "sequential", "merger": "magmax", "seen": [50.0] * 50, "matrix": matrix}
    draw_pictures(whole_results({"methods": {"magmax": one}, "tasks": [{}] * 50}), tmp_path)
    with Image.open(tmp_path / "accuracy_matrix.png") as picture:
        assert max(picture.size) <= 3000


def test_the_picture_of_the_readme_says_the_same_on_light_and_on_dark(results, tmp_path):
    write_results_file(tmp_path, results)
    script = Path(__file__).parents[3] / "docs" / "readme_picture.py"
    runpy.run_path(str(script))["main"](str(tmp_path), str(tmp_path))
    labels = []
    for theme, ink in (("light", "#21262b"), ("dark", "#e6e8ea")):
        text = (tmp_path / f"accuracy_{theme}.svg").read_text()
        assert ink in text
        root = ElementTree.fromstring(text)
        labels.append(root.get("aria-label"))
        words = [own.text for own in root.iter("{http://www.w3.org/2000/svg}text")]
        assert {"magmax  88.0 %", "sequential fine-tuning  60.0 %", "other mergers"} <= set(words)
    assert labels[0] == labels[1]
    assert "magmax  88.0 %" in labels[0]
