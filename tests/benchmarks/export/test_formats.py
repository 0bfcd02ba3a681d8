"""Exports used by the libraries that they are for, in processes that know nothing of this one."""

import json
import os
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from cl_merge import load, load_clip
from cl_merge.benchmarks.datasets.digits import digits
from cl_merge.benchmarks.export import FORMATS, export
from cl_merge.benchmarks.export.card import write_card
from cl_merge.benchmarks.export.comparing import check_features
from cl_merge.benchmarks.export.graphs import onnx_reason
from cl_merge.benchmarks.export.huggingface_folder import misfit
from cl_merge.benchmarks.export.open_clip_folder import model_config
from cl_merge.benchmarks.runs.trained_run import read_run, restore
from cl_merge.errors import InputError, StorageError

pytestmark = pytest.mark.slow

LIBRARIES = {
    "torch": """
program = torch.export.load(folder / "model.pt2").module()
logits = program(images)
one = program(images[:1])
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(folder / "model.onnx")
logits = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
one = torch.from_numpy(session.run(["logits"], {"images": images[:1].numpy()})[0])
assert "timm" not in sys.modules and "transformers" not in sys.modules
""",
    "open_clip": """
import open_clip
model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
model.eval()
unit = torch.nn.functional.normalize
rows = [unit(model.encode_text(tokenizer(c["prompts"])), dim=-1).mean(0) for c in classes]
head = unit(torch.stack(rows), dim=-1) * model.logit_scale.exp()
logits = unit(model.encode_image(images), dim=-1) @ head.T
one = unit(model.encode_image(images[:1]), dim=-1) @ head.T
""",
    "huggingface": """
from transformers import CLIPModel, CLIPProcessor
model = CLIPModel.from_pretrained(folder).eval()
processor = CLIPProcessor.from_pretrained(folder)
unit = torch.nn.functional.normalize
def encode(texts):
    tokens = processor(text=texts, padding=True, return_tensors="pt")
    return unit(model.text_projection(model.text_model(**tokens).pooler_output), dim=-1)
rows = torch.stack([encode(c["prompts"]).mean(0) for c in classes])
head = unit(rows, dim=-1) * model.logit_scale.exp()
def classify(images):
    found = model.visual_projection(model.vision_model(pixel_values=images).pooler_output)
    return unit(found, dim=-1) @ head.T
logits, one = classify(images), classify(images[:1])
""",
}
FRAME = """
import json, sys
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
for name in sys.argv[1:]:
    folder = Path(name)
    classes = json.loads((folder / "classes.json").read_text())
    images = torch.from_numpy(np.load(folder.parent / "images.npy"))
    with torch.no_grad():
        exec({body!r})
    apart = (one - logits[:1]).abs().max().item()
    assert apart <= 1e-4 * max(logits.abs().max().item(), 1.0), (name, apart, logits)
    np.save(folder.parent / f"{{folder.name}}.npy", logits.numpy())
assert not [name for name in sys.modules if name.split(".")[0] == "cl_merge"]
"""
# What a format can hold: plain weights, and some also class statistics that vote.
CASES = [
    *((form, "vit", None) for form in FORMATS),
    *((form, "aligned", None) for form in FORMATS),
    ("huggingface", "vit", "magmax-aligned"),
    # Of the embedded model: random weights leave features that hardly vary, and rounding counts.
    *((form, "glyph", "magmax-statistics") for form in ("torch", "onnx")),
    ("onnx", "glyph", "streaming-lda"),
    ("torch", "glyph", None),
]


def need_onnx():
    if onnx_reason(None) is not None:
        pytest.skip(onnx_reason(None))


@pytest.fixture(scope="module")
def exported(request, tmp_path_factory):
    """Makes each export once."""
    made = {}

    def make(form, run, method):
        if form == "onnx":
            need_onnx()
        if (form, run, method) not in made:
            folder = tmp_path_factory.mktemp("exported") / f"{form}-{run}-{method}"
            made[form, run, method] = export(
                request.getfixturevalue(run), form, folder, method=method
            )
        return made[form, run, method]

    return make


def alone(script, *words, cwd="/"):
    """Run Python in a process of its own, without a network."""
    found = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize("form", FORMATS)
def test_the_library_alone_gives_the_same_logits(form, exported, request, digits_images):
    cases = [(run, method) for of, run, method in CASES if of == form]
    folders = [exported(form, run, method) for run, method in cases]
    classifiers = [load(request.getfixturevalue(run), method=method) for run, method in cases]
    for classifier, folder in zip(classifiers, folders, strict=True):
        images = torch.stack([classifier.transform(image) for image in digits_images])
        np.save(folder.parent / "images.npy", images.numpy())
    alone(FRAME.format(body=LIBRARIES[form]), *folders)
    for classifier, folder in zip(classifiers, folders, strict=True):
        found = torch.from_numpy(np.load(folder.parent / f"{folder.name}.npy"))
        with torch.no_grad():
            expected = classifier.model(torch.from_numpy(np.load(folder.parent / "images.npy")))
        largest = max(expected.abs().max().item(), 1.0)
        torch.testing.assert_close(found, expected, atol=1e-4 * largest, rtol=1e-4)
        assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))


