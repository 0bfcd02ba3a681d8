"""Keep class statistics of image features beside a merged model, and let them vote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import override

from cl_merge.callbacks.batches import from_datamodule, sum_over_processes, trying
from cl_merge.callbacks.features import (
    Features,
    check_own_features,
    features_of,
    own_features,
    read_features,
)
from cl_merge.callbacks.merge import MergeCallback
from cl_merge.callbacks.others import attached
from cl_merge.callbacks.task import EvaluationCallback
from cl_merge.callbacks.voting import (
    TWO_ENCODERS,
    Classifier,
    check_head_classifies,
    check_text_head,
    lets_others_classify,
    number_of_classes,
    text_head,
    text_logits,
)
from cl_merge.class_statistics import StreamStatistics, fused_projection
from cl_merge.class_statistics.class_scatters import RANK
from cl_merge.class_statistics.drift import HOLD, RIDGE
from cl_merge.class_statistics.stream_statistics import FORMER_OPTIONS
from cl_merge.errors import InputError, unknown_name
from cl_merge.stream_merger.base_weights import BaseWeights
from cl_merge.task_vectors.module_weights import copies, evaluating, install, swapped

KINDS = ("both", "base", "merged", "aligned")

Images = Callable[[], Iterable[Any]]
"""Makes batches of a task's images, each exactly once over all processes."""


