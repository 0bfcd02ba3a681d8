"""That both sides of the comparison do the same work; how long it takes is not for tests."""

import json
import math
import sys

import pytest
import torch

from cl_merge.benchmarks.runs.run import start_run
from cl_merge.benchmarks.studies import overhead, step_speed
from cl_merge.benchmarks.studies.harness import Stopwatch
from cl_merge.benchmarks.studies.overhead import measure_stream, measure_test, read_settings
from cl_merge.errors import InputError

SMALL = [
    "stream.tasks=3",
    "stream.images_per_class=3",
    "stream.batch_size=4",
    "trainer.max_epochs=2",
]


# The test images of the digits are some 360, and here they are all looked at.
LARGE_BATCHES = "stream.batch_size=50"


@pytest.fixture
def run(tmp_path, request):
    found = start_run(read_settings([*SMALL, *getattr(request, "param", [])], tmp_path / "run"))
    yield found
    found.folder.release()


@pytest.mark.parametrize(
    "run",
    [
        [],
        ["trainer.gradient_clip_val=null", "optimizer.label_smoothing=0.1"],
        ["optimizer.warmup_steps=4", "stream.order=5", "seed=1"],
    ],
    indirect=True,
)
def test_framework_and_bare_loop_end_with_the_same_weights_bit_for_bit(run):
    before = run.base["visual.trunk.stem.weight"].clone()
    found = measure_stream(run, repeat=1)
    assert found.difference == 0
    assert not torch.equal(run.model.visual.trunk.stem.weight, before)
    assert len(found.pairs) == 2  # 3 tasks, but for the first
    steps = [2 * math.ceil(len(task.train) / 4) for task in run.stream.tasks]
    assert [pair.units for pair in found.pairs] == steps[1:]


@pytest.mark.parametrize("what", ["weight_decay", "lr"])
def test_a_bare_loop_that_does_something_else_is_found_out(run, what):
    # The bare loop reads the settings now, the framework has read them when the run was started.
    setattr(run.config.optimizer, what, 1.001 * getattr(run.config.optimizer, what))
    with pytest.raises(RuntimeError, match="do not do the same"):
        measure_stream(run, repeat=1)


@pytest.mark.parametrize("run", [[LARGE_BATCHES]], indirect=True)
def test_an_evaluation_is_one_forward_pass_over_the_test_images(run):
    found = measure_test(run, repeat=2)
    images = sum(len(task.test) for task in run.stream.tasks)
    assert found.passes == math.ceil(images / 50)
    assert found.difference == 0
    assert [pair.units for pair in found.pairs] == 2 * [found.passes]


def test_figures_are_those_of_the_pairs():
    def watch(wall, cpu):
        found = Stopwatch()
        found.wall, found.cpu = wall, cpu
        return found

    pairs = [
        overhead.Pair(10, watch(2.0, 1.0), watch(1.0, 1.0)),
        overhead.Pair(5, watch(3.0, 1.0), watch(4.0, 0.5)),
    ]
    figures = overhead.Found(pairs, 0.0).figures()
    assert figures["wall"] == {
        "framework_ms": [200.0, 600.0],
        "bare_ms": [100.0, 800.0],
        "more_ms": [100.0, -200.0],
        "ratios": [2.0, 0.75],
        "ratio_of_sums": 1.0,
    }
    assert figures["cpu"]["ratios"] == [1.0, 2.0]


def test_settings_that_the_bare_loop_does_not_know_are_refused(tmp_path):
    with pytest.raises(InputError, match="test_fraction"):
        read_settings(["stream.test_fraction=0.1"], tmp_path)


@pytest.mark.parametrize(("part", "unit"), [("stream", "ms a step"), ("test", "ms a forward pass")])
def test_the_command_prints_a_table_and_writes_the_figures(
    part, unit, tmp_path, capsys, monkeypatch
):
    file = tmp_path / "figures.json"
    settings = [*SMALL, LARGE_BATCHES]
    arguments = [part, *settings, "--repeat", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["overhead", *arguments])
    overhead.main()
    figures = json.loads(file.read_text())
    assert figures["settings"] == settings
    assert len(figures["wall"]["ratios"]) == (2 if part == "stream" else 1)
    shown = capsys.readouterr().out
    assert unit in shown
    assert f"{figures['cpu']['ratio_of_sums']:.3f}" in shown


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed"])
def test_steps_on_random_images_are_the_same_work(mode):
    ours, bare = (
        step_speed.measure(mode, way, "glyph", batch_size=4, steps=3, warmup=2)
        for way in step_speed.WAYS
    )
    assert ours["loss"] == pytest.approx(bare["loss"], rel=1e-6)
    assert all(figures["images_per_second"] > 0 for figures in (ours, bare))
