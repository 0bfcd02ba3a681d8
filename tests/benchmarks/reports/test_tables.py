"""The tables of a suite in all their forms."""

import csv
import io

import pytest
from rich.console import Console

from cl_merge.benchmarks.reports.summary import summarize
from cl_merge.benchmarks.reports.tables import csv_text, latex, markdown, rich_tables
from cl_merge.benchmarks.suites.definition import find_suite, narrowed
from cl_merge.benchmarks.suites.plan import jobs_of, make_plan
from cl_merge.errors import InputError


@pytest.fixture
def summary(two_seeds, write_results, tmp_path):
    suite, jobs = two_seeds
    for seed, shift in ((0, 0.0), (1, 2.0)):
        write_results(
            jobs["sequential", seed],
            {"zero-shot": 30.0, "magmax": 50.0 + shift, "average-sequential": 48.0},
            seconds=120.0,
        )
    write_results(jobs["independent", 0], {"ties": 40.0})
    failed = tmp_path / jobs["joint", 0].path
    failed.mkdir(parents=True)
    (failed / "failed.json").write_text("{}")
    return summarize(suite, tmp_path)


def test_markdown_marks_the_best_two_and_says_how_many_seeds_have_run(summary):
    lines = markdown(summary).splitlines()
    assert lines[2:10] == [
        "| method | digits-5 |",
        "|---|---:|",
        "| zero-shot | 30.0 ± 0.0 |",
        "| joint | failed |",
        "| magmax | **51.0 ± 1.4** |",
        "| ties | 40.0 (1 of 2) |",
        "| average-sequential | *48.0 ± 0.0* |",
        "",
    ]
    assert "k of n" in lines[10]


def test_latex_compiles_to_the_same_figures(summary):
    text = latex(summary)
    assert r"magmax & \textbf{51.0} $\pm$ 1.4 \\" in text
    assert r"average-sequential & \underline{48.0} $\pm$ 0.0 \\" in text
    assert text.count("{") == text.count("}")
    assert r"\begin{tabular}{lr}" in text


def test_names_of_folders_are_words_in_every_table(tmp_path):
    suite = narrowed(find_suite("offline"), data=[r"/data/a|b_c^~\d"], methods=["magmax"])
    summary = summarize(suite, tmp_path)
    assert markdown(summary).splitlines()[2] == r"| method | a\|b_c^~\d |"
    words = r"a|b\_c\textasciicircum{}\textasciitilde{}\textbackslash{}d"
    assert rf"method & {words} \\" in latex(summary)


def test_csv_holds_every_figure_exactly(summary):
    rows = list(csv.DictReader(io.StringIO(csv_text(summary))))
    found = {(r["method"], r["metric"]): r for r in rows}
    magmax = found["magmax", "accuracy"]
    assert (float(magmax["mean"]), magmax["seeds"]) == (51.0, "2")
    assert float(magmax["std"]) == 2.0**0.5
    assert (magmax["seed 0"], magmax["seed 1"]) == ("50.0", "52.0")
    assert found["ties", "accuracy"]["std"] == ""
    assert float(found["magmax", "seconds"]["mean"]) == 120.0


def test_the_terminal_shows_failures_and_other_metrics_in_their_units(summary):
    shown = printed(*rich_tables(summary))
    assert "51.0 ± 1.4" in shown
    assert "failed" in shown
    assert "2.0 ± 0.0" in printed(*rich_tables(summary, "seconds"))  # minutes
    assert "1.0 ± 0.0" in printed(*rich_tables(summary, "peak_memory"))  # GiB


def test_the_difference_to_the_paper_stands_beside_the_figure(write_results, tmp_path):
    suite = narrowed(find_suite("table1"), data=["cars"], tasks=[10], methods=["magmax"])
    (job,) = jobs_of(make_plan(suite))
    write_results(job, {"magmax": 70.0})
    summary = summarize(suite, tmp_path)
    assert "| magmax | **70.0 (+0.7)** |" in markdown(summary)  # the paper: 69.28
    assert "70.0 (+0.7)" in printed(*rich_tables(summary))
    assert "69.28,0.7" in csv_text(summary)


def test_an_unknown_metric_is_answered_with_the_nearest(summary):
    with pytest.raises(InputError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        markdown(summary, "acuracy")


def test_a_narrow_terminal_gets_the_table_in_parts_and_loses_nothing(write_results, tmp_path):
    suite = narrowed(find_suite("table1"), methods=["magmax", "ties"])
    for number, job in enumerate(jobs_of(make_plan(suite))):
        write_results(job, dict.fromkeys(job.methods, 40.0 + number))
    summary = summarize(suite, tmp_path)
    parts = rich_tables(summary, width=60)
    assert len(parts) > 1
    shown = printed(*parts, width=60)
    assert "…" not in shown
    assert all(f"{40.0 + number:.1f} (" in shown for number in range(28))
    assert len(rich_tables(summary, width=400)) == 1


def printed(*tables, width=120):
    console = Console(width=width, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.file.getvalue()
