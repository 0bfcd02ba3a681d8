"""Work in a process of its own that starts at once, with all that has been imported here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch


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
