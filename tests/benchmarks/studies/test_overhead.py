"""That both sides of the comparison do the same work; how long it takes is not for tests."""

import math
import subprocess
import sys

import pytest
import torch

from cl_merge.benchmarks.runs.run import start_run
from cl_merge.benchmarks.studies import overhead, regularizer_cost
from cl_merge.benchmarks.studies.harness import Stopwatch
from cl_merge.benchmarks.studies.overhead import measure_stream, measure_test, read_settings
from cl_merge.errors import InputError

pytestmark = pytest.mark.slow

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
    found = overhead.Found(pairs, 0.0)
    assert found.column("wall") == {
        "framework, ms": "400.00 (200.00-600.00)",
        "bare loop, ms": "450.00 (100.00-800.00)",
        "difference, ms": "-50.00 (-200.00-100.00)",
        "ratio": "1.375 (0.750-2.000)",
        "ratio of the sums": "1.000",
    }
    assert found.column("cpu")["ratio"] == "1.500 (1.000-2.000)"


def test_settings_that_the_bare_loop_does_not_know_are_refused(tmp_path):
    with pytest.raises(InputError, match="test_fraction"):
        read_settings(["stream.test_fraction=0.1"], tmp_path)


@pytest.mark.parametrize(("part", "unit"), [("stream", "of a step"), ("test", "forward pass")])
def test_the_command_prints_a_table(part, unit, capsys, monkeypatch):
    arguments = [part, *SMALL, LARGE_BATCHES, "--repeat", "1"]
    monkeypatch.setattr(sys, "argv", ["overhead", *arguments])
    overhead.main()
    shown = capsys.readouterr().out
    assert f"{2 if part == 'stream' else 1} pairs" in shown
    assert unit in shown
    assert "ratio of the sums" in shown


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_steps_on_random_images_are_the_same_work(precision):
    ours, bare = (
        regularizer_cost.measure(kind, precision, "glyph", batch_size=4, steps=3, warmup=2)
        for kind in ("magmax", regularizer_cost.BARE)
    )
    assert ours["loss"] == pytest.approx(bare["loss"], rel=1e-6)
    assert all(figures["images_per_second"] > 0 for figures in (ours, bare))


@pytest.mark.parametrize("kind", ["ewc-empirical", "drift-penalty", "lwf+ewc"])
def test_steps_with_regularizers_are_measured_with_the_fisher_pass(kind):
    found = regularizer_cost.measure(kind, "32-true", "glyph", batch_size=4, steps=3, warmup=2)
    assert found["step_ms"] > 0
    assert found["end_ms"] > 0


def test_steps_are_measured_in_processes_of_their_own():
    words = ["--kinds", "lwf", "bare loop", "--precision", "32-true", "--batch-size", "4"]
    words += ["--steps", "2", "--repeat", "1"]
    module = "cl_merge.benchmarks.studies.regularizer_cost"
    done = subprocess.run(
        [sys.executable, "-m", module, *words], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "ms a step" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    (lwf,) = (row for row in rows if row[:1] == ["lwf"])
    (bare,) = (row for row in rows if row[:2] == ["bare", "loop"])
    assert lwf[3] == "1.00"
    assert len(lwf) == len(bare) - 1
