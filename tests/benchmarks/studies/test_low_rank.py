"""Low-rank adapters against their formula, and the perturbed training."""

import pytest
import torch
from torch import nn

from cl_merge.benchmarks.studies.low_rank import LowRank, Perturbation, adapted, add_adapters


@pytest.fixture
def module():
    torch.manual_seed(0)
    wide = nn.Conv2d(3, 6, 3, bias=False)
    return nn.Sequential(wide, nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(6, 5))


def test_an_adapter_adds_the_product_of_its_factors():
    weight, adapter = torch.randn(4, 2, 3, 3), LowRank(torch.empty(4, 2, 3, 3), rank=2)
    assert torch.equal(adapter(weight), weight)
    nn.init.normal_(adapter.left)
    product = adapter.left.double() @ adapter.right.double()
    expected = weight.double() + product.reshape(4, 2, 3, 3)
    torch.testing.assert_close(adapter(weight).double(), expected, rtol=1e-5, atol=1e-6)


def test_only_adapters_train_and_only_full_matrices_have_one(module):
    weights = {0: module[0].weight.clone(), 3: module[3].weight.clone()}
    adapters = add_adapters(module, rank=2)
    assert set(adapters) == {"0.weight", "3.weight"}
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert all(".parametrizations.weight.0." in f".{n}" for n in trained)
    assert len(trained) == 4
    for index, weight in weights.items():
        assert torch.equal(adapted(module, f"{index}.weight"), weight)
        assert torch.equal(module[index].weight, weight)


def test_matrices_of_no_more_rows_than_the_rank_have_none(module):
    assert set(add_adapters(module, rank=5)) == {"0.weight"}


def test_a_perturbed_training_stretches_what_adapters_add_and_ends_without(module):
    adapters = add_adapters(module, rank=2)
    perturbation, seen = Perturbation(adapters, seed=0), set()
    for _ in range(30):
        perturbation.on_train_batch_start()
        (stretch,) = {adapter.stretch for adapter in adapters.values()}
        seen.add(stretch)
    assert seen == {0.5, 1.0, 1.5}
    perturbation.on_train_end()
    assert {adapter.stretch for adapter in adapters.values()} == {1.0}
