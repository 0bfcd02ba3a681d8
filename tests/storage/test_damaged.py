"""Whatever a file holds: an error that names it, or what was written; never anything else."""

import json
import os
import struct
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from cl_merge.errors import InputError
from cl_merge.storage import open_weights

TENSORS = {"weight": torch.arange(12.0).reshape(3, 4), "steps": torch.tensor([1, 2, 3])}
WHOLE = save(TENSORS, {"format": "pt"})
HEADER = 8 + struct.unpack("<Q", WHOLE[:8])[0]

many = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read_everything(path):
    with open_weights(path) as weights:
        return {name: weights.read(name).clone() for name in weights.names}


def assert_error_or_tensors(path):
    """Either one clear error, or tensors that can be used."""
    try:
        for tensor in read_everything(path).values():
            tensor.view(torch.uint8).sum()
    except InputError as error:
        message = str(error)
    else:
        return
    assert str(path) in message
    assert "\n" not in message


def refuses(path, match=None):
    with pytest.raises(InputError, match=match) as caught:
        read_everything(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "model-1.safetensors"])
def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 300\n"
    (tmp_path / name).write_text(pointer)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    path = index if name.startswith("model") else tmp_path / name
    refuses(path, f"{name}' is a pointer of Git LFS in place of the file itself; fetch that with")


def with_header(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, stop, dtype="F32", shape=None):
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


