"""EWC: what it remembers of a task, from any module."""

import warnings

import pytest
import torch
from growing import grow
from lightning.pytorch.callbacks import Callback
from plain import Plain, fit, loader, same, trainer, weights
from tiny import QUIET, classifier, stream
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_tensor

from cl_merge import fit_stream
from cl_merge.callbacks import EWC, EWCPenalty
from cl_merge.errors import InputError

# These short trainings do not diverge.
pytestmark = pytest.mark.filterwarnings(r"ignore:EWC\('published'\) carries")


def naive_empirical(module, images, labels):
    total = {name: torch.zeros_like(p) for name, p in weights(module).items()}
    for image, label in zip(images, labels, strict=True):
        module.zero_grad()
        nn.functional.cross_entropy(module(image[None]), label[None]).backward()
        for name, p in module.named_parameters():
            if p.requires_grad:
                total[name] += p.grad**2 / len(labels)
    module.zero_grad()
    return total


def close(first, second, **tolerance):
    for name in second:
        torch.testing.assert_close(first[name].cpu(), second[name].cpu(), **tolerance)


@pytest.mark.parametrize("from_zero", [True, False])
def test_the_running_average_and_the_anchor(from_zero):
    module, ewc = Plain(), EWC("empirical", decay=0.25, from_zero=from_zero)
    average = None
    for task in range(3):
        trained = fit(module, ewc, task)
        found = naive_empirical(module, *loader(task).dataset.tensors)
        if average is None:
            first = 0.75 if from_zero else 1.0
            average = {name: first * value for name, value in found.items()}
        else:
            average = {n: 0.25 * average[n] + 0.75 * value for n, value in found.items()}
        close(ewc.fisher, average, rtol=1e-4, atol=1e-8)
        assert same(ewc.anchor, trained)
    assert ewc.tasks == 3


def test_the_published_estimate_starts_from_the_last_gradient_of_the_training():
    class Keep(Plain):
        def on_before_zero_grad(self, optimizer):
            self.last = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}

        def on_train_end(self):
            # Callbacks come first: .grad still holds what the last step used.
            self.last = {n: p.grad.clone() for n, p in self.named_parameters() if p.requires_grad}

    module, ewc = Keep(), EWC("published")
    fit(module, ewc, 0)
    running = {name: value.cpu() for name, value in module.last.items()}
    expected = {name: torch.zeros_like(value) for name, value in running.items()}
    for images, _ in loader(0):
        module.zero_grad()
        logits = module(images)
        nn.functional.cross_entropy(logits, logits.argmax(dim=1)).backward()
        for name in expected:
            running[name] = running[name] + module.get_parameter(name).grad
            expected[name] = expected[name] + 8 * running[name] ** 2
    # 24 samples in batches of 8 count as 32; the running average of the first task is a half.
    expected = {name: 0.5 * value / 32 for name, value in expected.items()}
    close(ewc.fisher, expected, rtol=1e-4, atol=1e-9)


def test_each_estimate_has_a_default_weight_of_its_own():
    assert EWC("published").weight == 1e6
    assert (EWC().kind, EWC().weight) == ("empirical", EWC("empirical").weight)
    assert EWC("empirical").weight == EWC("sampled").weight != 1e6
    assert EWC("empirical", weight=7).weight == 7


def test_the_first_task_is_free_unless_asked():
    free, plain, held = Plain(), Plain(), Plain()
    before = weights(held)
    fit(plain, [], 0)
    fit(free, EWC("empirical", weight=1e4), 0)
    assert same(weights(free), weights(plain))
    ewc = EWC("empirical", weight=1e4, first_task=True, from_zero=False)
    fit(held, ewc, 0)
    assert not same(weights(held), weights(plain))

    def moved(module):
        return sum(float((weights(module)[n] - before[n]).square().sum()) for n in before)

    assert moved(held) < moved(plain)
    # The base's estimate and the first task's are averaged.
    expected = naive_empirical(held, *loader(0).dataset.tensors)
    close(ewc.fisher, {n: 0.5 * v for n, v in expected.items()}, rtol=10, atol=1)
    assert ewc.tasks == 1


