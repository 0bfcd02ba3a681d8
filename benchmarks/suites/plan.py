"""From a suite to what has to be run: methods that share a training share it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cl_merge.benchmarks.datasets.catalog import find_data
from cl_merge.benchmarks.datasets.loading import task_epochs
from cl_merge.benchmarks.methods.method import TRAININGS, Method, find_method
from cl_merge.benchmarks.runs.settings import finished_methods
from cl_merge.benchmarks.suites.definition import Setting, Suite
from cl_merge.config.reading import read_config, read_yaml
from cl_merge.config.schema import RunConfig
from cl_merge.data.tasks import resolve_order
from cl_merge.errors import InputError

DONE, FAILED, BEGUN, NEW = "done", "failed", "begun", "new"
FAILURE = "failed.json"
"""Left in the folder of a job that failed: what it said, and when."""


@dataclass(frozen=True)
class Job:
    """One run: a training, and all methods of the suite that share it."""

    setting: Setting
    seed: int
    training: str
    methods: tuple[str, ...]  # by name; the first is the run's own
    config: Mapping[str, Any] = field(compare=False)  # the settings of the run
    apart: str = ""  # ending of its folder's name, if others of its training have another run

    @property
    def path(self) -> str:
        """Its folder within the suite's."""
        # Joint training is the same whatever the number of tasks.
        joint = TRAININGS[self.training].joint
        name = self.setting.data_name if joint else self.setting.name
        return f"{name}/seed{self.seed}/{self.training}{self.apart}"


@dataclass(frozen=True)
class Cell:
    """One figure of the table, before averaging over seeds, and the run that it comes from."""

    setting: Setting
    method: str
    seed: int
    job: Job


def make_plan(suite: Suite, folder: Path | None = None) -> list[Cell]:
    """List the cells of a suite, the first seed of everything first; several have the same job.

    Runs that were begun in the suite's folder keep the method that they are about.

    Example:
        >>> from cl_merge.benchmarks.suites.definition import find_suite, narrowed
        >>> suite = find_suite("table1")
        >>> cells = make_plan(narrowed(suite, data=["cars"], tasks=[10], methods=["magmax"]))
        >>> [(cell.method, cell.job.path) for cell in cells]
        [('magmax', 'cars-10/seed5/sequential')]
    """
    words = {find_method(word): word for word in suite.methods}
    cells = []
    for seed, setting in itertools.product(suite.seeds, suite.settings):
        jobs: dict[tuple[str, Method | None], Job] = {}
        begun = (folder / setting.name / f"seed{seed}").glob("*/results.json") if folder else ()
        finished = {results.parent.name for results in begun}
        for method in suite.rows:
            key = _run_of(method, suite, finished)
            if key not in jobs:
                jobs[key] = _job(suite, words, setting, seed, *key, folder)
            cells.append(Cell(setting, method.name, seed, jobs[key]))
    return cells


def jobs_of(cells: list[Cell]) -> list[Job]:
    """The jobs of cells, each once, in the order of the cells."""
    return list({cell.job.path: cell.job for cell in cells}.values())


def state_of(job: Job, folder: str | Path) -> str:
    """How far a job is: `DONE`, `FAILED`, `BEGUN` or `NEW`."""
    run_folder = Path(folder) / job.path
    if finished_methods(run_folder).issuperset(job.methods):
        return DONE
    if (run_folder / FAILURE).exists():
        return FAILED
    return BEGUN if (run_folder / "journal.jsonl").exists() else NEW


def job_config(job: Job) -> RunConfig:
    """The configuration of a job's run, as ``cl-merge run`` would read it."""
    recipe = _merged(find_data(job.setting.data).recipe, job.config)
    return read_config([], recipe, origin=job.path)


