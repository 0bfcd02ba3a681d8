"""The scale that is lowered where features drift too far, against distances measured by hand."""

import lightning as L
import pytest
import torch
from forked import as_ranks
from statistics_cases import Exact, Normed, clip, images_of, loader_of, trainer_of
from torch.utils.data import DataLoader, TensorDataset

from cl_merge.callbacks import DriftScale, MergeCallback
from cl_merge.errors import InputError
from cl_merge.task_vectors.module_weights import weights_of

COUNT = 21


class Sampled(L.LightningDataModule):
    """Gives images of its task to look at, each once over all processes."""

    def __init__(self, task, images=COUNT):
        super().__init__()
        self.task, self.images = task, images

    def train_dataloader(self):
        return loader_of(self.task)

    def sample_dataloader(self, images):
        rank, world = self.trainer.global_rank, self.trainer.world_size
        every, labels = images_of(self.task, min(images, self.images))
        return DataLoader(TensorDataset(every[rank::world], labels[rank::world]), batch_size=4)


def learned(make, scale, tasks=2, **where):
    model, merge = make(), MergeCallback("magmax", scale=scale, buffers="base")
    for task in range(tasks):
        trainer_of(merge, **where).fit(model, datamodule=Sampled(task))
    return model, merge


def distance(make, merge, scale, task):
    """How far unit features of a task's images are from those of the base, in float64."""
    found = []
    for factor in (0.0, scale):
        model = make().double().eval()
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, change in merge.merged().items():
                weights[name].copy_(merge.base[name].double() + factor * change.double())
            features = model.features(images_of(task)[0].double())
        found.append(features / features.norm(dim=1, keepdim=True))
    return float((found[1] - found[0]).norm(dim=1).mean())


@pytest.mark.parametrize("limit", [0.05, 0.1, 0.3])
def test_the_scale_is_where_features_are_as_far_as_the_limit_from_the_base(limit):
    _, merge = learned(clip, DriftScale(limit=limit))
    published, step = 0.5, 0.5 / 32
    assert [str(scales) for scales in merge.chosen][-1] == str(merge.stream.scales)
    if distance(clip, merge, published, 1) <= limit:
        assert merge.scale == published
        return
    assert merge.scale % step == 0
    below, above = (distance(clip, merge, merge.scale + by, 1) for by in (-step, step))
    assert below <= limit < above


def test_a_model_that_hardly_drifts_keeps_the_published_scale(caplog):
    with caplog.at_level("INFO", "cl_merge"):
        _, merge = learned(clip, DriftScale(limit=1.9))
    assert [scales.plain() for scales in merge.chosen] == [0.5, 0.5]
    assert "scale 0.5: features drift by " in caplog.text


def test_the_name_drift_is_the_default_and_survives_a_checkpoint():
    model, merge = learned(Exact, "drift")
    assert merge.scale == learned(Exact, DriftScale(0.6, 32))[1].scale
    fresh = MergeCallback("magmax", scale="drift", buffers="base")
    fresh.load_state_dict(merge.state_dict())
    assert (fresh.chosen, fresh.scale) == (merge.chosen, merge.scale)
    trainer_of(fresh).fit(model, datamodule=Sampled(1))
    assert len(fresh.chosen) == 3


def test_choosing_changes_nothing_in_the_training():
    first, second = (learned(Normed, scale) for scale in (None, DriftScale(0.01)))
    assert second[1].scale < 0.5
    for name, weight in weights_of(first[0]).items():
        assert torch.equal(weight, weights_of(second[0])[name]), name
    assert dict(first[1].merged()).keys() == dict(second[1].merged()).keys()


def test_without_such_images_the_first_ones_of_another_epoch_are_looked_at():
    seen = []

    def features(module, batch):
        seen.append(len(batch[0]))
        return module.features(batch[0])

    model, merge = clip(), MergeCallback("magmax", scale=DriftScale(0.1, 10, features))
    trainer_of(merge).fit(model, loader_of(0, count=COUNT, batch_size=4))
    assert merge.scale < 0.5
    assert seen == [4] + [4] * 12  # of the first to try it, then of three, four times


def test_two_processes_choose_what_one_does(tmp_path):
    def work(processes, rank, said):
        torch.set_num_threads(1)
        where = {"devices": processes, "strategy": "ddp" if processes > 1 else "auto"}
        _, merge = learned(Exact, DriftScale(0.02), **where, max_steps=2, max_epochs=-1)
        torch.save([scales.plain() for scales in merge.chosen], said)

    work(1, 0, tmp_path / "1-0")
    as_ranks(lambda rank: work(2, rank, tmp_path / f"2-{rank}"), 2)
    one, *two = (torch.load(tmp_path / name) for name in ("1-0", "2-0", "2-1"))
    assert two == [one, one]
    assert any(scale < 0.5 for scale in one)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DriftScale(limit=0.0), "limit=0.0; expected a finite number above 0"),
        (lambda: DriftScale(limit=float("nan")), "limit=nan; expected a finite number above 0"),
        (lambda: DriftScale(images=0), "images=0; expected a whole number from 1"),
        (lambda: MergeCallback(scale="drift", held_out=list), "held_out is for scale='auto', but"),
        (lambda: MergeCallback(scale="drifts"), "scale"),
    ],
)
def test_options_that_are_wrong_are_told(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_what_is_missing_shows_before_the_training():
    class Nothing(L.LightningModule):
        pass

    message = r"Nothing has no method features\(images\); give scale=DriftScale\(features=...\)"
    with pytest.raises(InputError, match=message):
        DriftScale().prepare(trainer_of(), Nothing(), None)
    model, merge = clip(), MergeCallback(scale="drift")
    with pytest.raises(InputError, match="the task has no image to choose the scale on"):
        trainer_of(merge).fit(model, datamodule=Sampled(0, images=0))
    assert (merge.tasks, merge.chosen) == (0, [])


@pytest.mark.parametrize("power", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("limit", [0.2, 0.4, 0.6, 1.1])
def test_a_drift_that_bends_is_found_to_within_a_step(power, limit):
    asked = []

    def distance(scale):
        asked.append(scale)
        return 1.2 * (scale / 0.5) ** power

    found = DriftScale(limit)._search(distance, 0.5, 1.2)
    exact = 0.5 * (limit / 1.2) ** (1 / power)
    assert len(asked) <= 2
    assert abs(found - max(exact, 0.5 / 32)) <= 0.5 / 32
