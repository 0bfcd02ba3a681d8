"""The progress bar counts bytes, from any thread, and only on a terminal; messages are lines."""

import io
import logging
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from cl_merge.cli.terminal import byte_progress, own_terminal, show_messages


def shown(told, terminal=True):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=80)
    with byte_progress(console, "merging") as progress:
        tell = progress(4_000_000)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(tell, told))
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())


def test_bytes_speed_and_time_are_shown_on_one_line():
    lines = shown([1_000_000] * 3).splitlines()
    assert any(
        re.search(r"merging .*3\.0/4\.0 MB \S+ [KMG]B/s \d:\d\d:\d\d", line) for line in lines
    )
    assert max(map(len, lines)) <= 80


def test_nothing_is_shown_where_there_is_no_terminal():
    assert shown([1_000_000], terminal=False).strip() == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_message_is_one_line_unless_a_terminal_wraps_it(terminal):
    screen = io.StringIO()
    said = "merged [bold] " + " ".join(f"folder/file-{number}.safetensors" for number in range(9))
    with own_terminal():
        show_messages(Console(file=screen, force_terminal=terminal, width=80))
        logging.getLogger("cl_merge.some.module").warning("%s", said)
    lines = screen.getvalue().splitlines()
    assert " ".join(line.strip() for line in lines) == said
    assert max(map(len, lines)) <= 80 if terminal else len(lines) == 1
