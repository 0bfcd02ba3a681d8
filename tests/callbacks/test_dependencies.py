"""The callbacks need torch, lightning, safetensors and numpy; whatever else is installed or not."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).parents[1] / "support"

# Who asks is looked at, because Lightning itself uses some of these where they are installed.
BLOCK = """
import importlib.abc, sys
sys.path.insert(0, {support!r})

class Block(importlib.abc.MetaPathFinder):
    names = set(
        "PIL datasets filelock jinja2 matplotlib msgspec omegaconf open_clip rich scipy sklearn timm "
        "torchmetrics torchvision xxhash yaml".split()
    )

    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if name.partition(".")[0] in self.names and self.is_ours(frame.f_globals["__name__"]):
            raise ModuleNotFoundError(f"{{frame.f_globals['__name__']}} imports {{name}}")

    def is_ours(self, importer):
        return importer.partition(".")[0] in ("cl_merge", "__main__")

sys.meta_path.insert(0, Block())
"""

STREAM = """
from plain import Plain, fit, loader, trainer
from cl_merge import EWC, DriftPenalty, LwF, MergeCallback, TaskVector

held = DriftPenalty(features=lambda module, batch: module(batch[0]))

for callback in (EWC(), EWC("published"), EWC("sampled"), LwF(target="net"), held):
    module, merge = Plain(), MergeCallback("ties", directory={folder!r}, density=0.3)
    for task in range(2):
        fit(module, [callback, merge], task)
        trainer(merge).test(module, loader(0), verbose=False)
    merge.install(module)
    assert merge.tasks == 2
module, merge = Plain(), MergeCallback("fisher", scale="auto", held_out=lambda: loader(7))
fit(module, merge, 0)
assert len(merge.chosen) == 1
assert len(TaskVector.load({folder!r} + "/task1.safetensors")) == 4
"""


def run(script, folder):
    script = (BLOCK + script).format(support=str(SUPPORT), folder=str(folder))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_merging_and_regularizing_a_stream_needs_nothing_else(tmp_path):
    done = run(STREAM, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["cl_merge.callbacks", "cl_merge.class_statistics"])
def test_importing_needs_nothing_else(module, tmp_path):
    done = run(f"import {module}", tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_needs_more_is_found_out(tmp_path):
    assert "imports torchmetrics" in run("import cl_merge.training.metrics", tmp_path).stderr
