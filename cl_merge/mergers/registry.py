"""The methods by name, or by where they are: in a file or module of the user's."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from cl_merge.errors import InputError, listing, nearest, unknown_name
from cl_merge.mergers.base import Merger
from cl_merge.mergers.breadcrumbs import Breadcrumbs
from cl_merge.mergers.consensus import Consensus
from cl_merge.mergers.dare import Dare, DareTies, Della
from cl_merge.mergers.dual_projection import DualProjection
from cl_merge.mergers.emr import Emr
from cl_merge.mergers.fisher_average import FisherAverage
from cl_merge.mergers.isotropic import Isotropic, IsotropicTasks
from cl_merge.mergers.karcher import Karcher
from cl_merge.mergers.max_magnitude import MaxMagnitude
from cl_merge.mergers.model_stock import ModelStock
from cl_merge.mergers.moving_average import MovingAverage
from cl_merge.mergers.null_space import NullSpaceFilter
from cl_merge.mergers.orthogonal import OrthogonalProjection
from cl_merge.mergers.random_mix import RandomMix
from cl_merge.mergers.regression_mean import RegressionMean
from cl_merge.mergers.select_erase import SelectCalculateErase
from cl_merge.mergers.singular_vectors import SingularVectors
from cl_merge.mergers.slerp import Slerp
from cl_merge.mergers.task_arithmetic import Average, TaskArithmetic
from cl_merge.mergers.ties import Ties
from cl_merge.mergers.wudi import Wudi
from cl_merge.seeds import derive_seed
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
    "regmean": RegressionMean,
    "opcm": OrthogonalProjection,
    "iso-c": Isotropic,
    "iso-cts": IsotropicTasks,
    "tsv": SingularVectors,
    "wudi": Wudi,
    "nufilt": NullSpaceFilter,
    "dop": DualProjection,
    "model-stock": ModelStock,
    "sce": SelectCalculateErase,
    "karcher": Karcher,
    "slerp": Slerp,
}
"""Classes by name of the method: the built-in ones, and those that users add."""

BUILT_IN = frozenset(MERGERS)
"""Names of the methods that come with the library."""

# What other libraries call them, with "-" for "_".
_ALIASES = {"linear": "average", "dare-linear": "dare"}

# Files that were run already, by path and by when they were last changed.
_FILES: dict[tuple[Path, int], ModuleType] = {}


def find_merger(method: str) -> type[Merger]:
    """Look up a method, as of `get_merger`, or import it: the class of its merger."""
    if not isinstance(method, str):
        raise InputError(
            f"the method is of type {type(method).__name__}; expected a name, such as 'magmax'"
        )
    if is_location(method):
        return _located(method)
    if method not in MERGERS:
        plain = method.replace("_", "-")
        method = _ALIASES.get(plain, plain)
    if method not in MERGERS:
        raise unknown_name("method", method, MERGERS)
    return MERGERS[method]


def get_merger(method: str, **options: Any) -> Merger:
    """Make a merger by name.

    Args:
        method: One of `MERGERS`, also with ``_`` for ``-``, or as mergekit calls it (``"linear"``
            is ``"average"``, ``"dare_linear"`` is ``"dare"``), or where to import one from:
            ``"path/to/file.py:median"`` or ``"package.module:median"``. Importing runs the code in
            that file.
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


def as_merger(
    method: str | Merger | type[Merger],
    options: Mapping[str, Any],
    caller: Callable[..., Any] | None = None,
) -> Merger:
    """Make a merger of a name, a location or a class, or take one that is ready.

    A name that is no option may have been meant for an argument of the caller, who takes both.

    Raises:
        InputError: If the method, an option or a value is wrong, or is beside a ready merger.
    """
    if isinstance(method, type) and issubclass(method, Merger):
        return _made(method, method.name, options, caller)
    if not isinstance(method, Merger):
        return _made(find_merger(method), method, options, caller)
    if options:
        raise InputError(
            f"option {listing(options)} beside a ready Merger '{method.name}', which has its own; "
            f"give options where it is made, or beside its name, '{method.name}'"
        )
    return method


