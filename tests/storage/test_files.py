"""Files are there whole or not at all, and a bad one is named."""

import errno
import json
import os
import re
import resource
import signal
import stat
from collections.abc import Sized
from pathlib import Path

import pytest
import torch
from forked import forked
from torch import nn

from cl_merge.errors import InputError, StorageError
from cl_merge.storage.files import (
    atomic_write,
    check_state,
    load_state,
    load_tensors,
    remove_leftovers,
    save_state,
    save_tensors,
)


def test_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "folders" / "file.txt"
    for text in ("first", "second"):
        with atomic_write(path) as temporary:
            assert temporary.parent == path.parent
            temporary.write_text(text)
        assert path.read_text() == text
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_former_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("former")
    with pytest.raises(error), atomic_write(path) as temporary:
        _write_half(temporary, error)
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def _write_half(temporary, error):
    temporary.write_text("half")
    raise error


def test_a_failed_first_write_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "file.txt"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_is_killed_leaves_the_former_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("former")

    def die():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(die, tmp_path / "said") == -signal.SIGKILL
    assert path.read_text() == "former"


def test_others_may_read_what_was_written_as_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "file.safetensors", {"a": torch.ones(2)}, {})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_all_tensors_come_back_equal(tmp_path):
    base = torch.arange(12.0)
    tensors = {
        "whole": base,
        "shares memory": base[2:5],
        "transposed": base.view(3, 4).t(),
        "strided": base[::3],
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "also empty": torch.empty(2, 0),
        "parameter": nn.Parameter(torch.ones(2)),
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
        "float16": torch.ones(3, dtype=torch.float16),
        "float64": torch.full((2,), 1 / 3, dtype=torch.float64),
        "integer": torch.tensor([1, -2]),
        "boolean": torch.tensor([True, False]),
    }
    save_tensors(tmp_path / "file.safetensors", tensors, {"name": "Größe"})
    loaded, metadata = load_tensors(tmp_path / "file.safetensors")
    assert metadata == {"name": "Größe"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("metadata", [{}, {"a": "b"}])
def test_a_file_may_hold_no_tensor(tmp_path, metadata):
    save_tensors(tmp_path / "file.safetensors", {}, metadata)
    assert load_tensors(tmp_path / "file.safetensors") == ({}, metadata)


def test_changing_what_was_loaded_does_not_change_the_file(tmp_path):
    path = tmp_path / "file.safetensors"
    save_tensors(path, {"a": torch.ones(2)}, {})
    load_tensors(path)[0]["a"].fill_(9)
    assert load_tensors(path)[0]["a"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_a_missing_file_is_named(tmp_path, name):
    path = tmp_path / name
    message = f"there is no file '{path}'; check the path"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_tensors(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, share):
    path = tmp_path / "file.safetensors"
    save_tensors(path, {"a": torch.ones(100), "b": torch.ones(50)}, {})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError) as caught:
        load_tensors(path)
    assert re.fullmatch(
        f"'{path}' is not a whole safetensors file \\(.+\\); it is corrupt, cut short or of "
        "another format: write or download it again",
        str(caught.value),
    )


def _with_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 some other format, and long enough to have a header",
        (1 << 60).to_bytes(8, "little") + b"{}",
        _with_header("no table"),
        _with_header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}),
        _with_header({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}),
        _with_header(
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            }
        ),
    ],
    ids=["other format", "endless header", "no table", "short data", "dtype", "overlap"],
)
def test_a_corrupt_file_is_named(tmp_path, content):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"'{re.escape(str(path))}' is not a whole safetensors"):
        load_tensors(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read anything")
def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "file.safetensors"
    save_tensors(path, {"a": torch.ones(2)}, {})
    path.chmod(0)
    with pytest.raises(InputError, match=f"'{path}' cannot be read \\(.*ermission"):
        load_tensors(path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "match"),
    [
        ({"a": torch.ones(2, dtype=torch.complex128)}, {}, "'a' of torch.complex128 cannot be"),
        ({"\ud800": torch.ones(2)}, {}, "is no text"),
        ({"a": torch.ones(2)}, {"task": 3}, "metadata are text by name, but 'task' is 3"),
    ],
)
def test_what_the_format_cannot_hold_is_named_and_not_written(tmp_path, tensors, metadata, match):
    with pytest.raises(InputError, match=match):
        save_tensors(tmp_path / "file.safetensors", tensors, metadata)
    assert list(tmp_path.iterdir()) == []


