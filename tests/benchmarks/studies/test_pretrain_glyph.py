"""The script that makes the embedded model, on a few steps and one font."""

import logging
from pathlib import Path

import matplotlib
import pytest
import torch
from safetensors.torch import load_file

from cl_merge import load_clip
from cl_merge.benchmarks.studies.pretrain_glyph import Recipe, main, pretrain

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "cmti10.ttf"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FONT.exists(), reason="this version of matplotlib lacks a font"),
]

FONTS = ["cmr10"]


def test_a_seed_fixes_every_weight():
    models = [
        pretrain(Recipe(steps=2, batch=16, captioned=8, seed=seed), FONTS) for seed in (0, 0, 1)
    ]
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["visual.trunk.stem.weight"], other["visual.trunk.stem.weight"])


def test_the_script_writes_a_folder_that_loads_and_reports_its_figures(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(logging.root, "handlers", [])  # main() installs one of its own
    out = tmp_path / "new" / "model"
    main(["--out", str(out), "--steps", "2", "--batch", "32"], FONTS)
    weights = load_file(out / "open_clip_model.safetensors")
    assert weights["visual.trunk.stem.weight"].dtype == torch.float16
    clip = load_clip(f"local-dir:{out}")
    assert clip.image_size == 32
    stem = clip.model.visual.trunk.stem.weight
    assert torch.equal(stem, weights["visual.trunk.stem.weight"].float())
    lines = capsys.readouterr().err.splitlines()
    subjects = [line.split(",")[0] for line in lines]
    assert subjects == ["step 2/2", "unseen fonts", "scikit-learn's digits"]
