"""What is written is whole, the same every time, and what other libraries load."""

import errno
import json
import os
import resource
import shutil
import signal
import stat
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cl_merge.errors import InputError, StorageError
from cl_merge.storage import check_output, open_weights, write_weights
from cl_merge.storage.files import remove_leftovers
from cl_merge.storage.safetensors_format import CODES, read_header

ONE = {"a": (torch.float32, (4,))}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_of_every_dtype_and_shape(tmp_path, tensors, write, same, opened):
    path = write(tmp_path / "new" / "m.safetensors", tensors, {"by": "me"})
    same(opened(path), tensors)
    loaded = load_file(path)
    assert all(loaded[name].shape == tensor.shape for name, tensor in tensors.items())
    assert all(loaded[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"by": "me", "format": "pt"}
    assert files(tmp_path) == ["new", "new/m.safetensors"]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kinds=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
            lambda n: n != "__metadata__"
        ),
        st.tuples(st.sampled_from(list(CODES)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    ),
    metadata=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])).filter(
            lambda key: key != "cl_merge.task_vector"  # says that it is one
        ),
        st.text(st.characters(exclude_categories=["Cs"])),
    ),
    cuts=st.randoms(use_true_random=False),
)
def test_any_tensors_in_any_pieces_come_back(tmp_path, same, kinds, metadata, cuts):
    path = tmp_path / "m.safetensors"
    tensors = {
        name: torch.arange(torch.Size(shape).numel()).to(dtype).reshape(shape)
        for name, (dtype, shape) in kinds.items()
    }
    pieces = []
    for name, tensor in tensors.items():
        ends = sorted({0, tensor.numel(), *(cuts.randint(0, tensor.numel()) for _ in range(3))})
        pieces += [(name, start, stop) for start, stop in pairwise(ends)]
    cuts.shuffle(pieces)
    with write_weights(path, kinds, metadata, overwrite=True) as writer:
        for name, start, stop in pieces:
            writer.write(name, start, tensors[name].reshape(-1)[start:stop])
    with open_weights(path) as weights:
        same(weights, tensors)
        assert weights.metadata == {**metadata, "format": "pt"}


def test_the_same_content_gives_the_same_bytes(tmp_path, tensors, write):
    turned = dict(reversed(tensors.items()))
    one = write(tmp_path / "1.safetensors", tensors, {"x": "1", "y": "2"})
    two = write(tmp_path / "2.safetensors", turned, {"y": "2", "x": "1"})
    assert one.read_bytes() == two.read_bytes()


def test_the_bytes_are_those_of_the_safetensors_library(tmp_path, write):
    tensors = {"b": torch.randn(3), "a": torch.randn(2, 2), "ü": torch.randn(())}
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    ours = write(tmp_path / "ours.safetensors", tensors)
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_all_data_is_aligned(tmp_path, tensors, write):
    locations, _ = read_header(write(tmp_path / "m.safetensors", tensors))
    assert all(place.start % place.dtype.itemsize == 0 for place in locations.values())


def test_many_threads_may_write_to_two_outputs_at_once(tmp_path):
    values = torch.arange(100_000, dtype=torch.int32)
    entries = {str(i): (values.dtype, values.shape) for i in range(5)}
    first, second = tmp_path / "1.safetensors", tmp_path / "2"
    jobs = [(name, start) for name in entries for start in range(0, 100_000, 5000)]
    with (
        write_weights(first, entries, {}) as one,
        write_weights(second, entries, {}, shard_bytes=500_000) as two,
        ThreadPoolExecutor(4) as pool,
    ):

        def work(job):
            name, start = job
            for writer in (one, two):
                writer.write(name, start, values[start : start + 5000] + int(name))

        list(pool.map(work, jobs))
    for path in (first, second):
        with open_weights(path) as weights:
            assert all(torch.equal(weights.read(name), values + int(name)) for name in entries)
    assert len(files(second)) == 6


def test_metadata_that_is_known_only_at_the_end(tmp_path, opened):
    entries = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with write_weights(
        tmp_path / "out", entries, {"hash": "0000", "x": "1"}, shard_bytes=8
    ) as writer:
        for name in entries:
            writer.write(name, 0, torch.ones(2))
        writer.amend({"hash": "abc"})
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert opened(shard).metadata == {"format": "pt", "hash": "abc", "x": "1"}


def test_metadata_cannot_grow(tmp_path):
    with (
        pytest.raises(RuntimeError, match="longer"),
        write_weights(tmp_path / "m.safetensors", ONE, {"hash": "0"}) as writer,
    ):
        writer.amend({"hash": "0" * 99})
    assert files(tmp_path) == []


