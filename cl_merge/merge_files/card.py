"""The model card of a merged folder: what it was made of, and how it can be made again."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cl_merge import __version__
from cl_merge.merge_files.plan import Plan
from cl_merge.mergers import Merger
from cl_merge.mergers.registry import chosen_options
from cl_merge.storage import Weights
from cl_merge.storage.hub import is_hub_id, short_names

CARD = "README.md"


def model_card(name: str, plan: Plan, merger: Merger, made: Mapping[str, str]) -> str:
    """Write the card of a merge.

    Args:
        name: What the merged model is called.
        plan: What is merged.
        merger: The method, as it was made.
        made: The metadata of the output.

    Returns:
        Markdown, with the metadata that the Hugging Face hub reads in front.
    """
    told = {key.removeprefix("cl_merge."): value for key, value in made.items()}
    method = _short_method(told["method"])
    inputs = plan.tasks if plan.no_base else [plan.base, *plan.tasks]
    every = short_names([weights.path for weights in [*inputs, *plan.importances]])
    names, weighing = every[: len(inputs)], every[len(inputs) :]
    about = (type(merger).__doc__ or "").strip().partition("\n")[0]  # not that of a base class
    weights = json.loads(told["weights"])
    tasks = [
        f"`{task}`" + (f", weight {json.dumps(weight)}" if weight != 1 else "")
        for task, weight in zip(names[-len(plan.tasks) :], weights, strict=True)
    ]
    rows = {
        "base": "none: the weights themselves are merged" if plan.no_base else f"`{names[0]}`",
        "merged": "<br>".join(tasks),
        "method": f"{method}: {about}" if about else method,
        "options": ", ".join(f"{k}={_word(v)}" for k, v in merger.options.items() if v is not None),
        "scale": told["scale"],
        "dtype": ", ".join(sorted({str(plan.written(n))[len("torch.") :] for n in plan.merged})),
        "made with": f"cl-merge {__version__}, torch {torch.__version__}",
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items() if value)
    return f"""{_front_matter(plan, names)}
# {name}

A merge of {len(plan.tasks)} checkpoints.

| | |
|---|---|
{table}

```sh
{_command(name, names, weighing, plan, merger, told)}
```

The metadata of the weights hold the same, and a hash of each input.
"""


def licence_of(folder: Path | None) -> str:
    """What the card in a folder says of its licence; nothing if there is none."""
    card = folder / CARD if folder is not None else None
    if card is None or not card.is_file():
        return ""
    text = card.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    said = re.search(r"^license: *(\S+) *$", head[1], flags=re.MULTILINE) if head else None
    return said[1] if said else ""


def _front_matter(plan: Plan, names: list[str]) -> str:
    paths = [weights.path for weights in [plan.base, *plan.tasks]]
    models = [path.as_posix().partition("@")[0] for path in paths if is_hub_id(path)]
    if not models and plan.base.folder is not None:
        models = names[:1]  # a file is no model that others could find
    lines = ["---"]
    if models:
        lines += ["base_model:", *(f"- {json.dumps(name)}" for name in dict.fromkeys(models))]
        lines += ["base_model_relation: merge"]
    lines += ["tags:", "- merge", "- cl-merge"]
    if library := _library(plan.base):
        lines.append(f"library_name: {library}")
    if licence := licence_of(plan.base.folder):
        lines.append(f"license: {licence}")
    return "\n".join([*lines, "---"])


def _library(base: Weights) -> str:
    """Which library loads a folder, by the names of its files."""
    if base.folder is None:
        return ""
    if (base.folder / "open_clip_config.json").is_file():
        return "open_clip"
    if (base.folder / "modules.json").is_file():
        return "sentence-transformers"
    return "transformers" if (base.folder / "config.json").is_file() else ""


def _command(
    name: str,
    names: list[str],
    weighing: list[str],
    plan: Plan,
    merger: Merger,
    told: Mapping[str, str],
) -> str:
    """The command that makes the same, where the inputs lie beside each other."""
    words = ["cl-merge", "merge", *(["--no-base"] if plan.no_base else []), *names]
    words += ["--method", _short_method(told["method"])]
    options = [f"{key}={_word(value)}" for key, value in chosen_options(merger).items()]
    words += ["--set", *options] if options else []
    if not plan.no_base:
        scale = json.loads(told["scale"])
        of = scale if isinstance(scale, dict) else {"*": scale}
        for pattern, number in of.items():
            word = json.dumps(number)
            words += ["--scale", word if pattern == "*" else f"{pattern}={word}"]
    weights = json.loads(told["weights"])
    if any(weight != 1 for weight in weights):
        words += ["--weight", *map(json.dumps, weights)]
    for option, key in (("--include", "include"), ("--exclude", "exclude")):
        if patterns := json.loads(told[key]):
            words += [option, *patterns]
    if plan.buffers:
        words += ["--buffers", told["buffers"]]
    if plan.dtype is not None:
        words += ["--dtype", str(plan.dtype).removeprefix("torch.")]
    if told["strip_prefix"]:
        words += ["--strip-prefix", told["strip_prefix"]]
    if weighing:
        words += ["--importance", *weighing]
    return shlex.join([*words, "--out", name])


def _short_method(method: str) -> str:
    """A method by name; of one in a file, without where the file lies."""
    where, colon, name = method.rpartition(":")
    return f"{Path(where).name}{colon}{name}" if where.endswith(".py") else method


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cell(value: str) -> str:
    return " ".join(value.replace("|", "\\|").split())
