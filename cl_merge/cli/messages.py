"""How the library's messages appear on the terminal."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def show_messages(console: Console) -> None:
    """Let what the library has to say appear beside the progress bar instead of breaking it.

    Args:
        console: Where the progress bar is.
    """
    from rich.logging import RichHandler

    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    library = logging.getLogger("cl_merge")
    library.handlers = [handler]
    library.propagate = False
    library.setLevel(logging.INFO)
