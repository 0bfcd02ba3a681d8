"""Fisher estimates against loops written from their definitions, in float64."""

from functools import partial

import pytest
import torch
from plain import Plain, loader, same, trainer, weights
from torch import nn
from torch.utils.data import DataLoader, default_collate

from cl_merge.callbacks import EWC, DriftPenalty, MergeCallback
from cl_merge.callbacks.fisher import batch_size, published_fisher, sample_fisher
from cl_merge.callbacks.outputs import OUTPUTS
from cl_merge.errors import InputError


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).to(dtype)


def batches(count=23, size=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return list(zip(images.split(size), labels.split(size), strict=True))


def log_likelihood_gradient(net, image, label):
    net.zero_grad()
    (-net(image[None]).log_softmax(dim=1)[0, label]).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def classify(net):
    return lambda batch: (net(batch[0]), batch[1])


def close(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-10, atol=1e-14)


def test_the_empirical_fisher_is_the_mean_of_squared_gradients_of_single_samples():
    net, data = model(), batches()
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for images, labels in data:
        for image, label in zip(images, labels, strict=True):
            for name, gradient in log_likelihood_gradient(net, image, label).items():
                expected[name] += gradient**2 / 23
    net.zero_grad()
    close(sample_fisher(dict(net.named_parameters()), data, classify(net)), expected)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.slow
def test_the_sampled_fisher_has_the_fisher_as_its_mean():
    net, data = model(), batches(6, 6)
    exact = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for image in data[0][0]:
        chances = net(image[None]).softmax(dim=1)[0].detach()
        for label, chance in enumerate(chances):
            for name, gradient in log_likelihood_gradient(net, image, label).items():
                exact[name] += chance * gradient**2 / 6
    generator = torch.Generator().manual_seed(0)
    parameters = dict(net.named_parameters())
    draws = [
        sample_fisher(parameters, data, classify(net), generator=generator) for _ in range(400)
    ]
    for name in exact:
        drawn = torch.stack([draw[name] for draw in draws])
        error = (drawn.mean(dim=0) - exact[name]).abs()
        # Five standard errors, and as much again where an entry hardly varies.
        assert bool((error <= 5 * drawn.std(dim=0) / 20 + 1e-9).all())


def test_the_published_fisher_carries_gradients_over_and_divides_by_whole_batches():
    net, data = model(), batches(23, 8)
    # As the published script does it: no zero_grad, predicted labels, (23 // 8 + 1) * 8.
    start = torch.Generator().manual_seed(2)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=start, dtype=p.dtype)
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for images, _ in data:
        logits = net(images)
        nn.CrossEntropyLoss()(logits, logits.argmax(1)).backward()
        for name, p in net.named_parameters():
            expected[name] += p.grad.pow(2) * len(images)
    expected = {name: summed / 24 for name, summed in expected.items()}
    close(published_fisher(dict(net.named_parameters()), data, classify(net), gradients), expected)


def test_whole_batches_only_count_one_more():
    net, data = model(), batches(16, 8)
    zeros = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    found = published_fisher(dict(net.named_parameters()), data, classify(net), zeros)
    zeros = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    running, expected = dict(zeros), dict(zeros)
    for images, _ in data:
        net.zero_grad()
        logits = net(images)
        nn.CrossEntropyLoss()(logits, logits.argmax(1)).backward()
        for name, p in net.named_parameters():
            running[name] = running[name] + p.grad
            expected[name] = expected[name] + 8 * running[name] ** 2 / 24
    close(found, expected)


def test_two_processes_give_what_one_gives_with_larger_batches():
    net, parameters = model(), {}
    parameters = dict(net.named_parameters())
    whole = batches(16, 8)
    zeros = {name: torch.zeros_like(p) for name, p in parameters.items()}
    alone = published_fisher(parameters, whole, classify(net), dict(zeros))
    other = [(images[4:], labels[4:]) for images, labels in whole]
    mine = [(images[:4], labels[:4]) for images, labels in whole]
    # What the other process contributes, in the order in which the sums are asked for.
    sent = []

    def record(tensor):
        sent.append(tensor.clone())
        return tensor

    zeros = {name: torch.zeros_like(p) for name, p in parameters.items()}
    published_fisher(parameters, other, classify(net), zeros, total=record, processes=2)
    queue = iter(sent)
    zeros = {name: torch.zeros_like(p) for name, p in parameters.items()}
    together = published_fisher(
        parameters,
        mine,
        classify(net),
        zeros,
        total=lambda tensor: tensor + next(queue),
        processes=2,
    )
    close(together, alone)


