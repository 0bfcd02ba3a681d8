"""What goes with every exported model: its classes, and how images are prepared for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch

from cl_merge.benchmarks.datasets.catalog import find_data
from cl_merge.benchmarks.datasets.loading import (
    ClassPrompts,
    joined_prompts,
    read_class_names,
    read_prompts,
    settings_of,
)
from cl_merge.benchmarks.runs.trained_run import FinishedRun, Restored
from cl_merge.errors import InputError
from cl_merge.models.zero_shot import zero_shot_head

# So many prompts are encoded to see whether they are those of the text head.
_TRIED = 256


def write_side_files(restored: Restored, folder: Path) -> list[dict[str, Any]]:
    """Write ``classes.json`` and ``preprocessing.json``; returns the content of the former."""
    prompts = _known_prompts(restored)
    classes: list[dict[str, Any]] = []
    for label, name in enumerate(restored.run.class_names):
        tasks = enumerate(restored.run.results["tasks"])
        found = {"name": name, "tasks": [n for n, task in tasks if label in task["classes"]]}
        classes.append(found | ({"prompts": prompts[label]} if prompts is not None else {}))
    for name, content in (("classes", classes), ("preprocessing", preprocessing(restored))):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return classes


def preprocessing(restored: Restored) -> dict[str, Any]:
    """Say how an image becomes what the model takes, in the words of open_clip."""
    found: dict[str, Any] = cast(Any, restored.model.visual).preprocess_cfg
    size = found["size"]
    pair = [size, size] if isinstance(size, int) else list(size)
    return found | {"size": pair, "mean": list(found["mean"]), "std": list(found["std"])}


def _known_prompts(restored: Restored) -> list[list[str]] | None:
    """The prompts of each class; None if the data set's recipe makes another text head by now."""
    try:
        found = _prompts(restored.run)
    except InputError:
        return None
    for label, prompts in enumerate(found[: max(1, _TRIED // len(found[0]))]):
        # A prompt of its own for each class: as the class's name, within a template without words.
        rows = [zero_shot_head(restored.clip, [text], "{}").weight[0] for text in prompts]
        made = torch.nn.functional.normalize(torch.stack(rows), dim=1).mean(dim=0)
        kept = restored.model.head.weight[label].cpu()
        if torch.nn.functional.cosine_similarity(made, kept, dim=0) < 1.0 - 1e-4:
            return None
    return found


def _prompts(run: FinishedRun) -> list[list[str]]:
    config, entry = run.config, find_data(run.config.data)
    known = [ClassPrompts(config.prompts, config.class_names, list(run.class_names))]
    if entry.sources:
        parts = [find_data(name) for name in entry.sources]
        # Names of joined data sets begin with the data set's own.
        own = [
            [n.removeprefix(f"{p.name}: ") for n in run.class_names if n.startswith(f"{p.name}: ")]
            for p in parts
        ]
        known = joined_prompts(config, [settings_of(part) for part in parts], own)
    found = [
        [template.replace("{}", name) for template in read_prompts(one.prompts)]
        for one in known
        for name in read_class_names(one.class_names, one.own_names or [])
    ]
    if len(found) != len(run.class_names):
        raise InputError(f"the data sets joined in '{config.data}' have changed")
    return found
