"""Merged weights in a module for a while: the trained ones come back, whatever happens meanwhile."""

import pytest
from lightning.pytorch.callbacks import Callback
from plain import Plain, fit, loader, same, trainer, weights
from torch import nn

from cl_merge import StreamMerger, TaskVector
from cl_merge.callbacks import MergeCallback
from cl_merge.errors import InputError


def trained_stream():
    module = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    stream = StreamMerger(module, "magmax", scale=0.5)
    stream.begin_task()
    for parameter in module.parameters():
        parameter.data.add_(1.0)
    stream.end_task()
    return stream, module, weights(module)


def test_weights_that_are_in_are_not_put_in_again():
    stream, module, trained = trained_stream()
    with stream.merged_weights():
        merged = weights(module)
        with pytest.raises(InputError, match="the merged weights are in the module already"):
            stream.swap_in()
        assert same(weights(module), merged)
    assert same(weights(module), trained)


def test_a_trainer_does_not_evaluate_within_merged_weights():
    module, callback = Plain(), MergeCallback()
    trained = fit(module, callback, 0)
    match = "the merged weights are in the module already"
    with pytest.raises(InputError, match=match), callback.stream.merged_weights():
        trainer(callback).test(module, loader(0), verbose=False)
    assert same(weights(module), trained)


def test_an_interruption_while_weights_are_written_leaves_the_trained_ones(monkeypatch):
    stream, module, trained = trained_stream()
    values = stream.model.values

    def interrupted(live):
        yield next(values(live))
        raise KeyboardInterrupt

    monkeypatch.setattr(stream.model, "values", interrupted)
    with pytest.raises(KeyboardInterrupt), stream.merged_weights():
        pass
    assert same(weights(module), trained)
    monkeypatch.undo()
    with stream.merged_weights():
        assert not same(weights(module), trained)


def test_the_task_vector_of_another_module_leaves_the_one_in_training():
    module, other, callback = Plain(), Plain(), MergeCallback()
    base = weights(module)
    looked = {"on_train_epoch_end": lambda *_: callback.task_vector(other)}
    looking = type("Looking", (Callback,), looked)()
    trained = fit(module, [callback, looking], 0)
    assert same(dict(callback.merged()), dict(TaskVector.between(base, trained)))
