"""A finished run as a classifier again: what it predicts, and what it says of damaged runs."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file

from cl_merge import ImageClassifier, InputError, load, load_clip
from cl_merge.benchmarks.datasets.digits import digits as all_digits
from cl_merge.class_statistics import StreamStatistics

pytestmark = pytest.mark.slow

METHODS = ["magmax", "magmax-statistics", "magmax-aligned", "streaming-lda", "zero-shot"]
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def logits(classifier, images):
    with torch.no_grad():
        return classifier.model(images)


@pytest.mark.parametrize("method", METHODS)
def test_predictions_are_those_of_the_runs_evaluation(method, glyph, digits):
    images, labels, tasks = digits
    hits = logits(load(glyph, method=method), images).argmax(dim=1) == labels
    found = json.loads((glyph / "results.json").read_text())["methods"][method]
    assert 100 * hits.float().mean().item() == pytest.approx(found["accuracy"])
    by_task = [100 * hits[tasks == task].float().mean().item() for task in (0, 1)]
    assert by_task == pytest.approx(found["matrix"][-1])


def test_a_run_with_aligned_statistics_has_them_in_its_weights(aligned):
    classifier = load(aligned)
    assert classifier.model.classify is None
    prepared = torch.stack([classifier.transform(image) for image in pictures()])
    (aligned_file,) = (aligned / "statistics").glob("*.safetensors")
    aligned_file.rename(aligned_file.with_suffix(".away"))
    try:
        assert torch.equal(logits(load(aligned), prepared), logits(classifier, prepared))
    finally:
        aligned_file.with_suffix(".away").rename(aligned_file)


def pictures(count=3):
    rows = all_digits()["test"].select(range(count))
    return [row["image"].convert("RGB") for row in rows]


def test_the_vote_is_that_of_both_encoders(glyph, digits):
    images = digits[0][:8]
    merged = load_file(glyph / "merged.safetensors")
    encoder, base = (load_clip("glyph").model.visual for _ in range(2))
    encoder.load_state_dict({k[7:]: v for k, v in merged.items() if k.startswith("visual.")})
    with torch.no_grad():
        m, b = (torch.nn.functional.normalize(e(images), dim=1).double() for e in (encoder, base))
    statistics = StreamStatistics.load(glyph / "statistics/magmax-statistics.safetensors")
    scores = 0.0
    for name, features in (("base", b), ("merged", m)):
        scores = scores + statistics.discriminants()[name].scores(features) / 2
    text = m @ merged["head.weight"].double().T
    mixed = statistics.vote.text * text + statistics.vote.statistics * scores
    expected = mixed.log_softmax(dim=1)
    found = logits(load(glyph, method="magmax-statistics"), images).double()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_neither_images_nor_task_vectors_are_needed(glyph, tmp_path, digits):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.yaml", "results.json", "merged.safetensors"):
        shutil.copy(glyph / name, bare)
    config = (bare / "config.yaml").read_text().replace("data: digits", "data: /not/there")
    (bare / "config.yaml").write_text(config)
    images = digits[0][:4]
    assert torch.equal(logits(load(bare), images), logits(load(glyph), images))


def test_predict_takes_images_paths_and_tensors_alike(glyph, tmp_path):
    classifier = load(glyph)
    images = pictures()
    files = [tmp_path / f"{place}.png" for place in range(3)]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    tensors = torch.stack([classifier.transform(image) for image in images])
    pixels = [np.asarray(image) for image in images]
    expected = logits(classifier, tensors).softmax(dim=1)
    paths = [str(file) for file in files]
    for given in (images, files, paths, tensors, list(tensors), pixels, np.stack(pixels)):
        found = classifier.predict(given, top=10, batch_size=2)
        assert [len(guesses) for guesses in found] == [10, 10, 10]
        for row, guesses in zip(expected, found, strict=True):
            values = dict(guesses)
            assert list(values.values()) == sorted(values.values(), reverse=True)
            assert [values[name] for name in NAMES] == pytest.approx(row.tolist(), abs=1e-6)
    for one in (images[0], files[0], str(files[0]), tensors[0], pixels[0]):
        assert classifier.predict(one, top=1)[0][0].name == classifier.predict(images)[0][0].name
    assert len(classifier.predict(images[0], top=99)[0]) == 10
    assert classifier.predict([]) == []


def test_a_camera_that_was_turned_changes_nothing(glyph, tmp_path):
    """As in a data set, whose images come upright."""
    classifier, upright = load(glyph), pictures()[0]
    turned, exif = upright.rotate(90, expand=True), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # "turn it by 90 degrees to the right"
    turned.save(tmp_path / "turned.png", exif=exif)
    read = datasets.Dataset.from_dict({"image": [str(tmp_path / "turned.png")]})
    in_a_data_set = read.cast_column("image", datasets.Image())[0]["image"]
    assert in_a_data_set.tobytes() == upright.tobytes() != turned.tobytes()
    expected = classifier.predict(upright)
    assert classifier.predict(tmp_path / "turned.png") == expected
    assert classifier.predict(Image.open(tmp_path / "turned.png")) == expected


def test_it_says_what_it_is(glyph):
    classifier = load(str(glyph), device="cpu")
    assert isinstance(classifier, ImageClassifier)
    assert classifier.class_names == NAMES
    assert not classifier.model.training


@pytest.fixture
def damaged(glyph, tmp_path):
    """A copy of a run, to damage."""
    return shutil.copytree(
        glyph, tmp_path / "run", ignore=shutil.ignore_patterns("task_vectors", "logs", "*.png")
    )


def message(folder, **options):
    with pytest.raises(InputError) as error:
        load(folder, **options)
    return str(error.value)


def test_what_is_no_finished_run_is_said(damaged, tmp_path):
    assert message(tmp_path / "nowhere") == (
        f"'{tmp_path / 'nowhere'}' is no folder; expected that of a finished run"
    )
    assert message(tmp_path) == f"'{tmp_path}' holds no run: there is no config.yaml"
    (damaged / "results.json").unlink()
    assert message(damaged) == (
        f"the run in '{damaged}' is not finished; go on with: cl-merge run out={damaged}"
    )


def test_damaged_results_are_said(damaged):
    file = damaged / "results.json"
    results = json.loads(file.read_text())
    file.write_text(file.read_text()[:100])
    assert message(damaged).startswith(f"'{file}' is damaged: ")
    for key in ("methods", "tasks", "method"):
        file.write_text(json.dumps({k: v for k, v in results.items() if k != key}))
        said = message(damaged)
        assert said.startswith(f"'{file}' is damaged: ")
        assert f"`{key}`" in said or f"{key} is missing" in said
    results["tasks"][0] |= {"classes": [7], "class_names": ["seven"]}
    file.write_text(json.dumps(results))
    assert "no task has the classes 0, 1, 2, 3 and 1 more" in message(damaged)


def test_damaged_weights_are_said(damaged):
    file = damaged / "merged.safetensors"
    whole = file.read_bytes()
    # Copies: the file that they are mapped from is written to.
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.write_bytes(whole[: len(whole) // 2])
    assert message(damaged).startswith(f"'{file}' is not a whole safetensors file (")
    save_file({k: v for k, v in tensors.items() if k != "head.weight"}, file)
    assert message(damaged) == (
        f"'{file}' has no text head 'head.weight' of the 10 classes that results.json names; "
        "restore it, or run again in a new folder"
    )
    save_file(
        tensors | {"visual.odd": torch.zeros(1), "visual.head.proj.weight": torch.zeros(2)}, file
    )
    assert message(damaged) == (
        f"'{file}' does not hold the weights of model 'glyph': visual.head.proj.weight, visual.odd "
        "missing, unknown or of another shape"
    )
    file.unlink()
    assert message(damaged) == f"the run in '{damaged}' has no merged.safetensors; restore it"


def test_missing_statistics_are_said(damaged):
    file = damaged / "statistics/magmax-statistics.safetensors"
    file.unlink()
    assert str(file) in message(damaged, method="magmax-statistics")


def test_methods_whose_weights_are_not_kept_are_said(glyph):
    assert message(glyph, method="ties") == (
        f"the run in '{glyph}' has not kept the weights of 'ties', only those of zero-shot, magmax, "
        "streaming-lda, magmax-aligned, magmax-statistics; for the others: cl-merge run method=ties "
        "out=NEW_FOLDER"
    )
    assert "unknown method of the run in" in message(glyph, method="magmx")
    assert "did you mean 'magmax'?" in message(glyph, method="magmx")


def test_from_aligned_weights_there_is_no_way_back(aligned, tmp_path):
    run = shutil.copytree(aligned, tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    entry = results["methods"]["magmax-aligned"]
    results["methods"]["magmax"] = {k: v for k, v in entry.items() if k != "statistics"}
    (run / "results.json").write_text(json.dumps(results))
    assert "has not kept the weights of 'magmax', only those of" in message(run, method="magmax")


def test_other_wrong_input_is_said(glyph, tmp_path):
    assert message(glyph, device="mars") == (
        "device=mars: no such device here; expected cpu or cuda"
    )
    classifier = load(glyph)
    text = tmp_path / "notes.png"
    text.write_text("no image")
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:3000])
    for wrong, words in (
        (text, f"'{text}' is no readable image (no image)"),
        (cut, f"'{cut}' is no readable image ("),
        (tmp_path / "no.png", f"there is no image '{tmp_path / 'no.png'}'; check the path"),
        (torch.zeros(1, 4, 4), "a tensor of shape [1, 4, 4] and dtype torch.float32"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "a tensor of shape [3, 4, 4] and dtype"),
        (np.zeros((4, 4, 3)), "an array of shape [4, 4, 3] and dtype float64; expected pixels"),
        (np.zeros((3, 4, 4), np.uint8), "an array of shape [3, 4, 4] and dtype uint8"),
    ):
        with pytest.raises(InputError) as error:
            classifier.predict(wrong)
        assert str(error.value).startswith(words)
    with pytest.raises(InputError, match="^top=0; expected 1 or more$"):
        classifier.predict([], top=0)
