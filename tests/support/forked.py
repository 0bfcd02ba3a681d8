"""Work in a process of its own that starts at once, with all that has been imported here."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SECONDS = 240  # that processes may take together

# Before, its streams on a CPU had no events; FSDP2 with tensor parallelism had no uneven shards.
fsdp2_needs_gpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch needs a GPU"
)


def forked(work: Callable[[], object], said: Path) -> str | int:
    """Do work in a forked process.

    Args:
        work: What to do; it may do anything to its process.
        said: A file for what it returns, outside of any folder that a test looks at.

    Returns:
        What it returned, as text; if it ended otherwise, its exit code or minus the signal.
    """
    process = os.fork()
    if process == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # a fork has none of the threads that there were
            said.write_text(str(work()))
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code or said.read_text()


def as_ranks(work: Callable[[int], object], processes: int) -> None:
    """Do work in forked processes, each told its rank, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        started.append(os.fork())
        if started[-1] == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
                sizes = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                known = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none"}
                every = ranks | sizes | known | {"MASTER_PORT": port}
                os.environ |= {k: str(v) for k, v in every.items()}
                work(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
    codes: dict[int, int] = {}
    end = time.monotonic() + SECONDS
    while len(codes) < processes:
        for process in set(started) - codes.keys():
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > end:  # the others would wait for long
            for process in set(started) - codes.keys():
                os.kill(process, signal.SIGKILL)
                codes[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        time.sleep(0.02)
    assert [codes[process] for process in started] == [0] * processes
