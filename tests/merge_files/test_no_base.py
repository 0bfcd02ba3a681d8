"""Without a base, weights are merged as they are; the rest is that of the first file."""

import json
import logging
import math

import pytest
import torch
from file_cases import listed, read, write
from safetensors import safe_open

from cl_merge import cli
from cl_merge.errors import InputError
from cl_merge.merge_files import merge_checkpoints
from cl_merge.mergers import MERGERS
from cl_merge.task_vectors.task_vector import TaskVector

SHAPES = {"w": (13, 9), "b": (13,), "s": ()}
NEED_NO_BASE = [name for name, merger in MERGERS.items() if not merger.needs_base]
assert NEED_NO_BASE == ["average", "fisher", "regmean", "karcher", "slerp"]


def weights(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    found = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}
    buffers = {"bn.running_mean": torch.full((3,), float(seed)), "steps": torch.tensor(seed)}
    return found | buffers


def files(folder, *every):
    return [write(folder, f"w{i}", w, "safetensors") for i, w in enumerate(every)]


def merged(folder, *every, **options):
    merge_checkpoints(None, files(folder, *every), folder / "o.safetensors", **options)
    return read(folder / "o.safetensors")


def slerp(one, other, t):
    one, other = one.double().flatten(), other.double().flatten()
    angle = math.acos(float(one @ other / one.norm() / other.norm()))
    if abs(math.cos(angle)) > 0.9995:
        return (1 - t) * one + t * other
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)


