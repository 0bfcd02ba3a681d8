"""A finished run as a classifier again, without its images and its task vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_merge.benchmarks.runs.results import finished_results
from cl_merge.benchmarks.runs.run_folder import RunFolder
from cl_merge.callbacks import ClassStatistics
from cl_merge.class_statistics import StreamStatistics
from cl_merge.config.reading import read_config
from cl_merge.config.schema import RunConfig
from cl_merge.errors import InputError, listing, unknown_name
from cl_merge.models.classifier import CLIPClassifier
from cl_merge.models.predictor import ImageClassifier
from cl_merge.models.pretrained import Clip, load_clip
from cl_merge.models.zero_shot import ZeroShotHead
from cl_merge.storage.files import load_tensors
from cl_merge.task_vectors.module_weights import (
    copies,
    floating_buffers,
    install,
    trained_parameters,
)

_WEIGHTS = "merged.safetensors"
_HEAD = "head.weight"


@dataclass(frozen=True)
class FinishedRun:
    """What the folder of a finished run says, with the method of interest; no weights yet."""

    path: Path
    config: RunConfig
    results: Mapping[str, Any]  # the content of results.json
    method: str
    class_names: tuple[str, ...]  # in the order of their labels

    @property
    def found(self) -> Mapping[str, Any]:
        """What the run found for the method."""
        return self.results["methods"][self.method]  # type: ignore[no-any-return]

    @property
    def statistics(self) -> str | None:
        """The kind of the method's class statistics; None if it has none."""
        return self.found.get("statistics")

    @property
    def plain(self) -> bool:
        """Whether an image encoder and the text head are all that decides."""
        return self.statistics in (None, "aligned")


@dataclass
class Restored:
    """The model of a finished run."""

    run: FinishedRun
    clip: Clip  # the pre-trained model with its text tower, the run's weights in its image tower
    model: CLIPClassifier  # around that image tower; class statistics vote in it
    voting: ClassStatistics | None  # those of the method, if they take part beside the weights


def load(
    folder: str | Path, *, method: str | None = None, device: str | torch.device | None = None
) -> ImageClassifier:
    """Load the classifier that a finished run has left.

    Predictions are those of the run's evaluation, in float32: the merged weights, and where the
    method has class statistics their vote. Neither images nor task vectors are needed. The model
    that the run names is loaded for its architecture, and for its weights where the vote needs
    features under the pre-trained encoder; the text head is the run's.

    Args:
        folder: Of the run, such as ``runs/digits-magmax``.
        method: Which of the run's methods; None for its own. Another one must have the same merged
            weights, as ``magmax-statistics`` and ``magmax`` have, or those of the pre-training.
        device: Where it works; None is the CPU. Class statistics stay there: to work elsewhere,
            load again.

    Returns:
        The classifier, in evaluation mode.

    Raises:
        InputError: If the folder holds no finished run, lacks or has damaged files, did not keep
            the method's weights, or there is no such device; or if the model cannot be loaded.

    Example::

        classifier = cl_merge.load("runs/digits-magmax")
        for guess in classifier.predict("seven.png")[0]:
            print(guess.name, guess.probability)
    """
    try:
        place = torch.empty(0, device=device or "cpu").device
    # torch raises several kinds, with advice for its own developers.
    except Exception as error:
        raise InputError(f"device={device}: no such device here; expected cpu or cuda") from error
    restored = restore(read_run(folder, method))
    model = restored.model.to(place)
    if restored.voting is not None:
        model.classify = restored.voting.classifier(model, place).of_images
    return ImageClassifier(model, restored.run.class_names, restored.clip.test_transform)


def read_run(folder: str | Path, method: str | None = None) -> FinishedRun:
    """Read what the folder of a finished run says, but not its weights; arguments as of `load`."""
    path = Path(folder).expanduser()
    results = finished_results(path)
    chosen, known = method or results["method"], results["methods"]
    if chosen not in known:
        raise unknown_name(f"method of the run in '{path}'", chosen, known)
    config = read_config([], {}, path / "config.yaml")
    names = {  # tasks may share classes
        label: name
        for task in results["tasks"]
        for label, name in zip(task["classes"], task["class_names"], strict=True)
    }
    missing = [str(label) for label in range(len(names)) if label not in names]
    if missing:
        raise InputError(
            f"'{path / 'results.json'}' is damaged: no task has the classes {listing(missing)}; "
            "restore it, or run again in a new folder"
        )
    class_names = tuple(names[label] for label in range(len(names)))
    run = FinishedRun(path, config, results, chosen, class_names)
    _check_kept(run)
    return run


