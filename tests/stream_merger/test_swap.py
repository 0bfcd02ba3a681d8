"""Merged weights in a module for a while: the trained ones come back, whatever happens meanwhile."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from plain import Plain, fit, loader, same, trainer, weights
from torch import nn
from torch.utils.data import DataLoader

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


class Stateful(nn.Module):
    """Keeps what it has put out last, as recurrent modules do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("hidden", torch.zeros(8, 3))

    def forward(self, images):
        self.hidden = self.linear(images).detach()
        return self.linear(images)


class Graph(nn.Module):
    """Has sparse tensors that do not change."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("adjacency", torch.eye(4).to_sparse())
        self.frozen = nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False)

    def forward(self, images):
        return self.linear(torch.sparse.mm(self.adjacency, images.T).T)


@pytest.mark.parametrize("start", ["sequential", "independent", "merged"])
@pytest.mark.parametrize("net", [Stateful, Graph])
def test_modules_whose_buffers_are_sparse_or_made_anew(net, start):
    class Tested(Plain):
        def test_step(self, batch, batch_idx):
            self(batch[0])

    module, callback = Tested(), MergeCallback(start=start, buffers="trained")
    module.net = net()
    for task in range(2):
        trained = fit(module, callback, task)
        data = DataLoader(loader(task).dataset, batch_size=7)
        trainer(callback).test(module, data, verbose=False)
        assert same(weights(module), trained)
    assert callback.tasks == 2


@pytest.mark.parametrize(
    "options",
    [{"buffers": "base"}, {"buffers": "average"}, {"scale": "auto", "held_out": lambda: loader(1)}],
)
def test_buffers_that_are_made_anew_in_an_evaluation_are_written_to(options):
    class Centred(Plain):
        def __init__(self):
            super().__init__()
            self.register_buffer("centre", torch.zeros(4))

        def test_step(self, batch, batch_idx):
            self.centre = batch[0].mean(dim=0)  # of inference mode

    module, callback = Centred(), MergeCallback(**options)
    for task in range(2):
        trained = fit(module, callback, task)
        trainer(callback).test(module, loader(task), verbose=False)
        assert same(weights(module), trained)
    callback.install(module)
    if "buffers" in options:
        assert torch.equal(module.centre, torch.zeros(4))


def test_buffers_come_back_where_another_callback_puts_parameters_back():
    class Ema(Callback):
        def on_test_end(self, trainer, pl_module):
            for name, value in trained.items():
                pl_module.get_parameter(name).data.copy_(value)

    module, callback = Plain(batch_norm=True), MergeCallback(buffers="base")
    trained = fit(module, callback, 0)
    statistics = module.net[1].running_mean.clone()
    trainer(Ema(), callback).test(module, loader(0), verbose=False)
    assert torch.equal(module.net[1].running_mean, statistics)


def test_the_task_vector_of_another_module_leaves_the_one_in_training():
    module, other, callback = Plain(), Plain(), MergeCallback()
    base = weights(module)
    looked = {"on_train_epoch_end": lambda *_: callback.task_vector(other)}
    looking = type("Looking", (Callback,), looked)()
    trained = fit(module, [callback, looking], 0)
    assert same(dict(callback.merged()), dict(TaskVector.between(base, trained)))
