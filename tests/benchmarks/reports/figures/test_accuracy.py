"""What is drawn of results alone: curves and matrices."""

from itertools import pairwise

import numpy as np
import pytest
from case_suite import make_run, make_suite
from matplotlib.text import Text

from cl_merge.benchmarks.reports.figures.accuracy import (
    draw_accuracies,
    draw_curve,
    draw_matrix,
)
from cl_merge.benchmarks.reports.figures.style import figure_style
from cl_merge.benchmarks.reports.figures.suite_runs import Measured, find_settings
from cl_merge.mergers import MERGERS


def draw(suite, function):
    with figure_style():
        return function(Measured(find_settings(suite)[0]))


def results(suite, name):
    return find_settings(suite)[0].methods()[name]


def test_the_curve_has_a_line_per_method_and_a_point_of_joint_training(tmp_path):
    make_suite(tmp_path, seeds=2)
    make_run(tmp_path, "birds", "joint", tasks=2)
    drawn = draw(tmp_path, draw_curve)
    assert drawn.columns == ("method", "after 1", "after 2", "after 3", "spread at the end")
    by_method = {row[0]: row[1:] for row in drawn.rows}
    assert set(by_method) == {
        "zero-shot", "joint", "sequential", "independent", "magmax", "max-abs", "average",
        "average-sequential",
    }  # fmt: skip
    seen = np.mean([result["seen"] for result in results(tmp_path, "magmax")], axis=0)
    assert by_method["magmax"][:3] == pytest.approx(seen, abs=0.051)
    (joint,) = results(tmp_path, "joint")
    assert by_method["joint"] == (None, None, pytest.approx(joint["accuracy"], abs=0.051), None)
    labels = [text.get_text() for axes in drawn.canvas.axes for text in axes.texts]
    # In every panel, to compare with; fine-tuning also where its task vectors are merged.
    assert labels.count("zero-shot") == labels.count("magmax") == len(drawn.canvas.axes) == 3
    assert labels.count("sequential") == 2


@pytest.mark.slow
def test_labels_at_the_ends_of_lines_do_not_cover_each_other(tmp_path):
    make_suite(tmp_path, seeds=1)
    drawn = draw(tmp_path, draw_curve)
    drawn.canvas.draw_without_rendering()
    for axes in drawn.canvas.axes:
        # Of the words alone: an annotation's own extent has its line in it.
        boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda b: b.y0)
        assert len(boxes) > 3
        assert all(one.y1 <= other.y0 + 1 for one, other in pairwise(boxes))


def test_labels_of_many_methods_stay_beside_their_panel():
    methods = {
        name: [{"training": "independent", "merger": name, "seen": [50.0, 40.0 + i]}]
        for i, name in enumerate(MERGERS)
        if name != "magmax"
    }
    with figure_style():
        drawn = draw_accuracies(methods, 2, "birds")
    drawn.canvas.draw_without_rendering()
    (axes,) = drawn.canvas.axes
    assert len(axes.texts) == len(methods)
    panel = axes.get_window_extent()
    for text in axes.texts:
        box = Text.get_window_extent(text)
        assert panel.y0 - box.height < box.y0 < box.y1 < panel.y1 + box.height


def test_a_single_task_is_the_first_and_no_fraction_of_it():
    methods = {"magmax": [{"training": "sequential", "merger": "magmax", "seen": [50.0]}]}
    with figure_style():
        drawn = draw_accuracies(methods, 1, "birds", fewest=1)
    assert [text.get_text() for text in drawn.canvas.axes[0].get_xticklabels()] == ["1"]


@pytest.mark.slow
def test_bands_are_drawn_for_several_seeds_only(tmp_path):
    make_suite(tmp_path / "one", seeds=1)
    make_suite(tmp_path / "two", seeds=2)
    bands = {
        name: sum(len(axes.collections) for axes in draw(tmp_path / name, draw_curve).canvas.axes)
        for name in ("one", "two")
    }
    assert bands["one"] == 0
    assert bands["two"] > 5


@pytest.mark.parametrize("tasks", [1, 4, 50])
def test_matrices_begin_with_zero_shot_and_are_means_over_seeds(tmp_path, tasks):
    make_suite(tmp_path, setting=f"birds-{tasks}", tasks=tasks, seeds=2)
    drawn = draw(tmp_path, draw_matrix)
    pictures = {
        axes.get_title(loc="left"): axes.images[0].get_array() for axes in drawn.canvas.axes[:6]
    }
    assert list(pictures) == [
        "sequential", "independent", "magmax", "max-abs", "average", "average\nsequential",
    ]  # fmt: skip
    zero_shot = np.mean([r["matrix"][0] for r in results(tmp_path, "zero-shot")], axis=0)
    magmax = np.mean([r["matrix"] for r in results(tmp_path, "magmax")], axis=0)
    assert np.allclose(pictures["magmax"], [zero_shot, *magmax])


def test_joint_training_alone_makes_no_figure_and_no_setting(tmp_path):
    make_run(tmp_path, "birds", "joint", tasks=2)
    assert find_settings(tmp_path) == []
