"""Drawn figures as part of a page."""

from __future__ import annotations

import math
import re
import struct
from base64 import b64encode
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Protocol
from xml.etree import ElementTree

from cl_merge.errors import InputError

_PNG = b"\x89PNG\r\n\x1a\n"
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
# What a picture in a page does not need: programs, other documents, notes on its making, and what
# the page says beside it.
_DROPPED = {"script", "foreignObject", "metadata", "title", "desc"}
_LOCAL_URL = re.compile(r"url\(\s*(['\"]?)#([^)'\"]+)\1\s*\)")


class Numbers(Protocol):
    """The numbers of a figure, as a table."""

    @property
    def columns(self) -> Sequence[str]:
        """The heads."""

    @property
    def rows(self) -> Sequence[Sequence[str | float | None]]:
        """Texts and numbers; None where there is none."""


class Drawn(Protocol):
    """A figure that was drawn, as a page needs it."""

    @property
    def title(self) -> str:
        """What stands over it."""

    @property
    def setting(self) -> str:
        """Name of its setting; anything else if it shows several."""

    @property
    def file(self) -> Path:
        """An SVG, or a PNG."""

    @property
    def caption(self) -> str:
        """What can be seen in it."""

    @property
    def alt(self) -> str:
        """The same for those who cannot see it."""

    @property
    def data(self) -> Numbers:
        """What was drawn."""


def inline_picture(file: Path, name: str, label: str) -> str:
    """Read a picture so that it can stand in a page.

    Args:
        file: An SVG, or a PNG.
        name: An identifier that no other picture of the page has.
        label: What is read out instead of it.

    Returns:
        An ``<svg>`` or ``<img>`` element.

    Raises:
        InputError: If the file cannot be read, or is none of the two.
    """
    if file.suffix.lower() != ".png":
        return inline_svg(file, name, label)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"'{file}' cannot be read ({error.strerror})") from error
    if not data.startswith(_PNG):
        raise InputError(f"'{file}' is no PNG")
    wide, high = struct.unpack(">II", data[16:24])
    return (
        f'<img id="{name}" alt="{escape(label)}" width="{wide}" height="{high}" '
        f'src="data:image/png;base64,{b64encode(data).decode()}">'
    )


def inline_svg(file: Path, name: str, label: str) -> str:
    """Read a picture so that it can stand in a page.

    Args:
        file: An SVG.
        name: An identifier that no other picture of the page has.
        label: What is read out instead of it.

    Returns:
        An ``<svg>`` element that runs nothing, loads nothing, and whose identifiers and styles are
        its own.

    Raises:
        InputError: If the file is no SVG.
    """
    try:
        root = ElementTree.parse(file).getroot()  # noqa: S314 - from the suite's own folder
    except (ElementTree.ParseError, OSError) as error:
        raise InputError(f"'{file}' is no SVG that can be read ({error})") from error
    if root.tag != f"{{{_SVG}}}svg":
        raise InputError(f"'{file}' is no SVG: its root is <{_local(root.tag)}>")
    _clean(root)
    for element in root.iter():
        _make_own(element, name)
    root.attrib.pop("aria-labelledby", None)
    root.attrib |= {"id": name, "role": "img", "aria-label": label}
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]
) -> Iterator[list[str]]:
    """Write the numbers of a figure as texts.

    Args:
        columns: The heads.
        rows: Texts and numbers; None where there is none.

    Yields:
        The texts of a row, those of the head first.
    """
    for row in (columns, *rows):
        yield ["" if value is None else _text(value) for value in row]


def _text(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def _clean(element: ElementTree.Element) -> None:
    for child in list(element):
        known = isinstance(child.tag, str) and child.tag.startswith(f"{{{_SVG}}}")
        if known and _local(child.tag) not in _DROPPED:
            _clean(child)
        else:
            element.remove(child)


def _make_own(element: ElementTree.Element, name: str) -> None:
    for key, value in list(element.attrib.items()):
        local = _local(key)
        if local.lower().startswith("on"):
            del element.attrib[key]
        elif local == "id":
            element.set(key, f"{name}-{value}")
        elif local == "href" and value.startswith("#"):
            element.set(key, f"#{name}-{value[1:]}")
        elif local == "href" and not value.startswith("data:image/"):
            del element.attrib[key]
        elif local != "href":
            element.set(key, _own_urls(value, name))
    if _local(element.tag) == "style":
        # Nested, a style reaches no further than its picture.
        element.text = f"#{name}{{{_own_urls(element.text or '', name)}}}"


def _own_urls(text: str, name: str) -> str:
    text = _LOCAL_URL.sub(lambda match: f"url(#{name}-{match[2]})", text)
    return re.sub(rf"url\((?!#{re.escape(name)}-)[^)]*\)|@import[^;]*;?", "none", text)


def _local(name: str) -> str:
    return name.rpartition("}")[2]
