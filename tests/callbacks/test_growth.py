"""Callbacks where parameters join, grow, and begin or cease to train."""

import copy

import lightning as L
import pytest
import torch
from growing import Backbone, Heads, grow
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from plain import Plain, fit, loader, same, trainer, weights
from safetensors.torch import load_file
from torch import nn

from cl_merge import TaskVector, get_merger, merge, merge_checkpoints
from cl_merge.callbacks import EWC, LwF, MergeCallback
from cl_merge.callbacks.outputs import distillation
from cl_merge.errors import InputError
from cl_merge.merge_files.inspection import inspect_checkpoints
from cl_merge.mergers import MERGERS


def padded(tensors, like):
    """Tensors with zeros for what others have more."""
    found = {}
    for name, other in like.items():
        found[name] = torch.zeros_like(other)
        if name in tensors:
            found[name][tuple(slice(n) for n in tensors[name].shape)] = tensors[name]
    return found


# Random numbers are keyed by the element, thresholds by the size of a task vector: those see the
# vectors as they were then, not as they are with zeros for what came later.
@pytest.mark.parametrize(
    "method", ["magmax", "average", "task-arithmetic", "ema", "emr", "tsv", "wudi", "dop"]
)
def test_a_head_that_grows_is_merged_as_if_the_tasks_before_had_not_moved_the_new_rows(
    method, tmp_path
):
    module, callback = Plain(), MergeCallback(method, directory=tmp_path)
    base = weights(module)
    fit(module, callback, 0)
    first = TaskVector.load(tmp_path / "task0.safetensors")
    grow(module, 5)
    born = weights(module)
    base |= {name: born[name].clone() for name in ("net.2.weight", "net.2.bias")}
    base["net.2.weight"][:3], base["net.2.bias"][:3] = (
        weights(Plain())["net.2.weight"],
        weights(Plain())["net.2.bias"],
    )
    trained = fit(module, callback, 1)
    second = TaskVector.between(base, trained)
    assert TaskVector.load(tmp_path / "task1.safetensors") == second
    assert same(callback.base, base)
    expected = merge([TaskVector(padded(first, second)), second], method=method)
    found = callback.merged()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    trainer(callback).test(module, loader(0), verbose=False)
    assert same(module.seen["test"], found.apply_to(base, callback.scale))
    assert same(weights(module), trained)


@pytest.mark.parametrize("store", ["float32", "int4"])
@pytest.mark.parametrize(
    "method",
    ["magmax", "average", "task-arithmetic", "ties", "random-mix", "dare", "breadcrumbs", "opcm"],
)
def test_the_files_of_a_stream_that_grew_merge_to_the_same_bits(method, store, tmp_path):
    module, callback = Heads(), MergeCallback(method, directory=tmp_path, store=store)
    fit(module, callback, 0)
    grow(module, 5)
    module.forward = lambda images: module.net(images)
    fit(module, callback, 1)
    module.add()
    del module.forward
    module.heads["1"] = nn.Linear(5, 3)
    fit(module, callback, 2)
    tasks = [tmp_path / f"task{task}.safetensors" for task in range(3)]
    out = tmp_path / "merged.safetensors"
    merge_checkpoints(tmp_path / "base.safetensors", tasks, out, method=method)
    assert same(load_file(out), callback.merged().apply_to(callback.base, callback.scale))
    assert inspect_checkpoints(tasks, tmp_path / "base.safetensors").fine
    with pytest.raises(InputError, match="other tensors|other shapes"):  # it has not grown itself
        merge_checkpoints(out, tasks, tmp_path / "x.safetensors", method=method)
    other = tmp_path / "other.safetensors"
    TaskVector({"net.2.weight": torch.ones(9, 8)}).save(other)
    with pytest.raises(InputError, match="which are no rows of the base"):
        merge_checkpoints(tmp_path / "base.safetensors", [other], tmp_path / "x.safetensors")


@pytest.mark.parametrize("method", sorted(set(MERGERS) - {"fisher", "regmean", "slerp"}))
def test_every_method_takes_parameters_that_join_and_grow(method):
    merger = get_merger(method)
    torch.manual_seed(0)
    merger.update({"a": torch.randn(3, 4)})
    assert merger.grow({"a": torch.Size([5, 4]), "b": torch.Size([2, 2])})
    merger.update({"a": torch.randn(5, 4), "b": torch.randn(2, 2)})
    shapes = {name: tuple(value.shape) for name, value in merger.merged().items()}
    assert shapes == {"a": (5, 4), "b": (2, 2)}
    assert all(bool(value.isfinite().all()) for value in merger.merged().values())


