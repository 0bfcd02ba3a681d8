"""Which tensors of a checkpoint are the weights, and what they are called."""

import itertools
import logging
import zipfile

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from cl_merge.errors import InputError
from cl_merge.storage import open_weights


def state(*names, value=1.0):
    return {name: torch.full((2,), value) for name in names or ("a", "b.c")}


def saved(path, content):
    torch.save(content, path)
    return path


STATE = state()
OTHER = state(value=2.0)
MODEL = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
ADAM = torch.optim.Adam(MODEL.parameters())
MODEL(torch.ones(2)).backward()
ADAM.step()
BESIDE = {
    "epoch": 3,
    "optimizer": ADAM.state_dict(),
    "lr_scheduler": {"last": torch.ones(1)},
    "scaler": {"scale": torch.ones(1)},
    "rng_state": {"cpu": torch.ones(1)},
    "callbacks": {"EMA": {"ema": OTHER}},
    "config": {"sizes": [1, 2], "nested": {"a": 1}},
}


@pytest.mark.parametrize(
    "wrapper",
    [
        ("state_dict",),
        ("model",),
        ("module",),
        ("params",),
        ("params_ema",),
        ("net",),
        ("ema",),
        ("teacher",),
        ("model", "state_dict"),
        ("model", "module"),
        ("ema", "module", "state_dict"),
        ("generator",),
        ("a name of one's own", "weights"),
    ],
)
def test_the_only_mapping_of_tensors_is_taken(tmp_path, same, opened, wrapper):
    content = STATE
    for key in reversed(wrapper):
        content = {**BESIDE, key: content}
    same(opened(saved(tmp_path / "m.pt", content)), STATE)


@pytest.mark.parametrize("usual", ["state_dict", "model", "model_state_dict", "params", "net"])
@pytest.mark.parametrize("other", ["state_dict_ema", "model_ema", "params_ema", "ema", "teacher"])
def test_the_usual_one_is_taken_beside_an_average(tmp_path, same, opened, caplog, usual, other):
    caplog.set_level(logging.INFO, "cl_merge")
    for content in ({other: OTHER, usual: STATE}, {usual: STATE, other: {"state_dict": OTHER}}):
        same(opened(saved(tmp_path / "m.pt", content)), STATE)
        assert f"took '{usual}'; it also has {other}" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"student": STATE, "teacher": OTHER}, "student, teacher"),
        ({"state_dict": STATE, "model": OTHER}, "state_dict, model"),
        ({"g": {"x": STATE}, "d": OTHER, "scaler": STATE}, "g, d"),
        ({"model": {"student": STATE, "teacher": OTHER}, "ema": OTHER}, "model.student, model.te"),
        ({"ema": OTHER, **STATE}, "ema"),
    ],
)
def test_several_are_refused_with_what_to_write(tmp_path, content, names):
    path = saved(tmp_path / "m.pt", content)
    first = names.split(",")[0]
    with pytest.raises(InputError) as caught:
        open_weights(path)
    assert f"'{path}' holds several sets of weights ({names}" in str(caught.value)
    assert f"'{path}:{first}'" in str(caught.value)
    with open_weights(f"{path}:{first}") as chosen:
        assert sorted(chosen.names) == ["a", "b.c"]


def test_a_key_chooses(tmp_path, same, opened):
    path = saved(tmp_path / "m.pt", {"params": STATE, "params_ema": OTHER, **BESIDE})
    same(opened(f"{path}:params"), STATE)
    weights = opened(f"{path}:params_ema")
    same(weights, OTHER)
    assert str(weights.path) == f"{path}:params_ema"
    assert weights.file_name == "m.pt"
    assert weights.folder is None
    same(opened(f"{path}:callbacks.EMA"), OTHER)


def test_a_key_may_hold_dots_and_lead_to_a_wrapper(tmp_path, same, opened):
    content = {"model.v1": {"best.pt": {"state_dict": STATE}}, "model": {"v2": OTHER}}
    path = saved(tmp_path / "m.pt", content)
    same(opened(f"{path}:model.v1"), STATE)
    same(opened(f"{path}:model.v1.best.pt"), STATE)
    same(opened(f"{path}:model.v1.best.pt.state_dict"), STATE)
    same(opened(f"{path}:model.v2"), OTHER)


