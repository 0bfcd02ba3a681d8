"""The one error that users see, and the words that go with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator


class InputError(ValueError):
    """Wrong input, found before any work is lost: the message says where, and what would be right.

    The command line prints it on one line and exits with code 2.
    """


class StorageError(OSError):
    """A file could not be written; the message says why. What was there before is still there."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> InputError:
    """Make the error for a name that is none of the known ones.

    Example:
        >>> print(unknown_name("method", "tie", ["magmax", "ties"]))
        unknown method 'tie'; did you mean 'ties'? Known: magmax, ties
    """
    names = list(known)
    return InputError(
        f"unknown {kind} '{name}'{nearest(name, names)} Known: {listing(names, limit=30)}"
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised for, and so on down to the first."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def was_interrupted(error: BaseException) -> bool:
    """Whether an interruption comes with errors of its own: cleaning up what it cut may fail."""
    return any(isinstance(cause, KeyboardInterrupt) for cause in causes(error))


def task_name(index: int) -> str:
    """Name a task by its index, which counts from 0, and its place, which the terminal shows.

    Example:
        >>> task_name(1)
        'task 1 (the 2nd)'
    """
    place = index + 1
    teen = place % 100 in (11, 12, 13)
    ending = "th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"task {index} (the {place}{ending})"


def nearest(name: object, known: Iterable[str], cutoff: float = 0.5) -> str:
    """End the sentence that calls a name unknown with the nearest known one, if one is near.

    Nearest of all is one that ends in the name, behind a dot.

    Example:
        >>> "unknown key 'sead'" + nearest("sead", ["seed", "data"])
        "unknown key 'sead'; did you mean 'seed'?"
        >>> "unknown key 'lr'" + nearest("lr", ["out", "optimizer.lr"])
        "unknown key 'lr'; did you mean 'optimizer.lr'?"
    """
    names = list(known)
    found = [known for known in names if known.endswith(f".{name}")]
    found += difflib.get_close_matches(str(name), names, n=1, cutoff=cutoff)
    return f"; did you mean '{found[0]}'?" if found else "."


def listing(names: Iterable[str], limit: int = 4) -> str:
    """Write names in a row, as many as `limit` in full; ``"none"`` for no names.

    Example:
        >>> listing(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    names = list(names)
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
