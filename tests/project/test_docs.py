"""The pages of the documentation do not fall behind the code: what they show works, and exists."""

import ast
import glob
import re
import shlex
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import export_cases
import lightning as L
import pytest
import tiny
import torch
from plain import Plain
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import cl_merge
from cl_merge import TaskVector, cli
from cl_merge.benchmarks.datasets.digits import digits
from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.benchmarks.suites.definition import find_suite, narrowed
from cl_merge.callbacks import MergeCallback
from cl_merge.config.schema import described_keys

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
SOURCES = [
    path
    for folder in ("cl_merge", "callbacks", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def commands(page):
    """The words behind ``cl-merge`` of every line of a page's shell blocks."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        starts = [i for i, word in enumerate(words) if word.endswith(("cl-merge", "cl_merge.cli"))]
        if starts and words[starts[-1] + 1 :]:
            yield words[starts[-1] + 1 :]


COMMANDS = [(page, " ".join(map(shlex.quote, words))) for page in PAGES for words in commands(page)]


def loader(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 4, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(16) % 3), batch_size=8)


def checkpoints(folder):
    """Weights before and after two tasks, in each form that the pages name."""
    states = {}
    (folder / "vectors").mkdir()
    for number, name in enumerate(("base", "task0", "task1")):
        generator = torch.Generator().manual_seed(number)
        shapes = {
            "visual.blocks.0.attn.weight": 4,
            "visual.blocks.0.attn.bias": 4,
            "visual.blocks.1.mlp.weight": (4, 4),
        }
        states[name] = {key: torch.randn(s, generator=generator) for key, s in shapes.items()}
        save_file(states[name], folder / f"{name}.safetensors")
        save_file(states[name], folder / "vectors" / f"{name}.safetensors")
        (folder / name).mkdir()
        save_file(states[name], folder / name / "model.safetensors")
        torch.save(states[name], folder / f"{name}.{'pt' if name == 'base' else 'ckpt'}")
    for task in (0, 1):
        importance = {name: value.abs() for name, value in states["base"].items()}
        save_file(importance, folder / f"importance{task}.safetensors")
        adapter = folder / f"adapter{task}"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
        parts = {"A": torch.ones(1, 4), "B": torch.full((4, 1), task + 1.0)}
        factors = {
            f"base_model.model.visual.blocks.1.mlp.lora_{k}.weight": v for k, v in parts.items()
        }
        save_file(factors, adapter / "adapter_model.safetensors")
    return states


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the files that the pages name."""
    monkeypatch.chdir(tmp_path)
    checkpoints(tmp_path)
    shutil.copy(ROOT / "examples" / "own_data.yaml", tmp_path)
    (tmp_path / "mine.py").write_text(blocks("howto/own_merger.md", "python")[0])
    (tmp_path / "my.yaml").write_text(blocks("howto/run.md", "yaml")[0])
    (tmp_path / "my-suite.yaml").write_text(blocks("howto/suites.md", "yaml")[0])
    return tmp_path


def given(page, place, factory):
    """What the Python blocks of a page take for granted."""
    names = {"L": L, "MergeCallback": MergeCallback, "module": Plain()}
    names |= {"tasks": [loader(0), loader(1)], "test_loader": loader(2), "loader": loader(0)}
    if page == "howto/callback.md":
        states = [{"weight": torch.zeros(10)}, {"weight": torch.arange(10.0)}]
        names |= dict(zip(("base_state", "tuned_state"), states, strict=True))
        names["other"] = TaskVector({"weight": -torch.ones(10)})
    if page == "concepts/metrics.md":
        labels = torch.arange(6)
        names |= {"module": torch.nn.Linear(4, 6), "train": lambda module, task: None}
        names["test_batches"] = [(torch.randn(6, 4), labels, labels // 2)]
    if page == "howto/callback.md":
        names["train"] = lambda module, data: module.net[0].weight.data.add_(0.1)
        names["evaluate"] = lambda module: module(torch.zeros(1, 4))
    if page == "howto/run.md":
        sys.path.insert(0, str(ROOT / "examples"))
        try:
            from own_data import main
        finally:
            sys.path.pop(0)
        main(place / "photos")
        names["photos"] = place / "photos"
    if page == "howto/checkpoints.md":
        names |= {"model": Plain().net, "batches": [torch.randn(3, 4)]}
    if page == "howto/statistics.md":
        names["features"] = lambda module, batch: (module.net[:2](batch[0]), batch[1])
    if page == "howto/memory.md":
        names["vector"] = TaskVector({"weight": torch.arange(100.0)})
    if page == "howto/scale.md":
        names["held_out_loader"] = loader(3)
    if page == "howto/finished.md":
        shutil.copytree(export_cases.glyph(factory), place / "runs" / "digits-magmax")
        digits()["test"][0]["image"].save(place / "seven.png")
    if page == "howto/resume.md":
        names |= {"model": tiny.classifier(), "stream": tiny.stream()}
        names["merge"] = MergeCallback("magmax")
        first = L.Trainer(max_epochs=1, callbacks=[MergeCallback("magmax")], **tiny.QUIET)
        first.fit(Plain(), loader(0))
        first.save_checkpoint("last.ckpt")
    return names


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_blocks_of_a_page_run(page, place, tmp_path_factory):
    names = given(page, place, tmp_path_factory)
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_the_commands_are_valid(page, command, place):
    parsed = cli._parse(shlex.split(command))
    if parsed.command == "run":
        read_settings([word for word in parsed.settings if word[:4] != "out="], parsed.config)
    if parsed.command == "bench":
        data, methods = (
            list(filter(None, text.split(","))) for text in (parsed.data, parsed.methods)
        )
        tasks = [int(word) for word in parsed.tasks.split(",") if word]
        narrowed(
            find_suite(parsed.suite),
            data=data,
            tasks=tasks,
            methods=methods,
            seeds=parsed.seeds,
            run=parsed.settings,
        )


@pytest.mark.parametrize(
    "command", sorted({c for _, c in COMMANDS if c.startswith(("merge ", "inspect "))})
)
def test_the_commands_on_files_work(command, place):
    words = [path for word in shlex.split(command) for path in sorted(glob.glob(word)) or [word]]
    assert cli.main(words) == 0


@pytest.mark.slow
def test_a_suite_of_ones_own_makes_a_plan(place, capsys):
    assert cli.main(["bench", "my-suite.yaml", "--dry-run"]) == 0
    assert "digits-2" in capsys.readouterr().out


def test_every_setting_that_a_page_names_exists():
    known = described_keys()
    groups = {key for key in known if any(other.startswith(f"{key}.") for other in known)}
    named = {
        (page, key)
        for page, text in PAGES.items()
        for key in re.findall(r"\[`([\w.]+)`\]\([./\w]*settings\.md\)", text)
        + re.findall(rf"(?<![\w.])((?:{'|'.join(groups)})\.\w+)[\w.]*=", text)
    }
    assert len(named) > 20
    assert not [(page, key) for page, key in named if key not in known]


def test_every_option_that_a_page_names_exists():
    parsers = cli.parser()._subparsers._group_actions[0].choices
    known = {option for parser in parsers.values() for option in parser._option_string_actions}
    # Those of the programs that measure, `python -m cl_merge.benchmarks...`, and of the examples.
    sources = [*SOURCES, *(ROOT / "examples").glob("*.py")]
    known |= {name for path in sources for name in re.findall(r'"(--[a-z-]+)"', path.read_text())}
    others = r"^.*(?:srun|torchrun|pip|sphinx|mlflow|tensorboard|--nnodes|--ntasks).*$"
    named = {
        (page, option)
        for page, text in PAGES.items()
        for option in re.findall(
            r"(?<![\w`-])`?(--[a-z][a-z-]*)", re.sub(others, "", text, flags=re.MULTILINE)
        )
    }
    # Two pages say how not to write a setting.
    wrong = {option for _, option in named} - known - {"--stream"}
    assert len(named) > 20
    assert not wrong


def templates():
    """Every text of the library that is no docstring, with … for what is put in."""
    found = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        inner = {id(part) for node in ast.walk(tree) for part in getattr(node, "values", ())}
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "unknown_name":
                found.append(f"unknown {text_of(node.args[0])} '…'")
            if id(node) not in inner | docstrings:
                found.append(text_of(node))
    return [text for text in found if text]


def text_of(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    return ""


def messages():
    return re.findall(r"^`(.+)`$", PAGES["troubleshooting.md"], flags=re.MULTILINE)


@pytest.fixture(scope="module")
def texts():
    return [re.sub(r"%[sd]|%\.\d+f", "…", text) for text in templates()]


@pytest.mark.parametrize("message", messages())
def test_a_message_that_troubleshooting_explains_is_one_of_the_library(message, texts):
    pattern = ".*".join(re.escape(piece) for piece in message.split("…"))
    assert any(re.search(pattern, text) for text in texts)


def test_troubleshooting_explains_each_message_once():
    assert len(messages()) > 60
    assert len(set(messages())) == len(messages())


def test_every_public_name_is_in_the_reference():
    reference = "\n".join(path.read_text() for path in (DOCS / "reference/python").iterdir())
    documented = set(re.findall(r"auto(?:class|function|exception):: (\S+)", reference))
    from cl_merge import callbacks

    wanted = {f"cl_merge.{name}" for name in set(cl_merge.__all__) - set(callbacks.__all__)}
    wanted |= {f"cl_merge.callbacks.{name}" for name in callbacks.__all__}
    assert wanted <= documented


@pytest.mark.parametrize("page", PAGES)
def test_links_work_on_the_pages_of_the_repository(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    links = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text)
    assert not [target for label, target in links if not label.strip()]
    files = [target.partition("#")[0] for _, target in links if "://" not in target]
    assert not [file for file in files if file and not (DOCS / page).parent.joinpath(file).exists()]
    assert not re.findall(r"\{(?:py:\w+|confval|ref|doc)\}`", text)


def test_every_page_is_in_a_table_of_contents():
    listed = {"index.md", "README.md"}
    for page, text in PAGES.items():
        for entries in re.findall(r"```\{toctree\}\n(.*?)```", text, flags=re.DOTALL):
            names = [line for line in entries.split() if not line.startswith(":")]
            listed |= {
                str((DOCS / page).parent.joinpath(n).resolve().relative_to(DOCS)) for n in names
            }
    listed |= {f"{name}.md" for name in listed}
    assert {page for page in PAGES if not page.startswith("reference/python/")} <= listed


@pytest.mark.parametrize("name", ["stream", "weights"])
def test_a_drawing_says_what_it_shows_to_those_who_do_not_see_it(name):
    drawing = ElementTree.parse(DOCS / "concepts" / f"{name}.svg").getroot()
    parts = {element.get("id"): element.text for element in drawing.iter() if element.get("id")}
    labels = drawing.get("aria-labelledby").split()
    assert drawing.get("role") == "img"
    assert len(labels) == 2
    assert all(parts[label].strip() for label in labels)


def test_the_generated_pages_have_every_setting_method_and_data_set(monkeypatch):
    pytest.importorskip("sphinx", reason="the generated pages need the extra docs")
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    import catalogs

    from cl_merge.benchmarks.datasets.catalog import catalog
    from cl_merge.benchmarks.methods.method import METHODS
    from cl_merge.mergers.registry import BUILT_IN

    groups = {key.partition(".")[0] for key in described_keys() if "." in key}
    pages = {name: markdown() for name, markdown in catalogs.MARKDOWN.items()}
    keys = described_keys().keys() - groups
    assert all(f"{{confval}} {key}\n" in pages["settings"] for key in keys)
    assert all(f"| `{name}` |" in pages["methods"] for name in METHODS)
    assert all(f"| `{name}` |" in pages["mergers"] for name in BUILT_IN)
    needs = {row.split(" | ")[0].strip("| `"): row for row in pages["merger-needs"].splitlines()}
    assert needs.keys() >= BUILT_IN
    assert "| none | 4 | yes | Marczak et al., MagMax" in needs["magmax"]
    assert "| none | 4 for each task | no | Gargiulo et al., Task Singular" in needs["tsv"]
    assert "| none | 20 | yes | Cheng et al., Whoever Started" in needs["wudi"]
    assert "for the importance of each element | 20 | yes | Matena & Raffel" in needs["fisher"]
    assert all(f"### `{name}`" in pages["data-sets"] for name in catalog())
