"""That the naive ways and the methods of the library do the same work."""

from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file

from cl_merge.benchmarks.studies import merge_speed
from cl_merge.benchmarks.studies.merge_speed import NAIVE, llm_shapes, make_inputs, measure


@pytest.fixture
def files(tmp_path, monkeypatch):
    shapes = {"visual.a": torch.Size((30, 7)), "visual.b": torch.Size((11,))}
    monkeypatch.setattr(merge_speed, "vit_shapes", lambda: shapes)
    return make_inputs(tmp_path, Namespace(model="vit", dtype="float32", tasks=3))


@pytest.mark.parametrize("naive", NAIVE)
def test_naive_ways_merge_as_the_methods_do(naive, files):
    found = []
    for name in (naive, naive.removeprefix("naive ")):
        measure(name, files)
        found.append(load_file(files[0].with_name("merged.safetensors")))
    scale = 1 if "magmax" in naive else 2 if "average" in naive else 0.55 / 0.5
    base = load_file(files[0])
    for name, value in base.items():
        torch.testing.assert_close((found[0][name] - value) * scale, found[1][name] - value)


def test_the_floor_writes_a_file_of_the_size_of_one(files):
    measure("floor", files)
    assert files[0].with_name("floor.bin").stat().st_size == files[0].stat().st_size


def test_a_decoder_is_as_large_as_asked_for():
    values = [sum(shape.numel() for shape in llm_shapes(n).values()) for n in (1e9, 2e9)]
    assert 1e9 <= values[0] < 1.3e9 < 2e9 <= values[1] < 2.3e9
