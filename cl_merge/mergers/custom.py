"""A user's own method, written as a function."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cl_merge.errors import InputError, unknown_name
from cl_merge.mergers.base import Merger
from cl_merge.mergers.chunks import Accumulators, ChunkInfo, ResultInfo, Unit
from cl_merge.mergers.registry import BUILT_IN, MERGERS
from cl_merge.mergers.stack import StackMerger
from cl_merge.task_vectors.task_vector import check_scale

Function = Callable[..., Tensor]
UNITS = ("element", "parameter")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"

# What options cannot be called beside the attributes of a merger: `merge`, `MergeCallback`,
# `StreamMerger` and `merge_checkpoints` take options and these side by side.
_TAKEN = (  # noqa: SIM905 - a list would take a line for each
    "base block_size buffers device directory dtype exclude held_out importance_samples "
    "importances include left_out logits lora_rank loss method module name output overwrite "
    "progress published_scale save_state scale shard_bytes start store strip_prefix tasks vectors "
    "weights"
).split()


def merge_method(
    name: str | None = None, *, scale: float = 1.0, unit: Unit = "element"
) -> Callable[[Function], type[Merger]]:
    """Make a method of a function that merges the values of all tasks at once.

    The function becomes a class of `Merger`, to be called for a merger:
    ``MergeCallback(median())``. It is known by its name from then on: ``merge(vectors, "median")``.
    The command line and a config find it by where it is, ``path/to/file.py:median`` or
    ``package.module:median``, and run the code in that file.

    Args:
        name: Name of the method; None takes that of the function, with ``-`` for ``_``.
        scale: Scale at which the merged task vector is applied unless the user says otherwise.
        unit: What the function sees at a time: ``"parameter"``, a whole parameter in its shape, or
            ``"element"``, any stretch of values, on several threads at once, so that the value of
            an element may depend on the tasks' values of that element alone.

    Returns:
        A decorator for functions of one positional argument, the values of T tasks, float32
        ``[T, n]`` (``[T, *shape]`` with ``unit="parameter"``), which they may change, that return
        the merged values, floating point ``[n]`` (``[*shape]``). Keyword-only arguments are the
        options: each needs a default, a plain value that JSON can hold.

    Raises:
        InputError: If the function takes other arguments, or the name is that of a built-in method.

    Example:
        >>> from cl_merge.mergers import MERGERS, merge
        >>> @merge_method("middle")
        ... def middle(values, *, lower: bool = True):
        ...     "Take the median over tasks."
        ...     return values.quantile(0.5, dim=0, interpolation="lower" if lower else "higher")
        >>> vectors = [{"weight": torch.tensor([value])} for value in (1.0, 5.0, 2.0, 4.0)]
        >>> merge(vectors, "middle")["weight"], merge(vectors, "middle", lower=False)["weight"]
        (tensor([2.]), tensor([4.]))
        >>> del MERGERS["middle"]  # forget it again
    """
    return _decorator(_Stacked, name, scale=scale, unit=unit)


def fold_method(
    name: str | None = None, *, scale: float = 1.0, unit: Unit = "element"
) -> Callable[[Function], type[Merger]]:
    """Make a method of a function that takes up one task at a time, in constant memory.

    As `merge_method`, but for functions of three positional arguments: what was merged so far,
    float32 ``[n]``, zeros before the first task; the values of the new task, ``[n]``; and its
    index, from 0. They return what is merged now, ``[n]``. With ``unit="parameter"`` all are in the
    parameter's shape. Arguments, options and errors are those of `merge_method`.

    Example:
        >>> from cl_merge.mergers import MERGERS, merge
        >>> @fold_method()
        ... def running_decay(merged, vector, task, *, rate: float = 0.5):
        ...     "Weigh older tasks less."
        ...     return rate * merged + vector
        >>> vectors = [{"weight": torch.tensor([value])} for value in (4.0, 2.0, 1.0)]
        >>> merge(vectors, "running-decay", rate=0.1)["weight"]
        tensor([1.2400])
        >>> del MERGERS["running-decay"]  # forget it again
    """
    return _decorator(_Folded, name, scale=scale, unit=unit)


class _Custom(Merger):
    """A merger around a function; the decorators make subclasses of it."""

    function: ClassVar[Function]
    arguments: ClassVar[tuple[str, ...]]  # of the function, before its options
    defaults: ClassVar[dict[str, Any]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for option, value in options.items():
            if option not in self.defaults:
                raise unknown_name(f"option of method '{self.name}'", option, self.defaults)
            _check_option(self.name, option, value, self.defaults[option])
        self._given = self.defaults | options
        for option, value in self._given.items():
            setattr(self, option, value)

    @property
    @override
    def options(self) -> dict[str, Any]:
        return dict(self._given)

    def call(self, like: Tensor, parameter: str, *arguments: Any) -> Tensor:
        """Call the function; refuse what is no finite floating-point tensor of this shape."""
        where = f"in method '{self.name}', parameter {parameter}"
        try:
            result: object = type(self).function(*arguments, **self._given)
        except Exception as error:
            error.add_note(where)
            raise
        if not isinstance(result, Tensor):
            wrong = f"{_kind(result)}, not a tensor"
        elif result.shape != like.shape:
            wrong = f"shape {tuple(result.shape)} instead of {tuple(like.shape)}"
        elif not result.is_floating_point():
            wrong = f"{result.dtype}, not floating point"
        elif not bool(result.isfinite().all()):
            wrong = "NaN or infinity"
        else:
            return result
        raise InputError(f"{where}: the function returned {wrong}")


class _Stacked(_Custom, StackMerger):
    arguments = ("values",)

    @override
    def combine(self, values: Tensor, info: ResultInfo) -> Tensor:
        return self.call(values[0], info.name, values)


class _Folded(_Custom):
    arguments = ("merged", "vector", "task")
    accumulators: ClassVar = {"merged": torch.float32}

    @override
    def fold(self, state: Accumulators, chunk: Tensor, info: ChunkInfo) -> None:
        # Copies: a function that changes its arguments changes no task vector of the user's.
        merged, vector = state["merged"].clone(), chunk.clone()
        if self.unit == "parameter":
            merged, vector = merged.view(info.shape), vector.view(info.shape)
        result = self.call(merged, info.name, merged, vector, info.task)
        state["merged"].copy_(result.reshape(-1))


def _decorator(
    kind: type[_Custom], name: Any, *, scale: float, unit: Unit
) -> Callable[[Function], type[Merger]]:
    if callable(name):  # without parentheses
        bare: Any = _decorator(kind, None, scale=scale, unit=unit)
        return bare(name)  # type: ignore[no-any-return]

    def decorate(function: Function) -> type[_Custom]:
        title = getattr(function, "__name__", "")
        known_as = title.replace("_", "-") if name is None else name
        if not isinstance(known_as, str) or not re.fullmatch(_NAME, known_as):
            raise InputError(
                f"a method's name is made of letters, digits, '-', '_' and '.', which {known_as!r} "
                "is not"
            )
        if known_as in BUILT_IN:
            raise InputError(f"'{known_as}' is a built-in method; give yours another name")
        if unit not in UNITS:
            raise unknown_name(f"unit of method '{known_as}'", unit, UNITS)
        options = _options(function, known_as, kind)
        made = type(
            title,
            (kind,),
            {
                "__doc__": function.__doc__,
                "__module__": function.__module__,
                "__qualname__": getattr(function, "__qualname__", title),
                "__signature__": inspect.Signature(options),
                "name": known_as,
                "published_scale": check_scale(scale),
                "unit": unit,
                "function": staticmethod(function),
                "defaults": {option.name: option.default for option in options},
            },
        )
        MERGERS[known_as] = made
        return made

    return decorate


def _options(function: Function, method: str, kind: type[_Custom]) -> list[inspect.Parameter]:
    parameters = list(inspect.signature(function).parameters.values())
    options = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    positional = [p for p in parameters if p not in options]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(positional) != len(kind.arguments) or any(p.kind not in plain for p in positional):
        expected = ", ".join(kind.arguments)
        raise InputError(
            f"method '{method}': the function must take ({expected}) and its options after a '*', "
            f"as in ({expected}, *, rate=0.5), but takes {inspect.signature(function)}"
        )
    for option in options:
        if option.default is inspect.Parameter.empty:
            raise InputError(f"method '{method}': the option {option.name} needs a default")
        taken = option.name in _TAKEN or hasattr(kind, option.name)
        if taken or option.name.startswith("_"):
            raise InputError(
                f"method '{method}': no option can be called {option.name}, which means something "
                "else to those who merge"
            )
        _check_option(method, option.name, option.default, None)
    return options


def _check_option(method: str, option: str, value: Any, default: Any) -> None:
    what = f"option {option} of method '{method}'"
    try:
        plain = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        plain = False
    if not plain:
        raise InputError(
            f"{what} must be a plain value (number, text, true or false, none, or lists and "
            f"dictionaries of these), not {value!r}"
        )
    if default is not None and _kind(value) != _kind(default):
        raise InputError(f"{what} must be {_kind(default)}, as {default!r} is, not {value!r}")


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return {str: "text", type(None): "None"}.get(type(value), f"a {type(value).__name__}")
