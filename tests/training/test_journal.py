"""The journal: whole lines only, whatever happens to the file."""

import errno
import math
from unittest.mock import Mock

import pytest
from forked import forked

from cl_merge.errors import InputError, StorageError
from cl_merge.training.journal import Journal, only_process

RECORDS = [{"task": 0, "value": 0.1 + 0.2}, {"task": 1, "names": ["ä", "b"], "none": None}]


def test_what_goes_in_comes_out_in_order(tmp_path):
    path = tmp_path / "new" / "journal.jsonl"
    journal = Journal(path)
    assert journal.records == []
    for record in RECORDS:
        journal.append(record)
    assert journal.records == Journal(path).records == RECORDS
    journal.append({"x": float("nan"), "y": float("inf"), "pair": (1, 2), 3: "number"})
    found = Journal(path).records[-1]
    assert math.isnan(found.pop("x"))
    assert found == {"y": math.inf, "pair": [1, 2], "3": "number"}


def test_records_are_found_by_what_they_hold(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for record in ({"task": 0, "x": 1}, {"task": None}, {"task": 0, "x": 2}, {"other": 0}):
        journal.append(record)
    assert journal.find(task=0) == {"task": 0, "x": 2}
    assert journal.find(task=0, x=1) == {"task": 0, "x": 1}
    assert journal.find(task=None) == {"task": None}
    assert journal.find(task=0, x=3) is journal.find(missing=None) is None


def test_what_could_not_be_written_is_not_among_the_records(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"a": 1})
    monkeypatch.setattr("os.fsync", _no_space)
    with pytest.raises(StorageError, match="No space left"):
        journal.append({"b": 2})
    monkeypatch.undo()
    assert journal.records == [{"a": 1}]
    journal.append({"c": 3})
    assert journal.records == Journal(journal.path).records == [{"a": 1}, {"c": 3}]


def _no_space(handle):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("cut", range(1, 28))
def test_a_torn_last_line_is_left_out_and_written_over(tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    for record in RECORDS:
        Journal(path).append(record)
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(path)
    assert journal.records == RECORDS[:1]
    journal.append({"again": True})
    assert Journal(path).records == [RECORDS[0], {"again": True}]


@pytest.mark.parametrize("line", ["not json", "[1, 2]", "3", "\xff"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"b": 2}}\n', encoding="latin-1")
    with pytest.raises(InputError, match=r"journal.jsonl, line 2, is no record of a journal"):
        Journal(path)


def test_a_line_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append(handle))
    Journal(tmp_path / "journal.jsonl").append({})
    assert len(synced) == 1


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(InputError, match="journal.jsonl is no file; take it away"):
        Journal(tmp_path / "journal.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="journal.jsonl' cannot be written"):
        Journal(tmp_path / "file" / "journal.jsonl").append({})


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    folder = tmp_path / "held"

    def hold():
        try:
            with only_process(folder):
                return "held"
        except InputError as error:
            return error

    def other():
        return forked(hold, tmp_path / "said")

    with only_process(folder):
        with only_process(folder):  # once more by the same process: the inner end frees nothing
            pass
        message = f"{folder} is in use by another process; wait for it, or name another folder"
        assert other() == message
    assert other() == "held"
    with pytest.raises(ZeroDivisionError), only_process(folder):
        raise ZeroDivisionError
    assert other() == "held"


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    # As older versions of filelock do; newer ones have another kind of lock, and warn.
    monkeypatch.setattr("filelock.FileLock.acquire", Mock(side_effect=NotImplementedError))
    message = f"^{tmp_path} is on a file system without locks; name a folder elsewhere, or: pip"
    with pytest.raises(InputError, match=message), only_process(tmp_path):
        pass
