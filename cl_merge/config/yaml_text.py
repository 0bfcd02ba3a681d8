"""YAML from anywhere: what would exhaust stack or memory is refused before it is read."""

from __future__ import annotations

import yaml

_DEPTH = 50
_VALUES = 100_000


def check_yaml(text: str) -> None:
    """Make sure that reading a text takes little, whoever has written it.

    Readers descend into what is nested, and aliases can multiply a few lines to gigabytes.

    Args:
        text: The YAML.

    Raises:
        ValueError: If it is nested deeply, or holds very many values with its aliases written out.
        yaml.YAMLError: If it is no YAML.

    Example:
        >>> check_yaml("[" * 60 + "]" * 60)
        Traceback (most recent call last):
        ...
        ValueError: nested more than 50 deep
    """
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            open_.append((event.anchor, 0))
            size = 1
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            anchor, size = open_.pop()
            if anchor is not None:
                sizes[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 1)
        else:
            size = int(isinstance(event, yaml.ScalarEvent))
            if size and event.anchor is not None:
                sizes[event.anchor] = 1
        anchor, before = open_[-1]
        open_[-1] = (anchor, before + size)
        if len(open_) > _DEPTH:
            raise ValueError(f"nested more than {_DEPTH} deep")
        if before + size > _VALUES:
            raise ValueError(f"more than {_VALUES:,} values, with aliases written out")
