"""What `MergeCallback` costs beside the training: a task's begin and end, and an evaluation's swap.

    python -m cl_merge.benchmarks.studies.callback_cost --model ViT-B-16
    torchrun --nproc-per-node=2 -m cl_merge.benchmarks.studies.callback_cost --model ViT-B-16

Times the steps of `StreamMerger`, of which the callback is made, on the image encoder of a CLIP
model with random weights, and counts the bytes that stay from task to task. Started by torchrun,
the parameters are sharded block by block with FSDP2.
"""

from __future__ import annotations

import os
from statistics import median

import open_clip
import torch
import torch.distributed as dist
from open_clip.transformer import ResidualAttentionBlock
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cl_merge.benchmarks.studies import harness
from cl_merge.stream_merger import StreamMerger
from cl_merge.task_vectors.module_weights import parameters_of
from cl_merge.task_vectors.shards import local

STEPS = ("begin", "end", "swap in", "swap out")


def main() -> None:
    """Measure each method; the first process prints a table."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--methods", nargs="+", default=["magmax", "average", "ties", "random-mix"])
    parser.add_argument("--tasks", type=int, default=5)
    words = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group()
    processes = dist.get_world_size() if dist.is_initialized() else 1
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    rows = []
    for method in words.methods:
        torch.manual_seed(0)
        visual = open_clip.create_model(words.model).visual.to(device)
        if dist.is_initialized():
            shard(visual)
        rows.append([method, *measure(visual, method, words.tasks)])
    if processes == 1 or dist.get_rank() == 0:
        where = f"{words.model}, {processes} processes, {torch.get_num_threads()} threads, {device}"
        columns = ["method", *(f"{step}, s" for step in STEPS), "model, MiB", "kept, MiB"]
        harness.show(where, columns, rows)
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(visual: nn.Module) -> None:
    """Shard an image encoder over all processes: its blocks, and the rest together."""
    mesh = init_device_mesh(next(visual.parameters()).device.type, (dist.get_world_size(),))
    for part in visual.modules():
        if isinstance(part, ResidualAttentionBlock):
            fully_shard(part, mesh=mesh)
    fully_shard(visual, mesh=mesh)


def measure(visual: nn.Module, method: str, tasks: int) -> list[str]:
    """Seconds of each step, as medians over tasks, and MiB of this process."""
    stream, watches = (
        StreamMerger(visual, method),
        {step: list[harness.Stopwatch]() for step in STEPS},
    )

    def timed(step: str) -> harness.Stopwatch:
        watch = harness.Stopwatch()
        watches[step].append(watch)
        return watch

    for _ in range(tasks):
        with timed("begin"):
            stream.begin_task()
        with torch.no_grad():
            for parameter in parameters_of(visual).values():
                here = local(parameter)
                here.add_(torch.randn_like(here), alpha=1e-3)
        with timed("end"):
            stream.end_task()
        with timed("swap in"):
            stream.swap_in()
        with timed("swap out"):
            stream.swap_out()
    held = [local(parameter) for parameter in parameters_of(visual).values()]
    kept = [*stream.base.values()]
    for accumulators in stream.merger.state_dict()["accumulators"].values():
        kept += accumulators.values()
    sizes = (sum(t.numel() * t.element_size() for t in tensors) for tensors in (held, kept))
    seconds = (f"{median(watch.wall for watch in watches[step]):.2f}" for step in STEPS)
    return [*seconds, *(f"{size / 2**20:.0f}" for size in sizes)]


if __name__ == "__main__":
    main()
