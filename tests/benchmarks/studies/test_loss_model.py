"""The quadratic model of the losses, against sums over the tasks in float64."""

import pytest
import torch

from cl_merge.benchmarks.studies.loss_model import LossModel, PerturbAndMerge

SHAPES = {"weight": (3, 4), "bias": (3,)}


def draw(generator):
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def tasks():
    generator = torch.Generator().manual_seed(0)
    fishers = [{n: v.square() for n, v in draw(generator).items()} for _ in range(4)]
    return [(draw(generator), fisher) for fisher in fishers]


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in SHAPES]).double()


def naive_step(tasks, start, direction):
    """The coefficient of P&M, as its paper writes it: sums over the tasks."""
    start, along = flat(start), flat(direction)
    above = sum(float(along @ (flat(f) * (start - flat(v)))) for v, f in tasks)
    below = sum(float(along @ (flat(f) * along)) for _, f in tasks)
    return -above / below


def test_the_step_is_that_of_the_sums_over_tasks(tasks):
    loss, generator = LossModel(), torch.Generator().manual_seed(1)
    start, direction = draw(generator), draw(generator)
    for vector, fisher in tasks:
        loss.update(vector, fisher)
    assert loss.step(start, direction) == pytest.approx(naive_step(tasks, start, direction))


def test_the_loss_rises_on_both_sides_of_the_step(tasks):
    loss, generator = LossModel(), torch.Generator().manual_seed(2)
    start, direction = draw(generator), draw(generator)
    for vector, fisher in tasks:
        loss.update(vector, fisher)
    best = loss.step(start, direction)

    def total(step):
        place = flat(start) + step * flat(direction)
        return sum(float(flat(f) @ (place - flat(v)).square()) for v, f in tasks)

    assert total(best) < min(total(best - 0.01), total(best + 0.01))


def test_merging_goes_from_the_merged_model_towards_each_new_task(tasks):
    merger, at = PerturbAndMerge(), {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for task, (vector, fisher) in enumerate(tasks):
        direction = {name: vector[name] - at[name] for name in SHAPES}
        step = naive_step(tasks[: task + 1], at, direction)
        at = {name: at[name] + step * direction[name] for name in SHAPES}
        merger.update(vector, fisher)
        assert merger.steps[task] == pytest.approx(step)
    torch.testing.assert_close(dict(merger.items()), at)


def test_the_first_task_is_taken_as_it_is_and_equal_fishers_give_the_mean(tasks):
    merger = PerturbAndMerge()
    same = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    for vector, _ in tasks[:2]:
        merger.update(vector, same)
    assert merger.steps == pytest.approx([1.0, 0.5])


def test_where_no_loss_depends_on_the_step_the_new_task_counts_whole(tasks):
    merger, nothing = PerturbAndMerge(), {n: torch.zeros(shape) for n, shape in SHAPES.items()}
    for vector, _ in tasks:
        merger.update(vector, nothing)
    assert merger.steps == [1.0] * 4
