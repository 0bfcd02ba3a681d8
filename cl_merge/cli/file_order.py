"""The order of files that a pattern of the shell named."""

from __future__ import annotations

import os
import re

from cl_merge.cli.terminal import say
from cl_merge.errors import listing


def by_number(files: list[str]) -> list[str]:
    """Sort files that differ in numbers alone and come as the shell lists them, 10 before 2.

    Tells so. Files in an order that no pattern gives, or of other names, stay as they are.
    """

    def numbers(file: str) -> list[str]:
        return re.findall(r"\d+", file)

    found = sorted(files, key=lambda file: [int(number) for number in numbers(file)])
    # What follows the number takes part in the shell's order, or not, by its language.
    of_a_pattern = files in (sorted(files), sorted(files, key=numbers))
    alike = len({re.sub(r"\d+", "0", file) for file in files}) == 1
    if found == files or not of_a_pattern or not alike or not all(map(os.path.exists, files)):
        return files
    say(f"files are taken in the order of their numbers, not of the shell: {listing(found)}")
    return found
