"""Only what is merged must match; what is no parameter is not merged; codes are refused."""

import json
import logging

import pytest
import torch
from file_cases import listed, write
from safetensors.torch import load_file
from torchvision.models import resnet18

from cl_merge.errors import InputError
from cl_merge.merge_files import merge_checkpoints
from cl_merge.merge_files.inspection import inspect_checkpoints

A = {"a": torch.tensor([1.0, 2, 3, 4])}
MOVED = {"a": torch.tensor([2.0, 2, 3, 4])}


def merged(folder, base, *tasks, store="safetensors", **options):
    """Write, merge and read; returns the tensors."""
    files = [write(folder, f"w{i}", w, store) for i, w in enumerate((base, *tasks))]
    out = folder / "out.safetensors"
    merge_checkpoints(files[0], files[1:], out, overwrite=True, **options)
    return load_file(out)


OTHER_HEADS = {
    "another shape": (torch.ones(7, 8), torch.ones(3, 8)),
    "only in the base": (torch.ones(7, 8), None),
    "only in the task": (None, torch.ones(7, 8)),
    "integers in the task": (torch.ones(7, 8), torch.ones(7, 8).long()),
}


@pytest.mark.parametrize("heads", OTHER_HEADS)
def test_what_is_excluded_may_be_anything(tmp_path, heads, caplog):
    before, after = OTHER_HEADS[heads]
    base = A | ({} if before is None else {"head.weight": before})
    task = MOVED | ({} if after is None else {"head.weight": after})
    with pytest.raises(InputError, match=r"head\.weight"):
        merged(tmp_path, base, task)
    with caplog.at_level(logging.WARNING):
        found = merged(tmp_path, base, task, exclude=["head*"], scale=1.0)
    assert torch.equal(found["a"], MOVED["a"])
    assert found.keys() == base.keys()
    if before is not None:
        assert torch.equal(found["head.weight"], before)
    named = after is not None
    assert ("left out: head.weight" in caplog.text) == named
    files = [tmp_path / "w0.safetensors", tmp_path / "w1.safetensors"]
    assert not inspect_checkpoints(files[1:], files[0]).fine
    assert inspect_checkpoints(files[1:], files[0], exclude=["head*"]).fine


@pytest.mark.parametrize("where", ["base", "task"])
def test_integers_and_positions_that_one_has_need_no_option(tmp_path, where):
    more = {"steps": torch.tensor(3), "text.position_ids": torch.arange(4.0)}
    base, task = (A | more, MOVED) if where == "base" else (A, MOVED | more)
    found = merged(tmp_path, base, task, scale=1.0)
    assert torch.equal(found["a"], MOVED["a"])
    assert found.keys() == base.keys()


@pytest.mark.parametrize("where", ["base", "task"])
def test_tied_parameters_may_be_stored_once(tmp_path, where):
    before, after = torch.randn(5, 3), torch.randn(5, 3)
    base, task = A | {"embed": before}, MOVED | {"embed": after}
    if where == "base":
        base["lm_head"] = before.clone()
    else:
        task["lm_head"] = after.clone()
    found = merged(tmp_path, base, task, scale=1.0)
    torch.testing.assert_close(found["embed"], after)
    assert found.keys() == base.keys()
    if where == "base":
        assert torch.equal(found["lm_head"], found["embed"])


@pytest.mark.parametrize("method", ["dare", "ties"])
def test_tied_parameters_that_all_store_twice_are_one(tmp_path, method):
    once = [{"embed": torch.randn(9, 7), "other": torch.randn(9, 7)} for _ in range(3)]
    twice = [{"embed": w["embed"], "lm_head": w["embed"], "other": w["other"]} for w in once]
    expected = merged(tmp_path, *once, method=method)
    found = merged(tmp_path, *twice, store="pt", method=method)
    assert torch.equal(found.pop("lm_head"), expected["embed"])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_matrices_that_begin_with_many_zeros_may_be_tied(tmp_path):
    embed = torch.zeros(3, 4096).index_fill_(0, torch.tensor([1]), 0.5)  # a row for padding
    found = merged(tmp_path, {"embed": embed, "lm_head": embed}, {"embed": embed + 1}, scale=1.0)
    assert torch.equal(found["lm_head"], embed + 1)


def test_equal_values_that_are_no_ties_do_not_count_as_such(tmp_path):
    zeros = {"one.bias": torch.zeros(4), "two.bias": torch.zeros(4), "lora": torch.zeros(4, 2)}
    base = A | zeros | {"more": torch.zeros(4, 2)}
    task = MOVED | {name: value + 1 for name, value in zeros.items() if name != "two.bias"}
    with pytest.raises(InputError, match=r"missing: more, two\.bias; extra: none|two\.bias"):
        merged(tmp_path, base, task)


def test_what_is_tied_in_the_base_only_is_refused(tmp_path):
    embed = torch.randn(5, 3)
    base = {"embed": embed, "lm_head": embed.clone()}
    tied, own = {"embed": embed + 1}, {"embed": embed + 1, "lm_head": embed + 2}
    with pytest.raises(InputError, match="has another 'lm_head' than 'embed'"):
        merged(tmp_path, base, tied, own)


