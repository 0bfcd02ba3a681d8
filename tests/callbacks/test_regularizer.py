"""LwF, EWC and DriftPenalty give what the same penalty gives when it is written inside the training step."""

import copy
import functools
import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from plain import ACCELERATOR, SAFE, Plain, fit, loader, same, trainer, weights
from torch import nn

from cl_merge import TaskVector, merge
from cl_merge.callbacks import EWC, DriftPenalty, LwF, MergeCallback
from cl_merge.callbacks.outputs import distillation
from cl_merge.errors import InputError

# These short trainings do not diverge.
pytestmark = pytest.mark.filterwarnings(r"ignore:EWC\('published'\) carries")

GRID = [
    {"precision": precision, "accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    | {"fused": fused}
    for precision, accumulate, clip, fused in itertools.product(
        ("32", "bf16-mixed", "16-mixed", "64"), (1, 2, 3), (None, 0.1), (False, True)
    )
    # Lightning refuses to clip what a fused optimizer unscales.
    if not (clip and fused and precision.endswith("mixed"))
]


def with_scaler(options):
    """Trainer options; Lightning itself offers no float16 on a CPU, but its plugin does."""
    if options["precision"] != "16-mixed" or ACCELERATOR != "cpu":
        return options
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    return {k: v for k, v in options.items() if k != "precision"} | {"plugins": [plugin]}


class WithTerm(Plain):
    """The module with a penalty written where people write it."""

    term = None

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        loss = nn.functional.cross_entropy(logits, labels)
        return loss if self.term is None else loss + self.term(images, logits)


def penalty(weight, fisher, anchor):
    """weight / 2 * sum F (p - p*)^2, with a graph."""

    def term(module):
        parts = [
            (fisher[name].to(p.device) * (p - anchor[name].to(p.device)) ** 2).sum()
            for name, p in module.named_parameters()
            if p.requires_grad
        ]
        return weight / 2 * sum(parts)

    return term


def kept(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def held_in_place(**options):
    return DriftPenalty(features=lambda module, batch: module(batch[0]), **options)


MAKERS = [
    lambda: LwF(target="net"),
    lambda: EWC("empirical", weight=30.0),
    lambda: held_in_place(weight=3.0),
]


def distance(first, second):
    first, second = weights(first), weights(second)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def name_of(options):
    return "-".join(str(value) for value in options.values())


def check_equal_to_a_term_inside_the_step(callback, options, make_term, least):
    """Train a second task with a callback, with its term written in the step, and without it."""
    options = options | {"max_epochs": 2}
    fused = options.pop("fused")
    module, reference, free = Plain(fused=fused), WithTerm(fused=fused), Plain(fused=fused)
    fit(module, callback, 0, **with_scaler(options))
    for other in (reference, free):
        other.load_state_dict(module.state_dict())
    reference.term = make_term(module, reference)
    fit(module, callback, 1, **with_scaler(options))
    trainer(**with_scaler(options)).fit(reference, loader(1))
    trainer(**with_scaler(options)).fit(free, loader(1))
    assert distance(module, reference) < 1e-5
    assert distance(module, free) > least


@pytest.mark.slow
@pytest.mark.parametrize("options", GRID, ids=name_of)
@pytest.mark.parametrize("kind", ["published", "empirical"])
def test_ewc_equals_the_penalty_inside_the_training_step(options, kind):
    ewc = EWC(kind, weight=30.0)

    def make_term(_, reference):
        term = penalty(30.0, kept(ewc.fisher), kept(ewc.anchor))
        return lambda images, logits: term(reference)

    check_equal_to_a_term_inside_the_step(ewc, options, make_term, least=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("options", GRID, ids=name_of)
def test_the_drift_penalty_equals_the_same_inside_the_training_step(options):
    callback = held_in_place(weight=3.0)

    def make_term(module, reference):
        drift, start = copy.deepcopy(callback.penalty), weights(module)

        def term(images, logits):
            where = images.device
            with torch.autocast(where.type, enabled=False):
                live = dict(reference.named_parameters())
                changes = {name: live[name] - before.to(where) for name, before in start.items()}
                parts = [(d.to(where) * changes[n] ** 2).sum() for n, d in drift.elements.items()]
                for name, b in drift.gradients.items():
                    a, change = drift.inputs[name].to(where), changes[name]
                    parts.append(torch.trace(b.to(where) @ change @ a @ change.T))
                return 3.0 * sum(parts)

        return term

    check_equal_to_a_term_inside_the_step(callback, options, make_term, least=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", GRID, ids=name_of)
def test_lwf_equals_the_distillation_inside_the_training_step(options):
    def make_term(module, _):
        teacher = copy.deepcopy(module.net).eval()

        def term(images, logits):
            with torch.no_grad():
                old = teacher.to(images.device)(images)
            with torch.autocast(images.device.type, enabled=False):
                wide = (x if x.dtype == torch.float64 else x.float() for x in (logits, old))
                return 2.0 * distillation(*wide)

        return term

    lwf = LwF(2.0, target="net")
    check_equal_to_a_term_inside_the_step(lwf, options, make_term, least=1e-3)


def test_accumulation_may_change_between_epochs():
    module, ewc = Plain(), EWC("empirical", weight=30.0)
    fit(module, ewc, 0)
    reference = WithTerm()
    reference.load_state_dict(module.state_dict())
    term = penalty(30.0, kept(ewc.fisher), kept(ewc.anchor))
    reference.term = lambda images, logits: term(reference)
    schedule = {0: 1, 1: 3, 2: 2}
    fit(module, [GradientAccumulationScheduler(schedule), ewc], 1, max_epochs=3)
    fit(reference, GradientAccumulationScheduler(schedule), 1, max_epochs=3)
    assert distance(module, reference) < 1e-5


@pytest.mark.parametrize("penalty", ["ewc", "drift"])
def test_they_compose_in_any_order(penalty):
    def run(order):
        module = Plain()
        base = weights(module)
        callbacks = {
            "lwf": LwF(target="net"),
            "ewc": EWC("empirical", weight=10.0),
            "drift": held_in_place(),
            "merge": MergeCallback("magmax"),
        }
        vectors = []
        for task in range(3):
            trained = fit(module, [callbacks[name] for name in order], task)
            vectors.append(TaskVector.between(base, trained))
        assert dict(callbacks["merge"].merged()).keys() == base.keys()
        assert same(dict(callbacks["merge"].merged()), dict(merge(vectors)))
        return weights(module)

    first = run(["lwf", penalty, "merge"])
    assert same(first, run(["merge", penalty, "lwf"]))
    module = Plain()
    for task in range(3):
        fit(module, [], task)
    assert not same(first, weights(module))


def test_each_term_is_logged_apart_from_the_loss_of_the_module():
    module = Plain()
    lwf, ewc = LwF(target="net"), EWC("empirical", weight=10.0)
    fit(module, [lwf, ewc], 0)
    anchor, fisher = kept(ewc.anchor), kept(ewc.fisher)
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            images, labels = batch
            with torch.no_grad():
                logits = pl_module(images)
                old = torch.func.functional_call(
                    pl_module.net,
                    {k.removeprefix("net."): v.to(images.device) for k, v in anchor.items()},
                    images,
                )
                self.expected = {
                    "loss": nn.functional.cross_entropy(logits, labels),
                    "lwf/loss": 0.3 * distillation(logits, old),
                    "ewc/penalty": penalty(10.0, fisher, anchor)(pl_module),
                }

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            found = trainer.callback_metrics
            assert set(found) == {"loss", "lwf/loss", "ewc/penalty"}
            for name, value in self.expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
            total = self.expected["loss"] + self.expected["lwf/loss"]
            torch.testing.assert_close(outputs["loss"], total, rtol=1e-5, atol=1e-6)
            seen.append(float(found["ewc/penalty"]))

    fit(module, [lwf, ewc, Watch()], 1, max_epochs=2)
    assert len(seen) == 6
    assert seen[0] == 0.0
    assert seen[-1] > 0


def test_nothing_of_them_is_left_in_the_module_or_its_checkpoint(tmp_path):
    module, callbacks = Plain(), [make() for make in MAKERS]
    fit(module, callbacks, 0)
    checkpoint = ModelCheckpoint(tmp_path)
    fit(module, [*callbacks, checkpoint], 1)
    assert "training_step" not in vars(module)
    assert not module.net._forward_hooks
    assert list(module.state_dict()) == list(Plain().state_dict())
    state = torch.load(checkpoint.best_model_path, weights_only=True)
    assert list(state["state_dict"]) == list(Plain().state_dict())
    copy.deepcopy(module)


@pytest.mark.parametrize("make", MAKERS, ids=["lwf", "ewc", "drift"])
def test_a_task_that_stopped_goes_on_from_a_checkpoint(make, tmp_path):
    def first_task():
        module, callback = Plain(), make()
        fit(module, callback, 0)
        return module, callback

    module, callback = first_task()
    fit(module, callback, 1, max_epochs=4)
    fit(module, callback, 2)

    stopped, callback = first_task()
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1)

    class Stop(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(stopped, [callback, checkpoint, Stop()], 1, max_epochs=4)
    assert "training_step" not in vars(stopped)
    fresh, callback = Plain(), make()
    file = str(tmp_path / "epoch=1-step=6.ckpt")
    trainer(callback, ModelCheckpoint(tmp_path), max_epochs=4).fit(
        fresh, loader(1), ckpt_path=file, **SAFE
    )
    assert callback.tasks == 2
    fit(fresh, callback, 2)
    assert same(weights(fresh), weights(module))


@pytest.mark.parametrize("make", MAKERS, ids=["lwf", "ewc", "drift"])
def test_a_checkpoint_of_the_last_step_ends_its_task(make, tmp_path):
    module, callback = Plain(), make()
    fit(module, callback, 0)
    checkpoint = ModelCheckpoint(tmp_path)
    fit(module, [callback, checkpoint], 1)
    fresh, again = Plain(), make()
    trainer(again, ModelCheckpoint(tmp_path)).fit(
        fresh, loader(1), ckpt_path=checkpoint.best_model_path, **SAFE
    )
    assert again.tasks == 2
    fit(module, callback, 2)
    fit(fresh, again, 2)
    # On a GPU the module is back on the CPU by then, where the Fisher is estimated.
    assert distance(fresh, module) < (1e-7 if ACCELERATOR == "cpu" else 1e-4)


def test_manual_optimisation_is_refused():
    module = Plain()
    module.automatic_optimization = False
    for callback in (make() for make in MAKERS):
        with pytest.raises(RuntimeError, match="but Plain sets automatic_optimization=False"):
            fit(module, callback, 0)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_weight_must_be_finite_and_not_negative(value):
    with pytest.raises(InputError, match=r"weight=.* of LwF; expected 0 or more, finite"):
        LwF(value)
    with pytest.raises(InputError, match=r"weight=.* of EWC; expected 0 or more, finite"):
        EWC(weight=value)


@pytest.mark.parametrize("make", [lambda: LwF(1.0, target="net"), lambda: EWC(weight=30.0)])
def test_a_layer_that_is_frozen_for_a_task_is_regularized_again_when_it_trains(make):
    module, callback = Plain(), make()
    for task, trains in enumerate((True, False, True)):
        module.net[0].weight.requires_grad_(trains)
        fit(module, callback, task)
    teacher = callback._teacher if isinstance(callback, LwF) else callback.anchor
    assert torch.equal(
        teacher[next(n for n in teacher if n.endswith("0.weight"))], module.net[0].weight
    )


def test_a_step_that_returns_a_dictionary_or_skips_a_batch():
    class Odd(Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                return None
            return {"loss": super().training_step(batch, batch_idx), "more": 1}

    module, free, callbacks = Odd(), Odd(), [make() for make in MAKERS]
    fit(module, callbacks, 0)
    fit(free, [], 0)
    assert same(weights(module), weights(free))
    fit(module, callbacks, 1)
    fit(free, [], 1)
    assert not same(weights(module), weights(free))


def test_two_of_a_kind_share_the_training_step():
    module = Plain()
    ones = [LwF(target="net"), LwF(target="net.0", readout=lambda output, classes: output)]
    for task in range(2):
        fit(module, ones, task)
        assert "training_step" not in vars(module)


def test_a_module_that_extends_its_own_step_gets_it_back():
    module = Plain()
    own = module.training_step
    module.training_step = lambda batch, batch_idx: own(batch, batch_idx)
    before = module.training_step
    lwf = LwF(target="net")
    for task in range(2):
        fit(module, lwf, task)
        assert module.training_step is before


def test_fast_dev_run_and_nothing_trained():
    module, callbacks = Plain(), [make() for make in MAKERS]
    fit(module, callbacks, 0, max_epochs=0)
    assert [callback.tasks for callback in callbacks] == [0, 0, 0]
    fit(module, callbacks, 0, fast_dev_run=True)
    assert [callback.tasks for callback in callbacks] == [1, 1, 1]
    assert isinstance(module, L.LightningModule)


def decorated(step):
    @functools.wraps(step)
    def wrapper(*args, **kwargs):
        return step(*args, **kwargs)

    return wrapper


def test_a_training_step_that_is_decorated_and_takes_the_batch_alone():
    class Decorated(Plain):
        @decorated
        def training_step(self, batch):
            return super().training_step(batch, 0)

    module, lwf = Decorated(), LwF(target="net")
    for task in range(2):
        fit(module, lwf, task)
    assert lwf.tasks == 2