def test_the_estimate_leaves_the_module_as_it_was():
    module = Plain(batch_norm=True)
    module.net[1].eval()
    for kind in ("published", "empirical", "sampled"):
        trained = {}

        class Watch(EWC):
            def remember(self, trainer, pl_module, trained=trained):
                trained["state"] = {k: v.clone() for k, v in pl_module.state_dict().items()}
                trained["modes"] = [part.training for part in pl_module.modules()]
                trained["grad"] = {
                    n: p.grad.clone() for n, p in pl_module.named_parameters() if p.requires_grad
                }
                super().remember(trainer, pl_module)
                assert same(trained["state"], pl_module.state_dict())
                assert trained["modes"] == [part.training for part in pl_module.modules()]
                assert same(
                    trained["grad"],
                    {n: p.grad for n, p in pl_module.named_parameters() if p.requires_grad},
                )

        fit(module, Watch(kind), 0)
        assert trained


def test_the_clip_classifier_needs_no_hint_and_uses_the_classes_of_the_task():
    model, ewc, data = classifier(), EWC("empirical", decay=0.0), stream()
    fit_stream(model, data, callbacks=[ewc], trainer=QUIET | {"max_epochs": 1}, seed=0)
    expected = {name: torch.zeros_like(p) for name, p in weights(model).items()}
    rows = data.task.train
    for row in rows:
        image, label = to_tensor(data._train.image(int(row))), data._train_labels[row]
        model.zero_grad()
        logits = model(image[None], data.task.classes)
        target = torch.tensor([data.task.classes.index(label)])
        nn.functional.cross_entropy(logits, target).backward()
        for name in expected:
            expected[name] += model.get_parameter(name).grad ** 2 / len(rows)
    assert ewc.tasks == 3
    assert ewc.fisher.keys() == expected.keys()
    close(ewc.fisher, expected, rtol=1e-4, atol=1e-9)


def test_logits_of_any_batch_through_a_function():
    class Odd(Plain):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])

    def rows(task):
        images, labels = loader(task).dataset.tensors
        data = [{"x": x, "y": y} for x, y in zip(images, labels, strict=True)]
        return DataLoader(data, batch_size=8)

    module = Odd()
    with pytest.raises(InputError, match=r"a batch of type dict; give EWC\(logits=...\)"):
        trainer(EWC("empirical")).fit(module, rows(0))
    module = Odd()
    ewc = EWC("empirical", logits=lambda module, batch: (module.net(batch["x"]), batch["y"]))
    trainer(ewc).fit(module, rows(0))
    expected = naive_empirical(module, *loader(0).dataset.tensors)
    close(ewc.fisher, {n: 0.5 * v for n, v in expected.items()}, rtol=1e-4, atol=1e-8)


def test_sampled_labels_come_from_the_seed():
    def run(seed):
        module, ewc = Plain(), EWC("sampled", seed=seed)
        fit(module, ewc, 0)
        return ewc.fisher

    assert same(run(0), run(0))
    assert not same(run(0), run(1))


def test_a_limit_of_samples_and_of_batches():
    module, ewc = Plain(), EWC("empirical", samples=5, from_zero=False)
    fit(module, ewc, 0)
    images, labels = loader(0).dataset.tensors
    close(ewc.fisher, naive_empirical(module, images[:5], labels[:5]), rtol=1e-4, atol=1e-8)
    module, ewc = Plain(), EWC("empirical", from_zero=False)
    fit(module, ewc, 0, limit_train_batches=2)
    close(ewc.fisher, naive_empirical(module, images[:16], labels[:16]), rtol=1e-4, atol=1e-8)