@pytest.fixture(scope="module")
def digits_images():
    rows = digits()["test"].select(range(7))
    return [row["image"].convert("RGB") for row in rows]


@pytest.mark.parametrize("form", FORMATS)
def test_the_card_shows_how_to_use_it(form, exported, vit, tmp_path):
    folder, classifier = exported(form, "vit", None), load(vit)
    (snippet,) = re.findall(r"```python\n(.*?)```", card(folder), flags=re.DOTALL)
    assert snippet.count('open("FOLDER/') == snippet.count('classes.json", encoding="utf-8")') == 1
    # As large as the model's input in one case; in the other turned by the camera, to be resized
    # and cut.
    sizes, snippets, exif = ((32, 32), (66, 45)), [], Image.Exif()
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
        exif[ExifTags.Base.Orientation] = (1, 6)[number]
        Image.fromarray(pixels).save(tmp_path / f"{number}.png", exif=exif)
        snippets.append(snippet.replace("FOLDER", str(folder)))
        snippets[-1] = snippets[-1].replace("image.png", f"{number}.png")
    lines = alone("\n".join(snippets), cwd=tmp_path).splitlines()
    for number, line in enumerate(lines):
        [[best]] = classifier.predict(tmp_path / f"{number}.png", top=1)
        # The processor of transformers resizes with rounding of its own.
        near = 0.05 if form == "huggingface" and number else 1e-3
        name, probability = line.split()
        assert (name, float(probability)) == (best.name, pytest.approx(best.probability, abs=near))
    assert len(lines) == 2


def card(folder):
    return (folder / "README.md").read_text()


@pytest.mark.parametrize(("form", "run", "method"), CASES)
def test_each_folder_says_what_the_model_is(form, run, method, exported, request):
    folder, place = exported(form, run, method), request.getfixturevalue(run)
    results = json.loads((place / "results.json").read_text())
    name = method or results["method"]
    text = card(folder)
    classes = json.loads((folder / "classes.json").read_text())
    assert [c["name"] for c in classes] == [
        n for task in results["tasks"] for n in task["class_names"]
    ]
    assert [c["tasks"] for c in classes] == [[0]] * 5 + [[1]] * 5
    assert classes[3]["prompts"][3] == "the number three"
    images = json.loads((folder / "preprocessing.json").read_text())
    assert images["size"] == [32, 32]
    assert images["interpolation"] == "bicubic"
    assert images["mean"] == ([0.5, 0.5, 0.5] if run == "glyph" else [0.5, 0.4, 0.3])
    assert f"| method | {name} |" in text
    assert f"| {results['methods'][name]['accuracy']:.1f} |" in text
    assert "| 0 | zero, one, two, three, four | 40 |" in text
    assert "| seed | 0 |" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text
    assert ("class statistics" in text) == ("statistics" in results["methods"][name])
    assert str(place) not in text
    assert "None" not in text.partition("## How to load it")[0]
    assert not list(folder.parent.glob(".*"))


def test_what_open_clip_and_transformers_write_agrees_in_their_own_words(exported):
    configured = json.loads((exported("huggingface", "vit", None) / "config.json").read_text())
    assert configured["vision_config"]["hidden_act"] == "quick_gelu"
    assert configured["text_config"]["hidden_act"] == "quick_gelu"
    whole = json.loads((exported("open_clip", "vit", None) / "open_clip_config.json").read_text())
    assert whole["model_cfg"]["quick_gelu"] is True
    assert whole["preprocess_cfg"]["std"] == [0.2, 0.3, 0.4]


def test_an_open_clip_export_is_a_model_to_start_from(exported, vit, digits_images):
    clip = load_clip(f"local-dir:{exported('open_clip', 'vit', None)}")
    images = torch.stack([clip.test_transform(image) for image in digits_images])
    with torch.no_grad():
        expected = load(vit).model.features(images)
        torch.testing.assert_close(clip.model.visual(images), expected)


def message(run, form, output, **options):
    with pytest.raises(InputError) as error:
        export(run, form, output, **options)
    return str(error.value)


