"""Damaged bytes and edited trees, drawn from a seed, and what a reader has to say of them."""

import copy
import signal
from contextlib import contextmanager

from cl_merge.errors import InputError

SEEDS = range(120)
VALUES = [None, True, -1, 0.5, 1e300, 10**400, float("nan"), float("inf"), "x", "\x1b[2J", [], {}]


class LateError(BaseException):
    """Nothing that anybody would handle."""


@contextmanager
def in_time(seconds=20):
    def late(*_):
        raise LateError(f"not done in {seconds} s")

    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def damaged_bytes(content, draw):
    """Bytes as a bad disk, a crash or another program leaves them."""
    place = draw.randrange(max(len(content), 1))
    length = draw.choice([1, 2, 50])
    noise = bytes(draw.randrange(256) for _ in range(length))
    return draw.choice(
        [
            content[:place],
            content[:place] + content[place + length :],
            content[:place] + noise + content[place + length :],
            content[:place] + b"\0" * length + content[place + length :],
            content + noise,
            noise,
            b"",
        ]
    )


def edited(tree, draw):
    """The same object with one entry taken away, added or replaced, somewhere."""
    tree = copy.deepcopy(tree)
    at = tree
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = draw.choice(keys)
        if isinstance(at[key], (dict, list)) and at[key] and draw.random() < 0.8:
            at = at[key]
            continue
        action = draw.randrange(3)
        if action == 0:
            del at[key]
        elif action == 1:
            at[key] = draw.choice(VALUES)
        elif isinstance(at, list):
            at.insert(key, draw.choice(VALUES))
        else:
            at[f"{key}x"] = draw.choice(VALUES)
        return tree


def complaint(work):
    """What some work has to complain of; empty if it ends well."""
    try:
        with in_time():
            work()
    except InputError as error:
        return str(error)
    return ""
