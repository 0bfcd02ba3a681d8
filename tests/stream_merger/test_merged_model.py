"""What a merged model copies of a module and of itself: no more than changes."""

import pytest
import torch
from plain import Plain, fit, loader
from torch import nn

from cl_merge.callbacks import ClassStatistics, MergeCallback
from cl_merge.callbacks.auto_scale import AutoScale
from cl_merge.callbacks.drift_scale import DriftScale
from cl_merge.task_vectors import module_weights

TRAINED = sum(p.numel() for p in Plain().net.parameters())


def features(module, batch):
    return module.net(batch[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: [MergeCallback(scale=AutoScale(), held_out=lambda: loader(7))],
        lambda: [MergeCallback(scale=DriftScale(features=features, limit=1e-3))],
        lambda: [
            MergeCallback(),
            ClassStatistics(
                features=lambda module, batch: (features(module, batch), batch[1]), classes=3
            ),
        ],
    ],
    ids=["auto", "drift", "statistics"],
)
def test_frozen_weights_are_not_copied_when_a_task_ends(make, monkeypatch):
    sizes, copies = [], module_weights.copies

    def counting(tensors, device=None):
        sizes.append(sum(tensor.numel() for tensor in tensors.values()))
        return copies(tensors, device)

    monkeypatch.setattr(module_weights, "copies", counting)
    module = Plain()
    module.large = nn.Linear(100, 100).requires_grad_(False)
    fit(module, make(), 0)
    assert max(sizes) == TRAINED


def test_a_backup_does_not_copy_the_base(monkeypatch):
    sizes, copied = [], torch.Tensor.__deepcopy__

    def counting(tensor, memo):
        sizes.append(tensor.numel())
        return copied(tensor, memo)

    module, callback = Plain(), MergeCallback()
    fit(module, callback, 0)
    kept = callback.merged()
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", counting)
    undo = callback.backup()
    assert sum(sizes) == TRAINED  # what MagMax accumulates
    monkeypatch.undo()
    fit(module, callback, 1)
    undo()
    assert callback.tasks == 1
    assert callback.merged() == kept
