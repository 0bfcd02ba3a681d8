"""What lifts the text head alone: each way against its definition, and the command on a run."""

import json
import shutil
import sys

import pytest
import torch

from cl_merge import TaskVector, cli, merge
from cl_merge.benchmarks.runs.evaluator import RunEvaluator
from cl_merge.benchmarks.studies import harness
from cl_merge.benchmarks.studies import text_head_only as text_head
from cl_merge.benchmarks.studies.text_head_only import (
    MERGING,
    PLAIN,
    WAYS,
    SeenClasses,
    measure,
    train,
)
from cl_merge.errors import InputError

pytestmark = pytest.mark.slow

NAMES = ["stem.weight", "blocks.0.weight", "blocks.1.weight", "proj"]


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(0)
    return [
        TaskVector({name: torch.randn(5, generator=generator) for name in NAMES}) for _ in range(4)
    ]


def magmax(vectors):
    return merge(vectors, method="magmax")


def test_sign_consistency_weighs_by_the_share_of_one_sign(vectors):
    found, plain = MERGING["sign consistency"](vectors), magmax(vectors)
    for name in NAMES:
        for i in range(5):
            values = [float(vector[name][i]) for vector in vectors]
            share = abs(sum(values)) / sum(abs(value) for value in values)
            assert float(found[name][i]) == pytest.approx(
                0.5 * float(plain[name][i]) * share, rel=1e-4
            )


def test_scales_fall_by_a_factor_from_each_layer_to_the_one_before(vectors):
    found = MERGING["scale falls towards early layers"](vectors)
    for depth, name in enumerate(NAMES):
        expected = 0.5 * 0.8 ** (3 - depth) * magmax(vectors)[name]
        torch.testing.assert_close(found[name], expected)


def test_the_mean_over_time_is_that_of_the_models_after_each_task(vectors):
    found = MERGING["mean of merged models over time"](vectors)
    models = [magmax(vectors[: task + 1]) for task in range(4)]
    for name in NAMES:
        expected = 0.5 * torch.stack([model[name] for model in models]).mean(dim=0)
        torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize("way", ["magmax", "ema", "opcm"])
def test_a_method_counts_with_its_published_scale(way):
    generator = torch.Generator().manual_seed(1)
    vectors = [TaskVector({"weight": torch.randn(3, 4, generator=generator)}) for _ in range(3)]
    scale = {"magmax": 0.5, "ema": 1.0, "opcm": text_head.get_merger("opcm").published_scale}[way]
    expected = merge(vectors, method=way)["weight"] * scale
    torch.testing.assert_close(MERGING[way](vectors)["weight"], expected)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits-2") / "seed0" / "sequential"
    settings = ["data=digits", "stream.tasks=2", "stream.images_per_class=6", "evaluate=last"]
    settings += ["trainer.max_epochs=1", "trainer.accelerator=cpu", "compare=false"]
    assert cli.main(["run", *settings, f"out={folder}"]) == 0
    return folder


def test_trained_anew_without_any_change_it_is_the_same_model(run):
    evaluator = RunEvaluator.of(run)
    stored = list(harness.task_vectors(run))
    again, after_another = train(evaluator), (train(evaluator, start="merged"), train(evaluator))[1]
    for name, value in merge(stored, method="magmax").items():
        assert torch.equal(again.merged()[name], value)
        assert torch.equal(after_another.merged()[name], value)


def test_the_loss_over_seen_classes_changes_only_what_follows_the_first_task(run):
    evaluator = RunEvaluator.of(run)
    for task, count in ((0, 5), (1, 10)):
        evaluator.stream.select(task)
        seen = text_head.seen_classes(evaluator.stream)
        assert len(seen) == count
        assert seen[-5:] == list(evaluator.stream.task.classes)
    plain, seen = train(RunEvaluator.of(run)), train(RunEvaluator.of(run), kind=SeenClasses)
    assert any(not torch.equal(plain.merged()[n], v) for n, v in seen.merged().items())


def test_the_command_shows_each_way_with_its_difference(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["text_head_only", str(run)])
    text_head.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["way", run.parts[-3]]
    (plain,) = (line.split()[-1] for line in printed if line.split()[:1] == [PLAIN])
    for name in WAYS[1:]:
        (line,) = (line for line in printed if line.strip().startswith(f"{name}  "))
        accuracy, difference = map(float, line.split()[-2:])
        assert accuracy - float(plain) == pytest.approx(difference, abs=0.1001)


def test_a_run_that_other_images_or_threads_were_used_for_is_found_out(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    results["methods"][PLAIN]["accuracy"] += 0.5
    (other / "results.json").write_text(json.dumps(results))
    with pytest.raises(InputError, match="MagMax of its task vectors has .* results.json says"):
        measure(other, [PLAIN])
