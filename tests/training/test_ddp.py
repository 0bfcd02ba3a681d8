"""Two processes over gloo do what one does: the same counts, weights and merged bits."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import case_ddp
import pytest
import torch
from safetensors.torch import load_file

from cl_merge import TaskVector, cli, load_clip, merge

pytestmark = pytest.mark.slow

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")]
    ),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
NAMES = ("plain", "lwf", "published", "empirical", "drift", "both", "voting")
RUN = [
    "stream.tasks=2",
    "stream.images_per_class=8",
    "stream.test_fraction=0.05",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "method=random-mix",
    "compare=[joint,lwf-magmax,random-mix-statistics]",
]
ON_TWO = ["stream.batch_size=8", "trainer.devices=2", "trainer.strategy=ddp"]


@pytest.fixture(scope="module")
def as_another_process():
    """Work here as the processes that these tests start do, and leave no trace of it."""
    threads, library = torch.get_num_threads(), logging.getLogger("cl_merge")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # A command shows the library's messages in its own way.
        for name in ("handlers", "propagate", "level"):
            patch.setattr(library, name, getattr(library, name))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """Both on two processes under torchrun: streams, and a run; their folders, and what was said."""
    streams, folder = tmp_path_factory.mktemp("streams"), tmp_path_factory.mktemp("torchrun")
    script = Path(__file__).parents[1] / "support" / "case_ddp.py"
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", script, streams, *RUN, *ON_TWO]
    return streams, folder, start(folder, [*words, f"out={folder / 'run'}"])


def start(folder, words):
    """Run Python in a folder; what it printed."""
    command = [sys.executable, *words]
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory, as_another_process, torchrun):
    """The streams: the folder of one process, this one, and that of two."""
    folder = tmp_path_factory.mktemp("streams-on-one")
    case_ddp.train(folder, devices=1)
    return folder, torchrun[0]


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


@pytest.mark.parametrize("name", [name for name in NAMES if name != "voting"])
def test_the_same_global_batches_give_the_same_weights_as_one_process(ran, name):
    alone, first = tensors(ran[0], name, 1), tensors(ran[1], name, 2)
    kept = {key.split(".")[0] for key in alone} - {"trained", "merged"}
    assert kept == {"plain": set(), "lwf": set(), "drift": {"moments"}}.get(name, {"fisher"})
    for key in alone:
        torch.testing.assert_close(
            first[key], alone[key], rtol=2e-4, atol=2e-5, msg=f"{name} {key}"
        )


def test_the_regularizers_did_something(ran):
    plain = tensors(ran[0], "plain", 1)["trained.visual.1.weight"]
    for name in NAMES[1:-1]:
        other = tensors(ran[0], name, 1)["trained.visual.1.weight"]
        assert float((other - plain).abs().max()) > 1e-3


def test_task_vectors_are_written_once_and_whole(ran):
    for folder in ran:
        for name in NAMES:
            files = {file.name for file in (folder / name).iterdir()}
            assert files == {f"task{task}.safetensors" for task in range(3)}


def test_two_processes_take_statistics_of_every_image_once(ran):
    alone, first = tensors(ran[0], "voting", 1), tensors(ran[1], "voting", 2)
    assert int(alone["statistics.base.counts"].sum()) == 71
    # The base does not train: its features are the same, and so is their sum in any order.
    for name in ("counts", "sums", "products"):
        key = f"statistics.base.{name}"
        apart = (first[key] - alone[key]).abs().max()
        assert apart <= (0 if name == "counts" else 8 * 2**20)  # rounding of a forward pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory, as_another_process, torchrun):
    """The same run from the command line, on one process, on two, and on two under torchrun."""
    folder = tmp_path_factory.mktemp("runs")
    two = start(folder, ["-m", "cl_merge.cli", "run", *RUN, *ON_TWO, f"out={folder / 'two'}"])
    assert cli.main(["run", *RUN, "stream.batch_size=16", f"out={folder / 'one'}"]) == 0
    (torchrun[1] / "run").rename(folder / "torchrun")
    return folder, {"two": two, "torchrun": torchrun[2]}


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
