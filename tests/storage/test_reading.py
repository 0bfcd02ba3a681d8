"""Every kind of checkpoint gives the tensors that were written, in little memory."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import lightning
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from cl_merge import TaskVector
from cl_merge.errors import InputError
from cl_merge.storage import open_weights
from cl_merge.storage.quantize import stored
from cl_merge.storage.safetensors_format import CODES


def simple(*names):
    return {name: torch.full((2, 2), float(i)) for i, name in enumerate(names or ("a", "b"))}


def test_a_safetensors_file_of_every_dtype_and_shape(tmp_path, tensors, same, opened):
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt", "by": "me"})
    weights = opened(tmp_path / "m.safetensors")
    same(weights, tensors)
    assert weights.kind == "safetensors"
    assert weights.metadata == {"format": "pt", "by": "me"}
    assert not weights.is_task_vector
    assert weights.folder is None


@pytest.mark.parametrize("old", [False, True])
def test_a_torch_file_of_every_dtype_and_shape(tmp_path, tensors, same, opened, old):
    if old:  # that format has a class for each dtype, and none for newer ones
        known = [t.dtype for t in map(torch.tensor, ([1.0], [1], [True]))]
        known += [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8]
        tensors = {name: t for name, t in tensors.items() if t.dtype in known}
    torch.save(tensors, tmp_path / "m.pt", _use_new_zipfile_serialization=not old)
    weights = opened(tmp_path / "m.pt")
    same(weights, tensors)
    assert weights.kind == "torch checkpoint"
    assert weights.metadata == {}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    dtype=st.sampled_from(list(CODES)),
    shape=st.lists(st.integers(0, 6), max_size=4),
    order=st.randoms(use_true_random=False),
    start=st.integers(0, 1300),
    length=st.integers(0, 1300),
)
def test_any_stretch_of_any_strides(tmp_path, dtype, shape, order, start, length):
    axes = list(range(len(shape)))
    order.shuffle(axes)
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype).permute(axes)
    torch.save({"t": tensor}, tmp_path / "t.pt")
    save_file({"t": tensor.contiguous()}, tmp_path / "t.safetensors")
    expected = tensor.contiguous().reshape(-1)[start : start + length]
    for file in ("t.pt", "t.safetensors"):
        with open_weights(tmp_path / file) as weights:
            read = weights.read("t", start, start + length)
            assert weights.shape("t") == tensor.shape
            assert read.dtype == dtype
            assert torch.equal(read.view(torch.uint8), expected.contiguous().view(torch.uint8))


def test_names_are_in_the_order_of_the_file(tmp_path, opened):
    wide, narrow = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float16)
    save_file({"a": narrow, "b": wide, "c": narrow.clone()}, tmp_path / "m.safetensors")
    assert opened(tmp_path / "m.safetensors").names == ["b", "a", "c"]
    torch.save({"b": wide, "a": narrow}, tmp_path / "m.pt")
    assert opened(tmp_path / "m.pt").names == ["b", "a"]


def test_tensors_that_are_not_aligned_are_read_aligned(tmp_path, opened):
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    text = json.dumps(header).encode()
    values = torch.tensor([1.5, -2.0])
    data = bytes(3) + values.numpy().tobytes()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    read = opened(tmp_path / "m.safetensors").read("b")
    assert read.data_ptr() % 4 == 0
    assert torch.equal(read, values)


@pytest.mark.parametrize("kind", ["file", "shards", "task vector", "int8"])
def test_names_lose_what_wrappers_add_in_safetensors_too(tmp_path, opened, kind):
    tensors = simple("a._orig_mod.w", "module._checkpoint_wrapped_module.b")
    path = tmp_path / "m.safetensors"
    if kind == "shards":
        path = tmp_path / "m.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "m.safetensors")}))
    if kind in ("file", "shards"):
        save_file(tensors, tmp_path / "m.safetensors")
    else:
        TaskVector(tensors).save(path, "int8" if kind == "int8" else "float32")
    weights = opened(path)
    assert sorted(weights.names) == ["a.w", "module.b"]
    assert weights.read("module.b").tolist() == [1.0] * 4


def test_tied_tensors_are_there_under_both_names(tmp_path, opened, same):
    shared = torch.randn(4, 3)
    torch.save({"a": shared, "b": shared, "part": shared[1:3]}, tmp_path / "m.pt")
    same(opened(tmp_path / "m.pt"), {"a": shared, "b": shared, "part": shared[1:3]})


def test_parameters_need_no_gradient_when_read(tmp_path, opened):
    torch.save({"a": nn.Parameter(torch.ones(2))}, tmp_path / "m.pt")
    assert not opened(tmp_path / "m.pt").read("a").requires_grad


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_a_training_checkpoint_gives_its_weights(tmp_path, opened, same, key):
    torch.save({"epoch": 3, key: simple(), "optimizer": {"lr": 0.1}}, tmp_path / "m.pt")
    same(opened(tmp_path / "m.pt"), simple())


@pytest.mark.parametrize("name", ["model_best.pth.tar", "checkpoint-3.PTH.TAR"])
def test_a_checkpoint_as_timm_names_it(tmp_path, opened, same, name):
    torch.save({"state_dict": simple(), "state_dict_ema": simple("a", "b")}, tmp_path / name)
    same(opened(tmp_path / name), simple())
    same(opened(tmp_path), simple())
    same(opened(f"{tmp_path / name}:state_dict_ema"), simple("a", "b"))


def test_a_wrapper_before_all_names_is_left_out(tmp_path, opened, same):
    torch.save({"state_dict": simple("module.a", "module.b")}, tmp_path / "m.pt")
    same(opened(tmp_path / "m.pt"), simple())


def test_a_wrapper_before_some_names_stays(tmp_path, opened, same):
    torch.save(simple("module.a", "b"), tmp_path / "m.pt")
    same(opened(tmp_path / "m.pt"), simple("module.a", "b"))


def test_a_lightning_checkpoint(tmp_path, opened, same):
    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

    model = Model()
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "m.ckpt", weights_only=True)
    weights = opened(tmp_path / "m.ckpt")
    assert weights.kind == "Lightning checkpoint"
    same(weights, model.state_dict())


def test_a_task_vector_is_known_by_its_metadata(tmp_path, opened, same):
    vector = TaskVector({"a": torch.randn(3)}, {"task": "birds"})
    vector.save(tmp_path / "t.safetensors")
    weights = opened(tmp_path / "t.safetensors")
    same(weights, dict(vector))
    assert weights.is_task_vector
    assert weights.kind == "task vector"
    assert weights.metadata["task"] == "birds"


def test_a_quantised_task_vector_is_read_as_its_values(tmp_path, opened, same):
    vector = TaskVector({"a": torch.randn(64, 64), "b": torch.randn(3)}, {"task": "birds"})
    vector.save(tmp_path / "t.safetensors", store="int4")
    weights = opened(tmp_path / "t.safetensors")
    same(weights, stored(vector, "int4"))
    assert weights.is_task_vector
    assert weights.kind == "task vector"
    assert weights.metadata["task"] == "birds"


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "open_clip_model.safetensors",
        "other.safetensors",
        "pytorch_model.bin",
        "open_clip_pytorch_model.bin",
        "epoch=3.ckpt",
    ],
)
def test_a_folder_with_one_checkpoint(tmp_path, opened, same, name):
    save = save_file if name.endswith(".safetensors") else torch.save
    save(simple(), tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    torch.save({"lr": 0.1}, tmp_path / "training_args.bin")
    weights = opened(tmp_path)
    same(weights, simple())
    assert weights.path == weights.folder == tmp_path
    assert weights.file_name == name


def test_safetensors_go_before_torch_files(tmp_path, opened):
    save_file(simple("right"), tmp_path / "model.safetensors")
    torch.save(simple("wrong"), tmp_path / "pytorch_model.bin")
    assert opened(tmp_path).names == ["right"]


def test_the_usual_name_goes_before_others(tmp_path, opened):
    save_file(simple("right"), tmp_path / "model.safetensors")
    save_file(simple("wrong"), tmp_path / "adapter_model.safetensors")
    assert opened(tmp_path).names == ["right"]


def sharded(folder, count):
    folder.mkdir(exist_ok=True, parents=True)
    tensors, weight_map = {}, {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        # Names against the order of the files.
        tensors[f"t{count - number}"] = weight = torch.randn(3, 5)
        save_file({f"t{count - number}": weight}, folder / file, {"number": str(number)})
        weight_map[f"t{count - number}"] = file
    text = json.dumps({"metadata": {}, "weight_map": dict(sorted(weight_map.items()))})
    (folder / "model.safetensors.index.json").write_text(text)
    return tensors


def test_a_sharded_folder_or_its_index(tmp_path, opened, same):
    tensors = sharded(tmp_path, 12)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        weights = opened(path)
        same(weights, tensors)
        assert weights.names == list(tensors)
        assert weights.kind == "sharded safetensors"
        assert weights.metadata == {"number": "0"}
        assert weights.path == path
        assert weights.folder == tmp_path


def test_a_snapshot_in_the_cache_of_the_hub(tmp_path, opened, same):
    home = tmp_path / "models--me--mine"
    snapshot = home / "snapshots/abc"
    tensors = sharded(snapshot, 2)
    (home / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(home / "blobs" / str(number))
        file.symlink_to(f"../../blobs/{number}")
    same(opened(snapshot), tensors)
    (tmp_path / "link").symlink_to(snapshot)
    same(opened(tmp_path / "link"), tensors)


def test_a_model_of_transformers_saved_in_shards(tmp_path, opened, same):
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    weights = opened(tmp_path)
    assert weights.kind == "sharded safetensors"
    same(weights, model.state_dict())


def sharded_pickles(folder, names=("b", "a"), stem="pytorch_model", prefix=""):
    folder.mkdir(exist_ok=True)
    tensors = {f"{prefix}{name}": torch.randn(3, 5) for name in names}
    table = {}
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        table[name] = f"{stem}-{number:05}-of-{len(names):05}.bin"
        torch.save({name: tensor}, folder / table[name])
    text = json.dumps({"metadata": {}, "weight_map": table})
    (folder / f"{stem}.bin.index.json").write_text(text)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("stem", ["pytorch_model", "mine"])
def test_a_folder_of_sharded_torch_files_or_its_index(tmp_path, opened, same, stem):
    tensors = sharded_pickles(tmp_path, stem=stem, prefix="module._orig_mod.")
    torch.save({"lr": 0.1}, tmp_path / "training_args.bin")
    for path in (tmp_path, tmp_path / f"{stem}.bin.index.json"):
        weights = opened(path)
        same(weights, tensors)
        assert weights.names == ["b", "a"]
        assert weights.kind == "sharded torch checkpoint"
        assert weights.path == path
        assert weights.folder == tmp_path
    save_file(simple("right"), tmp_path / "model.safetensors")
    assert opened(tmp_path).names == ["right"]


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"a": "../x.bin", "b": "1.bin"}, "expected a .bin file in the same folder"),
        ({"a": "0.safetensors"}, "expected a .bin file in the same folder"),
        ({"a": "2.bin"}, "2.bin' is missing"),
        ({"a": "0.bin", "c": "1.bin"}, "missing: c. Download both again"),
        ({"a": "0.bin", "b": "0.bin"}, "missing: b."),
    ],
)
def test_an_index_of_torch_files_names_every_tensor_once(tmp_path, table, match):
    for number, name in enumerate("ab"):
        torch.save({name: torch.ones(2)}, tmp_path / f"{number}.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(InputError, match=match):
        open_weights(tmp_path)


def test_many_shards_need_few_handles(tmp_path, opened):
    tensors = sharded(tmp_path, 12)
    weights = opened(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for name in [*tensors, *tensors]:
        assert torch.equal(weights.read(name), tensors[name].reshape(-1))
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_views_stay_what_they_are_while_other_shards_are_read(tmp_path, opened):
    tensors = sharded(tmp_path, 12)
    weights = opened(tmp_path)
    views = {name: weights.read(name) for name in tensors}
    assert all(torch.equal(views[name], tensors[name].reshape(-1)) for name in tensors)


def test_many_threads_read_what_one_does(tmp_path, opened):
    tensors = sharded(tmp_path, 12)
    weights = opened(tmp_path)
    barrier = threading.Barrier(4)

    def work(seed):
        barrier.wait()
        names = list(tensors)
        for step in range(300):
            name = names[(step * (seed + 1)) % len(names)]
            if not torch.equal(weights.read(name), tensors[name].reshape(-1)):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_views_outlive_the_checkpoint_which_reads_no_more(tmp_path, suffix):
    save = save_file if suffix == "safetensors" else torch.save
    save(simple(), tmp_path / f"m.{suffix}")
    with open_weights(tmp_path / f"m.{suffix}") as weights:
        view = weights.read("b")
    assert view.tolist() == [1.0] * 4
    with pytest.raises(RuntimeError, match="was closed"):
        weights.read("b")


def test_reading_a_large_file_takes_no_memory_of_its_own(tmp_path, opened):
    size, step = 100 << 20, 1 << 20
    save_file({"a": torch.zeros(size, dtype=torch.int8)}, tmp_path / "m.safetensors")
    weights = opened(tmp_path / "m.safetensors")
    before = own_memory()
    for start in range(0, size, step):
        assert not weights.read("a", start, start + step).any()
    assert own_memory() - before < 16 << 20


def own_memory():
    """Bytes of this process that are no pages of files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))