def test_what_a_format_cannot_hold_is_said_with_those_that_can(glyph, vit, tmp_path):
    need_onnx()
    new = tmp_path / "new"
    assert message(glyph, "open_clip", new) == (
        "format open_clip cannot hold method 'magmax' with model 'glyph': its image tower "
        "'glyph_resnet' comes with cl_merge, and open_clip alone cannot build it; formats that "
        "can: torch, onnx"
    )
    assert message(glyph, "huggingface", new) == (
        "format huggingface cannot hold method 'magmax' with model 'glyph': its image tower "
        "'glyph_resnet' is none of CLIPModel's; formats that can: torch, onnx"
    )
    votes = message(vit, "open_clip", new, method="magmax-statistics")
    assert votes.endswith(
        ": it has no place for class statistics that vote beside the text head (those of a method "
        "that ends in -aligned are in the image tower); formats that can: torch, onnx"
    )
    assert not new.exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"vision_cfg": {"layers": [1, 1, 1, 1]}}, "residual network, and CLIPModel has vision"),
        ({"vision_cfg": {"pool_type": "avg"}}, "CLIPModel does not know its pool_type"),
        ({"text_cfg": {"no_causal_mask": True}}, "CLIPModel does not know its no_causal_mask"),
        ({"text_cfg": {"vocab_size": 100}}, "CLIPModel does not know its vocab_size"),
        ({"text_cfg": {"hf_model_name": "a/b"}}, "its text tower 'a/b' is none of CLIPModel's"),
        ({"vision_cfg": {"timm_model_name": "vit_tiny"}}, "its image tower 'vit_tiny' is none"),
        ({"custom_text": True}, "CLIPModel does not know its custom_text"),
    ],
)
def test_architectures_that_transformers_does_not_know_are_said(changed, words, vit):
    config = model_config(read_run(vit).config)
    assert misfit(config) is None
    for key, value in changed.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    assert words in misfit(config)


def test_what_was_written_is_compared_with_the_runs_model(vit):
    restored = restore(read_run(vit))
    visual, clip = restored.model.visual, restored.clip

    def encode_texts(texts):
        return clip.model.encode_text(clip.tokenizer(texts))

    check_features("onnx", visual, encode_texts, restored)
    with pytest.raises(InputError, match="^format onnx does not give the model's logits: they di"):
        check_features("onnx", lambda images: visual(images).flip(1), encode_texts, restored)
    with pytest.raises(InputError, match="^format onnx does not encode texts as model 'local-dir"):
        check_features("onnx", visual, lambda texts: encode_texts(texts).flip(1), restored)


def test_nothing_is_overwritten(vit, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    assert message(vit, "torch", full) == (
        f"the output folder '{full}' is not empty; give a new or an empty folder"
    )
    assert message(vit, "torch", full / "mine.txt").startswith(
        f"the output '{full / 'mine.txt'}' is a file; "
    )
    assert message(vit, "torch", vit / "model").startswith(
        f"the output '{vit / 'model'}' is, or lies within, the input '{vit}'; "
    )
    assert message(vit, "torch", tmp_path / "model.safetensors") == (
        f"the output '{tmp_path / 'model.safetensors'}' is named like a file; an export is a folder"
    )
    assert (full / "mine.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_an_export_that_fails_leaves_nothing(vit, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            export(vit, "open_clip", empty)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    export(vit, "open_clip", empty)
    assert (empty / "README.md").exists()


@pytest.mark.parametrize(
    ("form", "package"), [("onnx", "onnxruntime"), ("huggingface", "transformers")]
)
def test_a_missing_library_is_said(form, package, vit, tmp_path, monkeypatch):
    if form == "onnx":
        need_onnx()
    monkeypatch.setitem(sys.modules, package, None)
    assert message(vit, form, tmp_path / "new") == (
        f"format {form} needs the package '{package}', which is not installed: "
        'pip install "cl-merge[export]"'
    )


def test_unknown_formats_are_said(vit, tmp_path):
    assert message(vit, "onx", tmp_path / "new") == (
        "unknown format 'onx'; did you mean 'onnx'? Known: open_clip, huggingface, torch, onnx"
    )


def test_prompts_that_are_not_the_heads_are_left_out(vit, tmp_path):
    import shutil

    run = shutil.copytree(vit, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("the number {}", "another word {}"))
    export(run, "open_clip", tmp_path / "new")
    classes = json.loads((tmp_path / "new/classes.json").read_text())
    assert set(classes[0]) == {"name", "tasks"}
    assert "another word" not in card(tmp_path / "new")
    assert "not known any more" in card(tmp_path / "new")


def test_a_users_data_file_and_folders_are_called_by_their_names(vit, tmp_path):
    restored = restore(read_run(vit))
    for data, name in (
        ("/home/me/cifar10.yaml", "cifar10"),
        ("cifar10.yaml", "cifar10"),
        ("/photos/birds.v2", "birds.v2"),
        ("someone/birds", "someone/birds"),
    ):
        restored.run.config.data = data
        write_card(restored, "torch", [{"name": "zero", "tasks": [0]}], tmp_path)
        assert f"# local-dir:vit on {name}, magmax\n" in card(tmp_path)
        assert f"of the data set `{name}`." in card(tmp_path)
        assert f"| data | {name} |" in card(tmp_path)
