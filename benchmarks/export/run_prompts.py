"""The prompts that a run's text head was made of."""

from __future__ import annotations

import torch

from cl_merge.benchmarks.datasets.catalog import find_data
from cl_merge.benchmarks.datasets.prompts import read_class_names, read_prompts
from cl_merge.benchmarks.runs.trained_run import FinishedRun, Restored
from cl_merge.config.reading import read_config
from cl_merge.errors import InputError
from cl_merge.models.zero_shot import zero_shot_head

# So many are encoded to see whether they are the right ones.
_TRIED = 256


def prompts_of(restored: Restored) -> list[list[str]] | None:
    """Find the prompts of each class, and try the first ones against the text head.

    Args:
        restored: The model of a finished run.

    Returns:
        The prompts of each class, in the order of the labels; None if the recipe is not there any
        more or makes another head.
    """
    try:
        found = _prompts(restored.run)
    except InputError:
        return None
    tried = max(1, _TRIED // len(found[0]))
    for label, prompts in enumerate(found[:tried]):
        # A prompt of its own for each class: as the class's name, within a template without words.
        rows = [zero_shot_head(restored.clip, [text], "{}").weight[0] for text in prompts]
        made = torch.nn.functional.normalize(torch.stack(rows), dim=1).mean(dim=0)
        kept = restored.model.head.weight[label].cpu()
        if torch.nn.functional.cosine_similarity(made, kept, dim=0) < 1.0 - 1e-4:
            return None
    return found


def _prompts(run: FinishedRun) -> list[list[str]]:
    config, entry = run.config, find_data(run.config.data)
    if not entry.sources:
        names = read_class_names(config.class_names, run.class_names)
        return _filled(names, read_prompts(config.prompts))
    # Names of joined data sets begin with the data set's own.
    members = [find_data(name) for name in entry.sources]
    own = [
        [n.removeprefix(f"{m.name}: ") for n in run.class_names if n.startswith(f"{m.name}: ")]
        for m in members
    ]
    given = config.class_names
    if given is not None:
        given = read_class_names(given, [name for names in own for name in names])
    found: list[list[str]] = []
    for member, names in zip(members, own, strict=True):
        recipe = read_config([], member.recipe, origin=member.name)
        chosen = recipe.class_names if given is None else given[: len(names)]
        given = None if given is None else given[len(names) :]
        prompts = recipe.prompts if config.prompts is None else config.prompts
        found += _filled(read_class_names(chosen, names), read_prompts(prompts))
    if len(found) != len(run.class_names):
        raise InputError(f"the data sets joined in '{config.data}' have changed")
    return found


def _filled(names: list[str], templates: list[str]) -> list[list[str]]:
    return [[template.replace("{}", name) for template in templates] for name in names]