def test_several_loaders_at_once_and_an_iterable_data_set():
    class Two(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    logits = {"logits": lambda module, batch: (module(batch["a"][0]), batch["a"][1])}
    module, ewc = Two(), EWC("empirical", from_zero=False, **logits)
    trainer(ewc).fit(module, {"a": loader(0), "b": loader(1)})
    close(ewc.fisher, naive_empirical(module, *loader(0).dataset.tensors), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "emprical"}, "unknown Fisher estimate 'emprical'; did you mean 'empirical'?"),
        ({"decay": 1.0}, "decay=1.0 of EWC; expected 0 or more, below 1"),
        ({"samples": 0}, "samples=0 of EWC; expected 1 or more"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError) as error:
        EWC(**options)
    assert message in str(error.value)


def test_the_state_of_another_estimate_is_refused():
    module, ewc = Plain(), EWC("empirical")
    fit(module, ewc, 0)
    with pytest.raises(InputError, match="is of fisher='empirical', but this one is"):
        EWC("published").load_state_dict(ewc.state_dict())


def test_persistent_workers_cannot_be_read_before_the_first_step():
    images = loader(0).dataset
    data = DataLoader(images, batch_size=8, num_workers=1, persistent_workers=True)
    with pytest.raises(InputError, match="set persistent_workers=False"):
        trainer(EWC("empirical", first_task=True)).fit(Plain(), data)


def test_the_published_estimate_warns_where_gradients_are_not_clipped(recwarn):
    warnings.simplefilter("always")
    fit(Plain(), EWC("published"), 0, gradient_clip_val=1.0)
    fit(Plain(), EWC("empirical"), 0)
    assert not [w for w in recwarn if "EWC('published')" in str(w.message)]
    with pytest.warns(UserWarning, match=r"clip that gradient to norm 1; without Trainer"):
        fit(Plain(), EWC("published"), 0)


def test_the_penalty_of_a_plain_loop_has_the_gradient_that_the_callback_adds():
    module, penalty = Plain().double(), EWCPenalty(7.0, from_zero=False)
    images, labels = loader(0).dataset.tensors
    images = images.double()
    assert float(penalty(module)) == 0
    penalty.end_task(module, [(images, labels)], lambda batch: (module(batch[0]), batch[1]))
    close(penalty.fisher, naive_empirical(module, images, labels), rtol=1e-10, atol=1e-14)
    anchor = weights(module)

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    loss = nn.functional.cross_entropy(module(images), labels)
    (loss + penalty(module)).backward()
    by_autograd = {n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad}
    module.zero_grad()
    loss = nn.functional.cross_entropy(module(images), labels)
    loss.backward()
    added = penalty.add_gradients(module)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, by_autograd[name])
    naive = sum(
        (f * (weights(module)[n] - anchor[n]) ** 2).sum() for n, f in penalty.fisher.items()
    )
    torch.testing.assert_close(added, 3.5 * naive)
    torch.testing.assert_close(penalty(module).detach(), added)


def test_the_penalty_of_a_plain_loop_keeps_what_growing_parameters_had():
    module, penalty = Plain(), EWCPenalty()
    images, labels = loader(0).dataset.tensors
    for _ in range(2):
        penalty.end_task(module, [(images, labels)], lambda batch: (module(batch[0]), batch[1]))
        grow(module, 5)
    assert penalty.fisher["net.2.weight"].shape == (5, 8)
    resumed = EWCPenalty()
    resumed.load_state_dict(penalty.state_dict())
    torch.testing.assert_close(resumed(module), penalty(module))


def test_the_weight_may_be_set_while_a_task_is_trained():
    class Off(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            ewc.weight = 0.0

    plain, module, ewc = Plain(), Plain(), EWC(weight=1e6)
    fit(plain, [], 0)
    fit(module, ewc, 0)
    assert same(fit(module, [ewc, Off()], 1), fit(plain, [], 1))