class ClassStatistics(EvaluationCallback):
    """Keep statistics of each class's image features, and let them decide beside the text head.

    Merging holds on to what the weights of each task knew, but the model never sees two tasks
    together, and mixes their classes up. What tells them apart needs no image: a mean for each
    class, one covariance, and a few directions in which each class varies more than that.

    After each task one pass over its images reads their features under the base weights, whose
    statistics stay true for ever, and under the merged ones, whose statistics
    `cl_merge.class_statistics.DriftCompensation` moves on as the merged model drifts; the less
    it does (``scale="drift"``), the truer they are. How much statistics and text head count is
    chosen on the images of all tasks, each when its task ends and leave-one-out. Sums are exact:
    under DDP, in any order, they are the same bits. Training is the same with and without it.

    Works beside `MergeCallback`, after which it must run, or alone, where the merged weights are
    those that training left. Use one instance for the whole stream. In a `CLIPClassifier` the vote
    replaces the head in every evaluation outside a fit; any other module may call `classify` in its
    ``test_step``. A stream that is resumed keeps the `ridge`, `hold` and `rank` that it began with.

    Args:
        kind: ``"both"``: the text head and statistics of base and merged features, two encoders.
            ``"base"``: without those of merged features. ``"merged"``: without those of base
            features, one encoder. ``"aligned"``: as ``"merged"``, but inside a linear map of the
            features, so that the text head, which there must be, decides alone; `install`
            multiplies it into the encoder's projection.
        text: Whether the text head takes part in the decision among classes seen. If not, and for
            modules whose ``head`` is no `ZeroShotHead`, statistics decide among them. Classes not
            seen are always the text head's.
        features: Makes image features [B, D] and labels [B] of module and batch; by default
            ``module.features(batch[0]), batch[1]``. Of a `CLIPClassifier` they must be its
            own, however they come out of a batch.
        images: Makes batches of the task's images, each exactly once over all processes. None asks
            the data module for its ``task_dataloader()``, or else reads one more training epoch.
        classes: Number of classes, for modules whose ``head`` does not tell.
        ridge: See `DriftCompensation`.
        hold: See `DriftCompensation`.
        rank: In how many directions each class may vary in its own way under the base weights;
            each takes C x D numbers. 0 gives all classes the same covariance.

    Attributes:
        tasks: Number of tasks learned so far.
        base: The weights before any training, by parameter name; those of `MergeCallback`, if
            there is one. If both this and the buffers are empty, the module always holds them.
        base_buffers: The floating-point buffers before any training, by name; likewise.
        statistics: What is kept; None before the first task ends.

    Raises:
        InputError: If an option is wrong, the module has no features or they are not finite, the
            number of classes is not known, the parameters that train are not those of the first
            task, a `MergeCallback` runs after this one, or something else replaces the head.
        RuntimeError: Under a strategy that shards parameters or spawns processes.

    Example::

        merge, statistics = MergeCallback("magmax", scale="drift"), ClassStatistics()
        for loader in tasks:
            trainer = L.Trainer(max_epochs=3, callbacks=[merge, statistics])
            trainer.fit(module, loader)
            trainer.test(module, test_loader)

    Reference:
        Hayes & Kanan, Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis,
        CVPR Workshops 2020, for statistics under an encoder that does not change.
    """

    def __init__(
        self,
        kind: str = "both",
        *,
        text: bool = True,
        features: Features | None = None,
        images: Images | None = None,
        classes: int | None = None,
        ridge: float = RIDGE,
        hold: float = HOLD,
        rank: int = RANK,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise unknown_name("kind of class statistics", kind, KINDS)
        if classes is not None and classes < 1:
            raise InputError(f"classes={classes}; expected 1 or more")
        self.kind = kind
        self.base: dict[str, Tensor] = {}
        self.base_buffers: dict[str, Tensor] = {}
        self.statistics: StreamStatistics | None = None
        self._text = text
        self._features = features_of(features)
        self._images = images
        self._classes = classes
        self._options: dict[str, Any] = {"ridge": ridge, "hold": hold, "rank": rank}
        self._new_statistics(1, 1)  # checks the options
        # Whether the base is a MergeCallback's, which has it in its own state.
        self._shares_base = False
        self._own_base = BaseWeights(None, keep_frozen=False)  # where there is no MergeCallback
        self._evaluating = False
        self._classifier: Classifier | None = None  # of the evaluation, once it was asked for

    @property
    @override
    def tasks(self) -> int:
        """Number of tasks learned so far."""
        return self.statistics.tasks if self.statistics else 0

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(kind=self.kind, text=self._text)

    def learn(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take up the images of a task that ended; a fit does this by itself.

        Args:
            trainer: A trainer in one of its hooks, with the task's images.
            module: The module, on its device. Where the trainer has no `MergeCallback`, the
                merged weights are those that it holds.

        Raises:
            InputError: If something is wrong with images, labels or features. The statistics are
                as they were.
        """
        self._check(module)
        base = {n: t.to(module.device) for n, t in (self.base | self.base_buffers).items()}
        images, merge = self._images_of(trainer), _merge_callback(trainer)
        live = merge.stream.model.written(module) if merge else {}
        # Not the generators of devices, for which each process would have to use all of them.
        with isolate_rng(include_cuda=False), swapped(live, {}), evaluating(module):
            if merge is not None:
                merge.install(module)
            batches = images() if images is not None else None
            read = read_features(trainer, module, self._features, base, batches)
        length, text = read.merged.shape[1], text_logits(module, read.merged)
        statistics = self.statistics
        if statistics is None:
            statistics = self._new_statistics(number_of_classes(module, self._classes), length)
        if statistics.features != length:
            raise InputError(
                f"image features have length {length}, those of earlier tasks {statistics.features}"
            )
        total = sum_over_processes(trainer, module)
        statistics.learn(*read, text if self._text else None, total=total)
        self.statistics, self._classifier = statistics, None

    def classify(
        self, module: nn.Module, batch: Any, classes: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """Classify a batch with the statistics, for modules that are no `CLIPClassifier`.

        For many batches outside of a trainer's evaluation make a `classifier` once.

        Args:
            module: The module, holding the merged weights: within an evaluation, or after
                `MergeCallback.install`.
            batch: What the function `features` takes.
            classes: Labels of the K classes to choose among; None for all C.

        Returns:
            Log-probabilities, float32 [B, K].

        Raises:
            InputError: If no task has been learned yet.
        """
        features = self._features(module, batch)[0]
        classifier = self._classifier or self.classifier(module, features.device)
        if self._evaluating:
            self._classifier = classifier
        return classifier(module, batch, features, classes)

    def classifier(self, module: nn.Module, device: torch.device | None = None) -> Classifier:
        """Make what classifies features of a module that holds the merged weights.

        Args:
            module: The module.
            device: Where it works; None is the CPU.

        Returns:
            The classifier, as statistics are now.

        Raises:
            InputError: If no task has been learned yet, or the base weights are in the checkpoint
                of a `MergeCallback` that is not there.
        """
        if self.statistics is None:
            raise InputError("no class statistics: no task has been trained yet")
        if self.kind in TWO_ENCODERS:
            self._check_base()
        base = self.base | self.base_buffers
        # Whoever keeps it may use it outside of the inference mode of an evaluation.
        with torch.inference_mode(False), torch.no_grad():
            head = text_head(module)
            return Classifier(self.kind, self.statistics, head, self._features, base, device)

    def install(self, module: nn.Module) -> None:
        """Multiply statistics of kind ``"aligned"`` into the module's image projection, to stay.

        Once, after the last task, and then without this callback: it would do so a second time.

        Args:
            module: A `CLIPClassifier` with the merged weights in it.

        Raises:
            InputError: If the kind is another, no task has been learned yet, the module has no
                text head or image encoder, or that does not end with a linear projection.
        """
        if self.kind != "aligned":
            raise InputError(
                f"statistics of kind '{self.kind}' are not part of the weights; only those of kind "
                "'aligned' can be installed"
            )
        visual: Any = getattr(module, "visual", None)
        if visual is None:
            raise InputError(f"{type(module).__name__} has no image encoder 'visual' to install in")
        check_text_head(module)
        fused = self.classifier(module).fused_map
        assert fused is not None  # noqa: S101 - of this kind and with a text head it is there
        name, value = fused_projection(visual, fused)
        install(dict(visual.named_parameters()), {name: value})

    # Hooks, in the order in which they fire.

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        ours = attached(trainer, MergeCallback, ClassStatistics)
        merge = _merge_callback(trainer)
        if merge is not None and ours.index(merge) > ours.index(self):
            raise InputError(
                "ClassStatistics runs before MergeCallback, whose merged weights it reads; put "
                "it behind: callbacks=[merge, statistics]"
            )

    @override
    def prepare_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._check(module)

    @override
    def begin_task(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        self._share_base(trainer)
        self._check_base()
        if not self._shares_base:
            self._own_base.parameters, self._own_base.buffers = self.base, self.base_buffers
            self._own_base.note(module, resumed=self._resumed)
        with trying(trainer, module):
            # What fails shows now; batches that are not read again may have labels of any kind.
            if self._images_of(trainer):
                self._features(module, batch)
            else:
                read_features(trainer, module, self._features, {}, [batch])

    @override
    def watch(self) -> None:
        if not self._shares_base:
            self._own_base.watch()

    @override
    def end_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.learn(trainer, module)

    @override
    def begin_evaluation(self, trainer: L.Trainer, module: Any) -> None:
        if self._unfinished:
            raise InputError(
                "the checkpoint was written within a task, of whose images ClassStatistics has no "
                "statistics yet; evaluate after the fit, without ckpt_path"
            )
        self._share_base(trainer)
        if lets_others_classify(module):
            check_head_classifies(module)
            classifier = self.classifier(module, module.device)
            classifier.features = own_features  # it is given images, whatever a batch is
            module.classify = classifier.of_images
        self._evaluating = True

    @override
    def end_evaluation(
        self, trainer: L.Trainer, module: L.LightningModule, *, failed: bool
    ) -> None:
        if self._evaluating and lets_others_classify(module):
            vars(module)["classify"] = None
        self._evaluating, self._classifier = False, None

    @override
    def task_state(self) -> dict[str, Any]:
        statistics = self.statistics
        return {
            "kind": self.kind,
            "shape": [statistics.classes, statistics.features] if statistics else None,
            "options": statistics.options if statistics else self._options,
            "statistics": statistics.state_dict() if statistics else {},
            "borrowed": self._shares_base,
            "base": {} if self._shares_base else self.base,
            "base_buffers": {} if self._shares_base else self.base_buffers,
        }

    @override
    def load_task_state(self, state: dict[str, Any]) -> None:
        if state["kind"] != self.kind:
            raise InputError(
                f"the saved class statistics are of kind '{state['kind']}', not '{self.kind}'; "
                "make ClassStatistics with the saved kind"
            )
        self._shares_base = state["borrowed"]
        self.base, self.base_buffers = copies(state["base"]), copies(state["base_buffers"])
        self.statistics, self._classifier = None, None
        if state["shape"] is not None:
            options = state.get("options", FORMER_OPTIONS)
            self.statistics = self._new_statistics(*state["shape"], **options)
            self.statistics.load_state_dict(state["statistics"])

    def _new_statistics(self, classes: int, features: int, **saved: Any) -> StreamStatistics:
        encoders = "merged" if self.kind == "aligned" else self.kind
        return StreamStatistics(classes, features, encoders, **self._options | saved)

    def _images_of(self, trainer: L.Trainer) -> Images | None:
        return self._images or from_datamodule(trainer, "task_dataloader")

    def _share_base(self, trainer: L.Trainer) -> None:
        """Use the base of the MergeCallback, if there is one, which has moved it to the module."""
        merge = _merge_callback(trainer)
        if merge is None:
            self._shares_base = self._shares_base and not self.base  # if it is here, it is kept
        elif merge.base and (self._shares_base or not self.tasks):  # else it began after these
            self._shares_base = True
            self.base, self.base_buffers = merge.base, merge.base_buffers

    def _check_base(self) -> None:
        if self._shares_base and not self.base:
            raise InputError(
                "these class statistics were kept beside a MergeCallback, whose state has the base "
                "weights; put that one in front of them again: callbacks=[merge, statistics]"
            )

    def _check(self, module: nn.Module) -> None:
        """Find out what a module lacks before anything is trained."""
        if self._features is own_features:
            check_own_features(module)
        if self.kind == "aligned":
            check_text_head(module)
        number_of_classes(module, self._classes, self.statistics)


def _merge_callback(trainer: L.Trainer) -> MergeCallback | None:
    every = attached(trainer, MergeCallback)
    if len(every) > 1:
        raise InputError(
            "ClassStatistics reads the merged weights of one MergeCallback, but this Trainer has "
            f"{len(every)}; keep the one whose weights shall classify"
        )
    return every[0] if every else None
