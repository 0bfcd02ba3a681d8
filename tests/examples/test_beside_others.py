"""MergeCallback beside the callbacks that come with Lightning."""

import pytest
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from plain import SAFE, Plain, loader, same, trainer, weights

from cl_merge import TaskVector, merge
from cl_merge.callbacks import MergeCallback
from cl_merge.errors import InputError


def stream(make_others, folder, *, merge_first, epochs=3):
    """Two tasks; what was trained, task by task, and the callback."""
    module, callback, trained = Plain(), MergeCallback("magmax"), [weights(Plain())]
    for task in (0, 1):
        others = make_others(folder / str(task))
        callbacks = [callback, *others] if merge_first else [*others, callback]
        loop = trainer(*callbacks, max_epochs=epochs, logger=CSVLogger(folder))
        loop.fit(module, loader(task), loader(task))
        trained.append(weights(module))
    return module, callback, trained


def merged_by_hand(trained):
    base = trained[0]
    vectors = [TaskVector.between(base, after) for after in trained[1:]]
    return merge(vectors, "magmax").apply_to(base, scale=0.5)


OTHERS = {
    "ModelCheckpoint": lambda folder: [ModelCheckpoint(folder, save_last=True, save_top_k=-1)],
    "EarlyStopping": lambda folder: [EarlyStopping("loss", mode="max", patience=0)],  # at once
    "LearningRateFinder": lambda folder: [LearningRateFinder(num_training_steps=5)],
    "LearningRateMonitor": lambda folder: [LearningRateMonitor("step")],
    "GradientAccumulationScheduler": lambda folder: [GradientAccumulationScheduler({0: 1, 1: 2})],
    "DeviceStatsMonitor": lambda folder: [DeviceStatsMonitor(cpu_stats=True)],
    "all": lambda folder: [other for make in list(OTHERS.values())[:-1] for other in make(folder)],
}


# These put other weights in when training ends.
AVERAGES = {"StochasticWeightAveraging": lambda folder: [StochasticWeightAveraging(0.1, 1)]}
WeightAveraging = getattr(lightning_callbacks, "WeightAveraging", None)
if WeightAveraging is not None:
    AVERAGES["WeightAveraging"] = lambda folder: [WeightAveraging()]
    AVERAGES["EMAWeightAveraging"] = lambda folder: [
        lightning_callbacks.EMAWeightAveraging(decay=0.5)
    ]
needs_weight_averaging = pytest.mark.skipif(
    WeightAveraging is None, reason="this version of lightning has no WeightAveraging"
)


def check_merged(module, callback, trained):
    assert callback.tasks == 2
    trainer(callback).test(module, loader(0), verbose=False)
    assert same(module.seen["test"], merged_by_hand(trained))
    assert same(weights(module), trained[-1])


@pytest.mark.parametrize("merge_first", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_the_merged_model_is_that_of_the_weights_each_fit_left(name, merge_first, tmp_path):
    check_merged(*stream(OTHERS[name], tmp_path, merge_first=merge_first))


@pytest.mark.parametrize("merge_first", [True, False])
@pytest.mark.parametrize("name", AVERAGES)
def test_beside_an_average_of_weights_it_merges_the_average(name, merge_first, tmp_path):
    check_merged(*stream(AVERAGES[name], tmp_path, merge_first=merge_first))


def test_early_stopping_ends_a_task_before_its_last_epoch(tmp_path):
    module, callback = Plain(), MergeCallback("magmax")
    loop = trainer(EarlyStopping("loss", mode="max", patience=0), callback, max_epochs=3)
    loop.fit(module, loader(0))
    assert loop.current_epoch < 3
    assert callback.tasks == 1


def test_the_best_checkpoint_is_tested_as_the_weights_of_its_task(tmp_path):
    module, callback = Plain(), MergeCallback("magmax")
    best = ModelCheckpoint(tmp_path, monitor="loss", mode="max")  # not the last epoch's
    loop = trainer(callback, best, max_epochs=3)
    loop.fit(module, loader(0))
    last = weights(module)
    loop.test(module, loader(0), ckpt_path="best", verbose=False)
    assert same(module.seen["test"], merged_by_hand([weights(Plain()), weights(module)]))
    assert not same(weights(module), last)


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_of_weights_is_made_afresh_for_each_task(name, tmp_path):
    others = AVERAGES[name](tmp_path)
    with pytest.raises(InputError, match=f"make a new {name} for each task"):
        stream(lambda folder: others, tmp_path, merge_first=False)


@needs_weight_averaging
def test_a_fit_that_goes_on_may_keep_its_average_of_weights(tmp_path):
    average, saved = WeightAveraging(), ModelCheckpoint(tmp_path, filename="at", save_top_k=-1)
    module, callback = Plain(), MergeCallback("magmax")
    trainer(average, callback, saved).fit(module, loader(0))
    again = trainer(average, callback, max_epochs=2)
    again.fit(module, loader(0), ckpt_path=saved.best_model_path, **SAFE)
    assert callback.tasks == 1


@needs_weight_averaging
def test_validate_refuses_to_show_the_average_as_the_merged_model(tmp_path):
    module, callback = Plain(), MergeCallback("magmax")
    loop = trainer(WeightAveraging(), callback)
    loop.fit(module, loader(0), loader(0))
    trained = weights(module)
    with pytest.raises(InputError, match=r"^something changed .* WeightAveraging can do that; "):
        loop.validate(module, loader(0), verbose=False)
    assert same(weights(module), trained)
    trainer(callback).validate(module, loader(0), verbose=False)
    assert same(module.seen["validation"], merged_by_hand([weights(Plain()), trained]))
