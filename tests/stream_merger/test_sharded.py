"""Under shards, on any mesh, every merged bit is that of one process."""

import pytest
import torch
import torch.distributed as dist
from forked import as_ranks, fsdp2_needs_gpu
from merger_cases import ANY_NUMBER
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from cl_merge.errors import InputError
from cl_merge.mergers import MERGERS
from cl_merge.mergers.custom import fold_method
from cl_merge.stream_merger import StreamMerger
from cl_merge.task_vectors.module_weights import install, parameters_of
from cl_merge.task_vectors.shards import whole
from cl_merge.task_vectors.task_vector import TaskVector

pytestmark = pytest.mark.slow

TASKS = 3
MESHES = [
    pytest.param("fsdp", 2, marks=fsdp2_needs_gpu),
    ("tensor", 2),
    pytest.param("both", 4, marks=fsdp2_needs_gpu),
]


class Net(nn.Module):
    """Two layers that can be sharded by rows and by columns, evenly and not, and two that cannot."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(5, 6), nn.Linear(6, 3), nn.LayerNorm(3)

    def forward(self, images):
        return self.norm(self.second(torch.relu(self.first(images))))


def parallel(net, kind):
    """Shard a module over all processes as its user would."""
    size = dist.get_world_size()
    shape = {"fsdp": (size, 1), "tensor": (1, size), "both": (size // 2, 2)}[kind]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    if kind != "fsdp":
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        parallelize_module(net, mesh["tensor"], plan)
    if kind != "tensor":
        fully_shard(net.first, mesh=mesh["data"])
        fully_shard(net, mesh=mesh["data"])
    return net


def made(kind=None):
    torch.manual_seed(0)
    return Net() if kind is None else parallel(Net(), kind)


def train(net, task):
    """Change all weights in a way that shows elements, signs and equal magnitudes."""
    generator = torch.Generator().manual_seed(task)
    for name, parameter in parameters_of(net).items():
        now = whole(parameter.detach())
        change = torch.randn(now.shape, generator=generator) * torch.rand(1, generator=generator)
        change[change.abs() < 0.1] = 0
        change.view(-1)[::5] = 0.25 * (-1) ** task
        install({name: parameter.detach()}, {name: now + change})


def weights(net):
    return {name: whole(p.detach()).clone() for name, p in parameters_of(net).items()}


def learn(stream, tasks):
    for task in tasks:
        stream.begin_task()
        train(stream.module, task)
        stream.end_task()


def results(kind, folder=None):
    """What every method makes of the same tasks: merged weights, files, a state that goes on."""
    found = {}
    for method in (*ANY_NUMBER, "turns"):
        net = made(kind)
        where = folder / method if folder is not None else None
        stream = StreamMerger(net, method, directory=where, **OPTIONS.get(method, {}))
        learn(stream, range(TASKS - 1))
        state = stream.state_dict()
        if kind is not None:  # only the first process has it, and all read the checkpoint
            box = [state]
            dist.broadcast_object_list(box)
            state = box[0]
        resumed = StreamMerger(net, method, directory=where, **OPTIONS.get(method, {}))
        resumed.load_state_dict(state)
        learn(resumed, [TASKS - 1])
        trained = weights(net)
        with resumed.merged_weights():
            net(torch.randn(2, 5))  # leaves parameters gathered, with FSDP2
            found[method] = weights(net)
        assert all(torch.equal(weights(net)[name], t) for name, t in trained.items())
        found[f"{method} vector"] = dict(resumed.merged())
        resumed.install()
        found[f"{method} stays"] = weights(net)
    return found


OPTIONS = {"ties": {"store": "int8"}, "magmax": {"store": "bf16"}, "emr": {"start": "merged"}}
OPTIONS |= {"average": {"start": "independent"}}


@pytest.fixture(scope="module", autouse=True)
def turns():
    """A method of the user's that needs whole parameters."""

    @fold_method("turns", unit="parameter")
    def turns(merged, vector, task):
        return merged + vector.flip(0)

    yield
    del MERGERS["turns"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return results(None, folder), folder


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for what, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[what][name], tensor), (what, name)


@pytest.mark.parametrize(("kind", "processes"), MESHES)
def test_all_methods_merge_to_the_bits_of_one_process(alone, kind, processes, tmp_path):
    def work(rank):
        dist.init_process_group("gloo")
        found = results(kind, tmp_path)
        check_equal(found, alone[0])
        dist.barrier()  # and no goodbye, which older versions of torch may hang in

    as_ranks(work, processes)
    for method in ANY_NUMBER:
        for task in range(TASKS):
            name = f"{method}/task{task}.safetensors"
            written, expected = (TaskVector.load(folder / name) for folder in (tmp_path, alone[1]))
            assert written == expected, name


@fsdp2_needs_gpu
def test_parameters_may_join_but_not_grow():
    def work(rank):
        dist.init_process_group("gloo")
        net = made("fsdp")
        stream = StreamMerger(net, "magmax", scale=1.0)
        learn(stream, [0])
        first = dict(stream.merged())
        net.more = nn.Linear(3, 2)  # not sharded itself
        learn(stream, [1])
        merged = stream.merged()
        assert set(merged) == {*first, "more.weight", "more.bias"}
        with stream.merged_weights():
            moved = weights(net)["more.weight"]
        torch.testing.assert_close(moved, weights(net)["more.weight"])

        net.more = nn.Linear(3, 4)
        with pytest.raises(InputError, match=r"more\.weight is \(4, 3\) instead of \(2, 3\)"):
            stream.begin_task()
        dist.barrier()  # and no goodbye, which older versions of torch may hang in

    as_ranks(work, 2)


@fsdp2_needs_gpu
def test_processes_keep_their_shares_and_no_more():
    def work(rank):
        dist.init_process_group("gloo")
        for method in ("ties", "iso-c"):
            net = made("fsdp")
            stream = StreamMerger(net, method)
            learn(stream, range(2))
            sizes = torch.tensor([sum(t.numel() for t in stream.base.values())])
            every = [torch.zeros_like(sizes) for _ in range(2)]
            dist.all_gather(every, sizes)
            total = sum(p.numel() for p in weights(net).values())
            assert sum(map(int, every)) == total
            assert max(map(int, every)) <= total / 2 + 18  # the largest whole parameter: 18 more
        dist.barrier()  # and no goodbye, which older versions of torch may hang in

    as_ranks(work, 2)