def fresh_merger(
    method: str | Merger | type[Merger],
    options: Mapping[str, Any],
    caller: Callable[..., Any] | None = None,
) -> Merger:
    """Do as `as_merger`, and refuse a merger that has folded tasks before."""
    merger = as_merger(method, options, caller)
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


def chosen_options(merger: Merger) -> dict[str, Any]:
    """The options of a merger that are no defaults, by name."""
    known = inspect.signature(type(merger)).parameters
    return {name: own for name, own in merger.options.items() if own != known[name].default}


def _made(
    merger: type[Merger],
    method: str,
    options: Mapping[str, Any],
    caller: Callable[..., Any] | None = None,
) -> Merger:
    known = inspect.signature(merger).parameters
    for option in options:
        if option not in known:
            error = str(unknown_name(f"option of method '{method}'", option, known))
            if caller is not None and nearest(option, known) == ".":
                arguments = inspect.signature(caller).parameters
                error += nearest(option, arguments, cutoff=0.7).removesuffix(".")
            raise InputError(error)
    return merger(**options)


def is_location(method: str) -> bool:
    """Tell a location, ``file.py:name`` or ``module:name``, from the name of a method."""
    return ":" in method


def _located(location: str) -> type[Merger]:
    """Import a method: after the colon stands its name, or that of its function or class."""
    where, _, name = location.rpartition(":")
    if not where or not name:
        raise InputError(
            f"'{location}' does not tell where a method is; expected 'path/to/file.py:name' or "
            "'package.module:name'"
        )
    module = _run_file(where) if where.endswith(".py") else _import_module(where)
    found = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Merger)
        and hasattr(value, "name")
        # Not what it imports from here, such as the class that it derives its own from.
        and (value.__module__ == module.__name__ or not value.__module__.startswith("cl_merge."))
    }
    found |= {merger.name: merger for merger in found.values()}
    if name in found:
        return found[name]
    if callable(getattr(module, name, None)):
        raise InputError(
            f"'{name}' in '{where}' is no merger; decorate the function with @merge_method or "
            "@fold_method, or make it a subclass of Merger"
        )
    raise unknown_name(f"method in '{where}'", name, found)


def _run_file(where: str) -> ModuleType:
    path = Path(where).expanduser()
    if not path.is_file():
        beside = [file.name for file in path.parent.glob("*.py")]
        hint = nearest(path.name, beside).rstrip(".")
        raise InputError(f"there is no file '{where}' to take a method from{hint}")
    path = path.resolve()
    key = (path, path.stat().st_mtime_ns)
    if key in _FILES:
        return _FILES[key]
    # A name that no module has and files of equal names do not share.
    module = ModuleType(f"methods_in_{path.stem}_{derive_seed(str(path)):x}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    try:
        with _importing(where, path.parent):
            SourceFileLoader(module.__name__, str(path)).exec_module(module)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    _FILES[key] = module
    return module


def _import_module(where: str) -> ModuleType:
    if not all(part.isidentifier() for part in where.split(".")):
        raise InputError(
            f"'{where}' is neither a Python file, as in 'path/to/file.py:name', nor a module, as "
            "in 'package.module:name'"
        )
    try:
        with _importing(where, Path.cwd(), where):
            return importlib.import_module(where)
    except ModuleNotFoundError as error:
        missing = error.name or where
        raise InputError(
            f"there is no module '{missing}' to take a method from"
            f"{nearest(missing, _siblings(missing.rpartition('.')[0]))}"
        ) from error


def _siblings(parent: str) -> list[str]:
    paths = getattr(sys.modules.get(parent), "__path__", []) if parent else [".", *sys.path]
    prefix = f"{parent}." if parent else ""
    return [prefix + module.name for module in pkgutil.iter_modules(paths)]


@contextmanager
def _importing(where: str, folder: Path, module: str = "") -> Iterator[None]:
    """Find modules in a folder, too, after all others; name the place whose code raises an error.

    That the module is itself not there is told by the `ModuleNotFoundError` as it is.
    """
    before = list(sys.path)
    sys.path.append(str(folder))
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{missing}."):
            raise
        raise InputError(f"'{where}' raises {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = before