def test_the_same_content_gives_the_same_bytes(tmp_path):
    metadata = {f"key {i}": 'a "quoted" naïve\nvalue ' * i for i in range(20)}
    tensors = {"w": torch.arange(6.0).view(2, 3), "v": torch.ones(3, dtype=torch.int8)}
    written = set()
    for number in range(5):
        path = tmp_path / f"{number}.safetensors"
        save_tensors(path, tensors, metadata)
        found, kept = load_tensors(path)
        assert kept == metadata
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        written.add(path.read_bytes())
    assert len(written) == 1


def write_bytes(path, tensors):
    with atomic_write(path) as temporary:
        temporary.write_bytes(bytes(10 * tensors["w"].numel()))


@pytest.mark.parametrize(
    "write",
    [lambda path, tensors: save_tensors(path, tensors, {}), save_state, write_bytes],
    ids=["tensors", "state", "bytes"],
)
def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path, write):
    path, big = tmp_path / "folder" / "file", {"w": torch.zeros(100_000)}
    path.parent.mkdir()
    path.write_text("former")

    def fill_up():
        """Write with no file longer than 100 kB, as on a full disk."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            write(path, big)
        except StorageError as error:
            return error

    said = forked(fill_up, tmp_path / "said")
    assert said.startswith(f"'{path}' cannot be written (")
    assert said.endswith("); nothing that was there before is lost")
    assert "\n" not in said
    assert path.read_text() == "former"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_loses_nothing(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    path.write_text("former")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    message = r"cannot be written \(No space left on device\)"
    with pytest.raises(StorageError, match=message), atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with pytest.raises(StorageError, match=r"file/state.ckpt' cannot be written \("):
        save_state(blocked / "state.ckpt", {})


def test_errors_of_the_block_itself_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), atomic_write(tmp_path / "file"):
        raise RuntimeError("mine")


def test_leftovers_of_killed_writers_go_and_nothing_else(tmp_path):
    kept = ["file", "notes.tmp", ".hidden.tmp", ".file.0123456z.tmp", ".tmp-notes", "sub/.lock"]
    gone = [".file.01234567.tmp", "sub/.state.ckpt.deadbeef.tmp", "sub/.tmpAb3xYz"]
    gone += [".out.deadbeef.tmp/model.safetensors"]
    for name in kept + gone:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")}
    assert left == {"sub", *kept}


def test_a_state_comes_back_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "state.ckpt"
    state = {"task": 1, "tensors": {"w": torch.arange(1000.0)}, "names": ["a"], "nothing": None}
    save_state(path, state)
    found = load_state(path)
    assert torch.equal(found.pop("tensors")["w"], state.pop("tensors")["w"])
    assert found == state
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"state.ckpt' is not a whole checkpoint \("):
        load_state(path)
    path.write_bytes(b"anything")
    with pytest.raises(InputError, match="is not a whole checkpoint"):
        load_state(path)
    with pytest.raises(InputError, match="there is no file"):
        load_state(tmp_path / "none.ckpt")


def test_a_byte_of_a_state_that_has_changed_is_noticed(tmp_path):
    path = tmp_path / "state.ckpt"
    save_state(path, {"w": torch.zeros(1000)})
    check_state(path)
    content = bytearray(path.read_bytes())
    place = content.index(bytes(4000)) + 2000
    content[place] = 1
    path.write_bytes(content)
    assert load_state(path)["w"].count_nonzero() == 1  # which reading does not notice
    with pytest.raises(InputError, match=r"state.ckpt' is not a whole checkpoint \('.*' in it has"):
        check_state(path)
    path.write_bytes(content[:100])
    with pytest.raises(InputError, match=r"state.ckpt' is not a whole checkpoint \("):
        check_state(path)


@pytest.mark.parametrize("value", [Path("a"), nn.Identity(), Sized])
def test_a_state_that_could_not_be_read_again_is_not_written(tmp_path, value):
    path = tmp_path / "state.ckpt"
    save_state(path, {"former": 1})
    with pytest.raises(InputError) as caught:
        save_state(path, {"hyper_parameters": {"value": value}})
    assert re.fullmatch(
        f"'{path}' could not be read again \\(.*Unsupported global: GLOBAL \\S+ was not an allowed "
        "global by default\\); keep only tensors and plain values in hyper-parameters and in the "
        "states of callbacks",
        str(caught.value),
    )
    assert load_state(path) == {"former": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_code_in_a_state_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"x": Evil()}, tmp_path / "state.ckpt")
    with pytest.raises(InputError, match="is not a whole checkpoint"):
        load_state(tmp_path / "state.ckpt")
    assert not (tmp_path / "made").exists()