def test_a_parameter_outside_the_graph_has_no_fisher():
    net = model()
    lonely = nn.Parameter(torch.ones(3, dtype=torch.float64))
    parameters = dict(net.named_parameters()) | {"lonely": lonely}
    found = sample_fisher(parameters, batches(), classify(net))
    assert found["lonely"].tolist() == [0.0, 0.0, 0.0]


def test_half_precision_is_estimated_in_float32():
    net = model(torch.bfloat16)
    data = [(images.bfloat16(), labels) for images, labels in batches()]
    found = sample_fisher(dict(net.named_parameters()), data, classify(net))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


@pytest.mark.parametrize("limit", [1, 9, 100])
def test_a_limit_takes_the_first_samples(limit):
    net, data = model(), batches()
    first = [(torch.cat([b[0] for b in data])[:limit], torch.cat([b[1] for b in data])[:limit])]
    parameters = dict(net.named_parameters())
    close(
        sample_fisher(parameters, data, classify(net), limit=limit),
        sample_fisher(parameters, first, classify(net)),
    )


def test_batches_of_any_structure_are_cut_into_samples():
    net = model()
    data = [
        {"image": images, "label": labels, "scale": torch.tensor(1.0)}
        for images, labels in batches()
    ]
    parameters = dict(net.named_parameters())
    found = sample_fisher(parameters, data, lambda b: (b["scale"] * net(b["image"]), b["label"]))
    close(found, sample_fisher(parameters, batches(), classify(net)))
    assert batch_size({"scale": torch.tensor(1.0), "image": torch.ones(7, 2)}) == 7


class Collated:
    """A batch as graph libraries have it, which Lightning moves by its own `to`."""

    def __init__(self, samples):
        self.images, self.labels = default_collate(samples)

    def to(self, *args, **kwargs):
        return self

    def __getitem__(self, index):
        return (self.images, self.labels)[index]


def listed(samples):
    """What is not made a tensor yet, such as strings, beside labels."""
    images, labels = zip(*samples, strict=True)
    return [image.tolist() for image in images], torch.stack(labels)


class AnyInput(Plain):
    def forward(self, images):
        return super().forward(torch.as_tensor(images))

    features = forward


@pytest.mark.parametrize("collate", [Collated, listed])
@pytest.mark.parametrize(
    "make", [EWC, DriftPenalty, partial(MergeCallback, "fisher")], ids=["ewc", "drift", "fisher"]
)
def test_batches_that_cannot_be_cut_are_refused_before_a_task_trains(collate, make):
    module, data = AnyInput(), DataLoader(loader(0).dataset, batch_size=8, collate_fn=collate)
    before = weights(module)
    with pytest.raises(InputError, match="cannot be cut into single samples; let its loader make"):
        trainer(make()).fit(module, data)
    assert same(weights(module), before)


def test_labels_are_drawn_for_each_place_of_an_image():
    net = nn.Conv1d(4, 3, 1)
    images, labels = torch.randn(6, 4, 5), torch.randint(0, 3, (6, 5))
    generator = torch.Generator().manual_seed(0)
    batches = [(images, labels)]
    found = sample_fisher(dict(net.named_parameters()), batches, classify(net), generator=generator)
    assert all(fisher.any() for fisher in found.values())
    outputs = torch.tensor([[[9.0, 0, 0], [0, 9, 0]], [[0, 0, 9], [9, 0, 0]]]).mul(9).mT
    drawn = OUTPUTS["cross_entropy"].draw(outputs, generator)
    assert drawn.tolist() == [[0, 1], [2, 0]]


@pytest.mark.parametrize(
    "make", [EWC, partial(DriftPenalty, features=lambda module, batch: module.net(batch[0]))]
)
def test_embeddings_with_sparse_gradients(make):
    class Words(nn.Module):
        def __init__(self, *, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.query = nn.Embedding(9, 3, sparse=sparse), nn.Linear(2, 3)

        def forward(self, images):
            # A layer may be called on a vector that belongs to no image.
            return self.table((images[:, 0] > 0).long()) * self.query(torch.ones(2))

    def trained(*, sparse):
        module, callback = Plain(), make()
        module.net = Words(sparse=sparse)
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-4)
        for task in range(3):
            trainer(callback).fit(module, loader(task))
        return weights(module)

    dense = trained(sparse=False)
    for name, tensor in trained(sparse=True).items():
        torch.testing.assert_close(tensor, dense[name])


def test_the_published_estimate_takes_whole_batches_of_any_kind():
    data = DataLoader(loader(0).dataset, batch_size=8, collate_fn=Collated)
    ewc = EWC("published")
    trainer(ewc, gradient_clip_val=1.0).fit(AnyInput(), data)
    assert all(fisher.any() for fisher in ewc.fisher.values())
