"""The direction of imports: command line, benchmarks, callbacks, core, torch; never back."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {"core": 0, "callbacks": 1, "benchmarks": 2, "cli": 3}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "cl_merge" else ("cl_merge", *parts)
    return ".".join(parts)


def layer(module: str) -> str:
    second = module.split(".")[1] if "." in module else ""
    return second if second in LAYERS else "core"


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


FILES = [
    path
    for folder in ("cl_merge", "callbacks", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_one_way(path):
    module = module_name(path).removesuffix(".__init__")
    # The package has public names of all layers, and imports them when they are asked for.
    own = "cli" if module == "cl_merge" else layer(module)
    for name in imports(path):
        assert name.split(".")[0] not in ("callbacks", "benchmarks"), f"{path} imports {name}"
        if name.split(".")[0] == "cl_merge":
            assert LAYERS[layer(name)] <= LAYERS[own], f"{path} imports {name}"


def used(path: Path, modules: set[str]) -> set[str]:
    """The modules that a file imports; a package only where a name of its own is imported."""
    found = set(imports(path)) & modules
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def test_no_file_imports_itself_through_others():
    modules = {module_name(path).removesuffix(".__init__"): path for path in FILES}
    # The package hands names of all layers on, when they are asked for.
    modules.pop("cl_merge")
    uses = {name: used(path, set(modules)) for name, path in modules.items()}
    assert sum(map(len, uses.values())) > len(modules)
    list(TopologicalSorter(uses).static_order())  # raises CycleError, which names the circle


def test_merging_needs_no_lightning():
    modules = (
        "task_vector",
        "mergers",
        "files",
        "errors",
        "analysis",
        "weights",
        "heads",
        "scenario",
        "checkpoints",
        "engine",
        "engine.inspection",
        "kernels",
        "quantize",
        "statistics",
    )
    names = ", ".join(f"cl_merge.{module}" for module in modules)
    script = f"import {names}, sys; assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_command_line_can_say_how_threads_wait_before_torch_is_there():
    script = "import cl_merge.cli, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names_are_there_and_cost_nothing_until_they_are_used():
    script = (
        "import sys, cl_merge\n"
        "assert 'cl_merge.benchmarks' not in sys.modules\n"
        "from cl_merge import CLIPClassifier, TaskStream, TaskVector, fit_stream, load_clip, merge\n"
        "from cl_merge.callbacks import MergeCallback\n"
        "from cl_merge import load\n"
        "assert cl_merge.load is load and callable(load)\n"
        "assert isinstance(cl_merge.ImageClassifier, type)\n"
        "for name in cl_merge.__all__: getattr(cl_merge, name)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")
