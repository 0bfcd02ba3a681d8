"""Directives that write down what the code knows: settings, methods, mergers, data sets, suites.

Each makes Markdown, in `markdown`, and has no options. Nothing that they show is kept here, so that
nothing can fall behind the code.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib.resources import files
from typing import Any

import torch
import yaml
from docutils.nodes import Node
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from cl_merge import cli
from cl_merge.benchmarks.datasets.catalog import catalog, find_data
from cl_merge.benchmarks.methods.method import GROUPS, METHODS, published_scale
from cl_merge.benchmarks.suites.definition import find_suite
from cl_merge.config.schema import RunConfig
from cl_merge.mergers import MERGERS, Merger
from cl_merge.mergers.registry import BUILT_IN

# A list of a recipe that is longer, such as the order of 200 classes, is told by its length.
LONGEST = 12


def setup(app: Sphinx) -> dict[str, Any]:
    """Add this extension to Sphinx."""
    for name, function in MARKDOWN.items():
        app.add_directive(name, _directive(function))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def settings() -> str:
    """Every setting of a run with type, default and meaning, in its groups."""
    own = [item for item in fields(RunConfig) if _group(item) is None]
    groups = [item for item in fields(RunConfig) if _group(item) is not None]
    parts = ["## A run", *(_setting(item) for item in own)]
    for item in groups:
        parts += [f"## `{item.name}`", f"{_sentence(item.metadata['about'])}"]
        parts += [_setting(inner, f"{item.name}.") for inner in fields(_group(item))]
    return "\n\n".join(parts)


def methods() -> str:
    """The methods of the tables, in the groups of the tables."""
    parts = []
    for title, names in GROUPS.items():
        rows = []
        for name in names:
            method = METHODS[name]
            scale = published_scale(method)
            rows.append(
                (
                    f"`{name}`",
                    _sentence(method.about),
                    "" if scale is None else str(method.scale or f"{scale:g}"),
                    ", ".join(f"`{key}={value}`" for key, value in method.published.items()),
                    method.paper or "",
                )
            )
        head = ("method", "what it is", "scale", "published options", "in the paper")
        parts += [f"### {_sentence(title)[:-1]}", _table(head, rows)]
    return "\n\n".join(parts)


def mergers() -> str:
    """The mergers by name: class, published scale and options."""
    rows = [
        (
            f"`{name}`",
            f"{{py:class}}`~{merger.__module__}.{merger.__qualname__}`",
            f"{merger.published_scale:g}",
            ", ".join(f"`{option}={value!r}`" for option, value in _options(merger).items()),
        )
        for name, merger in _built_in()
    ]
    return _table(("method", "class", "scale", "options"), rows)


def merger_needs() -> str:
    """The mergers by name: data, memory, whether they fold, and the source of the rule."""
    rows = []
    for name, merger in _built_in():
        kept, folds = _kept(merger)
        data = "images of its task, for the importance of each element"
        if merger.grams:
            data = "inputs of its task, for the Gram matrices of layers"
        data = data if merger.weighted else "none"
        memory = kept if folds else f"{kept} for each task"
        rows.append((f"`{name}`", data, memory, "yes" if folds else "no", _source(merger)))
    return _table(("method", "data", "kept", "folds", "source"), rows)


def merger_classes() -> str:
    """The docstring of each merger's class, under the names of its methods."""
    names: dict[type[Merger], list[str]] = {}
    for name, merger in _built_in():
        names.setdefault(merger, []).append(name)
    parts = []
    for merger, known_as in names.items():
        title = ", ".join(f"`{name}`" for name in known_as)
        place = f"{merger.__module__}.{merger.__qualname__}"
        parts += [
            f"### {title}",
            f"```{{eval-rst}}\n.. autoclass:: {place}\n```",
        ]
    return "\n\n".join(parts)


def data_sets() -> str:
    """Each data set of the catalog: where it comes from, its size and its recipe."""
    parts = []
    for name in catalog():
        entry = find_data(name)
        where = f"`{entry.source}`" if entry.source else "a local copy"
        if entry.sources:
            where = "joined from " + ", ".join(f"[`{one}`](#{one})" for one in entry.sources)
        size = ", ".join(f"{number:,} {_FACTS[fact]}" for fact, number in entry.facts.items())
        recipe = yaml.safe_dump(_shortened(entry.recipe), sort_keys=False, allow_unicode=True)
        parts += [
            f"({name})=\n### `{name}`",
            _sentence(entry.about),
            f"Source: {where}. {_sentence(size)}",
            f"```yaml\n{recipe}```",
        ]
    return "\n\n".join(parts)


