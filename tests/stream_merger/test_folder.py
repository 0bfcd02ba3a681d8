"""The folder in which a stream writes its task vectors."""

import shutil

import pytest
from plain import Plain, fit, same, weights

from cl_merge.callbacks import EWC, MergeCallback
from cl_merge.errors import StorageError


def test_a_folder_that_cannot_be_written_to_stops_the_first_fit_before_it_trains(tmp_path):
    (tmp_path / "file").touch()
    module, callback = Plain(), MergeCallback(directory=tmp_path / "file" / "vectors")
    before = weights(module)
    with pytest.raises(StorageError, match="vectors' cannot be written"):
        fit(module, callback, 0)
    assert same(weights(module), before)


def test_a_task_that_cannot_be_written_counts_for_no_callback(tmp_path):
    folder = tmp_path / "vectors"
    module, ewc, callback = Plain(), EWC(), MergeCallback("average", directory=folder)
    fit(module, [ewc, callback], 0)
    kept = callback.merged()
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(StorageError, match=r"task1.safetensors' cannot be written"):
        fit(module, [ewc, callback], 1)
    assert (callback.tasks, ewc.tasks) == (1, 1)
    assert callback.merged() == kept


def test_task_vectors_of_another_stream_are_named_once(tmp_path, caplog):
    def warnings_of_a_stream(tasks):
        caplog.clear()
        module, callback = Plain(), MergeCallback(directory=tmp_path)
        for task in range(tasks):
            fit(module, callback, task)
        return [text for text in caplog.messages if "task vectors of another stream" in text]

    assert warnings_of_a_stream(2) == []
    (warning,) = warnings_of_a_stream(2)
    assert "task0.safetensors, task1.safetensors" in warning