DAMAGED = {
    "empty": b"",
    "cut in the length": WHOLE[:5],
    "cut after the length": WHOLE[:8],
    "cut in the header": WHOLE[: HEADER // 2],
    "cut at the header's last byte": WHOLE[: HEADER - 1],
    "cut after the header": WHOLE[:HEADER],
    "cut in the data": WHOLE[: HEADER + 10],
    "cut by one byte": WHOLE[:-1],
    "one byte more": WHOLE + b"\0",
    "length of zero": with_header({}, length=0),
    "length beyond the file": with_header({}, length=10**6),
    "length beyond what readers accept": with_header({}, length=10**9),
    "length that would be negative": with_header({}, length=2**64 - 1),
    "length of half of all memory": with_header({}, length=2**63),
    "no JSON": with_header(b"{]      "),
    "no object": with_header([1, 2]),
    "no UTF-8": with_header(b'{"\xff":1}'),
    "half a surrogate": with_header(
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ),
    "deep nesting": with_header(b"[" * 100_000),
    "deep nesting in an object": with_header(b'{"a":' * 50_000),
    "metadata that is no text": with_header({"__metadata__": {"a": 1}, "a": entry(0, 8)}),
    "overlap": with_header({"a": entry(0, 8), "b": entry(4, 8)}),
    "hole": with_header({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12),
    "hole at the begin": with_header({"a": entry(4, 8)}),
    "data at the end that no one owns": with_header({"a": entry(0, 4)}),
    "offsets beyond the file": with_header({"a": entry(0, 400)}),
    "offsets backwards": with_header({"a": entry(8, 0, shape=[2])}),
    "negative offsets": with_header({"a": entry(-8, 0, shape=[2])}),
    "offsets that overflow": with_header({"a": entry(0, 2**64 - 1, shape=[2])}),
    "three offsets": with_header({"a": {**entry(0, 8), "data_offsets": [0, 4, 8]}}),
    "offsets in fractions": with_header({"a": {**entry(0, 8), "data_offsets": [0.0, 8.0]}}),
    "shape too large": with_header({"a": entry(0, 8, shape=[3])}),
    "shape too small": with_header({"a": entry(0, 8, shape=[1])}),
    "shape that overflows": with_header({"a": entry(0, 8, shape=[2**62, 2**62])}),
    "shape that overflows with zero": with_header({"a": entry(0, 0, shape=[2**63, 0])}, b""),
    "negative shape": with_header({"a": entry(0, 8, shape=[-1, -2])}),
    "wrong dtype": with_header({"a": entry(0, 8, dtype="F64", shape=[2])}),
    "unknown dtype": with_header({"a": entry(0, 8, dtype="F33", shape=[2])}),
    "dtype of half a byte": with_header({"a": entry(0, 8, dtype="F4", shape=[16])}),
    "no dtype": with_header({"a": {"shape": [2], "data_offsets": [0, 8]}}),
    "a name twice": with_header(
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ),
    "a name twice, alike": with_header(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ),
    "torch.save under another name": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_safetensors_file_is_named(tmp_path, what):
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[what])
    assert str(path) in refuses(path)


@many
@given(data=st.data())
def test_no_change_of_a_header_does_more_than_raise_an_error(tmp_path, data):
    raw = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, HEADER - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    assert_error_or_tensors(path)


@many
@given(
    start=st.integers(-1, 20),
    stop=st.integers(-1, 20),
    dtype=st.sampled_from(["F32", "F64", "BF16", "U8", "BOOL", "I64", "F4", "F8_E8M0", "X"]),
    shape=st.lists(st.integers(-1, 5), max_size=3),
    size=st.integers(0, 20),
)
def test_any_header_is_read_rightly_or_refused(tmp_path, start, stop, dtype, shape, size):
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header({"a": entry(start, stop, dtype, shape)}, bytes(size)))
    assert_error_or_tensors(path)


@many
@given(content=st.binary(max_size=200), suffix=st.sampled_from(["safetensors", "pt", "ckpt"]))
def test_random_bytes_are_refused(tmp_path, content, suffix):
    path = tmp_path / f"file.{suffix}"
    path.write_bytes(content)
    assert_error_or_tensors(path)


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin", "safetensors", "txt", ""])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x03\x04" + bytes(99), b"\x80\x02}q."])
def test_no_suffix_makes_sense_of_nonsense(tmp_path, suffix, content):
    path = tmp_path / f"file.{suffix}"
    path.write_bytes(content)
    assert str(path) in refuses(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@many
@given(data=st.data(), old=st.booleans())
@pytest.mark.slow
def test_no_change_of_a_torch_file_does_more_than_raise_an_error(tmp_path, data, old):
    whole, path = tmp_path / "whole.pt", tmp_path / "model.pt"
    torch.save({"state_dict": TENSORS}, whole, _use_new_zipfile_serialization=not old)
    raw = bytearray(whole.read_bytes())
    if data.draw(st.booleans(), "cut"):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    assert_error_or_tensors(path)


def test_code_in_a_pickle_never_runs(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/sprung",)

    for old in (False, True):
        path = tmp_path / "model.pt"
        torch.save({"weight": Trap()}, path, _use_new_zipfile_serialization=not old)
        assert "runs code" in refuses(path, "Python objects")
    assert not (tmp_path / "sprung").exists()


def test_a_pickled_module_is_refused_with_what_to_save_instead(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    refuses(tmp_path / "model.pt", r"torch\.save\(model\.state_dict\(\)")


@pytest.mark.filterwarnings("error", "ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused_without_a_warning(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version", "code/__torch__.py"):
            archive.writestr(f"model/{name}", b"3\n")
    refuses(tmp_path / "model.pt", "TorchScript")


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a Tensor"),
        ({"epoch": 3, "state_dict": {"name": "x"}}, "holds no tensors by name"),
        ({1: torch.ones(1)}, "holds no tensors by name"),
        ({"weight": torch.ones(1), 1: torch.ones(1)}, "1 is the key of a tensor"),
        ({"weight": torch.eye(3).to_sparse()}, "'weight' is a sparse"),
    ],
)
def test_what_is_no_state_dict_is_refused_by_key(tmp_path, content, match):
    torch.save(content, tmp_path / "model.pt")
    refuses(tmp_path / "model.pt", match)


def sharded(folder, weight_map=None, names=("a", "b")):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        save_file({name: torch.ones(2)}, folder / f"{number}.safetensors")
    index = {
        "metadata": {},
        "weight_map": weight_map or {"a": "0.safetensors", "b": "1.safetensors"},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_sound_sharded_folder_is_read(tmp_path):
    assert list(read_everything(sharded(tmp_path))) == ["a", "b"]


@pytest.mark.parametrize(
    "file",
    [
        "../0.safetensors",
        "x/../../0.safetensors",
        "/0.safetensors",
        "..\\0.safetensors",
        "C:\\0.safetensors",
        "..",
        "",
        "0.safetensors\0",
        "0.safetensors\n",
        "0.bin",
    ],
)
def test_an_index_names_files_of_its_folder_only(tmp_path, file):
    save_file({"a": torch.ones(2)}, tmp_path / "0.safetensors")
    folder = sharded(tmp_path / "model", {"a": file, "b": "1.safetensors"})
    refuses(folder, "index.json' names the file")


@pytest.mark.parametrize("through", ["file", "folder"])
def test_an_index_does_not_lead_through_links(tmp_path, through):
    folder = sharded(tmp_path / "model", {"a": "0.safetensors", "b": "sub/1.safetensors"})
    sharded(tmp_path / "elsewhere")
    if through == "folder":
        (folder / "sub").symlink_to(tmp_path / "elsewhere")
    else:
        (folder / "sub").mkdir()
        (folder / "sub/1.safetensors").symlink_to(tmp_path / "elsewhere/1.safetensors")
    refuses(folder, "leads out of its folder")


def test_a_link_that_goes_in_circles_is_refused(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    refuses(tmp_path)
    refuses(tmp_path / "model.safetensors")


def test_the_one_file_of_a_folder_is_no_link_to_elsewhere(tmp_path):
    (tmp_path / "folder").mkdir()
    save_file(TENSORS, tmp_path / "weights.safetensors")
    (tmp_path / "folder/model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    refuses(tmp_path / "folder", "leads out of its folder")


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"a": "0.safetensors", "b": "2.safetensors"}, "2.safetensors' is missing"),
        ({"a": "0.safetensors", "b": "0.safetensors"}, "missing: b."),
        ({"a": "0.safetensors", "c": "1.safetensors"}, "missing: c. Download both again"),
        ({"b": "1.safetensors", "a": "1.safetensors"}, "missing: a."),
    ],
)
def test_an_index_names_every_tensor_once(tmp_path, weight_map, match):
    refuses(sharded(tmp_path, weight_map), match)


