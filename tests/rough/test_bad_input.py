"""The bad input that users meet first, through the command line and through Python: exact words."""

import datasets
import lightning as L
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

import cl_merge
from cl_merge import CLIPClassifier, TaskStream, TaskVector, cli, load_clip, zero_shot_head
from cl_merge.callbacks import MergeCallback
from cl_merge.errors import InputError

DIVERGED = (
    "NaN or infinity in net.weight. Training diverged or a file is damaged: leave it out, or train "
    "again, for example with a lower learning rate"
)
ONE_ARCHITECTURE = "Both must come from one architecture"


def weights(**others):
    return {"net.weight": torch.ones(2, 3), "net.bias": torch.zeros(2)} | others


# What is wrong with the weights of the second task, what is said of its file, and what of it in
# Python.
WEIGHTS = {
    "missing": (
        {"net.bias": torch.zeros(2)},
        "has other tensors than the base 'base.safetensors'; missing: net.weight; extra: none. "
        + ONE_ARCHITECTURE,
        "has other tensors than the base; missing: net.weight; extra: none. " + ONE_ARCHITECTURE,
    ),
    "extra": (
        weights(**{"net.more": torch.ones(1)}),
        "has other tensors than the base 'base.safetensors'; missing: none; extra: net.more. "
        + ONE_ARCHITECTURE,
        "has other tensors than the base; missing: none; extra: net.more. " + ONE_ARCHITECTURE,
    ),
    "shape": (
        weights(**{"net.weight": torch.ones(3, 3)}),
        "has other shapes than the base 'base.safetensors': net.weight (3, 3) instead of (2, 3); "
        "exclude what is not to be merged",
        "has other shapes than the base: net.weight (3, 3) instead of (2, 3)",
    ),
    "type": (
        weights(**{"net.weight": torch.ones(2, 3, dtype=torch.int64)}),
        "has other dtypes than the base 'base.safetensors': net.weight int64 instead of float32. "
        "Convert one of the two",
        "has other dtypes than the base: net.weight int64 instead of float32. Convert one of the two",
    ),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(weights(), "base.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights().items()}, "task0.safetensors")
    return tmp_path


def said(words, capsys):
    """The one line that a command says; it has done nothing else."""
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("cl-merge: ")
    assert shown.err.count("\n") == 1
    return shown.err.removeprefix("cl-merge: ").rstrip("\n")


def merging(capsys, *options):
    files = ["base.safetensors", "task0.safetensors", "task1.safetensors"]
    return said(["merge", *files, "-o", "merged.safetensors", *options], capsys)


def error_of(work, *positional, **named):
    with pytest.raises(InputError) as caught:
        work(*positional, **named)
    return str(caught.value)


def merge_files(**options):
    tasks = ["task0.safetensors", "task1.safetensors"]
    cl_merge.merge_checkpoints("base.safetensors", tasks, "merged.safetensors", **options)


@pytest.mark.parametrize("wrong", WEIGHTS)
def test_tensors_that_do_not_match(wrong, here, capsys):
    tensors, of_file, in_python = WEIGHTS[wrong]
    save_file(tensors, "task1.safetensors")
    assert merging(capsys) == f"'task1.safetensors' {of_file}"
    assert error_of(merge_files) == f"'task1.safetensors' {of_file}"
    assert error_of(TaskVector.between, weights(), tensors) == f"the fine-tuned model {in_python}"
    assert not (here / "merged.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(value, here, capsys):
    broken = weights(**{"net.weight": torch.tensor([[0.0, 1.0, 2.0], [3.0, value, 5.0]])})
    save_file(broken, "task1.safetensors")
    assert merging(capsys) == f"'task1.safetensors': {DIVERGED}"
    assert error_of(merge_files) == f"'task1.safetensors': {DIVERGED}"
    assert error_of(TaskVector.between, weights(), broken) == f"the fine-tuned weights: {DIVERGED}"
    vectors = [TaskVector(weights()), TaskVector(broken)]
    assert error_of(cl_merge.merge, vectors) == f"task 1 (the 2nd): {DIVERGED}"
    assert not (here / "merged.safetensors").exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-4], "incomplete metadata, file not fully covered"),
        (lambda content: b"\x93" * 100, "header too large"),
        (lambda content: b"", "header too small"),
    ],
)
def test_a_file_that_is_corrupt_or_cut_short(damage, reason, here, capsys):
    content = (here / "task0.safetensors").read_bytes()
    (here / "task1.safetensors").write_bytes(damage(content))
    message = (
        f"'task1.safetensors' is not a whole safetensors file (Error while deserializing header: "
        f"{reason}); it is corrupt, cut short or of another format: write or download it again"
    )
    assert merging(capsys) == message
    assert error_of(merge_files) == message
    assert error_of(TaskVector.load, "task1.safetensors") == message


def test_a_scale_that_is_not_finite(here, capsys):
    save_file(weights(), "task1.safetensors")
    message = "the scale must be a finite number, not nan"
    assert merging(capsys, "--scale", "nan") == message
    assert error_of(merge_files, scale=float("nan")) == message
    assert error_of(MergeCallback, "magmax", scale=float("nan")) == message
    assert error_of(TaskVector(weights()).apply_to, weights(), float("nan")) == message
    assert said(["run", "merge.scale=.nan", "out=run"], capsys) == (
        "merge.scale=nan; expected a finite number, finite numbers by pattern, auto or drift"
    )


