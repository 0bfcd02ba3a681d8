"""The examples in the docstrings do what they show."""

import doctest
import importlib

import pytest
import torch
from modules import FILES, module_name

pytestmark = pytest.mark.slow

MODULES = [
    name.removesuffix(".__init__")
    for name in map(module_name, FILES)
    if not name.endswith((".cli.__main__", ".__init__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    # By import name: collected as files, `callbacks/merge.py` would be imported a second time.
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    found = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=flags)
    assert found.failed == 0