@pytest.mark.parametrize("key", ["none", "params.none", "epoch", "params.a", "optimizer", "."])
def test_a_key_without_weights_is_named(tmp_path, key):
    path = saved(tmp_path / "m.pt", {"params": STATE, "ema": OTHER, **BESIDE})
    with pytest.raises(InputError, match=f"no weights under the key '{key}'; .*: params, ema"):
        open_weights(f"{path}:{key}")


def test_a_file_with_such_a_name_goes_before_a_key(tmp_path, same, opened):
    saved(tmp_path / "m.pt", {"params": OTHER, "x.pt": OTHER})
    same(opened(saved(tmp_path / "m.pt:x.pt", STATE)), STATE)
    with pytest.raises(InputError, match=r"no file or folder '.*n\.pt:params'"):
        open_weights(tmp_path / "n.pt:params")
    with pytest.raises(InputError, match=r"no file or folder '.*m\.pt:'"):
        open_weights(f"{tmp_path}/m.pt:")


def test_a_folder_may_have_a_key_but_safetensors_none(tmp_path, same, opened):
    (tmp_path / "f").mkdir()
    saved(tmp_path / "f/m.ckpt", {"params": STATE, "ema": OTHER})
    same(opened(f"{tmp_path}/f:ema"), OTHER)
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="has no keys such as 'ema'"):
        open_weights(f"{tmp_path}/m.safetensors:ema")


@pytest.mark.parametrize("stray", [3, 0.5, "text", None, True, [1, 2], {"a": {"b": 1}}, (), {1}])
def test_what_is_no_tensor_is_left_out_and_told(tmp_path, same, opened, caplog, stray):
    caplog.set_level(logging.INFO, "cl_merge")
    same(opened(saved(tmp_path / "m.pt", {**STATE, "step": stray})), STATE)
    assert caplog.messages[-1].endswith("left out what is no tensor: step")


def test_mappings_without_end_are_refused(tmp_path):
    content = {"model": {}, **STATE}
    content["model"]["model"] = content
    with pytest.raises(InputError, match="without end"):
        open_weights(saved(tmp_path / "m.pt", content))
    deep = 10_000
    with zipfile.ZipFile(tmp_path / "deep.pt", "w") as file:
        data = b"\x80\x02" + b"}X\x05\0\0\0model" * deep + b"N" + b"s" * deep + b"."
        file.writestr("m/data.pkl", data)
        file.writestr("m/version", b"3\n")
        file.writestr("m/byteorder", b"little")
    with pytest.raises(InputError, match="recursion"):
        open_weights(tmp_path / "deep.pt")


# ---- names


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_wrappers_around_the_model_in_any_order(tmp_path, same, opened, count):
    for wrappers in itertools.product(
        ["module.", "_orig_mod.", "_fsdp_wrapped_module."], repeat=count
    ):
        content = {"".join(wrappers) + name: tensor for name, tensor in STATE.items()}
        same(opened(saved(tmp_path / "m.pt", {"state_dict": content})), STATE)


def test_wrappers_around_parts_of_the_model(tmp_path, same, opened):
    parts = ["a._orig_mod.w", "b.0._orig_mod.w", "b.1._checkpoint_wrapped_module.w", "c.module.w"]
    plain = ["a.w", "b.0.w", "b.1.w", "c.module.w"]
    same(opened(saved(tmp_path / "m.pt", state(*parts))), state(*plain))


def test_a_compiled_model(tmp_path, same, opened):
    content = torch.compile(MODEL).state_dict()
    assert all(name.startswith("_orig_mod.") for name in content)
    same(opened(saved(tmp_path / "m.pt", content)), MODEL.state_dict())


def test_an_averaged_model(tmp_path, same, opened):
    content = AveragedModel(MODEL).state_dict()
    assert "n_averaged" in content
    same(opened(saved(tmp_path / "m.pt", content)), MODEL.state_dict())
    same(opened(saved(tmp_path / "m.pt", state("n_averaged"))), state("n_averaged"))


def test_two_tensors_of_one_name_are_refused(tmp_path):
    path = saved(tmp_path / "m.pt", state("a._orig_mod.w", "a.w"))
    with pytest.raises(InputError, match=r"two tensors that are 'a\.w' without .* 'a\.w'"):
        open_weights(path)
