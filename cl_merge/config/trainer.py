"""The arguments of Lightning's Trainer that a configuration gives, checked before any work."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cl_merge.errors import InputError, nearest

# What a run cannot do without, or has not.
_NOT_HERE = {
    "barebones": "a run needs its evaluations and logs",
    "fast_dev_run": "a run needs whole trainings and evaluations",
    "val_check_interval": "the trainings of a run have no validation",
}

# Types of weights other than float32, of which task vectors are made; "mixed" keeps that.
_WEIGHTS = ("bf16-true", "16-true", "64-true", "64", 64)

# Lightning takes less than this, and then fails or trains nothing.
_LEAST = {
    "max_epochs": 1,
    "min_epochs": 0,
    "accumulate_grad_batches": 1,
    "log_every_n_steps": 0,
    "reload_dataloaders_every_n_epochs": 0,
}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    list: "a list",
    dict: "keys and values",
    NoneType: "null",
}


def check_trainer(arguments: Mapping[str, Any]) -> None:
    """Check names, types and what else goes wrong only when a training has begun.

    Example:
        >>> check_trainer({"max_epochs": "many"})
        Traceback (most recent call last):
        ...
        cl_merge.errors.InputError: trainer.max_epochs=many; expected a whole number or null
    """
    # Lightning takes a second to load, and not every command needs it.
    from lightning import Trainer

    known = list(inspect.signature(Trainer.__init__).parameters)[1:]
    hints = get_type_hints(Trainer.__init__)
    for name, value in arguments.items():
        if name not in known:
            hint = nearest(f"trainer.{name}", [f"trainer.{other}" for other in known])
            raise InputError(
                f"unknown key 'trainer.{name}'{hint} It is no argument of Lightning's Trainer"
            )
        given = f"trainer.{name}={value}"
        if name in _NOT_HERE and value:
            raise InputError(f"{given}; {_NOT_HERE[name]}: leave it out")
        if not _fits(value, hints[name]):
            raise InputError(f"{given}; expected {_described(hints[name])}")
        if name == "precision" and value in _WEIGHTS:
            raise InputError(f"{given}; expected 32-true, bf16-mixed or 16-mixed")
        if name in _LEAST and value is not None and value < _LEAST[name]:
            raise InputError(f"{given}; expected a whole number from {_LEAST[name]}")
        if name == "max_steps" and value < 1 and value != -1:
            raise InputError(f"{given}; expected a whole number from 1, or -1 for no limit")
        if name in ("limit_train_batches", "limit_test_batches") and value == 0:
            raise InputError(f"{given}; expected a number of batches, or a share above 0")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a configuration is of a type."""
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in of)
    if origin is Literal:
        return (type(value), value) in [(type(one), one) for one in of]
    if origin is list:
        return isinstance(value, list) and all(_fits(item, of[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, of[1]) for item in value.values())
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def _described(hint: Any) -> str:
    """A type in words; what a configuration cannot hold is left out."""
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        words = {word for one in of if (word := _described(one))} - {"null"}
        # Python keeps one Union for all orders of its types, in the order that it met first.
        known = [word for word in _WORDS.values() if word in words]
        null = ["null"] if NoneType in of else []
        return " or ".join([*known, *sorted(words - set(known)), *null])
    if origin is Literal:
        return " or ".join(str(one) for one in of)
    return _WORDS.get(origin or hint, "")
