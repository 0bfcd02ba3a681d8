"""Second moments of inputs and gradients against loops over images and places, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl_merge.callbacks.second_moments import second_moments
from cl_merge.errors import InputError


class Net(nn.Module):
    """Each kind of parameter: matrices, depth-wise filters, biases, norms, attention, an unused."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, padding=1)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.twice = nn.Linear(4, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.scale = nn.Parameter(torch.ones(5))
        self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, images):
        places = self.depthwise(torch.tanh(self.conv(images))).flatten(2).mT
        places = self.attention(self.norm(places), places, places, need_weights=False)[0]
        hidden = self.twice(torch.tanh(self.twice(input=places)))
        return self.scale * self.out(hidden.mean(dim=1))


MATRICES = {"conv.weight", "twice.weight", "out.weight"}


def images(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 6, 6, generator=generator).double()


def moments(net, batches, seed=5, **options):
    parameters = dict(net.named_parameters())
    return second_moments(net, parameters, batches, net, seed_of=lambda i: seed + i, **options)


def score_of(net, image, v):
    return (F.normalize(net(image[None]), dim=-1) * v).sum()


def drawn(count, seed=5):
    generators = (torch.Generator().manual_seed(seed + index) for index in range(count))
    return torch.cat([torch.randn((1, 5), generator=one) for one in generators]).double()


def naive_layer(net, layer, given, v):
    """Inputs and gradients at the outputs of each call of a layer, by place, for each image."""
    for image, direction in zip(given, v, strict=True):
        seen = []
        hook = layer.register_forward_hook(
            lambda _, args, named, output, seen=seen: seen.append((*args, *named.values(), output)),
            with_kwargs=True,
        )
        score = score_of(net, image, direction)
        hook.remove()
        yield [
            (inputs.detach(), gradient)
            for (inputs, _), gradient in zip(
                seen, torch.autograd.grad(score, [output for _, output in seen]), strict=True
            )
        ]


def test_of_a_convolution_they_are_of_its_patches():
    net = Net()
    found = moments(net, [images(4)])
    a, b = torch.zeros(27, 27).double(), torch.zeros(4, 4).double()
    for ((inputs, gradient),) in naive_layer(net, net.conv, images(4), drawn(4)):
        padded = F.pad(inputs[0], (1, 1, 1, 1))
        for row in range(3):
            for column in range(3):
                patch = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].flatten()
                there = gradient[0, :, row, column]
                a += torch.outer(patch, patch) / 4
                b += torch.outer(there, there) / 4 / 9
    torch.testing.assert_close(found.inputs["conv.weight"], a)
    torch.testing.assert_close(found.gradients["conv.weight"], b)


def test_every_place_of_every_call_of_a_linear_layer_counts():
    net = Net()
    found = moments(net, [images(4)])
    a, b = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    for calls in naive_layer(net, net.twice, images(4), drawn(4)):
        assert len(calls) == 2
        for inputs, gradient in calls:
            for row, slope in zip(inputs[0], gradient[0], strict=True):
                a += torch.outer(row, row) / 4
                b += torch.outer(slope, slope) / 4 / 18
    torch.testing.assert_close(found.inputs["twice.weight"], a)
    torch.testing.assert_close(found.gradients["twice.weight"], b)


def test_of_everything_else_they_are_squared_gradients():
    net = Net()
    found = moments(net, [images(4)])
    assert set(found.inputs) == set(found.gradients) == MATRICES
    parameters = dict(net.named_parameters())
    # What an attention has is no layer that is called.
    others = {n for n in parameters if n not in MATRICES and not n.startswith("unused")}
    assert set(found.elements) == others
    expected = {name: torch.zeros_like(parameters[name]) for name in others}
    for image, v in zip(images(4), drawn(4), strict=True):
        net.zero_grad()
        score_of(net, image, v).backward()
        for name in others:
            expected[name] += parameters[name].grad.square() / 4
    for name in others:
        torch.testing.assert_close(found.elements[name], expected[name])


def test_of_one_image_and_the_last_layer_they_give_the_squared_change_along_v():
    net = Net()
    found = moments(net, [images(1)])
    hidden = []
    hook = net.out.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach()))
    net(images(1))
    hook.remove()
    change = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).double()

    def score(weight):
        return (F.normalize(net.scale * (hidden[0] @ weight.T), dim=-1) * drawn(1)).sum()

    _, moved = torch.func.jvp(score, (net.out.weight,), (change,))
    a, b = found.inputs["out.weight"], found.gradients["out.weight"]
    torch.testing.assert_close(torch.trace(b @ change @ a @ change.T), moved**2)


def test_batches_do_not_matter_and_no_more_images_are_taken_than_said():
    whole = moments(Net(), [images(4)])
    for batches in ([images(4)[:3], images(4)[3:]], [torch.cat([images(4), images(9, seed=2)])]):
        found = moments(Net(), batches, limit=4)
        for mine, other in zip(found, whole, strict=True):
            assert mine.keys() == other.keys()
            assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_weight_that_is_used_without_calling_its_layer_is_taken_by_elements():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12, 5)

        def forward(self, rows):
            return rows @ self.fc.weight.T

    found = moments(Tied().double(), [images(3)[:, 0, :2].flatten(1)])
    assert set(found.elements) == {"fc.weight"}
    assert not found.inputs


def test_layers_that_share_a_weight_are_one_layer_with_the_places_of_both():
    class Shared(nn.Module):
        def __init__(self, tied):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4, bias=False) if tied else self.first
            self.second.weight = self.first.weight

        def forward(self, rows):
            return self.second(torch.tanh(self.first(rows)))

    rows = images(3)[:, 0, 0, :4]
    tied, same = (moments(Shared(tied).double(), [rows]) for tied in (True, False))
    for mine, other in zip(tied, same, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], other[name])
    assert set(tied.inputs) == {"first.weight"}


@pytest.mark.parametrize("options", [{"padding_mode": "reflect"}, {"padding": "same"}])
def test_convolutions_that_pad_otherwise_are_taken_by_elements(options):
    net = Net()
    torch.manual_seed(1)
    net.conv = nn.Conv2d(3, 4, 3, **{"padding": 1} | options).double()
    assert "conv.weight" in moments(net, [images(2)]).elements


def test_a_compiled_part_hides_nothing():
    plain, compiled = Net(), Net()
    compiled.twice = torch.compile(compiled.twice, backend="eager")
    compiled(images(2))
    first, second = moments(plain, [images(2)]), moments(compiled, [images(2)])
    name = "twice._orig_mod.weight"
    torch.testing.assert_close(second.inputs[name], first.inputs["twice.weight"])


def test_the_module_is_left_as_it_was():
    net = Net()
    net.conv.requires_grad_(False)
    net.norm.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert "conv.weight" in moments(net, [images(2)]).inputs
    assert not net.conv.weight.requires_grad
    assert net.training
    assert not net.norm.training
    assert not any(layer._forward_hooks for layer in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "the task has no image whose features could be kept in place"),
        ([images(2) * float("nan")], "the gradient of the features by 'conv.weight' is not finite"),
    ],
)
def test_what_gives_no_moments_is_named(batches, message):
    with pytest.raises(InputError, match=message):
        moments(Net(), batches)
