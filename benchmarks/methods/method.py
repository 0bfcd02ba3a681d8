"""The methods of a run: which training they need and how they merge it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cl_merge.errors import InputError, unknown_name
from cl_merge.mergers import MERGERS, find_merger
from cl_merge.mergers.registry import is_location


@dataclass(frozen=True)
class Training:
    """One way through the tasks; methods that need the same one share it."""

    name: str  # as in results and in the folder of a run
    start: str = "sequential"  # where a task starts to train, or "independent"
    regularizer: str | None = None  # "lwf", "ewc" or "drift_penalty"
    joint: bool = False  # whether all tasks are one


@dataclass(frozen=True)
class Method:
    """One row of the table; the fields but the first and the last are those of its YAML."""

    name: str  # as in tables and in results.json
    training: str | None  # which training it needs
    merger: str | None = None  # what reduces its task vectors; None for the weights as trained
    statistics: str | None = field(default=None, repr=False)  # a kind of ClassStatistics
    text: bool = field(default=True, repr=False)  # whether the text head votes with them
    # Of ClassStatistics; None for its default.
    rank: int | None = field(default=None, repr=False)
    # Of its merged task vector, if not the published one: a number, or "drift".
    scale: Any = field(default=None, repr=False)
    about: str = field(default="", compare=False, repr=False)  # one line for people
    paper: str | None = field(default=None, compare=False, repr=False)  # its name in the paper
    # Options of the merger as in the paper's runs, where they differ from its defaults.
    published: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    # What merges the same without class statistics; None where nothing is different.
    without_statistics: Method | None = field(default=None, compare=False, repr=False)

    @property
    def plain(self) -> Method:
        """The method that merges the same with the text head alone; itself where nothing merges."""
        return self.without_statistics or self

    @property
    def merging(self) -> str:
        """The name of the method that merges the same at the published scale."""
        return self.plain.name.removesuffix(_DRIFT)

    @property
    def options(self) -> list[str]:
        """Names of the options of its merger."""
        return list(inspect.signature(find_merger(self.merger)).parameters) if self.merger else []

    @property
    def weighted(self) -> bool:
        """Whether it weighs the elements of task vectors, by importances that a fit estimates."""
        return self.merger is not None and find_merger(self.merger).weighted


TRAININGS: dict[str, Training] = {
    "sequential": Training("sequential"),
    "independent": Training("independent", start="independent"),
    "lwf": Training("lwf", regularizer="lwf"),
    "ewc": Training("ewc", regularizer="ewc"),
    "drift-penalty": Training("drift-penalty", regularizer="drift_penalty"),
    "joint": Training("joint", joint=True),
}

# The trainings that are fine-tuning on one task after another and nothing else.
_PLAIN = ("sequential", "independent")

# Mergers that were made for tasks that come one after another, each from the weights of the last.
_USUAL = {"ema": "sequential", "opcm": "sequential"}

# What a name ends in when class statistics vote, and which.
_STATISTICS = {"-statistics": "both", "-aligned": "aligned"}

# What a name ends in when the scale is the published one, but less where features drift too far.
_DRIFT = "-drift"

# In the order of the tables. With every method but MagMax the paper merges independent
# fine-tunings; the same mergers of sequential task vectors come close, so they are shown too.
GROUPS: dict[str, tuple[str, ...]] = {
    "without merging": (
        "zero-shot",
        "joint",
        "sequential",
        "independent",
        "lwf",
        "ewc",
        "drift-penalty",
    ),
    "sequential training": (
        "magmax",
        "magmax-drift",
        "lwf-magmax",
        "ewc-magmax",
        "drift-penalty-magmax",
    ),
    "independent training": ("max-abs", "average", "task-arithmetic", "random-mix", "ties"),
    "sequential, other mergers": (
        "average-sequential",
        "task-arithmetic-sequential",
        "random-mix-sequential",
        "ties-sequential",
    ),
    "class statistics": ("streaming-lda", "magmax-aligned", "magmax-statistics"),
}
"""The rows of a table in groups, as people read them."""


def _methods() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for name in (name for names in GROUPS.values() for name in names):
        file = files("cl_merge.benchmarks.methods").joinpath(f"{name}.yaml")
        recipe: Any = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
        other = recipe.pop("without_statistics", None)
        found[name] = Method(name, **recipe, without_statistics=found[other] if other else None)
    return found


METHODS: dict[str, Method] = _methods()
"""The methods of the tables by name, each from its YAML file in this folder."""


def find_method(name: str) -> Method:
    """Look up a method by its name in tables, or by a merger's.

    A merger's name, or where to import one from, may end in ``-sequential`` or ``-independent``:
    the training that it merges, without which it is independent fine-tunings but for mergers made
    for sequences. What merges may then end in ``-drift``: a scale that is lowered where features
    drift too far; or in ``-statistics`` or ``-aligned``: class statistics beside the text head, or
    inside the projection, at such a scale.

    Example:
        >>> find_method("ties").training
        'independent'
        >>> find_method("magmax-independent")
        Method(name='magmax-independent', training='independent', merger='magmax')
    """
    if name in METHODS:
        return METHODS[name]
    before, dash, last = name.rpartition("-")
    if before and dash + last in _STATISTICS:
        return _with_statistics(name, find_method(before), dash + last)
    if before and dash + last == _DRIFT:
        return _with_drift(name, find_method(before))
    merger, training = (before, last) if before and last in _PLAIN else (name, None)
    if not is_location(merger) and merger not in MERGERS:
        raise unknown_name("method", name, dict.fromkeys([*METHODS, *MERGERS]))
    if find_merger(merger).grams:
        raise InputError(
            f"'{name}' needs Gram matrices of the inputs of layers, which runs do not collect; "
            "merge files: cl-merge merge --importance"
        )
    label = _label(merger)
    known = METHODS.get(merger)
    usual = known.training if known else _USUAL.get(merger, "independent")
    if training in (None, usual):
        return known or Method(label, usual, merger)
    return Method(f"{label}-{training}", training, merger)


def check_same_method(method: Method, other: Method) -> None:
    """Refuse two methods of one name: results and tables tell methods apart by their names."""
    if method != other:
        raise InputError(
            f"methods '{method.merger}' and '{other.merger}' are both called '{method.name}'; give "
            "one of them another name"
        )


def absolute_path(name: str) -> str:
    """Name the file of a method from the root; names that are no file stay as they are.

    Example:
        >>> absolute_path("ties"), absolute_path("/home/../tmp/own.py:median")
        ('ties', '/tmp/own.py:median')
    """
    where, colon, method = name.rpartition(":")
    if not colon or not where.endswith(".py"):
        return name
    return f"{Path(where).expanduser().resolve()}:{method}"


def compared_methods(name: str, compare: bool | str | list[str]) -> list[Method]:
    """Choose the rows of a run's table, in the order of the tables, beside its own method's.

    `compare` is False for zero-shot alone, True for what plain fine-tuning and the method's own
    training give, ``"all"`` for all of `METHODS`, or names.

    Example:
        >>> [method.name for method in compared_methods("lwf-magmax", ["lwf"])]
        ['zero-shot', 'lwf', 'lwf-magmax']
    """
    own = find_method(name)
    wanted = {"zero-shot": METHODS["zero-shot"], own.name: own}
    if compare == "all":
        wanted |= METHODS
    elif compare is True:
        wanted |= {m.name: m for m in METHODS.values() if m.training in (*_PLAIN, own.training)}
    elif isinstance(compare, (str, list)):
        given = compare.split(",") if isinstance(compare, str) else compare
        for method in map(find_method, given):
            check_same_method(method, wanted.setdefault(method.name, method))
    elif compare:
        raise InputError(f"compare={compare}; expected true, false, all, or a list of methods")
    others = [method for method in wanted.values() if method.name not in METHODS]
    return [method for method in METHODS.values() if method.name in wanted] + others


def grouped_methods(trainings: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Sort the names of methods, given with their trainings, into the groups of a table.

    Those that are in no group stand last where others of their training are.

    Example:
        >>> grouped_methods({"mine": "sequential", "ties": "independent", "magmax": "sequential"})
        {'sequential training': ['magmax', 'mine'], 'independent training': ['ties']}
    """
    grouped = {
        title: [name for name in group if name in trainings] for title, group in GROUPS.items()
    }
    for name, training in trainings.items():
        if name not in METHODS:
            other = "independent training" if training == "independent" else "sequential training"
            votes = name.endswith(tuple(_STATISTICS))
            grouped["class statistics" if votes else other].append(name)
    return {title: group for title, group in grouped.items() if group}


