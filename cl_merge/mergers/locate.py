"""Methods that live in a user's own file or module."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from cl_merge.errors import InputError, nearest, unknown_name
from cl_merge.mergers.base import Merger
from cl_merge.seeds import derive_seed

# Files that were run already, by path and by when they were last changed.
_FILES: dict[tuple[Path, int], ModuleType] = {}


def is_location(method: str) -> bool:
    """Tell a location, ``file.py:name`` or ``module:name``, from the name of a method."""
    return ":" in method


def locate(location: str) -> type[Merger]:
    """Import a method from a file or module, which runs the code in it.

    After the colon of the location stands the name of a decorated function or of a subclass of
    `Merger`, or the name under which it registered itself. Modules beside the file, or in the
    working directory, are found too.
    """
    where, _, name = location.rpartition(":")
    if not where or not name:
        raise InputError(
            f"'{location}' does not tell where a method is; expected 'path/to/file.py:name' or "
            "'package.module:name'"
        )
    module = _run_file(where) if where.endswith(".py") else _import_module(where)
    found = _methods(module)
    if name in found:
        return found[name]
    if callable(getattr(module, name, None)):
        raise InputError(
            f"'{name}' in '{where}' is no merger; decorate the function with @merge_method or "
            "@fold_method, or make it a subclass of Merger"
        )
    raise unknown_name(f"method in '{where}'", name, found)


def _methods(module: ModuleType) -> dict[str, type[Merger]]:
    """Mergers that a module has, by the names they have in it and by their own."""
    found = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Merger)
        and hasattr(value, "name")
        # Not what it imports from here, such as the class that it derives its own from.
        and (value.__module__ == module.__name__ or not value.__module__.startswith("cl_merge."))
    }
    return found | {merger.name: merger for merger in found.values()}


def _run_file(where: str) -> ModuleType:
    path = Path(where).expanduser()
    if not path.is_file():
        beside = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        hint = nearest(path.name, beside).rstrip(".")
        raise InputError(f"there is no file '{where}' to take a method from{hint}")
    path = path.resolve()
    key = (path, path.stat().st_mtime_ns)
    if key not in _FILES:
        with _on_path(path.parent), _explained(where):
            _FILES[key] = _run(path)
    return _FILES[key]


def _run(path: Path) -> ModuleType:
    # A name that no module has and files of equal names do not share.
    name = f"methods_in_{path.stem}_{derive_seed(str(path)):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(where: str) -> ModuleType:
    if not all(part.isidentifier() for part in where.split(".")):
        raise InputError(
            f"'{where}' is neither a Python file, as in 'path/to/file.py:name', nor a module, as "
            "in 'package.module:name'"
        )
    try:
        with _on_path(Path.cwd()), _explained(where, where):
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
def _on_path(folder: Path) -> Iterator[None]:
    """Find modules in a folder, as Python does for a script, but after all others."""
    before = list(sys.path)
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


@contextmanager
def _explained(where: str, module: str = "") -> Iterator[None]:
    """Name the file or module whose code raises an error, unless the module is itself not there."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{missing}."):
            raise
        raise InputError(f"'{where}' raises {type(error).__name__}: {error}") from error
