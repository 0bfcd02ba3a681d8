"""The accuracy matrix of a stream, and the figures read off it.

`AccuracyMatrix` counts, over any number of processes. The figures are functions of what it has, for
T tasks:

- ``accuracy``: R, float [T, T]; ``R[i, j]`` is the accuracy on task j after task i. Figures of it
  are in its unit.
- ``correct``: images classified correctly, int64 [T, T], and ``total``: test images of each task,
  int64 [T]. Figures of them are in per cent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from cl_merge.data.tasks import as_integer
from cl_merge.errors import InputError


def average_accuracy(accuracy: Tensor) -> float:
    """Macro average accuracy: the mean over tasks of the last row.

    ACC of Lopez-Paz & Ranzato, NeurIPS 2017, equation 2.

    Example:
        >>> average_accuracy(torch.tensor([[90.0, 50.0], [70.0, 80.0]]))
        75.0
    """
    return float(accuracy[-1].nanmean())


def micro_accuracy(correct: Tensor, total: Tensor) -> float:
    """Micro average accuracy: the share of all test images that the last row gets right.

    This is the headline figure of the MagMax paper. NaN without test images.
    """
    images = int(total.sum())
    return 100.0 * int(correct[-1].sum()) / images if images else float("nan")


def seen_accuracies(
    correct: Tensor, total: Tensor, tasks: Sequence[int] | None = None
) -> list[float]:
    """Accuracy on everything seen: for each row, the micro average over the tasks up to its own.

    `tasks` says after which task each row was counted; None if row i was after task i.
    """
    return [
        micro_accuracy(row[None, : task + 1], total[: task + 1])
        for task, row in zip(tasks or range(len(correct)), correct, strict=True)
    ]


def average_incremental_accuracy(correct: Tensor, total: Tensor) -> float:
    """Mean over i of the accuracy on all seen after task i (iCaRL, Rebuffi et al. 2017)."""
    seen = seen_accuracies(correct, total)
    return sum(seen) / len(seen)


def backward_transfer(accuracy: Tensor) -> float:
    """What later tasks did to earlier ones: mean over j < T of R[T, j] - R[j, j].

    Negative where tasks are forgotten; NaN for a single task. Lopez-Paz & Ranzato, Gradient
    Episodic Memory for Continual Learning, NeurIPS 2017, equation 3.
    """
    return _mean((accuracy[-1] - accuracy.diagonal())[:-1])


def forward_transfer(accuracy: Tensor, zero_shot: Tensor) -> float:
    """What earlier tasks did to later ones: mean over j > 1 of R[j-1, j] - b[j].

    NaN for a single task. Lopez-Paz & Ranzato 2017, equation 4, with the zero-shot accuracies as b,
    float [T]: a pre-trained model's tasks start from them, not from a random initialisation.
    """
    return _mean(accuracy.diagonal(offset=1) - zero_shot[1:])


def forgetting(accuracy: Tensor) -> float:
    """Mean over j < T of (max over i < T of R[i, j]) - R[T, j].

    Chaudhry et al., Riemannian Walk for Incremental Learning, ECCV 2018, section 3: the maximum
    runs over the rows before the last, so that the figure can be negative. Rows before a task
    was seen count too: a pre-trained model is good at tasks that are still to come. NaN for a
    single task.
    """
    if len(accuracy) < 2:
        return float("nan")
    return _mean((accuracy[:-1].amax(dim=0) - accuracy[-1])[:-1])


def transfer(accuracy: Tensor) -> float:
    """What learning leaves of tasks to come: mean over j > 1 of the mean over i < j of R[i, j].

    NaN for a single task. Zheng et al., Preventing Zero-Shot Transfer Degradation in Continual
    Learning of Vision-Language Models, ICCV 2023, section 5, who call the mean of all R "average"
    and the mean of the last row "last".

    Example:
        >>> transfer(torch.tensor([[90.0, 50.0, 10.0], [70.0, 80.0, 20.0], [70.0, 80.0, 90.0]]))
        32.5
    """
    before = [accuracy[:j, j].mean() for j in range(1, len(accuracy))]
    return _mean(torch.stack(before)) if before else float("nan")


class AccuracyMatrix(Metric):
    """Count correct predictions by task, a row of the accuracy matrix at a time.

    Both evaluations come from the same logits: task-agnostic takes the best class of all,
    task-aware the best among the classes of the image's own task. `update` counts into the current
    row, `finish_row` sums it over processes and keeps it.

    Args:
        task_classes: For each of the T tasks the labels of its classes.
        num_classes: C, the number of rows of the head.

    Raises:
        InputError: A task's classes are not labels from 0 to C - 1.

    Attributes:
        task_classes: For each task the labels of its classes, ascending.
        rows: Finished rows: for each task index the counts, int64 [3, T]: correct task-agnostic,
            correct task-aware, images.

    Example:
        >>> matrix = AccuracyMatrix([[0], [1]], num_classes=2)
        >>> matrix.update(
        ...     torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]), torch.tensor([0, 1])
        ... )
        >>> matrix.finish_row(0)
        >>> matrix.accuracy()
        tensor([[100.,   0.]], dtype=torch.float64)
        >>> matrix.accuracy(aware=True)
        tensor([[100., 100.]], dtype=torch.float64)
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, task_classes: Sequence[Sequence[int]], num_classes: int) -> None:
        super().__init__()
        self.task_classes = [
            _labels(task, classes, num_classes) for task, classes in enumerate(task_classes)
        ]
        none = torch.zeros(3, len(task_classes), dtype=torch.int64)
        self.add_state("counts", default=none, dist_reduce_fx="sum")
        outside = torch.ones(len(task_classes), num_classes, dtype=torch.bool)
        for task, labels in enumerate(self.task_classes):
            outside[task, labels] = False
        self.register_buffer("_outside", outside, persistent=False)
        self._outside: Tensor
        self.rows: dict[int, Tensor] = {}

    @override
    def update(self, logits: Tensor, labels: Tensor, tasks: Tensor) -> None:
        """Count a batch into the current row.

        Args:
            logits: Over all classes, float [B, C].
            labels: Global labels, int64 [B].
            tasks: Which task each image belongs to, int64 [B].
        """
        agnostic = logits.argmax(dim=1) == labels
        aware = logits.masked_fill(self._outside[tasks], -torch.inf).argmax(dim=1) == labels
        hits = torch.stack([agnostic, aware, torch.ones_like(agnostic)]).long()
        self.counts.index_add_(1, tasks, hits)

    @override
    def compute(self) -> Tensor:
        """The counts of the current row, summed over processes, int64 [3, T]."""
        return self.counts

    def finish_row(self, task: int) -> None:
        """Keep the current row as the one after the task of an index, and start a new one.

        Under several processes this must be called on each of them, while they can communicate.
        """
        self.rows[task] = self.compute().cpu().clone()
        self.reset()

    @property
    def total(self) -> Tensor:
        """Test images of each task, int64 [T]."""
        return self._stack(2)[-1]

    def correct(self, *, aware: bool = False) -> Tensor:
        """Images classified correctly, int64 [rows, T], in the order of the finished tasks."""
        return self._stack(1 if aware else 0)

    def accuracy(self, *, aware: bool = False) -> Tensor:
        """R, float64 [rows, T] in per cent; NaN for a task without test images."""
        return 100.0 * self.correct(aware=aware).double() / self.total

    def seen(self) -> list[float]:
        """Accuracy on everything seen, after each finished task, in per cent."""
        return seen_accuracies(self.correct(), self.total, sorted(self.rows))

    def metrics(self, zero_shot: AccuracyMatrix | None = None) -> dict[str, float]:
        """Read the standard metrics off the matrix, in per cent.

        Args:
            zero_shot: The matrix of the pre-trained model, for the forward transfer.

        Returns:
            ``accuracy`` (micro), ``average_accuracy`` (macro), ``task_aware_accuracy`` (micro),
            ``average_incremental_accuracy``, ``backward_transfer``, ``forgetting`` and, with
            `zero_shot`, ``forward_transfer``. What compares tasks is NaN while rows are missing,
            as after joint training, which has one.
        """
        matrix, correct, total = self.accuracy(), self.correct(), self.total
        found = {
            "accuracy": micro_accuracy(correct, total),
            "average_accuracy": average_accuracy(matrix),
            "task_aware_accuracy": micro_accuracy(self.correct(aware=True), total),
        }
        complete = sorted(self.rows) == list(range(len(total)))
        over_time = {
            "average_incremental_accuracy": average_incremental_accuracy(correct, total),
            "backward_transfer": backward_transfer(matrix),
            "forgetting": forgetting(matrix),
        }
        if zero_shot is not None:
            over_time["forward_transfer"] = forward_transfer(matrix, zero_shot.accuracy()[-1])
        return found | {name: x if complete else float("nan") for name, x in over_time.items()}

    def _stack(self, which: int) -> Tensor:
        if not self.rows:
            raise RuntimeError("no row is finished; call finish_row(task) after the test images")
        return torch.stack([self.rows[task][which] for task in sorted(self.rows)])


def _labels(task: int, classes: Sequence[int], num_classes: int) -> list[int]:
    try:
        found = [as_integer(label) for label in classes]
    except TypeError:  # a label, where the list of a task's labels belongs
        found = [None]
    labels = sorted(label for label in found if label is not None and 0 <= label < num_classes)
    if len(labels) < len(found):
        raise InputError(
            f"task_classes[{task}] is {classes!r}; expected for each task the labels of its "
            f"classes, from 0 to {num_classes - 1}, such as [[0, 1], [2, 3]]"
        )
    return labels


def _mean(values: Tensor) -> float:
    return float(values.nanmean()) if len(values) else float("nan")
