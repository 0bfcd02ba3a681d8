"""A whole run from the command line: what it prints and leaves, and what it says of bad input."""

import csv
import json
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from stopping import stop_at_evaluation

from cl_merge import TaskVector, cli, load_clip, merge
from cl_merge.benchmarks.datasets.digits import digits
from cl_merge.benchmarks.methods.method import METHODS, published_scale
from cl_merge.benchmarks.runs import training
from cl_merge.errors import StorageError
from cl_merge.task_vectors.scales import Scales, scaled

pytestmark = pytest.mark.slow

SMALL = [
    "stream.tasks=2",
    "stream.images_per_class=40",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    "seed=3",
    "trainer.accelerator=cpu",
]


# For what is only compared with itself.
SMALLER = [*SMALL, "stream.images_per_class=8", "stream.test_fraction=0.1"]


def run(*words: str) -> int:
    return cli.main(["run", *words])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run with every method beside it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(*SMALL, "compare=all", "ewc.weight=100", f"out={folder}") == 0
    return folder


@pytest.fixture(scope="module")
def results(whole):
    return json.loads((whole / "results.json").read_text())


def test_the_folder_holds_what_it_should(whole):
    found = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert {
        "merged.safetensors",
        "results.json",
        "config.yaml",
        "accuracy_matrix.png",
        "accuracy_by_task.png",
        *(
            f"task_vectors/{start}/task{task}.safetensors"
            for start in ("sequential", "independent")
            for task in (0, 1)
        ),
    } <= found
    rows = list(csv.DictReader((whole / "logs/csv/metrics.csv").open()))
    assert any(row["train/sequential/loss"] for row in rows)
    for name in ("accuracy_matrix.png", "accuracy_by_task.png"):
        assert np.asarray(Image.open(whole / name)).std() > 10
    assert not [name for name in found if name.endswith(".tmp")]


def test_results_carry_every_method_and_every_figure(results):
    assert list(results["methods"]) == list(METHODS)
    for name, method in results["methods"].items():
        assert 0 <= method["accuracy"] <= 100
        rows = 1 if name == "joint" else 2
        assert np.asarray(method["matrix"]).shape == (rows, 2)
        assert np.asarray(method["matrix_task_aware"]).shape == (rows, 2)
        assert len(method["seen"]) == 2
        assert method["scale"] == published_scale(METHODS[name])
        assert method["metrics"]["accuracy"] == method["accuracy"]
    assert [task["class_names"] for task in results["tasks"]] == [
        ["zero", "one", "two", "three", "four"],
        ["five", "six", "seven", "eight", "nine"],
    ]
    assert results["seed"] == 3
    assert {"torch", "lightning", "cl-merge"} <= set(results["versions"])
    for costs in results["training"].values():
        assert all(cost["seconds"] > 0 and cost["peak_memory"] > 1 << 20 for cost in costs)
    zero_shot = results["methods"]["zero-shot"]["matrix"]
    assert zero_shot[0] == zero_shot[1]


@pytest.fixture(scope="module")
def clip():
    return load_clip("glyph")


@pytest.fixture(scope="module")
def correct(clip):
    """Count the digits that weights classify correctly, without any of the library's loops."""
    test = digits()["test"]
    images = torch.stack([clip.test_transform(image) for image in test["image"]])
    labels = torch.tensor(test["label"])
    encoder = deepcopy(clip.model.visual)

    def correct(state, head) -> int:
        encoder.load_state_dict(state)
        with torch.no_grad():
            features = torch.nn.functional.normalize(encoder(images), dim=1)
        return int(((features @ head.T).argmax(dim=1) == labels).sum())

    return correct


@pytest.mark.parametrize(
    "name", [n for n, method in METHODS.items() if n != "zero-shot" and not method.statistics]
)
def test_accuracies_are_those_of_the_task_vectors_on_disk(whole, results, clip, correct, name):
    method = METHODS[name]
    base = {f"visual.{k}": v.clone() for k, v in clip.model.visual.state_dict().items()}
    vectors = [
        TaskVector.load(whole / "task_vectors" / method.training / f"task{task}.safetensors")
        for task in ((0,) if name == "joint" else (0, 1))
    ]
    if method.merger:
        state = merge(vectors, method=method.merger).apply_to(base, published_scale(method))
    else:
        state = vectors[-1].apply_to(base)
    head = load_file(whole / "merged.safetensors")["head.weight"]
    state = {key.removeprefix("visual."): value for key, value in state.items()}
    accuracy = 100 * correct(state, head) / 360
    assert results["methods"][name]["accuracy"] == pytest.approx(accuracy, abs=1e-9)