def published_scale(method: Method) -> float | None:
    """The scale that a method was published with; None if it does not merge."""
    return find_merger(method.merger).published_scale if method.merger else None


def _with_statistics(name: str, plain: Method, ending: str) -> Method:
    if plain.statistics is not None:
        raise InputError(
            f"method={name}: '{plain.name}' has class statistics already; expected one ending, as "
            "in magmax-statistics"
        )
    if not plain.merger:
        raise InputError(
            f"method={name}: class statistics stand beside a merged model, and '{plain.name}' "
            "merges nothing; expected a method that merges, as in magmax-statistics"
        )
    plain = _with_drift(plain.name, plain)
    own = plain.name.removesuffix(_DRIFT) + ending
    return METHODS.get(own) or replace(
        plain,
        name=own,
        statistics=_STATISTICS[ending],
        about=f"{plain.about}, with class statistics",
        paper=None,
        without_statistics=plain,
    )


def _with_drift(name: str, plain: Method) -> Method:
    if plain.scale == "drift" and not plain.statistics:
        return plain
    if plain.statistics or not plain.merger:
        raise InputError(
            f"method={name}: '{plain.name}' does not end with a merge, whose scale -drift lowers; "
            "expected it right behind what merges, as in ties-drift"
        )
    own = f"{plain.name}{_DRIFT}"
    about = f"{plain.about}, at a scale that is lower where features drift too far"
    return METHODS.get(own) or replace(plain, name=own, scale="drift", about=about, paper=None)


def _label(merger: str) -> str:
    """What a merger is called in tables: a user's own one by its own name, not by its file."""
    if not is_location(merger):
        return merger
    label = find_merger(merger).name
    other = label in METHODS or (label in MERGERS and MERGERS[label] is not find_merger(merger))
    if other or label.endswith((*_STATISTICS, _DRIFT)):
        raise InputError(
            f"'{merger}' calls itself '{label}', which is the name of another method; give it "
            "another name"
        )
    return label
