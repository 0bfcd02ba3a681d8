"""The compiled loops give the bits that torch gives, and nothing depends on their being there."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_merge import kernels
from cl_merge.mergers import merge

compiled = pytest.mark.skipif(kernels.library() is None, reason="needs a C compiler")


@pytest.fixture
def without_kernels(monkeypatch):
    """A function that switches the compiled loops off until the test ends."""

    def switch_off():
        monkeypatch.setenv("CL_MERGE_KERNELS", "0")
        kernels.library.cache_clear()

    yield switch_off
    kernels.library.cache_clear()


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
        finite = kernels.subtract(one, two, out)
        expected = one.float() - two.float()
        assert finite == bool(expected.isfinite().all())
        assert same_bits(out.nan_to_num(), expected.nan_to_num())


@compiled
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 7, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_that_is_not_finite_is_seen(value, place, dtype):
    base, tuned = torch.zeros(100, dtype=dtype), torch.ones(100, dtype=dtype)
    assert kernels.subtract(tuned, base, torch.empty(100)) is True
    tuned[place] = value
    assert kernels.subtract(tuned, base, torch.empty(100)) is False


@compiled
def test_what_the_compiled_loops_do_not_know_is_left_to_torch():
    half, single, out = torch.ones(4).half(), torch.ones(4), torch.empty(4)
    assert kernels.subtract(3 * half, half, out)
    assert out.tolist() == [2] * 4
    assert kernels.subtract(torch.full((4, 2), 5.0)[:, 0], single, out)
    assert out.tolist() == [4] * 4
    merged = single.double()
    kernels.fold_largest(merged, -single.double())
    assert merged.tolist() == [-1] * 4


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_a_bracket_of_weights_is_that_of_their_difference(dtype, size):
    generator = torch.Generator().manual_seed(size)
    base = torch.randn(size, generator=generator).to(dtype)
    tuned = (base.float() + torch.randn(size, generator=generator)).to(dtype)
    values = tuned.float() - base.float()
    low, high = 0.5, max(0.6, float(values.abs().max()) if size else 0.0)
    expected, held = kernels.bracket(values, low, high, size)
    counts, found = kernels.bracket(kernels.Difference(tuned, base), low, high, size)
    assert counts == expected
    assert torch.equal(found, held)
    if size and dtype != torch.float16:
        tuned[size // 2] = float("nan")
        broken = kernels.Difference(tuned, base, lambda: ValueError("broken"))
        with pytest.raises(ValueError, match="broken"):
            kernels.bracket(broken, low, high, size)


@compiled
@pytest.mark.parametrize("method", ["magmax", "random-mix", "ties"])
@pytest.mark.parametrize("kind", ["normal", "ties and zeros", "subnormal", "huge"])
def test_mergers_give_the_same_bits_without_kernels(method, kind, without_kernels):
    generator = torch.Generator().manual_seed(0)
    factor = {"normal": 1.0, "ties and zeros": 0.0, "subnormal": 1e-42, "huge": 1e37}[kind]

    def values(size):
        if not factor:
            return torch.randint(-2, 3, (size,), generator=generator).float()
        return torch.randn(size, generator=generator) * factor

    vectors = [{"a": values(1001), "b": values(13).view(13, 1)} for _ in range(6)]
    with_kernels = merge(vectors, method)
    without_kernels()
    without = merge(vectors, method)
    assert all(same_bits(with_kernels[name], without[name]) for name in without)


def test_a_setting_does_without_the_compiled_loops(without_kernels):
    without_kernels()
    assert kernels.library() is None
    assert merge([{"w": torch.ones(1)}, {"w": -torch.ones(1) * 2}])["w"].tolist() == [-2.0]


@pytest.mark.slow
def test_compiled_loops_that_cannot_be_loaded_are_no_error(tmp_path):
    package = tmp_path / "cl_merge"
    shutil.copytree(Path(kernels.__file__).parent, package / "kernels")
    for file in (package / "kernels").glob("_loops*"):
        file.unlink()
    (package / "kernels" / f"_loops{EXTENSION_SUFFIXES[0]}").write_text("no library")
    script = (
        "import logging, sys; logging.basicConfig(level='INFO', stream=sys.stdout)\n"
        f"import cl_merge; cl_merge.__path__.insert(0, {str(package)!r})\n"
        "from cl_merge import kernels; from cl_merge.mergers import merge; import torch\n"
        "assert kernels.__file__.startswith(sys.argv[1]) and kernels.library() is None\n"
        "print(merge([{'w': torch.tensor([1.0])}, {'w': torch.tensor([-2.0])}])['w'].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True
    )
    said, result = done.stdout.splitlines()
    assert "merging without compiled loops, which takes longer: " in said
    assert result == "[-2.0]"


@pytest.mark.slow
def test_without_a_compiler_the_package_is_built_and_merges(tmp_path):
    root = Path(kernels.__file__).parents[2]
    if not (root / "setup.py").exists():
        pytest.skip("needs the sources")
    pytest.importorskip("pip")
    found = {dist.name: dist.version for dist in distributions(name="setuptools")}
    if int(found.get("setuptools", "0").partition(".")[0]) < 77:
        pytest.skip("this environment has no setuptools that can build the package")
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICES.md"):
        shutil.copy(root / name, sources)
    for name in ("cl_merge", "callbacks", "benchmarks"):
        ignored = shutil.ignore_patterns("_loops*.so", "__pycache__")
        shutil.copytree(root / name, sources / name, symlinks=True, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    wheel = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, sources]
    subprocess.run([*pip, *wheel], check=True, env=os.environ | {"CC": "/bin/false"})
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        assert not [name for name in archive.namelist() if "_loops" in name]
        archive.extractall(tmp_path / "installed")
    script = (
        "import torch; from cl_merge import kernels; from cl_merge.mergers import merge\n"
        "assert kernels.library() is None\n"
        "print(kernels.__file__)\n"
        "print(merge([{'w': torch.tensor([1.0])}, {'w': torch.tensor([-2.0])}])['w'].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
    )
    where, result = done.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert result == "[-2.0]"