def on_devices(job: Job, devices: int) -> Job:
    """Let a job train on several devices together, with the same number of images in a step."""
    batch = job_config(job).stream.batch_size
    if devices < 1 or batch % devices:
        raise InputError(
            f"ddp {devices}: {job.path} trains on batches of {batch}, which cannot be shared out "
            f"among {devices}; choose a divisor, or stream.batch_size"
        )
    trainer = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    settings = {"trainer": trainer, "stream": {"batch_size": batch // devices}}
    return replace(job, config=_merged(job.config, settings))


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over settings, as nested keys."""
    found: Any = OmegaConf.to_container(OmegaConf.merge(*map(dict, layers)))
    return dict(found)


def _run_of(method: Method, suite: Suite, finished: set[str]) -> tuple[str, Method | None]:
    """The training of the run that evaluates a method, and the method if it is the only one."""
    if method.training is not None:
        # A training estimates importances for one method.
        return method.training, method if method.weighted else None
    # The pre-trained model is evaluated in every run: any will do. Without one nothing trains.
    others = [m for m in suite.rows if m.training not in (None, "joint")]
    known = map(find_method, suite.methods)
    others += [m for m in known if m.training in finished and not m.weighted]
    return _run_of(others[0], suite, finished) if others else ("sequential", method)


def _in_order(suite: Suite, setting: Setting) -> dict[str, Any]:
    """The settings of a run in a drawn order: each joined data set keeps its own epochs."""
    found: dict[str, Any] = {"stream": {"order": setting.order}}
    entry = find_data(setting.data)
    recipe = read_config([], _merged(entry.recipe, suite.run, setting.run), origin=setting.name)
    if recipe.epochs is None:
        return found
    if not entry.sources:
        raise InputError(
            f"orders: '{setting.data}' has epochs for each task, {recipe.epochs}, which do not say "
            "what they are for in another order; give epochs=null"
        )
    names = [find_data(source).name for source in entry.sources]
    own = resolve_order(recipe.stream.order, names, "source")
    epochs = dict(zip(own, task_epochs(recipe, len(names)), strict=True))
    order = resolve_order(int(setting.order or 0), names, "source")
    return found | {"epochs": [epochs[index] for index in order]}


def _joint(suite: Suite, setting: Setting) -> Setting:
    """The setting of joint training, which is one run for all settings of a data set."""
    # It has one task, after which it is evaluated in any case.
    runs = [
        {key: value for key, value in other.run.items() if key != "evaluate"}
        for other in suite.settings
        if other.data_name == setting.data_name
    ]
    if any(run != runs[0] for run in runs):
        raise InputError(
            f"suite '{suite.name}': settings of {setting.data_name} differ in run, but share one "
            "run of joint training; give each a label: WORD, or leave joint out"
        )
    return replace(setting, tasks=setting.joint_tasks, order=None, run=runs[0])


def _job(
    suite: Suite,
    words: Mapping[Method, str],
    setting: Setting,
    seed: int,
    training: str,
    alone: Method | None,
    folder: Path | None,
) -> Job:
    """The job of a training, or that of a method which has one of its own."""
    if TRAININGS[training].joint:
        setting = _joint(suite, setting)
    shared = [m for m in words if m.training == training and not m.weighted]
    methods = [alone] if alone else shared or [find_method("sequential")]
    job = Job(setting, seed, training, (), {}, f"-{alone.name}" if alone else "")
    begun = folder and folder / job.path / "config.yaml"
    former = read_yaml(begun) if begun and begun.exists() else {}
    if TRAININGS[training].joint and former:  # it may be of another number of tasks
        setting = replace(setting, tasks=former["stream"]["tasks"])
    first = next((m for m in methods if m.merger), methods[0])
    own = next((m for m in methods if words.get(m, m.name) == former.get("method")), first)
    others = [m for m in methods if m != own]
    config = {
        "data": setting.data,
        "seed": seed,
        "method": words.get(own, own.name),
        "compare": [words[m] for m in others],
        "stream": {} if setting.tasks is None else {"tasks": setting.tasks},
        "merge": {},
    }
    if suite.published:
        # Methods with class statistics merge with the options of those without.
        options = {
            m.plain.name: dict(m.published) for m in others if m.published and m.plain != own.plain
        }
        found = {"options": dict(own.published), "beside": options}
        config["merge"] = {key: value for key, value in found.items() if value}
    if setting.order is not None:
        config = _merged(config, _in_order(suite, setting))
    config = _merged(suite.run, setting.run, config)
    names = (own.name, *(m.name for m in others))
    return replace(job, methods=names, config=config)