def check(found, expected, first, **tolerance):
    for name in SHAPES:
        close = tolerance or {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(found[name].double().flatten(), expected(name), **close)
    for name in first.keys() - SHAPES.keys():
        assert torch.equal(found[name], first[name])


def test_a_soup_is_the_mean_of_the_weights(tmp_path):
    every = [weights(i) for i in range(4)]
    found = merged(tmp_path, *every, method="average")
    check(found, lambda n: sum(w[n].double() for w in every).flatten() / 4, every[0])


def test_a_soup_of_weighted_files_of_several_dtypes(tmp_path):
    every = [weights(0, torch.bfloat16), weights(1), weights(2, torch.float16)]
    found = merged(tmp_path, *every, method="linear", weights=[1.5, 1.0, 0.5], dtype="float32")
    mean = [1.5 / 3, 1 / 3, 0.5 / 3]
    check(
        found,
        lambda n: sum(w[n].double() * m for w, m in zip(every, mean, strict=True)).flatten(),
        every[0],
    )
    assert found["w"].dtype == torch.float32


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_along_the_arc_between_the_weights(tmp_path, t):
    one, other = weights(0), weights(1)
    found = merged(tmp_path, one, other, method="slerp", t=t)
    check(found, lambda n: slerp(one[n], other[n], t), one)


def test_the_karcher_mean_of_two_is_the_middle_of_the_arc(tmp_path):
    one, other = weights(0), weights(1)
    other = {
        n: other[n] * (one[n].norm() / other[n].norm()) if n in SHAPES else t
        for n, t in other.items()
    }
    found = merged(tmp_path, one, other, method="karcher")
    for name in ("w", "b"):
        torch.testing.assert_close(
            found[name].double().flatten(), slerp(one[name], other[name], 0.5), rtol=1e-5, atol=1e-6
        )


def test_fisher_weighs_the_weights_themselves(tmp_path):
    one, other = weights(0), weights(1)
    of_each = [{n: torch.rand(s) for n, s in SHAPES.items()} for _ in range(2)]
    beside = [write(tmp_path, f"f{i}", f, "safetensors") for i, f in enumerate(of_each)]
    found = merged(tmp_path, one, other, method="fisher", importances=beside)
    first, second = of_each

    def expected(name):
        total = first[name].double() * one[name] + second[name].double() * other[name]
        return (total / (first[name].double() + second[name])).flatten()

    check(found, expected, one)


@pytest.mark.parametrize("choice", ["base", "trained", "average"])
def test_buffers_can_be_chosen(tmp_path, choice, caplog):
    every = [weights(i) for i in range(3)]
    found = merged(tmp_path, *every, method="average", buffers=choice)["bn.running_mean"]
    assert found.tolist() == [{"base": 0.0, "trained": 2.0, "average": 1.0}[choice]] * 3
    with caplog.at_level(logging.WARNING):
        merge_checkpoints(
            None, files(tmp_path, *every), tmp_path / "n.safetensors", method="average"
        )
    assert "bn.running_mean. The first file's were taken" in caplog.text
    assert "the first file's were taken: steps" in caplog.text


def test_each_file_is_told_of_once(tmp_path, caplog):
    every = files(tmp_path, weights(0), weights(1))
    total, told = [], []

    def progress(size):
        total.append(size)
        return told.append

    with caplog.at_level(logging.WARNING):
        merge_checkpoints(
            None, every, tmp_path / "o.safetensors", method="average", progress=progress
        )
    assert "more than once" not in caplog.text
    assert total == [sum(told)]
    with safe_open(tmp_path / "o.safetensors", framework="pt") as file:
        inputs = json.loads(file.metadata()["cl_merge.inputs"])
    assert [(entry["role"], entry["file"]) for entry in inputs] == [
        ("task", "w0.safetensors"),
        ("task", "w1.safetensors"),
    ]
    with caplog.at_level(logging.WARNING):
        merge_checkpoints(None, [every[0]] * 2, tmp_path / "p.safetensors", method="average")
    assert "w0.safetensors' is given more than once" in caplog.text


def test_small_files_are_those_of_the_first_folder(tmp_path, capsys):
    for i in range(2):
        write(tmp_path / f"m{i}", "model", weights(i), "safetensors")
        (tmp_path / f"m{i}/config.json").write_text(f'{{"number": {i}}}')
    words = ["merge", "--no-base", str(tmp_path / "m0"), str(tmp_path / "m1"), "--method", "slerp"]
    assert cli.main([*words, "-o", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"number": 0}
    printed = capsys.readouterr().out
    assert (
        "3 tensors merged from 2 tasks, 1 taken from the first file, 1 buffer of the first"
        in printed
    )


@pytest.mark.parametrize("method", [name for name in MERGERS if name not in NEED_NO_BASE])
def test_methods_for_changes_need_a_base(tmp_path, out, method):
    with pytest.raises(InputError) as caught:
        merge_checkpoints(None, files(tmp_path, weights(0), weights(1)), out / "o", method=method)
    assert str(caught.value) == (
        f"'{MERGERS[method].name}' merges changes and needs the base; without one there are "
        f"{', '.join(NEED_NO_BASE)}"
    )
    assert listed(out) == []


@pytest.mark.parametrize("adapter", ["", "default."])
def test_factors_of_adapters_are_refused(tmp_path, adapter):
    """A and B make the same adapter as -A and -B, but their mean is none."""
    names = [f"base_model.model.l.lora_{factor}.{adapter}weight" for factor in "AB"]
    every = [{name: torch.full((2, 2), sign) for name in names} for sign in (1.0, -1.0)]
    with pytest.raises(
        InputError, match=r"w0.safetensors' holds factors of LoRA, .* one by one: .*lora_A"
    ):
        merged(tmp_path, *every, method="average")
    start, *tasks = files(tmp_path, *every, every[0])  # of one start they are like other weights
    assert merge_checkpoints(start, tasks, tmp_path / "o.safetensors").merged == 2


def test_what_is_refused_without_a_base(tmp_path, out):
    one, other = files(tmp_path, weights(0), weights(1) | {"w": torch.ones(2)})
    vector = tmp_path / "v.safetensors"
    TaskVector({n: torch.ones(s) for n, s in SHAPES.items()}).save(vector)
    nan = write(tmp_path, "nan", weights(0) | {"b": torch.full((13,), math.nan)}, "safetensors")
    for given, options, message in (
        ([], {}, "no task to merge; give at least one checkpoint"),
        ([], {"lora_rank": 2}, "no task to merge; give at least one checkpoint"),
        ([], {"lora_rank": "auto"}, "no task to merge; give at least one checkpoint"),
        ([one, one], {"scale": 0.5}, "a scale is of changes to a base, and there is none"),
        (
            [one, vector],
            {},
            "v.safetensors' is a task vector, but without a base there must be weights",
        ),
        ([one, other], {}, "w1.safetensors' has other shapes than the first file '"),
        ([nan, one], {}, "nan.safetensors': NaN or infinity in b. Training diverged"),
    ):
        with pytest.raises(InputError) as caught:
            merge_checkpoints(None, given, out / "o", method="average", **options)
        assert message in str(caught.value)
    assert listed(out) == []
