"""What the tests of the command line share."""

import logging

import pytest


@pytest.fixture(autouse=True)
def usual_logging(monkeypatch):
    """A command shows the library's messages in its own way; other tests shall not see that."""
    library = logging.getLogger("cl_merge")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(library, name, getattr(library, name))
