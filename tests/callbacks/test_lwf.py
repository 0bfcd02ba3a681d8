"""LwF: the distillation loss, the teacher, and the classes it is asked about."""

import pytest
import torch
from plain import Plain, fit, loader, same, trainer, weights
from tiny import QUIET, classifier, stream
from torch import nn

from cl_merge import fit_stream
from cl_merge.callbacks import LwF
from cl_merge.callbacks.outputs import distillation
from cl_merge.errors import InputError


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_distillation_is_the_published_form(temperature, classes):
    generator = torch.Generator().manual_seed(classes)
    new = 5 * torch.randn(7, classes, generator=generator, dtype=torch.float64)
    old = 5 * torch.randn(7, classes, generator=generator, dtype=torch.float64)
    # Probabilities first, then to the power of 1 / T and normalised again, as published.
    p, q = new.softmax(dim=1) ** (1 / temperature), old.softmax(dim=1) ** (1 / temperature)
    p, q = p / p.sum(dim=1, keepdim=True), q / q.sum(dim=1, keepdim=True)
    expected = -(q * (p + 1e-5 / classes).log()).sum(dim=1).mean()
    torch.testing.assert_close(distillation(new, old, temperature), expected)


def test_the_gradient_of_distillation_is_right():
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    old = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logits: distillation(logits, old), (new,))


def test_the_teacher_is_the_model_after_the_previous_task():
    module, lwf = Plain(), LwF(target="net")
    for task in range(3):
        trained = fit(module, lwf, task)
        assert same({f"net.{name}": t for name, t in lwf.state_dict()["teacher"].items()}, trained)
        assert lwf.tasks == task + 1


def test_the_teacher_sees_the_same_inputs_in_evaluation_mode():
    class Dropped(Plain):
        def __init__(self):
            super().__init__(batch_norm=True)
            self.net.insert(0, nn.Dropout(0.5))
            self.inputs = []

        def training_step(self, batch, batch_idx):
            # An augmentation that is drawn anew for every batch.
            images, labels = batch
            images = images + torch.randn_like(images)
            self.inputs.append(images.cpu())
            return super().training_step((images, labels), batch_idx)

    asked = []

    def readout(output, classes):
        asked.append(output.detach().cpu().clone())
        return output

    module, lwf = Dropped(), LwF(target="net", readout=readout)
    fit(module, lwf, 0)
    teacher = Dropped()
    teacher.load_state_dict(module.state_dict())
    module.inputs.clear()
    asked.clear()
    fit(module, lwf, 1)
    assert all(part.training for part in module.net.modules())
    teacher.eval()
    with torch.no_grad():
        expected = [teacher.net(images) for images in module.inputs]
    # Asked for the student's output, then for the teacher's, at every step.
    assert len(asked) == 6
    for found, wanted in zip(asked[1::2], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_only_earlier_classes_are_distilled():
    seen = set()

    def trained(**options):
        model, data = classifier(), stream(order=[3, 1, 5, 0, 2, 4])
        lwf = LwF(**{k: lambda *given, f=f: f(model, *given) for k, f in options.items()})
        fit_stream(model, data, callbacks=[lwf], trainer=QUIET | {"max_epochs": 1}, seed=0)
        return weights(model)

    def readout(model, features, classes):
        seen.add(tuple(classes))
        return model.head(features, classes)

    assert same(trained(), trained(readout=readout))
    assert seen == {(3, 1), (3, 1, 5, 0)}


def test_a_larger_weight_keeps_the_outputs_closer_to_the_teacher():
    def distance(weight):
        module, lwf = Plain(), LwF(weight, target="net")
        fit(module, lwf, 0)
        images = loader(1).dataset.tensors[0]
        with torch.no_grad():
            before = module(images).softmax(dim=1)
            fit(module, lwf, 1, max_epochs=5)
        return float((module(images).softmax(dim=1) - before).abs().mean().detach())

    assert distance(100.0) < distance(1.0) < distance(0.0)


def keeps_a_loss(module, images):
    module.kept = module.head(images).square().mean()
    return module.head(images)


def changes_its_input(module, images):
    images.sub_(1.0)
    module.kept = 0.0
    return module.head(images)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("forward", [keeps_a_loss, changes_its_input])
def test_what_the_target_does_beside_its_output_is_as_without_a_teacher(forward, precision):
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.joined = nn.Linear(4, 3), nn.Identity()

        def forward(self, images):
            return self.joined(forward(self, images))

    class Module(Plain):
        def __init__(self):
            super().__init__()
            self.net = Kept()

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.net.kept

    def trained(*callbacks):
        module = Module()
        fit(module, callbacks, 0, precision=precision)
        module.net.joined = nn.Linear(3, 3)  # which the teacher has not
        return fit(module, callbacks, 1, precision=precision)

    assert same(trained(LwF(0.0, target="net")), trained())


def test_the_first_task_is_distilled_on_request():
    free, plain, held = Plain(), Plain(), Plain()
    fit(plain, [], 0)
    fit(free, LwF(target="net"), 0)
    fit(held, LwF(100.0, target="net", first_task=True), 0)
    assert same(weights(free), weights(plain))
    assert not same(weights(held), weights(plain))
    model = classifier()
    fit_stream(model, stream(), callbacks=[LwF(first_task=True)], trainer=QUIET | {"max_epochs": 1})


def test_the_teacher_is_one_copy_and_takes_no_gradient():
    module, lwf = Plain(batch_norm=True), LwF(target="net")
    fit(module, lwf, 0)
    fit(module, lwf, 1)
    teacher = lwf.state_dict()["teacher"]
    trained = {k: v for k, v in module.net.state_dict().items()}
    assert teacher.keys() == trained.keys()
    assert not any(tensor.requires_grad for tensor in teacher.values())
    live = {p.data_ptr() for p in module.net.parameters()}
    assert live.isdisjoint(tensor.data_ptr() for tensor in teacher.values())


def test_frozen_parameters_are_not_copied():
    module = Plain()
    module.net[0].requires_grad_(False)
    lwf = LwF(target="net")
    fit(module, lwf, 0)
    assert set(lwf.state_dict()["teacher"]) == {"2.weight", "2.bias"}
    fit(module, lwf, 1)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, r"LwF needs the name of the submodule of Plain .* one of net"),
        ("ner", r"unknown submodule of Plain 'ner'; did you mean 'net'\?"),
    ],
)
def test_a_target_that_is_missing_or_unknown_is_named(target, message):
    module = Plain()
    with pytest.raises(InputError, match=message):
        fit(module, LwF(target=target), 0)