def test_the_merged_weights_are_written_whole_and_load_into_open_clip(whole, results, correct):
    saved = load_file(whole / "merged.safetensors")
    state = {k.removeprefix("visual."): v for k, v in saved.items() if k.startswith("visual.")}
    accuracy = 100 * correct(state, saved["head.weight"]) / 360
    assert accuracy == pytest.approx(results["methods"]["magmax"]["accuracy"])


def test_comparing_changes_nothing_in_the_method_of_the_run(whole, results, tmp_path):
    assert run(*SMALL, "compare=false", f"out={tmp_path / 'alone'}") == 0
    alone = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert list(alone["methods"]) == ["zero-shot", "magmax"]
    assert alone["methods"]["magmax"]["matrix"] == results["methods"]["magmax"]["matrix"]
    first, second = (load_file(p / "merged.safetensors") for p in (whole, tmp_path / "alone"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_options_of_the_method_are_its_own(tmp_path):
    words = ["method=ties", "merge.scale=0.3", "merge.density=0.5", "compare=false"]
    assert run(*SMALL, *words, f"out={tmp_path / 'ties'}") == 0
    found = json.loads((tmp_path / "ties" / "results.json").read_text())
    assert found["methods"]["ties"]["scale"] == 0.3
    assert found["methods"]["ties"]["training"] == "independent"
    assert not (tmp_path / "ties" / "task_vectors" / "sequential").exists()


def test_the_scale_is_chosen_on_training_images_and_written_down(tmp_path, capsys):
    words = [*SMALL, "merge.scale=auto", "compare=[ties-sequential]", f"out={tmp_path / 'run'}"]
    assert run(*words) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [(task["train_images"], task["held_out_images"]) for task in found["tasks"]] == [
        (180, 20)
    ] * 2
    method = found["methods"]["magmax"]
    assert len(method["chosen_scales"]) == 2
    assert method["chosen_scales"][-1] == method["scale"]
    assert found["methods"]["ties-sequential"]["scale"] == 0.55
    assert "held_out: 0.1" in (tmp_path / "run" / "config.yaml").read_text()
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"magmax +{method['scale']:.3g} auto", out)
    assert "of 40 held-out images right" in out
    vectors = [
        TaskVector.load(tmp_path / f"run/task_vectors/sequential/task{task}.safetensors")
        for task in (0, 1)
    ]
    base = {f"visual.{k}": v for k, v in load_clip("glyph").model.visual.state_dict().items()}
    expected = merge(vectors, "magmax").apply_to(base, method["scale"])
    saved = load_file(tmp_path / "run" / "merged.safetensors")
    assert all(torch.equal(saved[name], expected[name]) for name in vectors[0])


def test_everything_about_the_merge_can_be_set(tmp_path):
    words = [
        "method=ties-sequential",
        "merge.options.density=0.5",
        'merge.scale={"*norm*": 0.1, "*": 0.4}',
        'merge.exclude=["*.bias"]',
        "merge.store=int8",
        "compare=[opcm]",
    ]
    assert run(*SMALL, *words, f"out={tmp_path / 'run'}") == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(found["methods"]) == ["zero-shot", "ties-sequential", "opcm"]
    assert found["methods"]["ties-sequential"]["scale"] == {"*norm*": 0.1, "*": 0.4}
    assert found["methods"]["opcm"]["training"] == "sequential"
    vectors = [
        TaskVector.load(tmp_path / f"run/task_vectors/sequential/task{task}.safetensors")
        for task in (0, 1)
    ]
    base = {f"visual.{k}": v for k, v in load_clip("glyph").model.visual.state_dict().items()}
    merged, scales = merge(vectors, "ties", density=0.5), Scales.read({"*norm*": 0.1}, 0.4)
    left_out = load_file(tmp_path / "run/task_vectors/sequential/unmerged1.safetensors")
    expected = dict(scaled(base, merged.items(), scales)) | left_out  # as the last task left it
    saved = load_file(tmp_path / "run" / "merged.safetensors")
    assert all(name.endswith(".bias") for name in left_out)
    for name in [n for n in saved if n.startswith("visual.")]:
        assert torch.equal(saved[name], expected[name]), name
        assert (name in merged) == (name in vectors[0])
        assert name not in merged or not name.endswith(".bias")


def test_methods_evaluated_after_the_last_task_only_end_with_the_same_figures(
    whole, results, tmp_path
):
    folder = tmp_path / "last"
    assert run(*SMALL, "compare=[ties, sequential, joint]", "evaluate=last", f"out={folder}") == 0
    found = json.loads((folder / "results.json").read_text())
    assert list(found["methods"]) == ["zero-shot", "joint", "sequential", "magmax", "ties"]
    for name, method in found["methods"].items():
        before = results["methods"][name]
        assert method["accuracy"] == before["accuracy"]
        assert method["matrix"][-1] == before["matrix"][-1]
        if name not in ("zero-shot", "joint"):
            assert len(method["matrix"]) == 1
            assert method["seen"] == [None, before["seen"][-1]]
            assert method["metrics"]["forgetting"] is None
    assert (folder / "accuracy_by_task.png").exists()


def test_a_run_with_a_method_of_ones_own_goes_on_from_anywhere(tmp_path, monkeypatch):
    source = tmp_path / "methods" / "own.py"
    source.parent.mkdir()
    source.write_text(
        "from cl_merge import merge_method\n"
        "@merge_method('of-a-run', scale=0.5)\n"
        "def mine(values, *, rate: float = 1.0): return rate * values.mean(dim=0)\n"
    )
    words = [
        *SMALLER,
        "method=own.py:mine",
        "compare=[own.py:mine-sequential]",
        "merge.options.rate=2",
        "merge.scale=auto",
        "merge.store=bf16",
        "checkpoint_seconds=0",
    ]
    monkeypatch.chdir(source.parent)
    assert run(*words, f"out={tmp_path / 'whole'}") == 0
    with monkeypatch.context() as patched:
        stop_at_evaluation(patched, 5)
        assert run(*words, f"out={tmp_path / 'broken'}") == 130
    monkeypatch.chdir(tmp_path)
    assert run(f"out={tmp_path / 'broken'}") == 0
    first, second = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "broken")
    )
    assert list(first["methods"]) == ["zero-shot", "of-a-run", "of-a-run-sequential"]
    assert first["method"] == "of-a-run"
    assert first["methods"] == second["methods"]
    saved = [tmp_path / name / "merged.safetensors" for name in ("whole", "broken")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


def test_layers_may_learn_at_rates_of_their_own(tmp_path):
    words = [*SMALLER, "stream.tasks=1", "method=sequential", "compare=false"]
    for decay in ("1", "0.25"):
        out = f"out={tmp_path / decay}"
        assert run(*words, "optimizer.warmup_steps=0", f"optimizer.layer_decay={decay}", out) == 0
    even, decayed = (
        TaskVector.load(tmp_path / decay / "task_vectors/sequential/task0.safetensors")
        for decay in ("1", "0.25")
    )
    ratio = {name: float(decayed[name].norm() / even[name].norm()) for name in even}
    assert ratio["visual.head.proj.weight"] > 0.5
    assert ratio["visual.trunk.stem.weight"] < 0.1


def test_it_prints_progress_by_task_and_ends_with_the_table(tmp_path, capsys):
    assert run(*SMALLER, "method=sequential", "compare=false", f"out={tmp_path / 'run'}") == 0
    out = capsys.readouterr().out
    # Whole lines, where no terminal wraps them.
    end = r"\), sequential training, \d+ s; accuracy on everything seen, %:\n  sequential \d+\.\d\n"
    assert re.search(rf"^task 1/2 \(.*{end}", out, re.MULTILINE)
    assert re.search(rf"^task 2/2 \(.*{end}", out, re.MULTILINE)
    assert re.search(r"zero-shot +\d+\.\d", out)
    assert re.search(r"sequential +\d+\.\d", out)


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for word in (
        *("stream.tasks", "optimizer.lr", "methods: ", "ties-sequential", "digits", "out"),
        *("magmax-statistics", "-aligned"),
    ):
        assert word in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["stream.taks=2"],
            "the command line: unknown key 'stream.taks'; did you mean 'stream.tasks'?",
        ),
        (["method=magmx"], "unknown method 'magmx'; did you mean 'magmax'?"),
        (["data=digts"], "unknown data set 'digts'; did you mean 'digits'?"),
        (["data=/no/where"], "'/no/where', to read images from: no such file or folder"),
        (["model=glyf"], "did you mean 'glyph'?"),
        (["stream.scenario=clas"], "unknown scenario 'clas'; did you mean 'class'?"),
        (["stream.tasks=11"], "stream.tasks=11 is more than the 10 classes of the data set"),
        (["stream.order=[1,2]"], "the class order must hold each class once"),
        (["optimizer.lr=-1"], "optimizer.lr=-1.0; expected a finite number above 0"),
        (["optimizer.layer_decay=0"], "optimizer.layer_decay=0.0; expected above 0, at most 1"),
        (["merge.scale=.inf"], "merge.scale=inf; expected a finite number"),
        (["merge.density=0.3"], "merge.density=0.3, but method 'magmax' has no density"),
        (["merge.options.rate=1"], "unknown option of method 'magmax' 'rate'"),
        (["merge.exclude=[visual.trnk.*]"], "exclude: the pattern 'visual.trnk.*' fits no param"),
        (['merge.scale={"visual.trnk.*": 1}'], "scale: the pattern 'visual.trnk.*' fits no param"),
        (["merge.scale=auto", "stream.held_out=0"], "stream.held_out=0.0, but merge.scale=auto"),
        (["merge.scale=auto", "method=lwf"], "merge.scale=auto, but method 'lwf' merges nothing"),
        (["merge.scale=auto", "merge.groups=[zz*]"], "groups: the pattern 'zz*' fits no parameter"),
        (["stream.held_out=1"], "stream.held_out=1.0; expected 0 or more, below 1"),
        (["method=none.py:own"], "there is no file '"),
        (["merge.density=0"], "merge.density=0.0; expected more than 0, at most 1"),
        (
            ["trainer.acelerator=cpu"],
            "unknown key 'trainer.acelerator'; did you mean 'trainer.accelerator'?",
        ),
        (["trainer.accelerator=abacus"], "trainer: "),
        (["prompts=[photo]"], "template 'photo' must hold '{}' exactly once"),
        (["class_names=[a,b]"], "class_names has 2 names, but the data set has 10 classes"),
        (["merge.buffers=mean"], "unknown choice of buffers 'mean'"),
        (["compare=[magmx]"], "unknown method 'magmx'; did you mean 'magmax'?"),
        (["compare=al"], "unknown method 'al'"),
        (["compare=3"], "compare=3; expected true, false, all, or a list of methods"),
        (["lwf.weight=-1"], "weight=-1.0 of LwF; expected 0 or more, finite"),
        (["lwf.temperatur=1"], "unknown key 'lwf.temperatur'; did you mean 'lwf.temperature'?"),
        (["ewc.fisher=emprical"], "unknown Fisher estimate 'emprical'; did you mean 'empirical'?"),
        (["drift_penalty.samples=0"], "samples=0 of DriftPenalty; expected 1 or more"),
        (["ewc.decay=1"], "decay=1.0 of EWC; expected 0 or more, below 1"),
        (["checkpoint_seconds=-1"], "checkpoint_seconds=-1.0; expected 0 or more"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_written(
    words, message, tmp_path, capsys
):
    folder = tmp_path / "run"
    assert run(*words, f"out={folder}") == 2
    error = capsys.readouterr().err
    assert error.startswith("cl-merge: ")
    assert message in error
    assert error.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parametrize(
    "variables",
    [
        "SLURM_NTASKS=1 SLURM_JOB_NAME=exp SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0",
        "TORCHELASTIC_RUN_ID=1 WORLD_SIZE=1 RANK=0 LOCAL_RANK=0 GROUP_RANK=0",
    ],
)
def test_devices_for_which_a_scheduler_has_started_no_process_are_refused(
    variables, tmp_path, monkeypatch, capsys
):
    for name, value in (word.split("=") for word in variables.split()):
        monkeypatch.setenv(name, value)
    words = ["trainer.devices=2", "trainer.strategy=ddp", f"out={tmp_path / 'run'}"]
    assert run(*SMALL, *words) == 2
    assert "need 2 processes, but SLURM or torchrun has started 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("seed=4", "seed=3, not 4"),
        ("stream.tasks=5", "stream.tasks=2, not 5"),
        ("optimizer.lr=0.5", "optimizer.lr=0.001, not 0.5"),
        ("optimizer.layer_decay=0.5", "optimizer.layer_decay=1.0, not 0.5"),
        ("trainer.max_epochs=2", "trainer.max_epochs=1, not 2"),
        ("trainer.deterministic=true", "trainer.deterministic=None, not True"),
        ("compare=false", "compare=all, not False"),
    ],
)
def test_a_folder_that_holds_another_run_is_refused(whole, capsys, word, said):
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()}
    assert run(word, f"out={whole}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cl-merge: out={whole} holds a run with {said}; name a new folder, or")
    assert error.count("\n") == 1
    after = {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()}
    assert before == after


