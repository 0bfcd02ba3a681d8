"""Inputs may be of any floating-point dtypes; the output is the base's, or the one that is asked for."""

import json
import logging

import pytest
import torch
from file_cases import in_memory, listed, read, same_bits, write
from transformers import CLIPConfig, CLIPModel

from cl_merge import cli
from cl_merge.errors import InputError
from cl_merge.merge_files import merge_checkpoints
from cl_merge.merge_files.inspection import inspect_checkpoints
from cl_merge.task_vectors.task_vector import TaskVector

NAMES = ("float32", "bfloat16", "float16")


def weights(seed, dtype="float32", **more):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (13, 9), "b": (13,), "bn.running_mean": (13,), "head": (4, 2)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return cast(found, dtype) | {"steps": torch.tensor(7)} | more


def cast(tensors, dtype):
    dtype = getattr(torch, dtype)
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


def merged(folder, base, *tasks, **options):
    files = [write(folder, f"w{i}", w, "safetensors") for i, w in enumerate((base, *tasks))]
    merge_checkpoints(files[0], files[1:], folder / "out.safetensors", overwrite=True, **options)
    return read(folder / "out.safetensors")


@pytest.mark.parametrize("method", ["magmax", "average", "ties", "dare-ties", "slerp", "sce"])
@pytest.mark.parametrize("of_base", [*NAMES, "float64"])
@pytest.mark.parametrize("of_output", [None, *NAMES])
def test_a_merge_of_several_dtypes_is_that_of_the_same_values_rounded_once(
    tmp_path, method, of_base, of_output
):
    base = weights(0, of_base)
    tasks = [weights(1, "float32"), weights(2, "bfloat16")]
    found = merged(tmp_path, base, *tasks, method=method, exclude=["head"], dtype=of_output)
    wide = "float64" if of_base == "float64" else "float32"
    names = ("w", "b")
    plain = [cast({n: w[n] for n in names}, wide) for w in (base, *tasks)]
    expected = in_memory(plain[0], plain[1:], method)
    # What is not merged: the last task's buffers, and the base's head.
    expected |= {"bn.running_mean": tasks[1]["bn.running_mean"], "head": base["head"]}
    expected = cast(expected, of_output or of_base) | {"steps": base["steps"]}
    assert same_bits(found, expected)


@pytest.mark.parametrize("choice", ["base", "average"])
def test_buffers_of_several_dtypes(tmp_path, choice):
    base, tasks = weights(0, "bfloat16"), [weights(1), weights(2, "float16")]
    found = merged(tmp_path, base, *tasks, buffers=choice, dtype="float32")["bn.running_mean"]
    of_tasks = [task["bn.running_mean"].double() for task in tasks]
    expected = base["bn.running_mean"] if choice == "base" else sum(of_tasks) / 2
    assert torch.equal(found, expected.float())


def test_one_byte_is_read_beside_others_and_stays_where_the_base_has_it(tmp_path):
    base = {"w": (torch.arange(8.0) / 4).to(torch.float8_e4m3fn), "v": torch.ones(2)}
    task = {"w": torch.arange(8.0) / 2, "v": torch.zeros(2)}
    for dtype, expected in ((None, torch.float8_e4m3fn), ("bfloat16", torch.bfloat16)):
        found = merged(tmp_path, base, task, method="average", dtype=dtype)["w"]
        assert found.dtype == expected
        assert torch.equal(found.float(), task["w"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_variances_of_one_byte_are_looked_at_like_others(tmp_path, dtype):
    base = {"w": torch.ones(2), "bn.running_var": torch.ones(3).to(dtype)}
    task = {"w": torch.zeros(2), "bn.running_var": torch.full((3,), 2.0).to(dtype)}
    assert merged(tmp_path, base, task)["bn.running_var"].float().tolist() == [2, 2, 2]
    with pytest.raises(InputError, match="holds a negative variance"):
        merged(tmp_path, base, task | {"bn.running_var": -task["bn.running_var"].float()})


def test_the_configuration_names_the_dtype_that_is_written_in_all_its_parts(tmp_path):
    parts = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    parts |= {"num_hidden_layers": 1}
    vision, text = parts | {"image_size": 16, "patch_size": 8}, parts | {"vocab_size": 20}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=4))
    model.save_pretrained(tmp_path / "base")
    model.half().save_pretrained(tmp_path / "task")
    before = (tmp_path / "base/config.json").read_text()
    for dtype in (None, "bfloat16"):
        out = tmp_path / f"out-{dtype}"
        merge_checkpoints(tmp_path / "base", [tmp_path / "task"], out, dtype=dtype)
        after = (out / "config.json").read_text()
        assert json.loads(after) == json.loads(
            before.replace('"float32"', f'"{dtype or "float32"}"')
        )
        loaded = CLIPModel.from_pretrained(out, dtype="auto")
        assert loaded.dtype == getattr(torch, dtype or "float32")