def restore(run: FinishedRun) -> Restored:
    """Load the model of a finished run, on the CPU."""
    file = run.path / _WEIGHTS
    tensors, _ = load_tensors(file)
    clip = load_clip(run.config.model, image_size=run.config.image_size)
    if _HEAD not in tensors or len(tensors[_HEAD]) != len(run.class_names):
        raise InputError(
            f"'{file}' has no text head '{_HEAD}' of the {len(run.class_names)} classes that "
            "results.json names; restore it, or run again in a new folder"
        )
    head = ZeroShotHead(tensors[_HEAD], run.class_names)
    visual: nn.Module = clip.model.visual  # type: ignore[assignment]
    model = CLIPClassifier(visual, head, **asdict(run.config.optimizer)).eval()
    voting = _statistics(run, model)
    if not _pretrained(run.method, run.found):
        _load_weights(model, tensors, file, run.config.model)
    if voting is not None and voting.kind == "aligned":
        voting.install(model)
        voting = None
    elif voting is not None:
        model.classify = voting.classifier(model).of_images
    return Restored(run, clip, model, voting)


def _check_kept(run: FinishedRun) -> None:
    """Check that the weights of the method are in the folder, or can be made of what is."""
    methods, own = run.results["methods"], run.results["method"]
    if not (run.path / _WEIGHTS).is_file():
        raise InputError(
            f"the run in '{run.path}' has no {_WEIGHTS}"
            + (": method=zero-shot trains nothing" if own == "zero-shot" else "; restore it")
        )
    # Methods that merge the same have the same weights, unless statistics are in them.
    merges = methods[own]["merger"] is not None and methods[own].get("statistics") != "aligned"
    same = ("training", "merger", "scale")
    kept = [
        name
        for name, found in methods.items()
        if name == own
        or _pretrained(name, found)
        or (merges and all(found[key] == methods[own][key] for key in same))
    ]
    if run.method not in kept:
        raise InputError(
            f"the run in '{run.path}' has not kept the weights of '{run.method}', only those of "
            f"{', '.join(kept)}; for the others: cl-merge run method={run.method} out=NEW_FOLDER"
        )


def _pretrained(name: str, found: Mapping[str, Any]) -> bool:
    """Whether a method classifies with the pre-trained weights."""
    return name == "zero-shot" or (found["merger"] is None and found.get("statistics") is not None)


def _load_weights(
    model: CLIPClassifier, tensors: Mapping[str, Tensor], file: Path, name: str
) -> None:
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    given = {key: value.shape for key, value in tensors.items()}
    wrong = sorted(key for key in wanted | given if wanted.get(key) != given.get(key))
    if wrong:
        raise InputError(
            f"'{file}' does not hold the weights of model '{name}': {listing(wrong)} missing, "
            "unknown or of another shape"
        )
    install(model.state_dict(), tensors)


def _statistics(run: FinishedRun, pretrained: CLIPClassifier) -> ClassStatistics | None:
    """Make the method's class statistics of the run's file, unless the weights hold them."""
    own = run.method == run.results["method"]
    if run.statistics is None or (own and run.statistics == "aligned"):
        return None
    file = RunFolder(run.path).statistics(run.method)
    made = ClassStatistics(run.statistics)
    made.statistics = StreamStatistics.load(file)
    if made.statistics.classes != len(run.class_names):
        raise InputError(
            f"'{file}' is of {made.statistics.classes} classes, but the run has "
            f"{len(run.class_names)}"
        )
    if run.found["merger"] is not None:  # otherwise the model holds the pre-trained weights
        made.base = copies(trained_parameters(pretrained))
        made.base_buffers = copies(floating_buffers(pretrained))
    return made
