"""What a suite is: settings, methods and seeds, from a YAML file and the words of a command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta
from omegaconf import OmegaConf

from cl_merge.benchmarks.datasets.catalog import absolute_data, find_data, is_data_file
from cl_merge.benchmarks.formatting import data_label
from cl_merge.benchmarks.methods.method import (
    Method,
    absolute_path,
    check_same_method,
    find_method,
)
from cl_merge.config.reading import flat, parse_arguments, read_yaml
from cl_merge.errors import InputError, nearest, unknown_name

T = TypeVar("T")

_FOLDER = Path(__file__).parent
_PAPER = ("table1", "table2")
# What a plan decides for each run.
_PLANNED = ("data", "seed", "out", "method", "compare", "stream.tasks", "merge.beside")


@dataclass(frozen=True)
class Setting:
    """A data set in a number of tasks that methods are compared on: a column of the table."""

    data: str  # as for `cl-merge run data=`
    tasks: int | None = None  # None leaves it to the data set, as with domains
    order: Annotated[int, Meta(ge=0)] | None = None  # a seed of the order; None for the recipe's
    run: Mapping[str, Any] = field(default_factory=dict, compare=False)  # settings of its runs
    # By how many tasks the run of joint training counts its test images. That run is the same for
    # any number, and serves all settings of the data set.
    joint_tasks: int | None = field(default=None, compare=False)
    # Instead of the data set's name, where two settings would have the same.
    label: Annotated[str, Meta(pattern=r"^\w[\w.+-]*$")] | None = None

    @property
    def data_name(self) -> str:
        """The data set in a word that can name a folder."""
        return self.label or data_label(self.data)

    @property
    def name(self) -> str:
        """The setting in a word that can name a folder, such as ``cifar100-10``."""
        order = "" if self.order is None else f"-order{self.order}"
        return self.name_of_all_orders + order

    @property
    def name_of_all_orders(self) -> str:
        """The same for its data set in so many tasks, whatever their order."""
        return self.data_name if self.tasks is None else f"{self.data_name}-{self.tasks}"


@dataclass(frozen=True)
class Suite:
    """A table to be filled: settings by methods, over seeds."""

    name: str
    about: str
    settings: tuple[Setting, ...]
    methods: tuple[str, ...]  # as for `find_method`
    shown: tuple[str, ...]  # those that were asked for; the others share a training with them
    seeds: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)]
    paper: str | None = None  # the table of the paper that it follows
    published: bool = False  # whether methods have the options of the published runs
    run: Mapping[str, Any] = field(default_factory=dict)  # settings of every run

    @property
    def rows(self) -> list[Method]:
        """The methods that were asked for, the rows of the table."""
        return [find_method(name) for name in self.shown]


def find_suite(name: str) -> Suite:
    """Read a suite that comes along, or that of a YAML file.

    Example:
        >>> find_suite("table2").seeds
        (5,)
    """
    known = name in known_suites()
    if not known and not is_data_file(name):
        raise unknown_name("suite", name, [*known_suites(), "FILE.yaml"])
    file, where = _FOLDER / f"{name}.yaml" if known else Path(name), f"suite {name}"
    content = read_yaml(file)
    _check_keys(content, Suite, where)
    for key in ("settings", "methods"):
        if not isinstance(content.get(key), list) or not content[key]:
            raise InputError(f"{where}: '{key}' must be a list with at least one entry")
    paper = content.get("paper")
    if paper is not None and paper not in _PAPER:
        raise unknown_name(f"table of the paper in {where}", str(paper), _PAPER)
    methods = _checked_methods(map(str, content["methods"]))
    settings = _distinct(
        [s for entry in content["settings"] for s in _settings(entry, where)], where
    )
    defaults = {"name": file.stem, "about": "", "shown": methods, "seeds": [0]}
    suite = _converted({**defaults, **content, "methods": methods, "settings": []}, Suite, where)
    return replace(suite, settings=settings, seeds=tuple(dict.fromkeys(suite.seeds)))


def known_suites() -> list[str]:
    """The names of the suites that come along."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def narrowed(
    suite: Suite,
    *,
    data: Sequence[str] = (),
    tasks: Sequence[int] = (),
    methods: Sequence[str] = (),
    seeds: str | None = None,
    orders: int | None = None,
    run: Sequence[str] = (),
) -> Suite:
    """Choose a part of a suite; what is not given stays, and a data set it does not have is added.

    `seeds` is how many, counted from the suite's first, or a list with commas; `orders` how many
    orders of classes, domains or data sets, of which the first is the recipe's and the others are
    drawn; `run` has settings of every run, as ``key=value``.

    Example:
        >>> part = narrowed(find_suite("table1"), data=["cars"], tasks=[10], seeds="3")
        >>> [setting.name for setting in part.settings], part.seeds
        (['cars-10'], (5, 6, 7))
    """
    settings: list[Setting] = []
    for name in map(absolute_data, data or dict.fromkeys(s.data for s in suite.settings)):
        own = [s for s in suite.settings if s.data == name]
        own = own or _settings({"data": name, "tasks": list(tasks) or None}, "the command line")
        chosen = [s for s in own if not tasks or s.tasks in tasks]
        if not chosen and data:
            known = ", ".join(str(s.tasks) for s in own if s.tasks is not None)
            has = f"{known} tasks" if known else "the tasks that its recipe makes"
            raise InputError(
                f"tasks {','.join(map(str, tasks))}: suite '{suite.name}' has '{name}' in {has}"
            )
        settings += chosen
    if not settings:
        has = ", ".join(s.name for s in suite.settings)
        raise InputError(f"nothing is left of suite '{suite.name}', which has {has}")
    if orders is not None:
        settings = [replace(s, order=order) for s in settings for order in _orders(orders)]
    chosen_settings = _distinct(settings, f"suite '{suite.name}'")
    for given in (suite.run, *(setting.run for setting in settings)):
        _check_planned(flat(given), f"run of suite '{suite.name}'")
    names = _checked_methods(methods)
    return replace(
        suite,
        settings=chosen_settings,
        methods=tuple(_checked_methods((*suite.methods, *names))),
        shown=tuple(names) or suite.shown,
        seeds=_seeds(seeds, suite.seeds),
        run={**suite.run, **_run_settings(run)},
    )