def test_what_is_no_configuration_is_copied_as_it_is(tmp_path):
    for text in ("[1, 2]", "not json", '"dtype"'):
        folder = tmp_path / f"base{len(text)}"
        write(folder, "model", weights(0), "safetensors")
        (folder / "config.json").write_text(text)
        out = tmp_path / f"out{len(text)}"
        merge_checkpoints(folder, [folder / "model.safetensors"], out, dtype="float16")
        assert json_or_text(out / "config.json") == json_or_text(folder / "config.json")


def json_or_text(path):
    text = path.read_text()
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.mark.parametrize(
    ("large", "options", "advice"),
    [
        ("w", {}, " after merging; use a smaller scale, or a wider dtype"),
        ("head", {"exclude": ["head"]}, "; use a wider dtype"),
        ("bn.running_mean", {}, "; use a wider dtype"),
    ],
)
def test_what_a_narrower_dtype_cannot_hold_is_refused(tmp_path, out, large, options, advice):
    base, task = weights(0), weights(1)
    task[large] = base[large] = torch.full_like(base[large], 1e5)
    files = [write(tmp_path, f"w{i}", w, "safetensors") for i, w in enumerate((base, task))]
    with pytest.raises(InputError) as caught:
        merge_checkpoints(files[0], files[1:], out / "m", dtype="float16", **options)
    assert str(caught.value) == f"'{large}' overflows float16{advice}"
    assert listed(out) == []
    merge_checkpoints(files[0], files[1:], out / "m", dtype="bfloat16", **options)


def test_masks_of_infinity_stay_where_they_are_not_merged(tmp_path):
    mask = torch.zeros(3, 3).masked_fill(torch.ones(3, 3).triu(1) > 0, -torch.inf)
    found = merged(tmp_path, weights(0, m=mask), weights(1, m=mask), exclude=["m"], dtype="float16")
    assert torch.equal(found["m"], mask.half())


def test_a_task_that_was_rounded_more_than_the_base_is_pointed_out(tmp_path, caplog):
    base = weights(0)
    with caplog.at_level(logging.WARNING):
        merged(tmp_path, base, weights(1, "float32"), buffers="base")
        assert caplog.text == ""
        merged(tmp_path, weights(0, "bfloat16"), weights(1), buffers="base")
        assert caplog.text == ""
        merged(tmp_path, base, weights(1, "bfloat16"), buffers="base")
    assert "w1.safetensors' is stored in a shorter dtype than the base" in caplog.text
    assert "counts as its change, in b, head, w." in caplog.text
    TaskVector.between(base, weights(1)).save(tmp_path / "vector.safetensors", "bf16")
    caplog.clear()
    merge_checkpoints(
        tmp_path / "w0.safetensors", [tmp_path / "vector.safetensors"], tmp_path / "o"
    )
    assert caplog.text == ""


def test_inspection_subtracts_several_dtypes(tmp_path):
    base, task = weights(0, "bfloat16"), weights(1)
    files = [write(tmp_path, f"w{i}", w, "safetensors") for i, w in enumerate((base, task))]
    found = inspect_checkpoints(files[1:], files[0])
    assert found.fine
    change = [task[n].double() - base[n].double() for n in ("w", "b", "head")]
    norm = sum(float(part.square().sum()) for part in change) ** 0.5
    assert found.files[0].norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("word", ["float8_e4m3fn", "half", "int8", ""])
def test_other_dtypes_are_not_written(tmp_path, out, word, capsys):
    files = [str(write(tmp_path, f"w{i}", weights(i), "safetensors")) for i in range(2)]
    assert cli.main(["merge", *files, "--dtype", word, "-o", str(out / "m")]) == 2
    assert f"unknown dtype '{word}'" in capsys.readouterr().err
    assert listed(out) == []