def test_values_of_any_strides_that_need_a_gradient(tmp_path, opened):
    matrix = torch.nn.Parameter(torch.randn(3, 4))
    with write_weights(tmp_path / "m.safetensors", {"a": (torch.float32, (4, 3))}, {}) as writer:
        writer.write("a", 0, matrix.t())
    assert torch.equal(opened(tmp_path / "m.safetensors").read("a"), matrix.t().reshape(-1))


# ---- folders


def tiny_bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return BertModel(config)


@pytest.mark.parametrize("shard", ["10KB", "1GB"])
@pytest.mark.slow
def test_transformers_loads_what_is_written_like_its_own(tmp_path, write, shard):
    from transformers import BertModel

    model = tiny_bert()
    model.save_pretrained(tmp_path / "base", max_shard_size=shard)
    (tmp_path / "base/tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "base/pytorch_model.bin").write_bytes(b"not copied")
    with open_weights(tmp_path / "base") as base:
        tensors = {name: base.read(name).reshape(base.shape(name)) + 1 for name in base.names}
        size = 10_000 if shard == "10KB" else 10**9
        write(tmp_path / "out", tensors, base.metadata, like=base, shard_bytes=size)
    loaded = BertModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    found = files(tmp_path / "out")
    assert {"config.json", "tokenizer.model"} <= set(found)
    assert "pytorch_model.bin" not in found
    assert ("model.safetensors" in found) == (shard == "1GB")
    assert ("model.safetensors.index.json" in found) == (shard == "10KB")


def test_open_clip_loads_what_is_written_like_its_own(tmp_path, write):
    import open_clip

    tower = {"width": 32, "layers": 1, "heads": 2}
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
        "text_cfg": {"context_length": 8, "vocab_size": 64, **tower},
    }
    model = open_clip.CLIP(**config)
    base = tmp_path / "base"
    base.mkdir()
    (base / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
    save_file(model.state_dict(), base / "open_clip_model.safetensors")
    tensors = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    with open_weights(base) as like:
        # Larger than the limit, but in one piece, as open_clip reads no index.
        write(tmp_path / "out", tensors, {}, like=like, shard_bytes=1000)
    assert files(tmp_path / "out") == ["open_clip_config.json", "open_clip_model.safetensors"]
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_folder_is_sharded_as_the_hub_does(tmp_path, write, same, opened):
    tensors = {f"t{i}": torch.randn(10) for i in range(5)} | {"large": torch.randn(100)}
    folder = write(tmp_path / "out", tensors, shard_bytes=100)
    same(opened(folder), tensors)
    assert [name for name in files(folder) if "safetensors" in name] == [
        "model-00001-of-00004.safetensors",
        "model-00002-of-00004.safetensors",
        "model-00003-of-00004.safetensors",
        "model-00004-of-00004.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 600
    assert index["weight_map"]["t2"] == "model-00002-of-00004.safetensors"
    again = write(tmp_path / "again", tensors, shard_bytes=100)
    assert contents(folder) == contents(again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]


@pytest.mark.parametrize(
    ("base", "written"),
    [
        ("model.safetensors", "model.safetensors"),
        ("open_clip_model.safetensors", "open_clip_model.safetensors"),
        ("mine.safetensors", "mine.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
        ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
        ("epoch=3.ckpt", "model.safetensors"),
    ],
)
def test_a_folder_has_the_names_of_the_base(tmp_path, write, base, written):
    (tmp_path / "base").mkdir()
    save = save_file if base.endswith(".safetensors") else torch.save
    save({"a": torch.ones(2)}, tmp_path / "base" / base)
    with open_weights(tmp_path / "base") as like:
        write(tmp_path / "out", {"a": torch.ones(2)}, like=like)
    assert files(tmp_path / "out") == [written]


def test_a_file_as_base_brings_nothing_along(tmp_path, write):
    save_file({"a": torch.ones(2)}, tmp_path / "mine.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with open_weights(tmp_path / "mine.safetensors") as like:
        write(tmp_path / "out", {"a": torch.ones(2)}, like=like)
    assert files(tmp_path / "out") == ["model.safetensors"]


def test_an_empty_folder_is_taken_also_through_a_link(tmp_path, write):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write(tmp_path / "link", {"a": torch.ones(2)})
    assert files(tmp_path) == ["empty", "empty/model.safetensors", "link"]


# ---- whole or not at all


@pytest.mark.parametrize("name", ["m.safetensors", "out"])
def test_nothing_but_what_is_hidden_is_there_before_the_end(tmp_path, name):
    with write_weights(tmp_path / name, ONE, {}) as writer:
        writer.write("a", 0, torch.ones(4))
        (hidden,) = tmp_path.iterdir()
        assert hidden.name.startswith(f".{name}.")
    assert files(tmp_path)[0] == name


@pytest.mark.parametrize("name", ["m.safetensors", "out"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, OSError])
def test_a_block_that_raises_leaves_nothing(tmp_path, name, error):
    with pytest.raises(error) as caught, write_weights(tmp_path / name, ONE, {}) as writer:
        fail(writer, error)
    assert type(caught.value) is error
    assert files(tmp_path) == []


def fail(writer, error):
    writer.write("a", 0, torch.ones(4))
    raise error


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("m.safetensors", "in the block"),
        ("m.safetensors", "fsync"),
        ("m.safetensors", "replace"),
        ("out", "in the block"),
        ("out", "fsync"),
        ("out", "replace"),
    ],
)
@pytest.mark.parametrize("cleaner", ["next write", "remove_leftovers"])
def test_a_killed_process_leaves_only_what_is_hidden_until_the_next_write(
    tmp_path, write, name, call, cleaner
):
    entries = {n: (torch.float32, (1000,)) for n in "ab"}
    (tmp_path / ".out.0123456z.tmp").touch()
    process = os.fork()
    if process == 0:
        with write_weights(tmp_path / name, entries, {}, shard_bytes=4000) as writer:
            for entry in entries:
                writer.write(entry, 0, torch.ones(1000))
            if call == "in the block":
                die()
            setattr(os, call, die)
    _, status = os.waitpid(process, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 2
    assert all(name.startswith(".") for name in left)
    if cleaner == "next write":
        write(tmp_path / name, {"a": torch.ones(2)})
    else:
        remove_leftovers(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left - {name} == {".out.0123456z.tmp"}


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["m.safetensors", "out"])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_disk_that_fills_leaves_nothing(tmp_path, name, call):
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(StorageError, match=rf"{name}' cannot be written \((No space|File too)"),
        write_weights(tmp_path / name, ONE, {}) as writer,
    ):
        fill(writer, patch, call)
    assert files(tmp_path) == []


def fill(writer, patch, call):
    writer.write("a", 0, torch.ones(3))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if call == "write":
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    else:
        patch.setattr(os, call, full)
    try:
        writer.write("a", 3, torch.ones(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["m.safetensors", "out"])
def test_a_full_disk_shows_before_the_work_begins(tmp_path, monkeypatch, name):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=20))
    begun = []
    with (
        pytest.raises(StorageError, match="No space left"),
        write_weights(tmp_path / name, ONE, {}) as writer,
    ):
        begun.append(writer)
    assert not begun
    assert files(tmp_path) == []


def test_more_than_any_disk_holds_is_refused(tmp_path):
    entries = {"a": (torch.float64, (1 << 50,))}
    with pytest.raises(StorageError), write_weights(tmp_path / "m.safetensors", entries, {}):
        pass
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "pieces", [[], [(0, 3)], [(1, 4)], [(0, 2), (3, 4)], [(0, 3), (2, 4)], [(0, 4), (0, 4)]]
)
def test_every_element_is_written_exactly_once(tmp_path, pieces):
    with (
        pytest.raises(RuntimeError, match="'a' was not written exactly once"),
        write_weights(tmp_path / "m.safetensors", ONE, {}) as writer,
    ):
        write_pieces(writer, pieces)
    assert files(tmp_path) == []


