"""What a suite has found, read back from its runs."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest

from cl_merge.benchmarks.methods.method import METHODS, find_method
from cl_merge.benchmarks.reports.summary import METRICS, over_orders, paper_accuracy, summarize
from cl_merge.benchmarks.reports.tables import markdown
from cl_merge.benchmarks.suites.definition import Setting, find_suite, narrowed
from cl_merge.benchmarks.suites.plan import BEGUN, DONE, FAILED, NEW, jobs_of, make_plan

PAPER = Path(__file__).parents[4] / "shared" / "paper" / "results.json"


def test_figures_are_means_and_sample_deviations_over_seeds(two_seeds, write_results, tmp_path):
    suite, jobs = two_seeds
    write_results(jobs["sequential", 0], {"magmax": 50.0, "zero-shot": 30.0})
    write_results(jobs["sequential", 1], {"magmax": 53.0, "zero-shot": 30.0})
    summary = summarize(suite, tmp_path)
    figure = summary.entries["digits-5", "magmax"].metrics["accuracy"]
    assert figure.values == {0: 50.0, 1: 53.0}
    assert figure.mean == 51.5
    assert figure.spread == pytest.approx(3 / math.sqrt(2))
    assert summary.entries["digits-5", "zero-shot"].metrics["accuracy"].spread == 0.0


def test_best_and_second_best_are_of_those_that_merge(two_seeds, write_results, tmp_path):
    suite, jobs = two_seeds
    write_results(
        jobs["sequential", 0], {"zero-shot": 90.0, "magmax": 50.0, "average-sequential": 60.0}
    )
    write_results(jobs["independent", 0], {"ties": 70.0})
    write_results(jobs["joint", 0], {"joint": 95.0})
    entries = summarize(suite, tmp_path).entries
    ranks = {method: entry.ranks.get("accuracy") for (_, method), entry in entries.items()}
    assert ranks == {
        "zero-shot": None,
        "joint": None,
        "magmax": None,
        "average-sequential": 2,
        "ties": 1,
    }


def test_equal_methods_are_equally_good(two_seeds, write_results, tmp_path):
    suite, jobs = two_seeds
    write_results(jobs["sequential", 0], {"magmax": 60.0, "average-sequential": 60.0})
    write_results(jobs["independent", 0], {"ties": 50.0})
    entries = summarize(suite, tmp_path).entries
    names = "magmax", "average-sequential", "ties"
    assert [entries["digits-5", name].ranks["accuracy"] for name in names] == [1, 1, 2]


def test_each_cell_says_how_far_it_is_and_why_it_failed(two_seeds, write_results, tmp_path):
    suite, jobs = two_seeds
    write_results(jobs["sequential", 0], {"magmax": 50.0, "zero-shot": 30.0})
    failed = tmp_path / jobs["independent", 0].path
    failed.mkdir(parents=True)
    (failed / "failed.json").write_text(json.dumps({"reason": "no space left"}))
    begun = tmp_path / jobs["joint", 0].path
    begun.mkdir(parents=True)
    (begun / "journal.jsonl").touch()
    cells = {(c.cell.method, c.cell.seed): c for c in summarize(suite, tmp_path).cells}
    assert cells["magmax", 0].state == DONE
    assert cells["average-sequential", 0].state == BEGUN  # not in the results of its run
    assert (cells["ties", 0].state, cells["ties", 0].reason) == (FAILED, "no space left")
    assert cells["joint", 0].state == BEGUN
    assert cells["ties", 1].state == NEW


def test_joint_training_tells_other_numbers_of_tasks_only_what_does_not_depend_on_them(
    write_results, tmp_path
):
    suite = narrowed(find_suite("table1"), data=["cars"], methods=["joint"])
    (job,) = jobs_of(make_plan(suite))
    write_results(job, {"joint": 88.0}, tasks=5)
    entries = summarize(suite, tmp_path).entries
    assert "forgetting" in entries["cars-5", "joint"].metrics
    assert set(entries["cars-20", "joint"].metrics) == {"accuracy", "seconds", "peak_memory"}
    # Asked for later, by another number of tasks than those of the run that is there.
    later = replace(suite, settings=tuple(replace(s, joint_tasks=s.tasks) for s in suite.settings))
    entries = summarize(later, tmp_path).entries
    assert set(entries["cars-20", "joint"].metrics) == {"accuracy", "seconds", "peak_memory"}


def test_stored_bytes_are_those_of_the_task_vectors(two_seeds, write_results, tmp_path):
    suite, jobs = two_seeds
    place = write_results(jobs["sequential", 0], {"magmax": 50.0, "zero-shot": 30.0})
    before = summarize(suite, tmp_path).entries  # of a run that was copied without them
    assert "stored_bytes" not in before["digits-5", "magmax"].metrics
    vectors = place / "task_vectors" / "sequential"
    vectors.mkdir(parents=True)
    (vectors / "task0.safetensors").write_bytes(b"0" * 1000)
    (vectors / "task1.safetensors").write_bytes(b"0" * 234)
    entries = summarize(suite, tmp_path).entries
    assert entries["digits-5", "magmax"].metrics["stored_bytes"].mean == 1234
    assert "stored_bytes" not in entries["digits-5", "zero-shot"].metrics


def test_the_figures_of_multi_domain_streams_are_read_off_both_matrices(
    two_seeds, write_results, tmp_path
):
    suite, jobs = two_seeds
    place = write_results(jobs["sequential", 0], {"magmax": 50.0, "zero-shot": 30.0}, tasks=3)
    results = json.loads((place / "results.json").read_text())
    method = results["methods"]["magmax"]
    method["matrix"] = [[90.0, 50.0, 10.0], [70.0, 80.0, 20.0], [71.0, 81.0, 91.0]]
    method["matrix_task_aware"] = [[92.0, 55.0, 30.0], [75.0, 85.0, 40.0], [72.0, 82.0, 92.0]]
    (place / "results.json").write_text(json.dumps(results))
    metrics = summarize(suite, tmp_path).entries["digits-5", "magmax"].metrics
    for prefix, key in (("", "matrix"), ("task_aware_", "matrix_task_aware")):
        rows, tasks = method[key], range(len(method[key]))
        before = [sum(rows[i][j] for i in range(j)) / j for j in tasks if j]
        assert metrics[f"{prefix}transfer"].mean == pytest.approx(sum(before) / len(before))
        every = [x for row in rows for x in row]
        assert metrics[f"{prefix}matrix_average"].mean == pytest.approx(sum(every) / len(every))
    last = method["matrix_task_aware"][-1]
    assert metrics["task_aware_last"].mean == pytest.approx(sum(last) / len(last))


def test_orders_are_an_axis_beside_the_seeds(write_results, tmp_path):
    methods = ["zero-shot", "joint", "magmax", "average-sequential"]
    suite = narrowed(find_suite("offline"), data=["digits"], methods=methods, seeds="2", orders=3)
    accuracies = iter([50.0, 60.0, 52.0, 62.0, 54.0, 64.0])
    for job in jobs_of(make_plan(suite)):
        own = next(accuracies) if job.training == "sequential" else 90.0
        found = {"magmax": own, "average-sequential": own - 1, "zero-shot": 30.0}
        write_results(job, {"joint": own} if job.training == "joint" else found)
    summary = summarize(suite, tmp_path)
    together = over_orders(summary)
    magmax = together.entries["digits-5", "magmax"].metrics["accuracy"]
    # The jobs come seed by seed, and in each order by order.
    assert magmax.values == {0: (50 + 62) / 2, 1: (60 + 54) / 2, 2: (52 + 64) / 2}
    assert magmax.spread == pytest.approx(stdev(magmax.values.values()))
    joint = together.entries["digits-5", "joint"]  # one run for all orders: no spread over them
    assert (joint.metrics["accuracy"].values, len(joint.cells)) == ({0: 90.0}, 1)
    assert together.entries["digits-5", "magmax"].ranks["accuracy"] == 1
    text = markdown(together)
    assert "(over orders, seeds 0, 1)" in text
    assert "± standard deviation over orders" in text
    alone = narrowed(find_suite("offline"), data=["digits"], methods=methods)
    assert over_orders(summarize(alone, tmp_path)) is None


def test_every_metric_is_explained():
    assert all(metric.title and metric.about for metric in METRICS.values())


@pytest.mark.skipif(not PAPER.exists(), reason="needs the paper's tables in ../shared/paper")
def test_the_papers_figures_are_the_papers():
    published = json.loads(PAPER.read_text())
    rows = {method.paper: method for method in METHODS.values() if method.paper}
    seen = 0
    for table in ("table1", "table2"):
        suite = find_suite(table)
        for name, by_data in published[table].items():
            for data, by_tasks in by_data.items():
                for tasks, value in by_tasks.items() if isinstance(by_tasks, dict) else ():
                    setting = Setting(data, int(tasks))
                    assert paper_accuracy(suite, setting, rows[name]) == value
                    seen += 1
    for name, by_data in published["reference"].items():
        for data, value in by_data.items():
            if data != "average":
                setting = Setting(data, 10)
                assert paper_accuracy(find_suite("table1"), setting, rows[name]) == value
                seen += 1
    assert seen == 9 * 14 + 2 * 4


def test_the_paper_has_no_figure_for_other_data_or_other_suites():
    magmax = find_method("magmax")
    assert paper_accuracy(find_suite("table1"), Setting("digits", 5), magmax) is None
    assert paper_accuracy(find_suite("offline"), Setting("cifar100", 5), magmax) is None
    assert paper_accuracy(find_suite("table1"), Setting("cars", 50), magmax) is None
