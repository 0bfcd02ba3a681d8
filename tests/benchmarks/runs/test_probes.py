"""Data sets beside the stream: tested with every method, resumed, and checked before any work."""

import json

import pytest
import torch

from cl_merge.benchmarks.runs.probes import load_probes
from cl_merge.benchmarks.runs.run import start_run
from cl_merge.benchmarks.runs.run_folder import RunFolder
from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.cli import main
from cl_merge.errors import InputError
from cl_merge.models.pretrained import load_clip
from cl_merge.models.zero_shot import zero_shot_head

SMALL = ["stream.tasks=2", "stream.images_per_class=4", "trainer.max_epochs=1", "compare=[ties]"]
PROBE = "probe=[characters]"


def naive_accuracy() -> float:
    """The characters classified by the pre-trained model, image by image."""
    from cl_merge.benchmarks.datasets.characters import characters

    images, recipe = characters()["test"], read_settings(["data=characters"])
    clip = load_clip("glyph")
    names = images.features["label"].names
    head = zero_shot_head(clip, names, recipe.prompts)
    with torch.inference_mode():
        found = [
            int(head(clip.model.visual.eval()(clip.test_transform(row["image"])[None])).argmax())
            for row in images
        ]
    return 100.0 * sum(a == b for a, b in zip(found, images["label"], strict=True)) / len(found)


@pytest.mark.slow
def test_every_method_is_tested_on_probes_after_every_task_and_when_it_joins_later(
    tmp_path, capsys
):
    out = tmp_path / "run"
    assert main(["run", *SMALL, PROBE, f"out={out}"]) == 0
    assert "probes: data sets beside the stream" in " ".join(capsys.readouterr().out.split())
    methods = json.loads((out / "results.json").read_text())["methods"]
    lengths = {name: len(found["probes"]["characters"]) for name, found in methods.items()}
    assert lengths == {"zero-shot": 1, "magmax": 2, "ties": 2}
    assert methods["zero-shot"]["probes"]["characters"] == [pytest.approx(naive_accuracy())]
    for found in methods.values():
        assert found["metrics"]["probe_accuracy"] == found["probes"]["characters"][-1]
    assert main(["run", f"out={out}", "compare=[ties,average]"]) == 0
    later = json.loads((out / "results.json").read_text())["methods"]
    assert len(later["average"]["probes"]["characters"]) == 2
    assert later["ties"] == methods["ties"]


@pytest.mark.slow
def test_a_run_with_probes_trains_as_one_without(tmp_path):
    without = [word for word in (*SMALL, "compare=false")]
    assert main(["run", *without, f"out={tmp_path / 'without'}"]) == 0
    assert main(["run", *without, PROBE, f"out={tmp_path / 'with'}"]) == 0
    one, other = (tmp_path / name / "merged.safetensors" for name in ("without", "with"))
    assert one.read_bytes() == other.read_bytes()


def test_what_was_probed_is_read_back(tmp_path):
    folder = RunFolder(tmp_path)
    folder.add_probe("magmax", "characters", 0, 50.0)
    folder.add_probe("magmax", "characters", 1, 40.0)
    folder.add_probe("ties", "characters", 1, 30.0)
    assert RunFolder(tmp_path).probes("magmax") == {"characters": {0: 50.0, 1: 40.0}}
    (tmp_path / "journal.jsonl").write_text(
        '{"probe": "characters", "of": "ties", "task": 1, "accuracy": 130.0, "session": 1, "seconds": 0}\n'
    )
    with pytest.raises(InputError, match=r"journal\.jsonl, line 1: .*<= 100"):
        RunFolder(tmp_path)


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ("[digits]", "probe=digits: is the data of the stream"),
        ("[charackters]", "probe=charackters: unknown data set .*characters"),
    ],
)
def test_wrong_probes_are_named_before_anything_is_loaded(probe, reason, tmp_path):
    config = read_settings([f"probe={probe}", f"out={tmp_path / 'run'}"])
    with pytest.raises(InputError, match=reason):
        load_probes(config)
    with pytest.raises(InputError, match=reason):
        start_run(config)
    assert not (tmp_path / "run").exists()