@pytest.mark.parametrize("start", ["independent", "merged"])
def test_a_task_starts_at_the_base_or_the_merge_in_the_rows_that_there_were(start):
    module, callback = Plain(), MergeCallback("magmax", start=start)
    base = weights(module)
    fit(module, callback, 0)
    expected = base if start == "independent" else callback.merged().apply_to(base, 0.5)
    grow(module, 5)
    new = weights(module)["net.2.weight"][3:]
    begun = {}

    class Record(Callback):
        def on_train_start(self, trainer, pl_module):
            begun.update(weights(pl_module))

    fit(module, [callback, Record()], 1)
    assert torch.equal(begun["net.2.weight"][:3], expected["net.2.weight"])
    assert torch.equal(begun["net.2.weight"][3:], new)


@pytest.mark.parametrize("start", ["sequential", "independent", "merged"])
@pytest.mark.parametrize("left_out", ["trained", "base"])
def test_a_head_that_is_left_out_may_be_anything(left_out, start):
    module = Plain()
    callback = MergeCallback("magmax", exclude=["net.2.*"], left_out=left_out, start=start)
    fit(module, callback, 0)
    module.net[2] = nn.Linear(8, 2)  # smaller, and without the old rows
    born = weights(module)["net.2.weight"]

    def step(batch, batch_idx):
        return nn.functional.cross_entropy(module(batch[0]), batch[1].clamp(max=1))

    module.training_step = step
    trained = fit(module, callback, 1)
    trainer(callback).test(module, loader(0), verbose=False)
    expected = born if left_out == "base" else trained["net.2.weight"]
    assert torch.equal(module.seen["test"]["net.2.weight"], expected)
    assert not torch.equal(module.seen["test"]["net.0.weight"], trained["net.0.weight"])
    assert same(weights(module), trained)


@pytest.mark.parametrize("exclude", [[], ["heads.*"]])
def test_heads_join_task_by_task(exclude):
    module, callback = Heads(), MergeCallback("magmax", exclude=exclude)
    fit(module, callback, 0)
    first = copy.deepcopy(module.heads["0"].state_dict())
    module.add()
    born = copy.deepcopy(module.heads["1"].state_dict())
    trained = fit(module, callback, 1)
    assert torch.equal(callback.base["heads.1.weight"], born["weight"])
    assert ("heads.1.weight" in callback.merged()) == (not exclude)
    trainer(callback).test(module, loader(0), verbose=False)
    if exclude:
        assert torch.equal(module.seen["test"]["heads.0.weight"], first["weight"])
        assert torch.equal(module.seen["test"]["heads.1.weight"], trained["heads.1.weight"])


def test_parameters_that_were_merged_and_go_or_shrink_stop_the_fit_before_it_trains():
    module, callback = Heads(), MergeCallback("magmax")
    fit(module, callback, 0)
    heads, module.heads = module.heads, nn.ModuleDict({"other": nn.Linear(3, 3)})
    module.forward = lambda images: module.heads["other"](module.net(images))
    with pytest.raises(InputError, match=r"no longer has heads.0.weight.*exclude=\['heads.\*'\]"):
        fit(module, callback, 1)
    module.heads, module.net[2] = heads, nn.Linear(8, 2)
    with pytest.raises(InputError, match=r"net.2.weight \(2, 8\) instead of \(3, 8\)"):
        fit(module, callback, 1)
    assert callback.tasks == 1


def test_other_dtypes_than_in_the_first_task_stop_the_fit_before_it_trains():
    module, callback = Plain(), MergeCallback("magmax")
    fit(module, callback, 0)
    module.double()
    before = weights(module)
    with pytest.raises(InputError, match="other dtypes than the base: net.0.weight float64"):
        trainer(callback, precision="64-true").fit(module, loader(1))
    assert same(weights(module), before)


# Freezing and unfreezing.


def test_a_backbone_that_is_unfrozen_within_a_task_is_merged_from_its_values_before():
    module, callback = Backbone(), MergeCallback("magmax")
    base = {name: p.detach().clone() for name, p in module.named_parameters()}
    unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    trainer(unfreeze, callback, max_epochs=2).fit(module, loader(0))
    assert not torch.equal(module.backbone[0].weight, base["backbone.0.weight"])
    assert callback.merged() == TaskVector.between(
        {name: base[name] for name in callback.base}, weights(module)
    )


