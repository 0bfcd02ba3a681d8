"""The methods by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from cl_merge.errors import InputError, listing, unknown_name
from cl_merge.mergers.average import Average
from cl_merge.mergers.base import Merger
from cl_merge.mergers.breadcrumbs import Breadcrumbs
from cl_merge.mergers.consensus import Consensus
from cl_merge.mergers.dare import Dare, DareTies
from cl_merge.mergers.della import Della
from cl_merge.mergers.emr import Emr
from cl_merge.mergers.fisher_average import FisherAverage
from cl_merge.mergers.isotropic import Isotropic
from cl_merge.mergers.locate import is_location, locate
from cl_merge.mergers.max_magnitude import MaxMagnitude
from cl_merge.mergers.moving_average import MovingAverage
from cl_merge.mergers.orthogonal import OrthogonalProjection
from cl_merge.mergers.random_mix import RandomMix
from cl_merge.mergers.singular_vectors import SingularVectors
from cl_merge.mergers.slerp import Slerp
from cl_merge.mergers.task_arithmetic import TaskArithmetic
from cl_merge.mergers.ties import Ties
from cl_merge.task_vectors.task_vector import TaskVector

MERGERS: dict[str, type[Merger]] = {
    "magmax": MaxMagnitude,
    "max-abs": MaxMagnitude,
    "average": Average,
    "task-arithmetic": TaskArithmetic,
    "random-mix": RandomMix,
    "ties": Ties,
    "dare": Dare,
    "dare-ties": DareTies,
    "della": Della,
    "breadcrumbs": Breadcrumbs,
    "consensus": Consensus,
    "emr": Emr,
    "ema": MovingAverage,
    "fisher": FisherAverage,
    "opcm": OrthogonalProjection,
    "iso-c": Isotropic,
    "tsv": SingularVectors,
    "slerp": Slerp,
}
"""Classes by name of the method: the built-in ones, and those that users add."""

BUILT_IN = frozenset(MERGERS)
"""Names of the methods that come with the library."""


def register(method: str, merger: type[Merger]) -> None:
    """Make a user's method known by its name, in place of one that had the name before."""
    if method in BUILT_IN:
        raise InputError(f"'{method}' is a built-in method; give yours another name")
    MERGERS[method] = merger


def find_merger(method: str) -> type[Merger]:
    """Look up a method.

    Args:
        method: One of `MERGERS`, or where to import one from: ``"path/to/file.py:median"`` or
            ``"package.module:median"``. Importing runs the code in that file.

    Returns:
        The class of its merger.

    Raises:
        InputError: If there is none; names the nearest valid name.
    """
    if not isinstance(method, str):
        raise InputError(
            f"the method is of type {type(method).__name__}; expected a name, such as 'magmax'"
        )
    if is_location(method):
        return locate(method)
    if method not in MERGERS:
        raise unknown_name("method", method, MERGERS)
    return MERGERS[method]


def get_merger(method: str, **options: Any) -> Merger:
    """Make a merger by name.

    Args:
        method: One of `MERGERS`, or where to import one from: ``"path/to/file.py:median"`` or
            ``"package.module:median"``. Importing runs the code in that file.
        **options: Its options, such as ``density`` for ``"ties"`` or ``seed`` for ``"random-mix"``.

    Returns:
        A merger that has folded nothing yet.

    Raises:
        InputError: If the method, an option or a value is wrong; names the nearest valid name.

    Example:
        >>> get_merger("ties", density=0.3).published_scale
        0.55
    """
    return _made(find_merger(method), method, options)


def as_merger(method: str | Merger | type[Merger], options: Mapping[str, Any]) -> Merger:
    """Make a merger of a name, a location or a class, or take one that is ready.

    Raises:
        InputError: If the method, an option or a value is wrong, or is beside a ready merger.
    """
    if isinstance(method, type) and issubclass(method, Merger):
        return _made(method, method.name, options)
    if not isinstance(method, Merger):
        return get_merger(method, **options)
    if options:
        raise InputError(
            f"option {listing(options)} beside a ready Merger '{method.name}', which has its own; "
            f"give options where it is made, or beside its name, '{method.name}'"
        )
    return method


def fresh_merger(method: str | Merger | type[Merger], options: Mapping[str, Any]) -> Merger:
    """Do as `as_merger`, and refuse a merger that has folded tasks before."""
    merger = as_merger(method, options)
    if merger.tasks:
        tasks = "1 task vector" if merger.tasks == 1 else f"{merger.tasks} task vectors"
        raise InputError(f"the Merger '{merger.name}' has folded {tasks} already; give a fresh one")
    return merger


def merge(
    vectors: Iterable[TaskVector],
    method: str | Merger | type[Merger] = "magmax",
    **options: Any,
) -> TaskVector:
    """Merge task vectors into one.

    Args:
        vectors: The task vectors in the order of their tasks. Given a generator, one at a time is
            in memory.
        method: One of `MERGERS`, where to import one from as for `get_merger`, or a fresh `Merger`.
        **options: Options of the method.

    Returns:
        The merged task vector in float32; its metadata tell method, options and number of tasks.

    Raises:
        InputError: If there is no vector, they do not match or are not finite, or the method, an
            option or a value is wrong.

    Example:
        >>> import torch
        >>> first = TaskVector({"weight": torch.tensor([3.0, -1.0])})
        >>> second = TaskVector({"weight": torch.tensor([1.0, -4.0])})
        >>> merge([first, second], method="magmax")["weight"]
        tensor([ 3., -4.])
    """
    merger = fresh_merger(method, options)
    for vector in vectors:
        merger.update(vector)
        del vector  # or it would still be held while a generator makes the next one
    if merger.tasks == 0:
        raise InputError("no task vector to merge; give at least one")
    merged = merger.merged()
    if isinstance(method, str):
        merged.metadata["method"] = method
    return merged


def _made(merger: type[Merger], method: str, options: Mapping[str, Any]) -> Merger:
    known = inspect.signature(merger).parameters
    for option in options:
        if option not in known:
            raise unknown_name(f"option of method '{method}'", option, known)
    return merger(**options)
