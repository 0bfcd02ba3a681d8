"""The notebook runs from its first cell to its last, and its pages say nothing of a machine."""

import json
import os
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FILE = Path(__file__).parents[2] / "docs" / "offline_table.ipynb"
SMALL = """
OUT = "walk"
METHODS = "sequential,magmax,ties-sequential,magmax-statistics"
SEEDS = 1
SETTINGS = ["trainer.max_epochs=1", "stream.images_per_class=8", "trainer.accelerator=cpu"]
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(FILE, as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    names = re.findall(r"^(\w+) = ", parameters.source, flags=re.MULTILINE)
    assert names == re.findall(r"^(\w+) = ", SMALL, flags=re.MULTILINE)
    parameters.source = SMALL
    place = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    nbclient.NotebookClient(notebook, timeout=300, resources=place).execute()
    return notebook


def test_every_cell_runs_and_shows_what_the_text_speaks_of(executed):
    shown = [output for cell in executed.cells for output in cell.get("outputs", [])]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    tables = [output for output in shown if "text/markdown" in output.get("data", {})]
    assert len(pictures) == 3
    assert all("| magmax |" in table.data["text/markdown"] for table in tables)
    assert len(tables) == 2


def test_the_saved_outputs_are_of_this_notebook_and_of_no_machine():
    content = json.loads(FILE.read_text())
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = json.dumps([cell["outputs"] for cell in cells])
    assert '"stderr"' not in outputs
    assert os.path.expanduser("~") not in outputs
    assert not re.search(r"/(home|tmp|root)/", outputs)