def test_complex_tensors_are_refused_unless_excluded(tmp_path):
    wave = {"wave": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(InputError, match="has complex tensors, which cannot be merged: wave"):
        merged(tmp_path, A | wave, MOVED | wave, store="pt")
    assert torch.equal(
        merged(tmp_path, A | wave, MOVED | wave, store="pt", exclude=["wave"])["wave"], wave["wave"]
    )


def networks():
    """A residual network and three fine-tunings, as their state dicts."""
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        network = resnet18().train()
        for _ in range(2 if seed else 0):
            network(torch.randn(4, 3, 32, 32) * (1 + seed))
        found.append({name: t.clone() for name, t in network.state_dict().items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dare-ties", "task-arithmetic"])
@pytest.mark.parametrize("buffers", [None, "trained", "base", "average"])
def test_statistics_of_batch_norms_are_chosen_and_not_merged(tmp_path, method, buffers, caplog):
    base, *tasks = networks()
    with caplog.at_level(logging.WARNING):
        found = merged(tmp_path, base, *tasks, method=method, buffers=buffers, scale=1.0)
    names = [name for name in base if "running" in name]
    assert len(names) == 40
    for name in names:
        every = [task[name] for task in tasks]
        if buffers == "average":
            expected = torch.stack(every).double().mean(dim=0).float()
        else:
            expected = base[name] if buffers == "base" else every[-1]
        assert torch.equal(found[name], expected)
    assert ("floating-point buffers differ and are not merged" in caplog.text) == (not buffers)
    network = resnet18().eval()
    network.load_state_dict(found)
    assert network(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_a_negative_variance_is_refused(tmp_path):
    base = A | {"bn.running_var": torch.ones(2)}
    task = MOVED | {"bn.running_var": torch.tensor([1.0, -0.1])}
    with pytest.raises(InputError, match=r"'bn\.running_var' holds a negative variance"):
        merged(tmp_path, base, task)
    assert "out.safetensors" not in listed(tmp_path)


def test_schedules_and_counters_are_buffers(tmp_path):
    base = A | {"model.alphas_cumprod": torch.ones(3), "ema.num_updates": torch.tensor(5.0)}
    task = MOVED | {"model.alphas_cumprod": torch.ones(3), "ema.num_updates": torch.tensor(9.0)}
    assert float(merged(tmp_path, base, task)["ema.num_updates"]) == 9
    assert float(merged(tmp_path, base, task, buffers="base")["ema.num_updates"]) == 5
    with pytest.raises(InputError, match="unknown choice of buffers 'last'"):
        merged(tmp_path, base, task, buffers="last")


@pytest.mark.parametrize("include", [["*", "net.alphas"], ["net.alphas"]])
def test_a_parameter_named_like_a_buffer_is_merged_if_its_whole_name_is_included(tmp_path, include):
    base, task = A | {"net.alphas": torch.zeros(3)}, MOVED | {"net.alphas": torch.ones(3)}
    found = merged(tmp_path, base, task, include=include, buffers="base", scale=0.5)
    assert found["net.alphas"].tolist() == [0.5] * 3
    with pytest.raises(InputError, match="named like a buffer by its whole"):
        merged(tmp_path, base, task, include=["*.alphas"])


CODES = {
    "GPTQ": {"layer.qweight": torch.ones(2, 2).int(), "layer.scales": torch.ones(2).half()},
    "bitsandbytes": {"layer.weight": torch.ones(2, 2).char(), "layer.SCB": torch.ones(2)},
    "nf4": {"layer.weight.quant_state.bitsandbytes__nf4": torch.ones(3).byte()},
    "fp8": {"weight": torch.ones(2).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)},
}


@pytest.mark.parametrize("kind", CODES)
def test_quantised_checkpoints_are_refused(tmp_path, kind):
    with pytest.raises(InputError, match="is quantised: .* dequantise them first"):
        merged(tmp_path, A | CODES[kind], MOVED | CODES[kind])
    files = [tmp_path / "w0.safetensors", tmp_path / "w1.safetensors"]
    found = inspect_checkpoints(files[1:], files[0])
    assert not found.fine
    assert found.files[0].quantised


def test_a_configuration_that_tells_of_quantisation_is_believed(tmp_path):
    files = [write(tmp_path, name, A, "safetensors") for name in ("base", "task")]
    folder = tmp_path / "folder"
    folder.mkdir()
    files[1].rename(folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "awq"}})
    )
    with pytest.raises(InputError, match=r"is quantised: quantization_config \(awq\) in config"):
        merge_checkpoints(files[0], [folder], tmp_path / "out.safetensors")
    (folder / "config.json").write_text("[]")
    merge_checkpoints(files[0], [folder], tmp_path / "out.safetensors")


def test_fp8_that_would_overflow_is_refused_before_the_cast(tmp_path):
    base, task = ({"w": torch.full((8,), v).to(torch.float8_e4m3fn)} for v in (384.0, 448.0))
    fine = merged(tmp_path, base, task, method="average", scale=1.0)
    assert torch.equal(fine["w"].float(), task["w"].float())
    with pytest.raises(InputError, match="'w' overflows float8_e4m3fn after merging"):
        merged(tmp_path, base, task, method="average", scale=3.0)


@pytest.mark.parametrize("name", ["merged.pt", "merged.BIN", "merged.ckpt", "merged.gguf"])
def test_an_output_that_cannot_be_written_by_its_name(tmp_path, name):
    base = write(tmp_path, "base", A, "safetensors")
    with pytest.raises(InputError, match="expected a name that ends in .safetensors"):
        merge_checkpoints(base, [base], tmp_path / name)
    assert listed(tmp_path) == ["base.safetensors"]