def test_a_layer_that_the_module_itself_unfreezes_in_a_batch_is_merged_whole():
    class Late(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            self.net[0].weight.requires_grad_(batch_idx > 0)

    module, callback = Late(), MergeCallback("magmax")
    base = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.net[0].weight.requires_grad_(False)
    fit(module, callback, 0)
    assert torch.equal(callback.base["net.0.weight"], base["net.0.weight"])
    assert not torch.equal(module.net[0].weight, base["net.0.weight"])


def test_a_layer_that_is_frozen_later_keeps_what_it_has_learned():
    module, callback = Plain(), MergeCallback("average")
    base = weights(module)
    vectors = [TaskVector.between(base, fit(module, callback, 0))]
    module.net[0].weight.requires_grad_(False)
    fit(module, callback, 1)
    module.net[0].weight.requires_grad_(True)
    vectors.append(TaskVector.between(base, weights(module)))
    assert callback.merged() == merge(vectors, method="average")


def test_weights_that_are_loaded_as_the_fit_starts_are_the_base():
    class Loads(Plain):
        def on_fit_start(self):
            if not self.seen:
                torch.nn.init.ones_(self.net[0].weight)

    module, callback = Loads(), MergeCallback("magmax")
    fit(module, callback, 0)
    assert torch.equal(callback.base["net.0.weight"], torch.ones(8, 4))


def test_independent_tasks_start_before_the_optimizer_copies_weights():
    class Copies(Plain):
        def configure_optimizers(self):
            self.master = [p.detach().clone() for p in self.parameters()]
            return super().configure_optimizers()

    module, callback = Copies(), MergeCallback("max-abs", start="independent")
    base = weights(module)
    for task in range(2):
        fit(module, callback, task)
        assert torch.equal(module.master[1], base["net.0.weight"])


# What moves without a gradient.


class Teacher(Plain):
    """A moving average of the net, as of BYOL, and a complex parameter."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.phase.abs().sum()

    def on_train_batch_end(self, *_):
        for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            slow.data = 0.5 * slow.data + 0.5 * fast.data


@pytest.mark.filterwarnings("ignore:5 parameters moved")
def test_what_moves_without_a_gradient_is_named_and_reset_for_independent_tasks():
    module, callback = Teacher(), MergeCallback("max-abs", start="independent")
    message = r"^5 parameters moved without a gradient, or are complex, and are not merged: "
    with pytest.warns(UserWarning, match=message):
        fit(module, callback, 0)
    begun = {}

    class Record(Callback):
        def on_train_start(self, trainer, pl_module):
            begun.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    fit(module, [callback, Record()], 1)
    fresh = dict(Teacher().named_parameters())
    assert all(torch.equal(value, fresh[name]) for name, value in begun.items())


# The regularizers.


def test_lwf_compares_the_outputs_that_the_head_had():
    def train(second):
        module, lwf = Plain(), LwF(2.0, target="net")
        fit(module, lwf, 0)
        old = copy.deepcopy(module.net)
        grow(module, 5)
        second(module, lwf, old)
        return weights(module)

    def by_hand(module, lwf, old):
        def step(batch, batch_idx):
            images, labels = batch
            logits = module(images)
            with torch.no_grad():
                teacher = old(images)
            term = distillation(logits[:, :3], teacher)
            return nn.functional.cross_entropy(logits, labels) + 2.0 * term

        module.training_step = step
        fit(module, [], 1)

    assert same(train(lambda module, lwf, _: fit(module, lwf, 1)), train(by_hand))


def test_ewc_penalises_the_entries_that_there_were():
    module, ewc = Plain(), EWC(weight=30.0)
    fit(module, ewc, 0)
    fisher, anchor = copy.deepcopy(ewc.fisher), copy.deepcopy(ewc.anchor)
    grow(module, 5)
    free = copy.deepcopy(module)
    start = weights(module)

    def step(batch, batch_idx):
        loss = nn.functional.cross_entropy(free(batch[0]), batch[1])
        for name, p in free.named_parameters():
            if name in fisher:
                old = p[tuple(slice(n) for n in anchor[name].shape)]
                loss = loss + 15.0 * (fisher[name] * (old - anchor[name]) ** 2).sum()
        return loss

    free.training_step = step
    fit(free, [], 1)
    fit(module, ewc, 1)
    for name, value in weights(free).items():
        torch.testing.assert_close(weights(module)[name], value)
    assert not same(start, weights(module))
    assert ewc.fisher["net.2.weight"].shape == (5, 8)


def test_several_callbacks_count_a_task_together_or_not_at_all():
    class Broken(Plain):
        broken = False

        def forward(self, images):
            if self.broken and not self.training:
                raise RuntimeError("no")
            return super().forward(images)

        def on_train_end(self):
            self.broken = True

    every = [LwF(target="net"), MergeCallback("magmax"), EWC()]
    with pytest.raises(RuntimeError, match="^no$"):
        fit(Broken(), every, 0)
    assert [callback.tasks for callback in every] == [0, 0, 0]
    module = Plain()
    fit(module, every, 0)
    assert [callback.tasks for callback in every] == [1, 1, 1]


@pytest.mark.parametrize("make", [EWC, lambda: MergeCallback("fisher")])
def test_logits_that_cannot_be_made_stop_the_fit_before_it_trains(make):
    class Without(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, callback = Without(), make()
    before = weights(module)
    with pytest.raises(Exception, match="forward"):
        fit(module, callback, 0)
    assert same(weights(module), before)
    logits = lambda module, batch: (module.layer(batch[0]), batch[1])  # noqa: E731
    again = EWC(logits=logits) if isinstance(callback, EWC) else None
    fit(module, again or MergeCallback("fisher", logits=logits), 0)