@pytest.mark.parametrize("density", [0, -0.5, 1.5])
def test_a_density_outside_0_to_1(density, here, capsys):
    save_file(weights(), "task1.safetensors")
    message = f"density must be a number above 0 and at most 1, not {density}"
    assert merging(capsys, "--method", "ties", "--set", f"density={density}") == message
    assert error_of(merge_files, method="ties", density=density) == message
    assert error_of(MergeCallback, "ties", density=density) == message
    assert said(["run", "method=ties", f"merge.density={density}", "out=run"], capsys) == (
        f"merge.density={float(density)}; expected more than 0, at most 1"
    )


def test_unknown_methods_data_sets_and_keys(here, capsys):
    save_file(weights(), "task1.safetensors")
    message = "unknown method 'magmx'; did you mean 'magmax'? Known: magmax, max-abs, average, "
    assert merging(capsys, "--method", "magmx").startswith(message)
    assert error_of(merge_files, method="magmx").startswith(message)
    assert error_of(MergeCallback, "magmx").startswith(message)
    assert error_of(cl_merge.merge, [TaskVector(weights())], "magmx").startswith(message)
    for word, message in (
        (
            "method=magmx",
            "unknown method 'magmx'; did you mean 'magmax'? Known: zero-shot, joint, ",
        ),
        (
            "data=cifar10",
            "unknown data set 'cifar10'; did you mean 'cifar100'? Known: a folder, ",
        ),
        (
            "stream.task=5",
            "the command line: unknown key 'stream.task'; did you mean 'stream.tasks'?",
        ),
        (
            "trainer.max_epoch=5",
            "unknown key 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?",
        ),
    ):
        assert said(["run", word, "out=run"], capsys).startswith(message)
    message = "unknown option of method 'ties' 'densty'; did you mean 'density'? Known: density, per_parameter, sign, combine, task_weights"
    assert merging(capsys, "--method", "ties", "--set", "densty=1") == message
    assert error_of(merge_files, method="ties", densty=1) == message
    assert error_of(MergeCallback, "ties", densty=1) == message


def table(labels, names=None):
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    images = [Image.new("L", (8, 8), 9 * number) for number in range(len(labels))]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def splits(train, test, names=("ant", "bee", "cat")):
    return {"train": table(train, names), "test": table(test, names)}


def saved(data):
    datasets.DatasetDict(data).save_to_disk("images")
    return "images"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "tasks", "message"),
    [
        (
            splits([0, 1, 2], [0, 1, 2]),
            4,
            "tasks=4 is more than the 3 classes of the data set; every task needs a class "
            "of its own",
        ),
        (
            splits([0, 1], [0, 1, 2]),
            3,
            "task 2 (cat) has no training image; use fewer tasks, or leave out what the training "
            "set does not show",
        ),
        (
            splits([0, 1, 2], [0, 1]),
            3,
            "task 2 (cat) has no test image to tell how good a model is at it; use fewer tasks, or "
            "hold more images out with test_fraction=...",
        ),
        (
            splits([0, -7, 2], [0, 1, 2], names=None),
            2,
            "the train split has labels outside the head: -7; expected 0 to 2",
        ),
    ],
)
def test_streams_that_cannot_be(data, tasks, message, here, capsys):
    assert error_of(TaskStream, data, tasks=tasks) == message
    folder = saved(data)
    capsys.readouterr()
    words = ["run", f"data={folder}", f"stream.tasks={tasks}", "trainer.accelerator=cpu"]
    assert cli.main([*words, "out=run"]) == 2
    # The same with the names of settings.
    message = message.replace("tasks=", "stream.tasks=").replace("test_fr", "stream.test_fr")
    assert capsys.readouterr().err == f"cl-merge: {message}\n"
    assert not (here / "run").exists()


@pytest.fixture(scope="module")
def two_classes():
    """A classifier of two classes, for data with more."""
    clip = load_clip("glyph")
    return CLIPClassifier(clip.model.visual, zero_shot_head(clip, ["ant", "bee"], ["a {}."]))


def trainer():
    return L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_labels_outside_the_head_of_a_model(two_classes):
    stream = TaskStream(splits([0, 1, 2], [0, 1, 2]), tasks=3)
    message = "the stream has 3 classes, but the head 2; make the head from stream.class_names"
    for work in (trainer().fit, trainer().test, trainer().validate):
        assert error_of(work, two_classes, datamodule=stream) == message
    batches = DataLoader([(torch.zeros(3, 32, 32), label) for label in (0, 1, 5, -1)], batch_size=4)
    message = "the batch has labels outside the head: -1, 5; expected 0 to 1"
    for work in (trainer().fit, trainer().test, trainer().validate):
        assert error_of(work, two_classes, batches) == message


@pytest.mark.slow
def test_an_output_folder_that_holds_another_run(copied, capsys):
    message = (
        f"out={copied} holds a run with seed=0, not 1; name a new folder, or leave the setting out "
        "to go on with that run"
    )
    assert said(["run", "seed=1", f"out={copied}"], capsys) == message
