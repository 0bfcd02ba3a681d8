"""Results from anywhere in one table: what is the same stream, and what is the same method."""

import json
import re
import shlex

import pytest
from results_files import write_results_file

from cl_merge.benchmarks.reports.html import write_leaderboard
from cl_merge.benchmarks.reports.leaderboard import read_leaderboard, spread_of
from cl_merge.cli import main
from cl_merge.errors import InputError

OPENAI = "ViT-B-16-quickgelu:openai"


@pytest.fixture
def write(tmp_path):
    """A function that writes results: a command, accuracies by method, and what else they say."""

    def written(folder, command, accuracies, **more):
        place = tmp_path / folder
        place.mkdir(parents=True)
        known = {
            "zero-shot": {"training": None},
            "joint": {"training": "joint"},
            "magmax": {"training": "sequential", "merger": "magmax"},
            "magmax-statistics": {"training": "sequential", "merger": "magmax"},
            "ties": {"training": "independent", "merger": "ties"},
            "ties-drift": {"training": "independent", "merger": "ties"},
            "fisher": {"training": "independent", "merger": "fisher"},
            "lwf": {"training": "lwf"},
        }
        methods = {name: known[name] | {"accuracy": x} for name, x in accuracies.items()}
        if command is not None:
            more["command"] = f"cl-merge run {command}"
        write_results_file(place, {"methods": methods, "method": next(iter(methods)), **more})
        return tmp_path / folder.partition("/")[0]

    return written


def values(board):
    return {
        (stream.name, *stream.settings, row.name): [f.metrics["accuracy"] for f in cell]
        for (stream, row), cell in board.cells.items()
        if row.method != "zero-shot"
    }


def test_seeds_orders_and_machines_are_one_cell_with_mean_and_spread(write):
    one = write("mine/seed0/sequential", "data=digits", {"magmax": 80.0})
    write("mine/seed1/sequential", "data=digits seed=1 stream.num_workers=8", {"magmax": 82.0})
    other = write("theirs", "data=digits stream.order=7 trainer.accelerator=gpu", {"magmax": 84.0})
    board = read_leaderboard([one, other])
    assert values(board) == {("digits, 2 tasks", "magmax"): [80.0, 82.0, 84.0]}
    (cell,) = (cell for (_, row), cell in board.cells.items() if row.name == "magmax")
    assert spread_of(cell, "accuracy") == (82.0, 2.0, 3)
    assert {finding.order for finding in cell} == {"of the recipe", "7"}


def test_processors_of_one_system_are_several_machines(write):
    for name in ("EPYC, AVX2", "Xeon, AVX512"):
        machine = {"device": "cpu", "processor": name, "platform": "Linux"}
        write(f"runs/{name[:4]}", "data=digits", {"magmax": 80.0}, machine=machine)
        folder = write(f"runs/copy-{name[:4]}", "data=digits", {"magmax": 80.0}, machine=machine)
    assert values(read_leaderboard([folder])) == {("digits, 2 tasks", "magmax"): [80.0, 80.0]}


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("stream.batch_size=64 trainer.devices=2", ["stream.batch_size=128"]),
        (
            "stream.batch_size=32 trainer.devices=[0,1] trainer.num_nodes=2",
            ["stream.batch_size=128"],
        ),
        ("trainer.devices=4", ["stream.batch_size=128"]),  # of the recipe's 32
        ("stream.batch_size=16 trainer.devices=2", []),  # the recipe's, from two
        ("trainer.devices=-1", ["trainer.devices=-1"]),
    ],
)
def test_devices_share_the_images_of_a_step(write, words, shown):
    found = values(read_leaderboard([write("one", words, {"magmax": 80.0})]))
    assert found == {("digits, 2 tasks", *shown, "magmax"): [80.0]}


@pytest.mark.parametrize("data", [("/a/photos", "/b/photos"), ("/a/x.v1", "/a/x.v2")])
def test_data_sets_outside_the_catalog_are_one_by_their_path(write, data):
    folders = [
        write(p[1:], f"data={p} seed={i}", {"magmax": 80.0}, data=p) for i, p in enumerate(data)
    ]
    assert len(values(read_leaderboard(folders))) == 2


def test_what_is_found_twice_counts_once(write, tmp_path):
    write("all/a", "method=magmax", {"magmax": 80.0, "ties": 70.0})
    write("all/b", "method=lwf", {"lwf": 60.0, "ties": 70.0})
    write("all/c", "method=lwf seed=1", {"ties": 70.0}, seed=1)
    found = values(read_leaderboard([tmp_path / "all" / "a", tmp_path / "all"]))
    name = "digits, 2 tasks"
    assert found == {(name, "magmax"): [80.0], (name, "lwf"): [60.0], (name, "ties"): [70.0, 70.0]}


