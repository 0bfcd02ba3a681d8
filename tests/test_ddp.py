"""Two processes over gloo do what one does: the same counts, weights and merged bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cl_merge import TaskVector, load_clip, merge

SCRIPT = """
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import save_file
from tiny import QUIET, classifier, stream
from torchvision.transforms import ColorJitter, Compose, ToTensor

from cl_merge import fit_stream
from cl_merge.callbacks import EWC, LwF, MergeCallback

folder, devices = Path(sys.argv[1]), int(sys.argv[2])
rank = int(os.environ.get("LOCAL_RANK", 0))
where = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
trainer = QUIET | where | {"max_epochs": 2, "gradient_clip_val": 1.0}


def data():
    augment = Compose([ColorJitter(brightness=0.5), ToTensor()])
    found = stream(tasks=3, batch_size=8 // devices, train_transform=augment, seed=5)
    # An odd number of test images, so that a padded sampler would count one of them twice.
    found.tasks[2] = replace(found.tasks[2], test=found.tasks[2].test[:-1])
    return found


def run(name, *callbacks):
    model, merge = classifier(), MergeCallback("random-mix", seed=3, directory=folder / name)
    result = fit_stream(model, data(), callbacks=[*callbacks, merge], trainer=trainer, seed=0)
    tensors = {f"trained.{k}": v.detach() for k, v in model.named_parameters()}
    tensors |= {f"merged.{k}": v for k, v in merge.merged().items()}
    for callback in callbacks:
        for k, v in getattr(callback, "fisher", {}).items():
            tensors[f"fisher.{k}"] = v
    save_file(tensors, folder / f"{name}-{devices}-{rank}.safetensors")
    return [result.accuracy.rows[i].tolist() for i in range(3)]


model = classifier()
L.Trainer(**QUIET, **where).test(model, datamodule=data(), verbose=False)
found = {
    "before": model.accuracy.rows[0].tolist(),
    "plain": run("plain"),
    "lwf": run("lwf", LwF(3.0)),
    "published": run("published", EWC(weight=100.0)),
    "empirical": run("empirical", EWC("empirical", weight=30.0)),
    "both": run("both", LwF(), EWC("empirical", weight=30.0)),
}
(folder / f"{devices}-{rank}.json").write_text(json.dumps(found))
"""

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
NAMES = ("plain", "lwf", "published", "empirical", "both")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Both runs: the folder of one process, and that of two."""
    folders = []
    for devices in (1, 2):
        folder = tmp_path_factory.mktemp(f"on-{devices}")
        script = folder / "script.py"
        script.write_text(SCRIPT)
        command = [sys.executable, script, folder, str(devices)]
        subprocess.run(command, check=True, env=ENVIRONMENT, timeout=300)
        folders.append(folder)
    return folders


def counts(folder, devices, rank=0):
    return json.loads((folder / f"{devices}-{rank}.json").read_text())


def tensors(folder, name, devices, rank=0):
    return load_file(folder / f"{name}-{devices}-{rank}.safetensors")


def test_two_processes_count_every_test_image_once(ran):
    one, two = ran
    alone, first, second = counts(one, 1), counts(two, 2), counts(two, 2, rank=1)
    assert sum(alone["before"][2]) == 29
    assert first["before"] == second["before"] == alone["before"]
    for name in NAMES:
        assert first[name] == second[name]
        assert [sum(row[2]) for row in first[name]] == [29, 29, 29]


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_ends_with_the_same_bits(ran, name):
    first, second = tensors(ran[1], name, 2), tensors(ran[1], name, 2, rank=1)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_global_batches_give_the_same_weights_as_one_process(ran, name):
    alone, first = tensors(ran[0], name, 1), tensors(ran[1], name, 2)
    assert any(key.startswith("fisher.") for key in alone) == (name not in ("plain", "lwf"))
    for key in alone:
        torch.testing.assert_close(
            first[key], alone[key], rtol=2e-4, atol=2e-5, msg=f"{name} {key}"
        )


def test_the_regularizers_did_something(ran):
    plain = tensors(ran[0], "plain", 1)["trained.visual.1.weight"]
    for name in NAMES[1:]:
        other = tensors(ran[0], name, 1)["trained.visual.1.weight"]
        assert float((other - plain).abs().max()) > 1e-3


def test_task_vectors_are_written_once_and_whole(ran):
    for folder in ran:
        for name in NAMES:
            files = {file.name for file in (folder / name).iterdir()}
            assert files == {f"task{task}.safetensors" for task in range(3)}


RUN = [
    "stream.tasks=2",
    "stream.images_per_class=8",
    "stream.test_fraction=0.05",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "method=random-mix",
    "compare=[joint,lwf-magmax]",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run from the command line: on one process, on two, and on two under torchrun."""
    folder = tmp_path_factory.mktemp("runs")
    two = ["stream.batch_size=8", "trainer.devices=2", "trainer.strategy=ddp"]
    ways = {
        "one": (["-m", "cl_merge.cli"], ["stream.batch_size=16"]),
        "two": (["-m", "cl_merge.cli"], two),
        "torchrun": (
            ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "cl_merge.cli"],
            two,
        ),
    }
    said = {}
    for name, (how, more) in ways.items():
        command = [sys.executable, *how, "run", *RUN, *more, f"out={folder / name}"]
        done = subprocess.run(
            command, check=True, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True
        )
        said[name] = done.stdout
    return folder, said


@pytest.mark.parametrize("way", ["two", "torchrun"])
def test_a_run_on_two_processes_finds_what_one_finds_and_writes_once(runs, way):
    folder, said = runs
    found, alone = (json.loads((folder / n / "results.json").read_text()) for n in (way, "one"))
    assert found["methods"].keys() == alone["methods"].keys()
    assert found["methods"]["zero-shot"] == alone["methods"]["zero-shot"]
    totals = {sum(task["test_images"] for task in r["tasks"]) for r in (found, alone)}
    assert len(totals) == 1
    for training in ("independent", "lwf"):
        for task in (0, 1):
            name = f"task_vectors/{training}/task{task}.safetensors"
            first, second = load_file(folder / way / name), load_file(folder / "one" / name)
            # Adam makes whole steps of the rounding in gradients near zero: compare all at once.
            moved = sum(float(tensor.square().sum()) for tensor in second.values())
            apart = sum(float((first[key] - second[key]).square().sum()) for key in second)
            assert apart < 1e-3 * moved
    # One table, one journal, one log for each task, nothing left over.
    assert said[way].count("per cent after the last task") == 1
    files = {str(f.relative_to(folder / way)) for f in (folder / way).rglob("*") if f.is_file()}
    expected = {
        str(f.relative_to(folder / "one")) for f in (folder / "one").rglob("*") if f.is_file()
    }
    assert {f for f in files if "tfevents" not in f} == {f for f in expected if "tfevents" not in f}
    assert len((folder / way / "journal.jsonl").read_text().splitlines()) == len(
        (folder / "one" / "journal.jsonl").read_text().splitlines()
    )


def test_random_mix_draws_the_same_on_any_number_of_processes(runs):
    folder, _ = runs
    base = {f"visual.{k}": v for k, v in load_clip("glyph").model.visual.state_dict().items()}
    for way in ("one", "two", "torchrun"):
        vectors = [
            TaskVector.load(folder / way / f"task_vectors/independent/task{task}.safetensors")
            for task in (0, 1)
        ]
        expected = merge(vectors, "random-mix", seed=0).apply_to(base)
        found = load_file(folder / way / "merged.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in vectors[0])
    two, torchrun = (load_file(folder / w / "merged.safetensors") for w in ("two", "torchrun"))
    assert all(torch.equal(two[name], torchrun[name]) for name in two)
