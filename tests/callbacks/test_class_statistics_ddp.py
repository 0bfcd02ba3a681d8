"""Two processes take up the same class statistics as one, and vote the same, bit for bit."""

import pytest
import torch
from forked import as_ranks
from statistics_cases import CLASSES, Exact, images_of, loader_of, trainer_of
from torch.utils.data import DataLoader, TensorDataset

from cl_merge.callbacks import ClassStatistics, MergeCallback

pytestmark = pytest.mark.slow

# The last task has fewer images than there are processes.
COUNTS = (21, 17, 1)
NAMES = ("loader", "images")


class Voting(Exact):
    """Keeps what the statistics say of each test image."""

    def __init__(self, statistics):
        super().__init__()
        self.statistics, self.found = statistics, []

    def test_step(self, batch):
        self.found.append(self.statistics.classify(self, batch))


def learn(processes, rank, said):
    """Train on a stream in two ways; save statistics and votes."""
    torch.set_num_threads(1)
    where = {"devices": processes, "strategy": "ddp" if processes > 1 else "auto"}
    found, now = {}, {}

    def images():
        every, labels = images_of(now["task"] % 2, COUNTS[now["task"]])
        own = slice(rank, None, processes)
        return DataLoader(TensorDataset(every[own], labels[own]), batch_size=8 // processes)

    for name in NAMES:
        own = images if name == "images" else None
        merge, statistics = MergeCallback(), ClassStatistics(images=own)
        model = Voting(statistics)
        for task, count in enumerate(COUNTS):
            now["task"] = task
            loader = loader_of(task % 2, count=count, batch_size=8 // processes)
            # As many steps on any number of processes: one image makes a batch too.
            steps = {"max_steps": 2, "max_epochs": -1}
            trainer_of(merge, statistics, **where, **steps).fit(model, loader)
        for task in range(2):
            shown = TensorDataset(*images_of(task))
            trainer_of(merge, statistics).test(model, DataLoader(shown, 21), verbose=False)
        found |= {f"{name} {k}": v for k, v in statistics.statistics.state_dict().items()}
        found |= {f"{name} weight": model.encoder.weight.detach(), f"{name} votes": model.found}
    torch.save(found, said)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What one process found, and each of two."""
    folder, threads = tmp_path_factory.mktemp("statistics"), torch.get_num_threads()
    as_ranks(lambda rank: learn(2, rank, folder / f"2-{rank}"), 2)
    learn(1, 0, folder / "1-0")
    torch.set_num_threads(threads)
    return [torch.load(folder / name) for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("name", NAMES)
def test_every_image_is_counted_once_though_samplers_repeat_some(ran, name):
    for found in ran:
        counts = found[f"{name} base.counts"]
        assert len(counts) == CLASSES
        assert int(counts.sum()) == sum(COUNTS)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_votes_and_weights_have_the_same_bits(ran, name):
    alone, *both = ran
    compared = [key for key in alone if key.startswith(name) and not key.endswith("votes")]
    assert len(compared) == 14
    for found in both:
        for key in compared:
            assert torch.equal(found[key], alone[key]), key
        for mine, theirs in zip(found[f"{name} votes"], alone[f"{name} votes"], strict=True):
            assert torch.equal(mine, theirs)


def test_both_ways_to_read_the_images_find_the_same(ran):
    for found in ran:
        assert torch.equal(found["loader base.sums"], found["images base.sums"])