def suites() -> str:
    """Each suite: its settings, methods and seeds."""
    parts = []
    for file in sorted(files("cl_merge.benchmarks.suites").iterdir(), key=lambda file: file.name):
        name, _, ending = file.name.partition(".")
        if ending != "yaml":
            continue
        suite = find_suite(name)
        rows = [
            ("settings", ", ".join(f"`{setting.name}`" for setting in suite.settings)),
            ("methods", ", ".join(f"`{method}`" for method in suite.methods)),
            ("seeds", ", ".join(map(str, suite.seeds))),
        ]
        parts += [f"### `{name}`", _sentence(suite.about), _table(("", ""), rows)]
    return "\n\n".join(parts)


def command_line() -> argparse.ArgumentParser:
    """The parser of ``cl-merge``, without the list of settings, which has a page of its own."""
    parser = cli.parser()
    for action in parser._subparsers._group_actions:
        run = action.choices["run"]
        run.epilog = run.epilog[run.epilog.index("examples:") :]
    return parser


MARKDOWN: dict[str, Callable[[], str]] = {
    "settings": settings,
    "methods": methods,
    "mergers": mergers,
    "merger-needs": merger_needs,
    "merger-classes": merger_classes,
    "data-sets": data_sets,
    "suites": suites,
}
"""What makes the Markdown of each directive, by the directive's name."""

_FACTS = {
    "train": "training images",
    "test": "test images",
    "classes": "classes",
    "domains": "domains",
    "tasks": "tasks",
}


def _directive(markdown: Callable[[], str]) -> type[SphinxDirective]:
    class Written(SphinxDirective):
        def run(self) -> list[Node]:
            return self.parse_text_to_nodes(markdown(), allow_section_headings=True)

    return Written


def _group(item: Any) -> Any:
    inner = item.default_factory
    return inner if isinstance(inner, type) and is_dataclass(inner) else None


def _setting(item: Any, prefix: str = "") -> str:
    default = item.default if item.default_factory is MISSING else item.default_factory()
    shown = yaml.safe_dump(default, default_flow_style=True, width=1000).removesuffix("...\n")
    kind = "" if item.type == "Any" else f"\n:type: `{item.type.replace('None', 'null')}`"
    about = _escaped(item.metadata["about"])
    return (
        f"````{{confval}} {prefix}{item.name}{kind}\n:default: `{shown.strip()}`\n\n{about}\n````"
    )


def _built_in() -> Iterable[tuple[str, type[Merger]]]:
    return ((name, merger) for name, merger in MERGERS.items() if name in BUILT_IN)


def _options(merger: type[Merger]) -> dict[str, Any]:
    return {name: found.default for name, found in inspect.signature(merger).parameters.items()}


def _source(merger: type[Merger]) -> str:
    """The work that a merger's docstring refers to, without what else it says of it."""
    reference = " ".join(inspect.getdoc(merger).partition("Reference:\n")[2].split())
    return re.split(r";|(?<!al)\.(?: |$)", reference, maxsplit=1)[0]


def _kept(merger: type[Merger]) -> tuple[str, bool]:
    """Bytes for each value, of all or of each task, as it is when one is run; whether it folds."""
    made, value = merger(), {"weight": torch.eye(64)}
    sizes = []
    for _ in range(3):
        made.update(value, value if merger.weighted else None)
        kept = made.state_dict()["accumulators"]["weight"].values()
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in kept) / 64**2)
    grows = sizes[2] - sizes[1]
    return f"{grows or sizes[2]:.3g}", not grows


def _shortened(recipe: Any) -> Any:
    if isinstance(recipe, Mapping):
        return {key: _shortened(value) for key, value in recipe.items()}
    if isinstance(recipe, list) and len(recipe) > LONGEST:
        return f"({len(recipe)} of them, in the data set's file)"
    return recipe


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{_escaped(words[1:])}." if words else ""


def _escaped(words: str) -> str:
    """Words with what Markdown would take for its own kept as it is."""
    return "".join(f"\\{sign}" if sign in "{}<>*_" else sign for sign in words)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines
    )
