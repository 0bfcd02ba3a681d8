"""Turn names in single backticks, as docstrings of the library have them, into links."""

from __future__ import annotations

import inspect
import re
from functools import partial
from typing import Any

from docutils.nodes import Element, reference
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

_TOP = ("class", "exception", "function", "data")
_SENTENCES: dict[str, list[str]] = {}


def setup(app: Sphinx) -> dict[str, Any]:
    """Add this extension to Sphinx."""
    # Before napoleon, which has 500, and after it.
    app.connect("autodoc-process-docstring", mark_arguments, priority=400)
    app.connect("autodoc-process-docstring", plain_returns, priority=410)
    app.connect("autodoc-process-docstring", keep_sentences, priority=420)
    app.connect("autodoc-process-docstring", put_sentences_back, priority=600)
    app.connect("autodoc-process-signature", spell_factories)
    app.connect("missing-reference", find)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def mark_arguments(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Write an object's own arguments and attributes as code: there is nothing to link to."""
    own = _arguments(obj) | _arguments(_owner(obj)) | _attributes(_owner(obj) or obj)
    code = partial(re.sub, r"(?<![`:\w])`(\w+)`(?![`_])", lambda match: _code(match, own))
    lines[:] = map(code, lines)


def _code(match: re.Match[str], own: set[str]) -> str:
    return f"``{match[1]}``" if match[1] in own else match[0]


def _arguments(obj: Any) -> set[str]:
    try:
        return set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        return set()


def _attributes(obj: Any) -> set[str]:
    """What a docstring lists under *Attributes*: these have no place of their own to link to."""
    section = re.search(r"\n +Attributes:\n(.*?)(\n\n|\Z)", obj.__doc__ or "", flags=re.DOTALL)
    return set(re.findall(r"^ +(\w+): ", section[1], flags=re.MULTILINE)) if section else set()


def _owner(obj: Any) -> Any:
    """The class that a method or a property belongs to; None for anything else."""
    function = getattr(obj, "fget", obj)
    *parents, _ = getattr(function, "__qualname__", "").split(".")
    found: Any = inspect.getmodule(function) if parents else None
    for parent in parents:
        found = getattr(found, parent, None)
    return found


def plain_returns(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Write what is returned as a field; napoleon takes what stands before a colon for a type."""
    for title, field in (("Returns:", ":returns:"), ("Yields:", ":yields:")):
        if title not in lines:
            continue
        start = lines.index(title) + 1
        stop = start
        while stop < len(lines) and (lines[stop].startswith("    ") or not lines[stop]):
            stop += 1
        first, *rest = lines[start:stop]
        lines[start - 1 : stop] = [f"{field} {first.strip()}", *rest]


def keep_sentences(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Keep what a property is; napoleon takes what stands before a colon for a type here too."""
    if what in ("attribute", "data", "property"):
        _SENTENCES[name] = [*lines]


def put_sentences_back(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Put back what `keep_sentences` kept."""
    lines[:] = _SENTENCES.pop(name, lines)


def spell_factories(
    app: Sphinx,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Write a default that a data class makes as dots; ``<factory>`` is no Python to Sphinx."""
    return signature and signature.replace("<factory>", "..."), returns


def find(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element
) -> reference | None:
    """Find a name that is written without its module, or with the module that defines it.

    The library's names are public in one place and defined in another; a docstring writes neither.
    A name that several objects end in, as methods of different classes, is not guessed.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].removesuffix("()")
    if target.startswith("cl_merge."):
        target = target.rpartition(".")[2]
    objects = env.domains["py"].objects
    # What is no object of its own, such as an attribute, is told where its class is.
    for name in (target, target.rpartition(".")[0]):
        found = {
            (entry.docname, entry.node_id): full
            for full, entry in objects.items()
            if name and (full == name or full.endswith(f".{name}"))
        }
        # A class or a function is meant before a method of the same name.
        top = {place: full for place, full in found.items() if objects[full].objtype in _TOP}
        if len(top or found) == 1:
            [((document, anchor), full)] = (top or found).items()
            return make_refnode(app.builder, node["refdoc"], document, anchor, [content], full)
    return None
