"""Compile the kernels once, with the C compiler of the machine, and load them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# No contraction: a fused multiply-add rounds once where torch rounds twice.
_OPTIONS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
_SECONDS = 60
_OFF = "CL_MERGE_KERNELS"


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the compiled kernels; compiles them if this machine has not done so before.

    They are kept in ``cl_merge`` of the user's cache folder, under a name that depends on source,
    compiler and processor. ``CL_MERGE_KERNELS=0`` in the environment does without them.

    Returns:
        The library; None where there is no compiler, or none that works: torch does the same then,
        in more time.
    """
    if os.environ.get(_OFF) == "0" or os.name != "posix":
        return None
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        log.info("no C compiler: merging without compiled kernels, which takes longer")
        return None
    folder = _cache()
    try:
        if folder is not None:
            return _declared(ctypes.CDLL(str(_compiled(compiler, folder))))
        with tempfile.TemporaryDirectory(prefix="cl_merge-") as work:  # loaded, it may go
            return _declared(ctypes.CDLL(str(_compiled(compiler, Path(work)))))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("merging without compiled kernels, which takes longer: %s", error)
        return None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the types of arguments and results once, which makes calls cheap."""
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    word, number = ctypes.c_uint64, ctypes.c_float
    folds: dict[str, list[Any]] = {
        "difference": [pointer],
        "fold_sum": [pointer],
        "fold_largest": [pointer],
        "fold_drawn": [pointer, word, word, word],
        "fold_signed": [pointer, pointer, pointer, pointer, number],
    }
    for name, kept in folds.items():
        getattr(library, name).argtypes = [*kept, pointer, size]
        getattr(library, name).restype = None
        for ending in ("_float32", "_bfloat16"):
            getattr(library, name + ending).argtypes = [*kept, pointer, pointer, size]
    library.count_signs.argtypes = [pointer, pointer, pointer, size, pointer]
    library.count_signs.restype = ctypes.c_int64
    library.elect.argtypes = [pointer] * 5 + [size, number]
    library.elect.restype = None
    library.bracket.argtypes = [pointer, size, number, number, pointer, size, pointer]
    library.bracket.restype = ctypes.c_int64
    return library


def _compiled(compiler: str, folder: Path) -> Path:
    source = files("cl_merge.kernels").joinpath("kernels.c").read_text()
    key = "\n".join((source, _version(compiler), _processor(), *_OPTIONS))
    name = f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    target = folder / name
    if target.is_file() and _ours(target):
        return target
    with tempfile.TemporaryDirectory(dir=folder) as work:
        (Path(work) / "kernels.c").write_text(source)
        output = Path(work) / name
        command = [compiler, *_OPTIONS, "kernels.c", "-o", str(output), "-lm"]
        subprocess.run(  # noqa: S603 - the compiler found above, our own source
            command, cwd=work, check=True, capture_output=True, timeout=_SECONDS
        )
        output.replace(target)
    return target


def _cache() -> Path | None:
    """A folder that only this user can write to: what lies there will be loaded as code."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "cl_merge"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _ours(folder) and os.access(folder, os.W_OK) else None
    except OSError:
        return None


def _ours(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _version(compiler: str) -> str:
    command = [compiler, "--version"]
    done = subprocess.run(  # noqa: S603 - as above
        command, check=True, capture_output=True, text=True, timeout=_SECONDS
    )
    return done.stdout


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine() + platform.node()
    # "Features" is what Arm calls them.
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
