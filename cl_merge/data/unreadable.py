"""Images that cannot be read: found before anything trains, named, and left out if so asked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cl_merge.data.images import ImageTable
from cl_merge.data.tasks import Indices, Task
from cl_merge.errors import InputError, listing

log = logging.getLogger(__name__)

UNREADABLE = ("stop", "skip")


def without_unreadable(
    tasks: Sequence[Task], train: ImageTable, test: ImageTable, num_workers: int
) -> list[Task]:
    """Leave out of tasks what is no readable image; says how many, and which.

    Every image that the tasks use is decoded once.
    """
    rows = np.unique(np.concatenate([own for t in tasks for own in (t.train, t.held_out)]))
    wrong = _unreadable(train, rows, num_workers)
    wrong_test = _unreadable(test, np.unique(np.concatenate([t.test for t in tasks])), num_workers)
    return [
        replace(
            task,
            train=np.setdiff1d(task.train, wrong),
            held_out=np.setdiff1d(task.held_out, wrong),
            test=np.setdiff1d(task.test, wrong_test),
        )
        for task in tasks
    ]


def _unreadable(table: ImageTable, rows: Indices, num_workers: int) -> Indices:
    # A generator of its own: to make an iterator draws a number, which training must not see.
    own = torch.Generator()
    loader = DataLoader(_Readable(table, rows), 64, num_workers=num_workers, generator=own)
    wrong: Indices = rows[~torch.cat(list(loader)).numpy()]
    if len(wrong):
        log.warning(
            "%d of %d images of split '%s' cannot be read and are left out: rows %s",
            len(wrong),
            len(rows),
            table.where,
            listing(map(str, wrong), limit=20),
        )
    return wrong


class _Readable(Dataset[bool]):
    """Whether each of some rows of a table is a readable image."""

    def __init__(self, table: ImageTable, rows: Indices) -> None:
        self._table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> bool:
        try:
            self._table.image(int(self._rows[index]))
        except InputError:
            return False
        return True
