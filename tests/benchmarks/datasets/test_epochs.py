"""Epochs task by task."""

import re

import pytest

from cl_merge.benchmarks.datasets.epochs import task_epochs
from cl_merge.config.schema import RunConfig
from cl_merge.errors import InputError


def test_every_task_has_its_own_epochs_or_all_have_those_of_the_trainer():
    assert task_epochs(RunConfig(epochs=[3, 1]), 2) == [3, 1]
    assert task_epochs(RunConfig(trainer={"max_epochs": 4}), 3) == [4, 4, 4]
    assert task_epochs(RunConfig(trainer={}), 1) == [None]


@pytest.mark.parametrize(
    ("epochs", "message"),
    [
        ([1, 2], "epochs has 2 numbers, but the stream has 3 tasks; expected one for each task"),
        ([1, 0, 1], "epochs=[1, 0, 1]; expected a list of whole numbers from 1, one per task"),
        ([1, 1.5, 1], "epochs=[1, 1.5, 1]; expected a list of whole numbers from 1"),
        ([1, True, 1], "epochs=[1, True, 1]; expected a list of whole numbers from 1"),
        (3, "epochs=3; expected a list of whole numbers from 1, one per task"),
    ],
)
def test_wrong_epochs_are_named(epochs, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        task_epochs(RunConfig(epochs=epochs), 3)
