"""Load the compiled loops that were built when the package was installed."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from importlib.util import find_spec
from typing import Any

log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the compiled loops, once; None where they were not built or cannot be loaded.

    Torch does the same then, to the same bits, in more time; so it does with ``CL_MERGE_KERNELS=0``
    in the environment.
    """
    if os.environ.get("CL_MERGE_KERNELS") == "0":
        return None
    found = find_spec("cl_merge.kernels._loops")
    if found is None or found.origin is None:
        log.info("the compiled loops were not built at installation: merging takes longer")
        return None
    try:
        return _declared(ctypes.CDLL(found.origin))
    except (OSError, AttributeError) as error:  # not there, or of another version
        log.info("merging without compiled loops, which takes longer: %s", error)
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
    for ending, given in (
        ("", [pointer]),
        ("_float32", [pointer] * 2),
        ("_bfloat16", [pointer] * 2),
    ):
        bracket = getattr(library, f"bracket{ending}")
        bracket.argtypes = [*given, size, number, number, pointer, size, pointer]
        bracket.restype = size
    return library
