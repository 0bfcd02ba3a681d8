"""Which parameters are merged, by patterns on their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from cl_merge.errors import InputError, listing
from cl_merge.task_vectors.scales import check_fits


@dataclass(frozen=True)
class Selection:
    """Parameters that patterns choose.

    Attributes:
        include: Patterns (``*``, ``?``, ``[abc]``) of what to take; empty for everything.
        exclude: Patterns of what to leave out, even if included.

    Example:
        >>> Selection(include=("visual.*",), exclude=("*.bias",)).names(["visual.a", "visual.bias"])
        ['visual.a']
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        for key in ("include", "exclude"):
            patterns = getattr(self, key)
            if isinstance(patterns, str):
                raise InputError(f"{key} must be a list of patterns, as in ['{patterns}']")
            for pattern in patterns:
                if not isinstance(pattern, str):
                    raise InputError(f"{key}: {pattern} is no pattern, such as 'visual.*'")
            object.__setattr__(self, key, tuple(patterns))

    def names(self, names: Iterable[str]) -> list[str]:
        """Choose from names, in their order; refuses patterns that fit nothing or leave nothing."""
        names = list(names)
        for key, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                check_fits(key, pattern, names)
        chosen = self.chosen(names)
        if names and not chosen:
            raise InputError(
                f"include={listing(self.include)} and exclude={listing(self.exclude)} leave no "
                "parameter to merge"
            )
        return chosen

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Choose from names, in their order; patterns may fit nothing."""
        return [
            name
            for name in names
            if (not self.include or _fits(name, self.include)) and not _fits(name, self.exclude)
        ]


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
