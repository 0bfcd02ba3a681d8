"""Where results come from: the command that finds them again, the code, and the machine."""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
from contextlib import suppress
from dataclasses import is_dataclass
from importlib.metadata import distribution
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

import cl_merge
from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.config.reading import parse_arguments
from cl_merge.config.schema import RunConfig, described_keys


def command_of(config: RunConfig) -> str:
    """Write the command that does a run again in a new folder: what differs from its recipe.

    Example:
        >>> command_of(read_settings(["method=ties", "seed=3", "stream.tasks=2"]))
        'cl-merge run method=ties seed=3 stream.tasks=2'
    """
    words = [_word("data", config.data)] if config.data != RunConfig.data else []
    recipe = read_settings(words)
    for key in described_keys():
        now, before = attrgetter(key)(config), attrgetter(key)(recipe)
        if now != before and key != "out" and not is_dataclass(now):
            words += _words(key, now, before)
    return shlex.join(["cl-merge", "run", *words])


def settings_of(command: str) -> dict[str, str]:
    """Read the settings of a command that `command_of` wrote, by key; values stay as written.

    Example:
        >>> settings_of("cl-merge run stream.tasks=5 method=ties")
        {'stream.tasks': '5', 'method': 'ties'}
    """
    return {key: value for key, _, value in (w.partition("=") for w in shlex.split(command)[2:])}


def source_commit() -> str | None:
    """The commit of the code that runs: of its checkout, or of what was installed from git.

    Returns:
        The hash in full, with ``-dirty`` behind it where tracked files have changed since; None
        where nothing tells.
    """
    folder = Path(cl_merge.__file__).parent
    try:
        # A repository that only has the environment in it says nothing of this code.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        origin = json.loads(distribution("cl-merge").read_text("direct_url.json") or "{}")
        commit: str | None = origin.get("vcs_info", {}).get("commit_id")
        return commit


def machine() -> dict[str, Any]:
    """What computes: system, processor, threads and device, on which the last bits depend."""
    return {
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def processor() -> str:
    """The name of the processor, and the vector instructions that torch uses of it."""
    told = None
    with suppress(OSError):  # where it is not Linux
        told = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    name = told[1] if told else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _git(folder: Path, *words: str) -> str:
    call = ["git", "-C", str(folder), *words]
    return subprocess.run(  # noqa: S603 - no word of it is from outside
        call, check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()


def _words(key: str, now: Any, before: Any) -> list[str]:
    """The words that make one setting of another; options by name have a word each."""
    if isinstance(now, dict) and all(map(str.isidentifier, now)):
        former = before if isinstance(before, dict) else {}
        changed = {name: value for name, value in now.items() if former.get(name, ...) != value}
        return [_word(f"{key}.{name}", value) for name, value in changed.items()]
    return [_word(key, now)]


def _word(key: str, value: Any) -> str:
    word = f"{key}={value}"
    # Text goes without quotes where it is read as the same text.
    if isinstance(value, str) and parse_arguments([f"value={value}"]) == {"value": value}:
        return word
    return f"{key}={json.dumps(value, ensure_ascii=False)}"