def write_pieces(writer, pieces):
    for start, stop in pieces:
        writer.write("a", start, torch.ones(stop - start))


@pytest.mark.parametrize(
    ("start", "values"),
    [(0, torch.ones(5)), (-1, torch.ones(2)), (3, torch.ones(2)), (0, torch.ones(2).double())],
)
def test_a_stretch_that_does_not_fit_is_refused(tmp_path, start, values):
    with (
        pytest.raises(RuntimeError, match="do not fit"),
        write_weights(tmp_path / "m.safetensors", ONE, {}) as writer,
    ):
        writer.write("a", start, values)


def test_others_may_read_what_was_written_as_any_new_file(tmp_path, write):
    before = os.umask(0o027)
    try:
        write(tmp_path / "m.safetensors", {"a": torch.ones(2)})
        write(tmp_path / "out", {"a": torch.ones(2)})
    finally:
        os.umask(before)
    for path in (tmp_path / "m.safetensors", tmp_path / "out/model.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


# ---- where it may go


def test_a_file_is_replaced_only_where_that_is_allowed(tmp_path, write):
    path = tmp_path / "m.safetensors"
    path.write_text("former")
    with pytest.raises(InputError, match="exists"):
        write(path, {"a": torch.ones(2)})
    assert path.read_text() == "former"
    write(path, {"a": torch.ones(2)}, overwrite=True)
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert files(tmp_path) == ["m.safetensors"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(StorageError, match="exists"), write_weights(path, ONE, {}) as writer:
        write_and_interfere(writer, path)
    assert path.read_text() == "theirs"
    assert files(tmp_path) == ["m.safetensors"]


def test_a_folder_that_fills_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(StorageError), write_weights(path, ONE, {}) as writer:
        write_and_interfere(writer, path / "theirs")
    assert files(tmp_path) == ["out", "out/theirs"]


@pytest.mark.parametrize("name", ["m.safetensors", "out"])
def test_of_two_that_write_to_one_name_at_once_the_later_one_wins(tmp_path, write, name):
    path = tmp_path / name
    with (
        pytest.raises(StorageError, match="another process writes to the same name"),
        write_weights(path, {f"t{i}": (torch.float32, (4,)) for i in range(3)}, {}) as writer,
    ):
        write_and_be_overtaken(writer, path, write)
    assert load_file(path if path.is_file() else path / "model.safetensors").keys() == {"theirs"}
    assert [each.name for each in tmp_path.iterdir()] == [name]


def write_and_be_overtaken(writer, path, write):
    write(path, {"theirs": torch.ones(2)})
    for number in range(3):
        writer.write(f"t{number}", 0, torch.ones(4))


def write_and_interfere(writer, theirs):
    writer.write("a", 0, torch.ones(4))
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("theirs")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_holds_something_is_never_replaced(tmp_path, write, overwrite):
    (tmp_path / "theirs").write_text("theirs")
    with pytest.raises(InputError, match="is not empty"):
        write(tmp_path, {"a": torch.ones(2)}, overwrite=overwrite)
    with pytest.raises(InputError, match="is a file"):
        write(tmp_path / "theirs", {"a": torch.ones(2)}, overwrite=overwrite)
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        write(tmp_path / "x.safetensors", {"a": torch.ones(2)}, overwrite=overwrite)


def test_a_folder_where_a_disk_is_mounted_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(InputError, match="a folder within it"):
        check_output(tmp_path)


def test_an_output_never_harms_an_input(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "in.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "soft.safetensors").symlink_to("in.safetensors")
    (tmp_path / "hard.safetensors").hardlink_to(tmp_path / "in.safetensors")
    inputs = [tmp_path / "in.safetensors", folder]
    for name in ["in", "soft", "hard", "folder/new", "folder/sub/new"]:
        with pytest.raises(InputError, match="is, or lies within, the input"):
            check_output(tmp_path / f"{name}.safetensors", inputs, overwrite=True)
    for inside in ([folder], [folder / "model.safetensors.index.json"]):
        with pytest.raises(InputError, match="is, or lies within, the input"):
            check_output(folder / "out", inside)
    check_output(tmp_path / "out.safetensors", inputs)
    check_output(tmp_path / "out", inputs)
    check_output(tmp_path / "folder2", inputs)


def test_a_place_that_cannot_be_written_to_is_named(tmp_path, write):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="m.safetensors' cannot be written"):
        write(tmp_path / "file" / "m.safetensors", {"a": torch.ones(2)})


@pytest.mark.parametrize("name", ["a" * 235 + ".safetensors", "ä" * 124])
def test_a_name_that_is_too_long_is_named(tmp_path, write, name):
    with pytest.raises(StorageError, match="' cannot be written \\(File name too long\\)"):
        write(tmp_path / name, {"a": torch.ones(2)})


@pytest.mark.parametrize(
    ("name", "dtype", "match"),
    [
        ("a", torch.complex128, "'a' of torch.complex128 cannot be written"),
        ("__metadata__", torch.float32, "'__metadata__' of"),
        ("half \ud800", torch.float32, "is no text"),
    ],
)
def test_what_safetensors_cannot_hold_is_named(tmp_path, name, dtype, match):
    with (
        pytest.raises(InputError, match=match),
        write_weights(tmp_path / "m.safetensors", {name: (dtype, (2,))}, {}),
    ):
        pass
    assert files(tmp_path) == []


def test_no_handle_stays_open(tmp_path, write):
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        write(tmp_path / str(number), {"a": torch.ones(9), "b": torch.ones(9)}, shard_bytes=36)
        with open_weights(tmp_path / str(number)) as weights:
            weights.read("a")
    assert len(os.listdir("/proc/self/fd")) == before
