"""How the threads that compute wait for each other."""

from __future__ import annotations

import os

# Turns of the loop in which a thread waits; without a setting GNU's library makes 300,000.
_SPINS = "10000"


def share_cores() -> None:
    """Let threads of GNU OpenMP, such as torch's, give their core away soon while they wait.

    By default they look for work for milliseconds. Where other processes want the same cores, those
    that still have work are kept from it, and a step of a small model takes a hundred times as
    long. Settings that the user has made stay. To be called before torch is imported.

    Reference:
        GNU libgomp, environment variables OMP_WAIT_POLICY and GOMP_SPINCOUNT.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = _SPINS