def test_a_finished_run_is_shown_again_and_nothing_is_written(whole, capsys):
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()}
    assert run(f"out={whole}", "stream.num_workers=1") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "holds this run, finished; nothing is left to do" in out
    assert re.search(r"lwf-magmax +0\.5 +\d+\.\d", out)
    after = {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()}
    assert after == before


def test_a_run_that_was_stopped_goes_on_without_its_settings(tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = [*SMALLER, "compare=[lwf]", "method=ties"]
    assert run(*words, f"out={whole}") == 0
    stop_at_evaluation(monkeypatch, 4)
    assert run(*words, f"out={broken}") == 130
    error = capsys.readouterr().err
    assert error == (
        f"cl-merge: interrupted; what was finished is kept; go on with: cl-merge run out={broken}\n"
    )
    monkeypatch.undo()
    assert run(f"out={broken}") == 0
    first, second = (json.loads((f / "results.json").read_text()) for f in (whole, broken))
    assert first["methods"] == second["methods"]
    for file in ("merged.safetensors", "accuracy_matrix.png"):
        assert (whole / file).read_bytes() == (broken / file).read_bytes()
    assert not (broken / "state").exists()


def test_a_full_disk_is_one_line_and_the_run_can_go_on(tmp_path, monkeypatch, capsys):
    import os

    flush, calls = os.fsync, []

    def fail(handle):
        calls.append(handle)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        flush(handle)

    words = [*SMALLER, "method=magmax", "compare=false", f"out={tmp_path / 'run'}"]
    monkeypatch.setattr(os, "fsync", fail)
    assert run(*words) == 1
    error = capsys.readouterr().err
    assert re.match(r"cl-merge: '.*' cannot be written \(No space left on device\); nothing", error)
    assert error.endswith(f"; go on with: cl-merge run out={tmp_path / 'run'}\n")
    assert error.count("\n") == 1
    monkeypatch.undo()
    assert run(f"out={tmp_path / 'run'}") == 0


def test_a_disk_that_fills_up_with_what_weighs_a_task_does_not_end_the_run(
    tmp_path, monkeypatch, capsys
):
    save = training.save_tensors

    def fail(path, tensors, metadata):
        if path.name == "importance1.safetensors":
            raise StorageError(f"'{path}' cannot be written (No space left on device)")
        save(path, tensors, metadata)

    words = [*SMALLER, "method=fisher", "compare=false", f"out={tmp_path / 'run'}"]
    monkeypatch.setattr(training, "save_tensors", fail)
    assert run(*words) == 1
    assert "go on with: cl-merge run out=" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(f"out={tmp_path / 'run'}") == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(*SMALL, f"out={tmp_path / 'file' / 'run'}") == 2
    assert re.match(r"cl-merge: out=.*file/run: cannot be created \(", capsys.readouterr().err)


def test_a_new_run_takes_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run(*SMALLER, "method=zero-shot", "compare=false") == 0
    assert {path.name for path in Path("runs").iterdir()} == {
        "digits-zero-shot",
        "digits-zero-shot-2",
    }


def test_a_folder_of_images_is_a_data_set(tmp_path, capsys):
    data = digits()
    for split in ("train", "test"):
        for index, image in enumerate(data[split].select(range(60))["image"]):
            label = data[split][index]["label"]
            file = tmp_path / "images" / split / str(label) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    words = [f"data={tmp_path / 'images'}", "stream.tasks=5", 'prompts=["the digit {}"]']
    rest = ["trainer.max_epochs=1", "compare=false", f"out={tmp_path / 'run'}"]
    assert run(*words, *rest) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["methods"]["magmax"]["accuracy"] > 30
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("has no recipe, and glyph, the default model, knows characters only") == 1
