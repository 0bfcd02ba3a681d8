"""The words that classifiers are made of: prompts and class names, as the settings give them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cl_merge.errors import InputError, nearest

_PACKAGE = "open_clip:"


def read_prompts(value: Any) -> list[str]:
    """Read the setting ``prompts``: a list, or the name of one that open_clip comes with.

    Example:
        >>> read_prompts("open_clip:SIMPLE_IMAGENET_TEMPLATES")[1]
        'a bad photo of the {}.'
    """
    if isinstance(value, str) and value.startswith(_PACKAGE):
        return [template("{}") for template in _open_clip_templates(value)]
    if isinstance(value, str):
        return [value]
    if isinstance(value, Sequence) and value:
        return [str(prompt) for prompt in value]
    raise InputError(
        f"prompts={value}; expected a list of prompts with {{}} for the class name, or "
        f"{_PACKAGE}OPENAI_IMAGENET_TEMPLATES"
    )


def read_class_names(value: Any, names: Sequence[str]) -> list[str]:
    """Read the setting ``class_names``, over the data set's own names.

    It is None; a list with one name for each class; or regular expressions, each with what replaces
    its matches, which are applied to the data set's names one after another.

    Example:
        >>> read_class_names({"^[0-9]+[.]": "", "_": " "}, ["001.Crested_Auklet"])
        ['Crested Auklet']
    """
    if value is None:
        return list(names)
    if isinstance(value, Mapping):
        found = list(names)
        for pattern, replacement in value.items():
            if isinstance(replacement, (Mapping, list)) or replacement is None:
                raise InputError(
                    f"class_names: '{pattern}' is replaced by {replacement}; expected text, '' for "
                    "nothing"
                )
            try:
                found = [re.sub(str(pattern), str(replacement), name) for name in found]
            except re.error as error:
                raise InputError(
                    f"class_names: '{pattern}' is no regular expression, or '{replacement}' does "
                    f"not go with it ({error})"
                ) from error
        return found
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(
            f"class_names={value}; expected a list of names, or patterns with their replacements"
        )
    if len(value) != len(names):
        raise InputError(
            f"class_names has {len(value)} names, but the data set has {len(names)} classes"
        )
    return [str(name) for name in value]


def _open_clip_templates(value: str) -> Sequence[Any]:
    from open_clip import zero_shot_metadata

    name = value.removeprefix(_PACKAGE)
    known = [known for known in vars(zero_shot_metadata) if known.endswith("_TEMPLATES")]
    if name not in known:
        near = nearest(value, [_PACKAGE + k for k in known])
        raise InputError(f"prompts={value}: open_clip has no such list{near}")
    found: Sequence[Any] = getattr(zero_shot_metadata, name)
    return found
