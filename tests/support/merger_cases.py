"""Which methods a test of all methods can try."""

from typing import Any

from cl_merge.mergers import MERGERS

ANY_NUMBER = [name for name, kind in MERGERS.items() if name != "slerp" and not kind.weighted]
"""Those that merge any number of task vectors, with nothing beside them."""

CHANGING_ONE = {"iso-c", "iso-cts"}
"""Those that change even a single task vector."""

DROPPING_NOTHING: dict[str, dict[str, Any]] = {
    "ties": {"density": 1.0},
    "dare": {"density": 1.0},
    "dare-ties": {"density": 1.0},
    "della": {"density": 1.0, "epsilon": 0.0},
    "breadcrumbs": {"beta": 0.0, "gamma": 0.0},
    "consensus": {"threshold": 0.0},
}
"""Options with which every value stays."""


def run(merger, vectors):
    """Fold task vectors and merge them."""
    for vector in vectors:
        merger.update(vector)
    return merger.merged()