def test_another_training_is_another_stream_and_other_options_another_row(write):
    beside = shlex.quote('merge.beside.ties={"density": 0.1}')
    folders = [
        write("a", "merge.scale=0.3 lwf.weight=1.0", {"magmax": 1.0, "ties": 2.0, "lwf": 3.0}),
        write("b", "trainer.max_epochs=3", {"magmax": 4.0}),
        write("c", beside, {"magmax": 5.0, "ties": 6.0}),
        # Class statistics stand beside a merge at a scale of its own, as magmax-drift.
        write("d", "merge.scale=0.3", {"magmax-statistics": 7.0, "magmax": 8.0}),
        write("e", "merge.store=int8", {"magmax": 9.0, "ties": 10.0}),
        write("f", "merge.density=0.5 merge.scale=2", {"ties": 11.0, "ties-drift": 12.0}),
        write("g", "merge.importance_samples=9", {"fisher": 13.0, "magmax": 14.0}),
    ]
    name = "digits, 2 tasks"
    assert values(read_leaderboard(folders)) == {
        (name, "magmax (scale=0.3)"): [1.0],
        (name, "ties"): [2.0],
        (name, "lwf (lwf.weight=1.0)"): [3.0],
        (name, "trainer.max_epochs=3", "magmax"): [4.0],
        (name, "magmax"): [5.0, 8.0, 14.0],
        (name, "ties (density=0.1)"): [6.0],
        (name, "magmax-statistics (scale=0.3)"): [7.0],
        (name, "magmax (store=int8)"): [9.0],
        (name, "ties (store=int8)"): [10.0],
        (name, "ties (density=0.5, scale=2)"): [11.0],
        (name, "ties-drift (density=0.5)"): [12.0],
        (name, "fisher (importance_samples=9)"): [13.0],
    }


def test_joint_training_stands_in_the_columns_of_any_number_of_tasks(write):
    folders = [
        write("two", "stream.tasks=2", {"joint": 90.0}),
        write("three", "stream.tasks=3", {"magmax": 80.0}, tasks=[{}, {}, {}]),
    ]
    found = values(read_leaderboard(folders))
    assert found["digits, 3 tasks", "joint"] == found["digits, 2 tasks", "joint"] == [90.0]


def test_results_without_their_command_are_refused_and_named(write, tmp_path, capsys):
    old = write("old", None, {"magmax": 80.0})
    new = write("new", "data=digits", {"magmax": 81.0})
    board = read_leaderboard([old, new])
    assert board.refused == [str(old / "results.json")]
    assert values(board) == {("digits, 2 tasks", "magmax"): [81.0]}
    with pytest.raises(InputError, match=r"no results say the command.*old.results\.json"):
        read_leaderboard([old])
    page = tmp_path / "page.html"
    assert main(["report", str(old), str(new), "--leaderboard", str(page)]) == 0
    assert "left out" in (said := capsys.readouterr().out)
    assert "old" in said
    assert "old/results.json" in page.read_text()


def test_figures_of_others_stand_apart_where_they_have_a_column(write, tmp_path):
    data = {"data": "cifar100", "model": OPENAI, "tasks": [{}] * 10}
    folder = write("run", "data=cifar100 stream.tasks=10", {"magmax": 80.0}, **data)
    file = tmp_path / "others.yaml"
    file.write_text(
        "published:\n"
        "  - {method: Head, data: cifar100, accuracy: 87.25, source: 'Someone, 2026'}\n"
        "  - {method: Other, data: cifar100, tasks: 5, accuracy: 1, source: 'Someone, 2026'}\n"
    )
    write_leaderboard(read_leaderboard([folder], file), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    below = page.partition("not measured here")[2]
    assert "87.2" in below
    assert "Someone, 2026" in below
    assert "80.41" not in page  # the paper's MagMax, rounded like the rest
    assert ">80.4<" in below
    assert "Other" not in page


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("published: [{method: a, data: b, source: c}]", "missing required field `accuracy`"),
        ("published: [{method: a, data: b, source: c, accuracy: 870}]", "<= 100"),
        ("published: [{method: a, data: b, source: c, accuracy: 87, year: 1}]", "year"),
        ("others: []", "others"),
    ],
)
def test_a_wrong_file_of_figures_is_named(write, tmp_path, content, reason):
    folder = write("run", "data=digits", {"magmax": 80.0})
    file = tmp_path / "others.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=rf"others\.yaml: .*{reason}"):
        read_leaderboard([folder], file)


def test_what_is_written_in_results_is_text_on_the_page(write, tmp_path):
    hostile = "</script><b onclick=x>"
    folder = write("run", "data=digits", {"magmax": 80.0}, machine={"device": hostile})
    write_leaderboard(read_leaderboard([folder]), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert hostile not in page
    data = page.partition('id="data">')[2].partition("</script>")[0]
    (figures,) = next(own for own in json.loads(data)["cells"] if own[0]["accuracy"]["best"])
    assert figures["accuracy"]["mean"] == "80.0"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--leaderboard", "page.txt"], r"--leaderboard page\.txt: expected a page"),
        (["--published", "x.yaml"], "--published: only with --leaderboard"),
        (["{folder}"], "several folders: only with --leaderboard"),
        (["--format", "csv", "--leaderboard"], "--format: not with --leaderboard"),
        (["--measure", "--leaderboard"], "--measure: not with --leaderboard"),
    ],
)
def test_wrong_words_are_refused(write, tmp_path, capsys, words, reason):
    folder = write("run", "data=digits", {"magmax": 80.0})
    (tmp_path / "empty").mkdir()
    words = [word.format(folder=tmp_path / "empty") for word in words]
    assert main(["report", str(folder), *words]) == 2
    assert re.search(reason, " ".join(capsys.readouterr().err.split()))
    assert main(["report", str(tmp_path / "empty"), "--leaderboard"]) == 2
    assert "has no results.json in it or below it" in " ".join(capsys.readouterr().err.split())
