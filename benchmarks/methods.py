"""The methods of a run: which training they need and how they merge it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cl_merge.errors import InputError, unknown_name
from cl_merge.mergers import MERGERS, Merger, get_merger


@dataclass(frozen=True)
class Training:
    """One way through the tasks; methods that need the same one share it.

    Attributes:
        name: As in results and in the folder of a run.
        start: Where a task starts to train, ``"sequential"`` or ``"independent"``.
        regularizer: ``"lwf"``, ``"ewc"`` or None.
        joint: Whether all tasks are one.
    """

    name: str
    start: str = "sequential"
    regularizer: str | None = None
    joint: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is fine-tuning on one task after another and nothing else."""
        return self.regularizer is None and not self.joint


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: As in tables and in ``results.json``.
        training: Which training it needs; None if it needs none.
        merger: Which merger reduces its task vectors; None if it evaluates the weights as trained.
    """

    name: str
    training: str | None
    merger: str | None = None

    def make_merger(self, options: dict[str, Any]) -> Merger:
        """Make its merger.

        Args:
            options: Values for the options that some mergers take; others ignore them.

        Returns:
            A fresh merger.
        """
        assert self.merger is not None  # noqa: S101 - asked only of methods that merge
        accepted = {"ties": {"density"}, "random-mix": {"seed"}}.get(self.merger, set())
        return get_merger(self.merger, **{k: v for k, v in options.items() if k in accepted})


TRAININGS: dict[str, Training] = {
    training.name: training
    for training in (
        Training("sequential"),
        Training("independent", start="independent"),
        Training("lwf", regularizer="lwf"),
        Training("ewc", regularizer="ewc"),
        Training("joint", joint=True),
    )
}

# In the order of the tables. With every method but MagMax the paper merges independent
# fine-tunings; the same mergers of sequential task vectors come close, so they are shown too.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("zero-shot", None),
        Method("joint", "joint"),
        Method("sequential", "sequential"),
        Method("independent", "independent"),
        Method("lwf", "lwf"),
        Method("ewc", "ewc"),
        Method("magmax", "sequential", "magmax"),
        Method("lwf-magmax", "lwf", "magmax"),
        Method("ewc-magmax", "ewc", "magmax"),
        *(
            Method(name, "independent", name)
            for name in ("max-abs", "average", "task-arithmetic", "random-mix", "ties")
        ),
        *(
            Method(f"{name}-sequential", "sequential", name)
            for name in ("average", "task-arithmetic", "random-mix", "ties")
        ),
    )
}


def find_method(name: str) -> Method:
    """Look up a method.

    Args:
        name: As in tables.

    Returns:
        The method.

    Raises:
        InputError: If there is none of that name; names the nearest.

    Example:
        >>> find_method("ties").training
        'independent'
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


def methods_beside(name: str, compare: bool | str | list[str]) -> list[Method]:
    """Choose the rows of a run's table.

    Args:
        name: The run's own method.
        compare: What to show beside it and zero-shot: False for nothing, True for what plain
            fine-tuning and the method's own training give, ``"all"`` for everything, or names.

    Returns:
        The methods, in the order of the tables.

    Raises:
        InputError: If a method is unknown, or `compare` is something else.

    Example:
        >>> [method.name for method in methods_beside("lwf-magmax", ["lwf"])]
        ['zero-shot', 'lwf', 'lwf-magmax']
    """
    own = find_method(name)
    if compare == "all":
        return list(METHODS.values())
    wanted = {"zero-shot", name}
    if compare is True:
        trainings = {t.name for t in TRAININGS.values() if t.plain} | {own.training}
        wanted |= {method.name for method in METHODS.values() if method.training in trainings}
    elif isinstance(compare, (str, list)):
        names = [compare] if isinstance(compare, str) else compare
        wanted |= {find_method(other).name for other in names}
    elif compare:
        raise InputError(f"compare={compare}; expected true, false, all, or a list of methods")
    return [method for method in METHODS.values() if method.name in wanted]


def published_scale(method: Method) -> float | None:
    """The scale that a method was published with; None if it does not merge."""
    return MERGERS[method.merger].published_scale if method.merger else None
