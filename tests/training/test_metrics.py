"""The accuracy matrix and the figures read off it."""

import math
import re

import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy

from cl_merge.training.metrics import (
    AccuracyMatrix,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    micro_accuracy,
    seen_accuracies,
    transfer,
)

# Three tasks with 10, 20 and 70 test images.
CORRECT = torch.tensor([[9, 10, 7], [5, 16, 14], [4, 12, 63]])
TOTAL = torch.tensor([10, 20, 70])
R = 100.0 * CORRECT.double() / TOTAL


def test_figures_match_values_worked_out_by_hand():
    assert average_accuracy(R) == pytest.approx((40 + 60 + 90) / 3)
    assert micro_accuracy(CORRECT, TOTAL) == pytest.approx(79)
    assert seen_accuracies(CORRECT, TOTAL) == pytest.approx([90, 70, 79])
    assert average_incremental_accuracy(CORRECT, TOTAL) == pytest.approx((90 + 70 + 79) / 3)
    assert backward_transfer(R) == pytest.approx(((40 - 90) + (60 - 80)) / 2)
    assert forgetting(R) == pytest.approx(((90 - 40) + (80 - 60)) / 2)
    zero_shot = torch.tensor([30.0, 40.0, 15.0])
    assert forward_transfer(R, zero_shot) == pytest.approx(((50 - 40) + (20 - 15)) / 2)


def test_forgetting_looks_at_rows_before_a_task_was_learned_and_can_be_negative():
    assert forgetting(torch.tensor([[10.0, 0.0], [30.0, 0.0]])) == -20.0
    better_before = torch.tensor([[1.0, 9.0, 0.0], [1.0, 5.0, 0.0], [1.0, 5.0, 0.0]])
    assert forgetting(better_before) == pytest.approx((0 + 4) / 2)


def test_a_single_task_has_no_transfer_and_no_forgetting():
    one = torch.tensor([[50.0]])
    assert all(
        math.isnan(value)
        for value in (
            backward_transfer(one),
            forgetting(one),
            forward_transfer(one, one[0]),
            transfer(one),
        )
    )


def test_what_is_seen_before_the_first_test_image_is_not_a_number():
    seen = seen_accuracies(torch.tensor([[0, 0], [0, 3]]), torch.tensor([0, 4]))
    assert math.isnan(seen[0])
    assert seen[1] == 75
    assert math.isnan(micro_accuracy(torch.tensor([[0]]), torch.tensor([0])))


def test_transfer_is_what_the_definition_says_on_random_matrices():
    matrix = 100 * torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_task = [sum(float(matrix[i, j]) for i in range(j)) / j for j in range(1, 6)]
    assert transfer(matrix) == pytest.approx(sum(by_task) / 5)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 7, generator=generator)
    labels = torch.randint(0, 7, (500,), generator=generator)
    return logits, labels


CLASSES = [(0, 3), (1, 2, 6), (4, 5)]


def test_a_row_matches_an_independent_count(batch):
    logits, labels = batch
    tasks = torch.tensor([next(t for t, c in enumerate(CLASSES) if label in c) for label in labels])
    matrix = AccuracyMatrix(CLASSES, 7)
    for start in range(0, 500, 64):
        part = slice(start, start + 64)
        matrix.update(logits[part], labels[part], tasks[part])
    matrix.finish_row(0)
    for task, classes in enumerate(CLASSES):
        own = tasks == task
        assert matrix.total[task] == own.sum()
        agnostic = multiclass_accuracy(
            logits[own].argmax(1), labels[own], num_classes=7, average="micro"
        )
        assert matrix.accuracy()[0, task].item() == pytest.approx(100 * agnostic.item())
        hits = [
            max(classes, key=lambda c, i=i: logits[i, c].item()) == labels[i].item()
            for i in own.nonzero().flatten().tolist()
        ]
        aware = 100 * sum(hits) / len(hits)
        assert matrix.accuracy(aware=True)[0, task].item() == pytest.approx(aware)


def test_rows_are_counted_apart(batch):
    logits, labels = batch
    tasks = torch.zeros_like(labels)
    matrix = AccuracyMatrix([range(7), range(7)], 7)
    matrix.update(logits, labels, tasks)
    matrix.finish_row(0)
    matrix.update(torch.nn.functional.one_hot(labels, 7).float(), labels, tasks)
    matrix.finish_row(1)
    assert matrix.accuracy()[1, 0] == 100
    assert matrix.accuracy()[0, 0] < 50
    assert matrix.total.tolist() == [500, 0]
    assert matrix.accuracy()[:, 1].isnan().all()


def test_a_row_measured_again_replaces_the_old_one(batch):
    logits, labels = batch
    matrix = AccuracyMatrix([range(7)], 7)
    for _ in range(2):
        matrix.update(logits, labels, torch.zeros_like(labels))
        matrix.finish_row(0)
    assert matrix.total.tolist() == [500]
    assert len(matrix.rows) == 1


def test_figures_carry_every_name(batch):
    logits, labels = batch
    matrix = AccuracyMatrix(CLASSES, 7)
    tasks = torch.tensor([next(t for t, c in enumerate(CLASSES) if label in c) for label in labels])
    for row in range(3):
        matrix.update(logits, labels, tasks)
        matrix.finish_row(row)
    figures = matrix.metrics(zero_shot=matrix)
    assert figures["accuracy"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean())
    assert figures["forward_transfer"] == figures["backward_transfer"] == figures["forgetting"] == 0
    assert set(figures) == {
        "accuracy",
        "average_accuracy",
        "task_aware_accuracy",
        "average_incremental_accuracy",
        "backward_transfer",
        "forgetting",
        "forward_transfer",
    }


def test_a_single_row_after_all_tasks_has_no_figures_over_time():
    matrix = AccuracyMatrix([[0], [1]], num_classes=2)
    matrix.update(torch.eye(2), torch.tensor([0, 0]), torch.tensor([0, 1]))
    matrix.finish_row(1)
    figures = matrix.metrics()
    assert figures["accuracy"] == figures["average_accuracy"] == 50.0
    assert matrix.seen() == [50.0]
    assert math.isnan(figures["forgetting"])
    assert math.isnan(figures["average_incremental_accuracy"])
    assert math.isnan(figures["backward_transfer"])


@pytest.mark.parametrize(
    ("task_classes", "named"),
    [([0, 0, 1], "task_classes[0] is 0"), ([[0], [3]], "[3]"), ([[0], [-1]], "[-1]"), (["a"], "a")],
)
def test_classes_that_are_not_labels_are_named(task_classes, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        AccuracyMatrix(task_classes, num_classes=3)


def test_figures_before_the_first_finished_row_say_what_to_call():
    matrix = AccuracyMatrix([[0], [1]], num_classes=2)
    with pytest.raises(RuntimeError, match="finish_row"):
        matrix.accuracy()
    with pytest.raises(RuntimeError, match="finish_row"):
        matrix.metrics()