def joined(one: Suite, other: Suite) -> Suite:
    """Put together all settings, methods and seeds of two parts of a suite."""
    shown = {*map(find_method, (*one.shown, *other.shown))}
    methods = _checked_methods((*one.methods, *other.methods))
    return replace(
        one,
        settings=_distinct((*one.settings, *other.settings), f"suite '{one.name}'"),
        methods=tuple(methods),
        shown=tuple(name for name in methods if find_method(name) in shown),
        seeds=tuple(sorted({*one.seeds, *other.seeds})),
    )


def to_yaml(suite: Suite) -> str:
    """Write a suite as YAML that `find_suite` reads back from a file."""
    return str(OmegaConf.to_yaml(OmegaConf.create(asdict(suite))))


def _checked_methods(names: Iterable[str]) -> list[str]:
    """The names of methods, each method once: ``ties-independent`` is another word for ``ties``."""
    found: dict[str, str] = {}
    for word in map(absolute_path, names):
        method = find_method(word)
        first = found.setdefault(method.name, word)
        check_same_method(method, find_method(first))
    return list(found.values())


def _settings(entry: Any, where: str) -> list[Setting]:
    if not isinstance(entry, Mapping) or "data" not in entry:
        raise InputError(f"{where}: each setting needs data: NAME, found {entry}")
    _check_keys(entry, Setting, f"a setting of {where}")
    data, tasks = absolute_data(str(entry["data"])), entry.get("tasks")
    # Runs read the files of users; a suite that was copied from another machine may lack them.
    if not is_data_file(data):
        find_data(data)
    numbers = tasks if isinstance(tasks, list) else [tasks]
    if not numbers or any(n is not None and (not isinstance(n, int) or n < 1) for n in numbers):
        raise InputError(f"{where}: tasks of '{data}' must be numbers, found {tasks}")
    common = {"joint_tasks": numbers[0], **entry, "data": data}
    return [_converted({**common, "tasks": number}, Setting, where) for number in numbers]


def _distinct(settings: Iterable[Setting], where: str) -> tuple[Setting, ...]:
    """Settings, each once; make sure that others do not share the folder of their runs."""
    found: dict[str, Setting] = {}
    data: dict[str, str] = {}  # by the folder of its joint training, which serves all its settings
    for setting in settings:
        first = found.setdefault(setting.name, setting)
        other = data.setdefault(setting.data_name, setting.data)
        same = (first, first.run) == (setting, setting.run)
        if not same or other != setting.data:
            raise InputError(
                f"{where}: two settings are called '{setting.data_name if same else setting.name}'"
                ", but differ in data or run; give one of them a label: WORD"
            )
    return tuple(found.values())


def _converted(content: Any, kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {error}") from error


def _check_keys(content: Mapping[str, Any], kind: type[Suite | Setting], where: str) -> None:
    known = [own.name for own in fields(kind)]
    for key in content:
        if key not in known:
            raise InputError(f"{where}: unknown key '{key}'{nearest(str(key), known)}")


def _seeds(text: str | None, default: tuple[int, ...]) -> tuple[int, ...]:
    if text is None:
        return default
    words = [word.strip() for word in text.split(",") if word.strip()]
    listed = "," in text
    if not words or not all(map(str.isdecimal, words)) or (not listed and int(text) < 1):
        raise InputError(
            f"seeds '{text}'; expected how many, such as 3, or a list with commas, such as 0,1,2 "
            "(one alone: '5,')"
        )
    if listed:
        return tuple(dict.fromkeys(map(int, words)))
    return tuple(range(default[0], default[0] + int(text)))


def _orders(number: int) -> list[int | None]:
    if number < 1:
        raise InputError(f"orders {number}; expected how many, 1 or more")
    return [None, *range(1, number)]


def _run_settings(words: Sequence[str]) -> Mapping[str, Any]:
    for word in words:
        _check_planned([word.partition("=")[0]], f"'{word}'")
    return parse_arguments(words)


def _check_planned(keys: Iterable[str], where: str) -> None:
    for key in keys:
        if key in _PLANNED:
            raise InputError(
                f"{where}: a suite decides {key} for each of its runs; choose data, tasks, "
                "methods, seeds and out for the whole suite"
            )
