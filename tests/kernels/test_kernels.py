"""The compiled loops give the bits that torch gives, and nothing depends on their being there."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_merge import kernels
from cl_merge.mergers import merge

compiled = pytest.mark.skipif(kernels.library() is None, reason="needs a C compiler")

FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)
PAIRS = st.lists(st.tuples(FLOAT, FLOAT), max_size=200)


def columns(pairs):
    return [torch.tensor([pair[i] for pair in pairs], dtype=torch.float32) for i in (0, 1)]


def same_bits(one, two):
    return torch.equal(one.view(torch.int32), two.view(torch.int32))


@compiled
@settings(deadline=None, max_examples=40)
@given(pairs=PAIRS)
def test_differences_are_those_of_torch(pairs):
    tuned, base = columns(pairs)
    for dtype in (torch.float32, torch.bfloat16):
        one, two, out = tuned.to(dtype), base.to(dtype), torch.empty(len(pairs))
        finite = kernels.difference(one, two, out)
        expected = one.float() - two.float()
        assert finite == bool(expected.isfinite().all())
        assert same_bits(out.nan_to_num(), expected.nan_to_num())


@compiled
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 7, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_that_is_not_finite_is_seen(value, place, dtype):
    base, tuned = torch.zeros(100, dtype=dtype), torch.ones(100, dtype=dtype)
    assert kernels.difference(tuned, base, torch.empty(100)) is True
    tuned[place] = value
    assert kernels.difference(tuned, base, torch.empty(100)) is False


@compiled
def test_what_the_kernels_do_not_know_is_left_to_torch():
    half, single, out = torch.ones(4).half(), torch.ones(4), torch.ones(4)
    assert kernels.difference(half, half, out) is None
    assert kernels.difference(single, half, out) is None
    assert kernels.difference(torch.ones(4, 2)[:, 0], single, out) is None
    assert kernels.fold_largest(single.double(), single.double()) is None


@compiled
@settings(deadline=None, max_examples=40)
@given(pairs=PAIRS, ends=st.tuples(FLOAT, FLOAT), room=st.integers(0, 300), data=st.data())
def test_a_bracket_counts_and_collects_exactly(pairs, ends, room, data):
    vector = columns(pairs)[0].repeat(5)
    if len(vector) and data.draw(st.booleans()):  # ends that occur
        ends = tuple(float(data.draw(st.sampled_from(vector.tolist()))) for _ in ends)
    low, high = sorted(map(abs, ends))
    magnitude = vector.abs()
    between = magnitude[(magnitude > low) & (magnitude < high)]
    counts, found = kernels.bracket(vector, low, high, room)
    if found is None:
        assert len(between) > min(room, len(vector)) - 64
        return
    assert same_bits(found, between)
    assert counts == tuple(
        int(end.sum()) for end in (magnitude < low, magnitude == low, magnitude == high)
    )


@compiled
@pytest.mark.parametrize("method", ["magmax", "random-mix", "ties"])
@pytest.mark.parametrize("kind", ["normal", "ties and zeros", "subnormal", "huge"])
def test_mergers_give_the_same_bits_without_kernels(method, kind, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    factor = {"normal": 1.0, "ties and zeros": 0.0, "subnormal": 1e-42, "huge": 1e37}[kind]

    def values(size):
        if not factor:
            return torch.randint(-2, 3, (size,), generator=generator).float()
        return torch.randn(size, generator=generator) * factor

    vectors = [{"a": values(1001), "b": values(13).view(13, 1)} for _ in range(6)]
    with_kernels = merge(vectors, method)
    monkeypatch.setattr(kernels, "library", lambda: None)
    without = merge(vectors, method)
    assert all(same_bits(with_kernels[name], without[name]) for name in without)


def test_without_a_compiler_everything_still_works(tmp_path):
    script = (
        "import torch; from cl_merge import kernels; from cl_merge.mergers import merge\n"
        "assert kernels.library() is None\n"
        "print(merge([{'w': torch.tensor([1.0])}, {'w': torch.tensor([-2.0])}])['w'].tolist())"
    )
    for setting in ({"CL_MERGE_KERNELS": "0"}, {"PATH": str(tmp_path)}):
        done = subprocess.run(
            [sys.executable, "-c", script],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | setting,
        )
        assert done.stdout == "[-2.0]\n"


def test_a_compiler_that_fails_is_no_error(tmp_path, monkeypatch, caplog):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with caplog.at_level("INFO", logger="cl_merge"):
        assert kernels.library.__wrapped__() is None
    assert "merging without compiled kernels, which takes longer" in caplog.text


@compiled
def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "cl_merge"
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert isinstance(kernels.library.__wrapped__(), ctypes.CDLL)
    assert list(cache.iterdir()) == []
    cache.chmod(0o700)
    kernels.library.__wrapped__()
    assert [file.suffix for file in cache.iterdir()] == [".so"]