def test_a_target_is_given_by_name():
    with pytest.raises(InputError, match="target of LwF is a module, Linear; expected its name"):
        LwF(target=nn.Linear(1, 1))


def test_a_target_that_is_not_called_is_named():
    module = Plain()
    module.other = nn.Linear(1, 1)
    lwf = LwF(target="other")
    with pytest.raises(InputError, match="'other' was not called with gradients in training_step"):
        fit(module, lwf, 0)


def test_a_compiled_part_is_distilled_as_any_other():
    plain, part = Plain(), Plain()
    part.net = torch.compile(part.net, backend="eager")
    first, second = LwF(target="net"), LwF(target="net")
    for task in range(2):
        fit(plain, first, task)
        fit(part, second, task)
    found = {name.replace("_orig_mod.", ""): value for name, value in weights(part).items()}
    assert same(found, weights(plain))


def test_the_teacher_has_all_that_changes():
    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 3)
            self.wave = nn.Parameter(torch.ones(4, dtype=torch.complex64))

        def forward(self, images):
            return self.linear((self.norm(images) * self.wave).abs())

    module, lwf = Plain(), LwF(target="net")
    module.net = torch.compile(Waves(), backend="eager")
    fit(module, lwf, 0)
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    parameters = {"norm.weight", "norm.bias", "linear.weight", "linear.bias", "wave"}
    assert lwf.state_dict()["teacher"].keys() == buffers | parameters
    assert lwf.state_dict()["teacher"]["wave"].is_complex()


def test_a_module_that_is_compiled_whole_is_refused_before_it_trains():
    module = torch.compile(Plain(), backend="eager")
    with pytest.raises(InputError, match="compile that part instead: module.net = torch.compile"):
        fit(module, LwF(target="net"), 0)


def test_an_output_that_is_no_logits_is_named():
    class Tokens(nn.Linear):
        def forward(self, x):
            return super().forward(x)[:, None]

    module = Plain()
    module.net = nn.Sequential(Tokens(4, 3), nn.Flatten())
    lwf = LwF(target="net.0")
    with pytest.raises(InputError, match=r"'net.0' returns \[8, 1, 3\]; expected logits"):
        fit(module, lwf, 0)


def test_an_output_with_logits_is_understood():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Net(nn.Linear):
        def forward(self, x):
            return Output(super().forward(x))

    class Module(Plain):
        def forward(self, images):
            return self.net(images).logits

    module = Module()
    module.net = Net(4, 3)
    lwf = LwF(target="net")
    for task in range(2):
        fit(module, lwf, task)
    assert lwf.tasks == 2


def test_the_temperature_must_be_positive():
    with pytest.raises(InputError, match=r"temperature=0 of LwF; expected more than 0"):
        LwF(temperature=0)


def test_a_model_that_is_tested_between_tasks():
    module, lwf = Plain(), LwF(target="net")
    for task in range(2):
        fit(module, lwf, task)
        trainer(lwf).test(module, loader(0), verbose=False)
    assert lwf.tasks == 2
