"""Imports run one way, from room to room; no file imports itself through others."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from modules import FILES, module_name

# From the ground up: a room may import the rooms before it.
ROOMS = [
    "errors",
    "seeds",
    "kernels",
    "storage",
    "task_vectors",
    "mergers",
    "stream_merger",
    "analysis",
    "merge_files",
    "data",
    "training",
    "models",
    "class_statistics",
    "config",
    "callbacks",
    "benchmarks.formatting",
    "benchmarks.methods",
    "benchmarks.datasets",
    "benchmarks.runs",
    "benchmarks.suites",
    "benchmarks.reports",
    "benchmarks.export",
    "benchmarks.studies",
    "cli",
]


def room(module: str) -> str:
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[0] == "benchmarks" else 1])


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


MODULES = {module_name(path).removesuffix(".__init__"): path for path in FILES}
# The package hands names of all rooms on, when they are asked for.
del MODULES["cl_merge"], MODULES["cl_merge.benchmarks"]


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    own = ROOMS.index(room(module))
    for name in imports(MODULES[module]):
        top, _, rest = name.partition(".")
        assert top not in ("callbacks", "benchmarks"), f"{module} imports {name}"
        if top == "cl_merge" and rest and name != "cl_merge.__version__":
            assert ROOMS.index(room(name)) <= own, f"{module} imports {name}"


def used(path: Path, modules: set[str]) -> set[str]:
    """The modules that a file imports; a package only where a name of its own is imported."""
    found = set(imports(path)) & modules
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def test_no_file_imports_itself_through_others():
    uses = {name: used(path, set(MODULES)) for name, path in MODULES.items()}
    assert sum(map(len, uses.values())) > len(MODULES)
    list(TopologicalSorter(uses).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.slow
def test_merging_needs_no_lightning():
    modules = [
        *("analysis", "errors", "kernels", "mergers", "storage", "task_vectors.task_vector"),
        *("merge_files", "merge_files.inspection", "data.tasks", "models.zero_shot"),
        "class_statistics",
    ]
    names = ", ".join(f"cl_merge.{module}" for module in modules)
    script = f"import {names}, sys; assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_command_line_can_say_how_threads_wait_before_torch_is_there():
    script = "import cl_merge.cli, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_public_names_are_there_and_cost_nothing_until_they_are_used():
    script = (
        "import sys, cl_merge\n"
        "assert 'cl_merge.benchmarks' not in sys.modules\n"
        "from cl_merge import CLIPClassifier, TaskStream, TaskVector, fit_stream, load_clip, merge\n"
        "from cl_merge import EWC, AutoScale, ClassStatistics, LwF, MergeCallback\n"
        "from cl_merge import load\n"
        "assert cl_merge.load is load and callable(load)\n"
        "assert isinstance(cl_merge.ImageClassifier, type)\n"
        "for name in cl_merge.__all__: getattr(cl_merge, name)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")