def test_what_the_index_does_not_name_is_left_out_and_named(tmp_path, caplog):
    folder = sharded(tmp_path)
    with open_weights(folder) as weights:
        expected = weights.read("a").clone()
    more = {"b": torch.ones(2), "a": torch.full((2,), 9.0), "more": torch.ones(1)}
    save_file(more, folder / "1.safetensors")
    with open_weights(folder) as weights:
        assert sorted(weights.names) == ["a", "b"]
        assert torch.equal(weights.read("a"), expected)
    assert "does not say so: a, more" in caplog.text


def test_a_shard_that_the_index_does_not_know_is_not_read(tmp_path):
    folder = sharded(tmp_path)
    save_file({"c": torch.ones(2)}, folder / "2.safetensors")
    assert list(read_everything(folder)) == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "0.safetensors", "a": "1.safetensors", "b": "1.safetensors"}}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_a_damaged_index_is_named(tmp_path, text):
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin1"))
    assert "model.safetensors.index.json" in refuses(folder, "no index")


def test_a_damaged_shard_is_named(tmp_path):
    folder = sharded(tmp_path)
    (folder / "1.safetensors").write_bytes(WHOLE[:-1])
    refuses(folder, "1.safetensors' is not a whole safetensors file")


def test_a_folder_without_weights_says_what_was_expected(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    refuses(tmp_path, "holds no weights; expected model.safetensors")


def test_a_folder_with_two_checkpoints_asks_which(tmp_path):
    for name in ("model", "open_clip_model"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    refuses(tmp_path, "several files of weights.*model.safetensors, open_clip_model.safetensors")


def test_a_whole_file_beside_an_index_asks_which(tmp_path):
    folder = sharded(tmp_path)
    save_file(TENSORS, folder / "model.safetensors")
    refuses(folder, "a checkpoint in one file and the index of one in shards")
    with open_weights(folder / "model.safetensors") as weights:
        assert weights.names


def test_what_is_not_there_or_no_file_is_named(tmp_path):
    refuses(tmp_path / "none.safetensors", "no file or folder.*none")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refuses(tmp_path / "pipe.safetensors", "no file or folder")
    refuses("a" * 5000 + ".safetensors", "cannot be read")
    refuses("nul\0.safetensors", "no file or folder")


def test_a_folder_named_as_a_file_of_weights_is_no_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    refuses(tmp_path, "no file or folder")


def test_a_task_vector_of_the_future_asks_for_an_update(tmp_path):
    save_file(TENSORS, tmp_path / "t.safetensors", {"cl_merge.task_vector": "9"})
    refuses(tmp_path / "t.safetensors", "version 9.*update cl_merge")


def test_a_file_that_changed_since_it_was_opened_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    with open_weights(path) as weights:
        path.unlink()
        save_file({"other": torch.ones(100)}, path)
        with pytest.raises(InputError, match="changed while it was read"):
            weights.read("weight")
        path.unlink()
        with pytest.raises(InputError, match="cannot be read"):
            weights.read("weight")
