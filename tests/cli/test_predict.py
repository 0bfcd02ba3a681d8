"""``cl-merge predict``: the table, the CSV, and what it says of bad input."""

import csv
import io
import shutil

import export_cases
import pytest

from cl_merge import cli, load
from cl_merge.benchmarks.datasets.digits import digits

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return export_cases.glyph(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five images at two depths, among files that are none."""
    place = tmp_path_factory.mktemp("images")
    (place / "deep" / "er").mkdir(parents=True)
    images = digits()["test"]
    for number, name in enumerate(("b.png", "a.PNG", "deep/c.jpg", "deep/er/d.bmp", "z.webp")):
        images[40 * number]["image"].convert("RGB").save(place / name)
    (place / "notes.txt").write_text("no image")
    return place


def test_images_make_a_table_of_the_top_classes(run, folder, capsys):
    assert cli.main(["predict", str(run), str(folder / "b.png"), str(folder / "z.webp")]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = [line.split() for line in lines if "%" in line]
    assert len(words) == 2 * 5
    for first, image in ((0, "b.png"), (5, "z.webp")):
        [guesses] = load(run).predict(folder / image)
        shown = [(w[-2], w[-1]) for w in words[first : first + 5]]
        assert shown == [(g.name, f"{g.probability:.1%}") for g in guesses]
    assert [w for w in lines[1].split()] == ["image", "class", "probability"]


def rows(text):
    return list(csv.reader(io.StringIO(text)))


def test_a_folder_makes_csv_in_order_whatever_the_batch(run, folder, tmp_path, capsys):
    assert cli.main(["predict", str(run), str(folder), "--top", "2", "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    head, *found = rows(printed)
    assert head == ["file", "class_1", "probability_1", "class_2", "probability_2"]
    names = ["a.PNG", "b.png", "deep/c.jpg", "deep/er/d.bmp", "z.webp"]
    assert [row[0] for row in found] == [str(folder / name) for name in names]
    expected = load(run).predict([folder / name for name in names], top=2)
    for row, (first, second) in zip(found, expected, strict=True):
        assert [row[1], row[3]] == [first.name, second.name]
        values = [float(row[2]), float(row[4])]
        assert values == pytest.approx([first.probability, second.probability], abs=1e-5)
    for option in ("--out", "-o", "--output"):
        file = tmp_path / f"{option}.csv"
        assert cli.main(["predict", str(run), str(folder), "--top", "2", option, str(file)]) == 0
        assert [row[:2] for row in rows(file.read_text())] == [row[:2] for row in rows(printed)]
        assert capsys.readouterr().out == ""


def test_a_method_with_statistics_and_more_classes_than_there_are(run, folder, capsys):
    words = ["predict", str(run), str(folder), "--method", "magmax-statistics", "--top", "99"]
    assert cli.main(words) == 0
    found = rows(capsys.readouterr().out)
    assert {len(row) for row in found} == {1 + 2 * 10}
    [guesses] = load(run, method="magmax-statistics").predict(folder / "a.PNG", top=1)
    assert found[1][1] == guesses[0].name


def test_files_in_a_folder_that_are_no_images_are_named_and_skipped(run, folder, tmp_path, capsys):
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    (mixed / "broken.png").write_text("no image")
    assert cli.main(["predict", str(run), str(mixed), "--top", "1"]) == 1
    printed = capsys.readouterr()
    assert printed.err == (
        f"cl-merge: skipped: '{mixed / 'broken.png'}' is no readable image (no image)\n"
    )
    assert len(rows(printed.out)) == 1 + 5


def error(capsys, *words):
    assert cli.main(["predict", *map(str, words)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("cl-merge: ")
    assert printed.err.count("\n") == 1
    return printed.err[len("cl-merge: ") : -1]


def test_what_cannot_be_classified_is_said_in_one_line(run, folder, tmp_path, capsys):
    text = folder / "notes.txt"
    assert error(capsys, run, text) == f"'{text}' is no readable image (no image)"
    missing = tmp_path / "missing.png"
    assert error(capsys, run, missing) == f"there is no image '{missing}'; check the path"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert error(capsys, run, empty) == (
        f"the folder '{empty}' has no image (.bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, .tif, "
        ".tiff, .webp)"
    )
    image = folder / "b.png"
    assert error(capsys, empty, image) == f"'{empty}' holds no run: there is no config.yaml"
    assert error(capsys, run, image, "--top", 0) == "--top 0; expected 1 or more"
    assert error(capsys, run, image, "--batch-size", 0) == "--batch-size 0; expected 1 or more"
    assert error(capsys, run, image, "-o", image) == (
        f"the output '{image}' exists; give another name"
    )
    assert error(capsys, run, image, "--device", "mars") == (
        "device=mars: no such device here; expected cpu or cuda"
    )


def test_a_run_that_is_not_finished_is_said(run, folder, tmp_path, capsys):
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(run / "config.yaml", begun)
    assert error(capsys, begun, folder) == (
        f"the run in '{begun}' is not finished; go on with: cl-merge run out={begun}"
    )
