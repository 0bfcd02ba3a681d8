"""A CLIP image encoder with a frozen text head, as a LightningModule."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from cl_merge.data.tables import check_range
from cl_merge.data.task_stream import TaskStream
from cl_merge.data.tasks import Task
from cl_merge.errors import InputError, unknown_name
from cl_merge.models.pretrained import Clip
from cl_merge.models.zero_shot import ZeroShotHead, zero_shot_head
from cl_merge.training.metrics import AccuracyMatrix

log = logging.getLogger(__name__)

SCHEDULES = ("cosine", "constant")

# "blocks.3.1." of "trunk.blocks.3.1.conv.weight": numbers that follow each other name one block.
_BLOCK = re.compile(r"(?:.*?\.)?\d+(?:\.\d+)*\.")
# open_clip's transformers register their output projection before everything else.
_LAST = re.compile(r"(?:.*\.)?(?:proj|head\..*)")

Classify = Callable[[L.LightningModule, Tensor, Tensor, Tensor | Sequence[int] | None], Tensor]
"""Makes logits [B, K] of module, images [B, 3, H, W], features [B, D] and classes."""


class CLIPClassifier(L.LightningModule):
    """Fine-tune the image encoder of a CLIP-style model; the head made from text stays as it is.

    With a `TaskStream` the loss is the cross entropy over the classes of the current task only, and
    ``trainer.test`` fills a row of the accuracy matrix. With any other data it is a classifier over
    all classes, for batches ``(image, label)``.

    The defaults are the recipe of the MagMax paper: AdamW, and for every task anew a linear warm-up
    of 500 steps followed by a cosine to zero. Most tasks are shorter and never leave the warm-up:
    this is what was published, and a message says so when it happens.

    Args:
        visual: The image encoder: images [B, 3, H, W] to features [B, D].
        head: The frozen classifier over all C classes.
        lr: Peak learning rate.
        weight_decay: Of AdamW.
        schedule: ``"cosine"`` (after the warm-up, to zero at the end of the task, which
            ``max_epochs`` or ``max_steps`` says) or ``"constant"``.
        warmup_steps: Optimizer steps of linear warm-up at the start of every task.
        label_smoothing: Of the cross entropy.
        layer_decay: Factor of the learning rate from each layer of the encoder to the one before
            it, see `layer_depths`. Below 1 early layers learn slower; 1 is the paper's.
        freeze_batch_norm: Keep batch-norm layers in evaluation mode, so that their statistics stay
            those of the pre-training; their weights and biases train all the same.

    Attributes:
        visual: The image encoder; its names are those of open_clip's, so weights go back and forth.
        head: The frozen classifier.
        accuracy: Where tests of a `TaskStream` are counted; made when one of these tasks is first
            tested, or set by hand. A test of other data is counted in one that is set by hand and
            has no row yet, by the tasks in its batches ``(image, label, task)``.
        classify: What classifies instead of the head, if not None: a function of this module,
            images [B, 3, H, W], their features [B, D] and classes that returns logits. Set by
            `ClassStatistics` for an evaluation.

    Raises:
        InputError: If an option is out of its range.

    Example::

        clip = load_clip("glyph")
        model = CLIPClassifier.from_clip(clip, stream.class_names, "a photo of a {}.", lr=3e-4)
        L.Trainer(max_epochs=3).fit(model, datamodule=stream)

    Reference:
        Marczak et al., MagMax, ECCV 2024, section 5; Radford et al., CLIP, ICML 2021. Learning
        rates by layer: Howard & Ruder, Universal Language Model Fine-tuning, ACL 2018.
    """

    _counter: AccuracyMatrix  # of the test that is running

    def __init__(
        self,
        visual: nn.Module,
        head: ZeroShotHead,
        *,
        lr: float = 1e-5,
        weight_decay: float = 0.1,
        schedule: str = "cosine",
        warmup_steps: int = 500,
        label_smoothing: float = 0.0,
        layer_decay: float = 1.0,
        freeze_batch_norm: bool = True,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise unknown_name("schedule", schedule, SCHEDULES)
        for option, fits, expected in (
            (f"{lr=}", 0 < lr < math.inf, "a finite number above 0"),
            (f"{weight_decay=}", 0 <= weight_decay < math.inf, "0 or more, finite"),
            (f"{label_smoothing=}", 0 <= label_smoothing <= 1, "from 0 to 1"),
            (f"{warmup_steps=}", warmup_steps >= 0, "0 or more"),
            (f"{layer_decay=}", 0 < layer_decay <= 1, "above 0, at most 1"),
        ):
            if not fits:
                raise InputError(f"{option}; expected {expected}")
        self.save_hyperparameters(ignore=["visual", "head"])
        # Convolutions are up to twice as fast in this layout; transformers do not mind.
        self.visual = visual.to(memory_format=torch.channels_last)
        self.head = head
        self.accuracy: AccuracyMatrix | None = None
        self.classify: Classify | None = None
        self._task: Task | None = None
        self._warmup_explained = False
        self.register_buffer("_position", torch.arange(len(head.class_names)), persistent=False)
        self._position: Tensor

    @classmethod
    def from_clip(
        cls, clip: Clip, class_names: Sequence[str], templates: str | Sequence[str], **options: Any
    ) -> CLIPClassifier:
        """Make the head from class names and prompts, and keep only the image encoder beside it.

        Args:
            clip: A loaded model; drop it afterwards to free its text tower.
            class_names: Names of the C classes, in the order of their labels.
            templates: Prompts with one ``{}`` for the name.
            **options: Those of the constructor.
        """
        head = zero_shot_head(clip, class_names, templates)
        visual: nn.Module = clip.model.visual  # type: ignore[assignment]
        return cls(visual, head, **options)

    @override
    def forward(self, images: Tensor, classes: Tensor | Sequence[int] | None = None) -> Tensor:
        """Classify images.

        Args:
            images: Transformed images, float [B, 3, H, W].
            classes: Labels of the K classes to choose among; None for all C.

        Returns:
            Logits, float32 [B, K].
        """
        features = self.features(images)
        if self.classify is not None:
            return self.classify(self, images, features, classes)
        logits: Tensor = self.head(features, classes)
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Encode transformed images, float [B, 3, H, W], to features, not normalised, [B, D]."""
        features: Tensor = self.visual(images)
        return features

    @override
    def train(self, mode: bool = True) -> CLIPClassifier:
        """Set the training mode, but never that of frozen batch norms."""
        super().train(mode)
        if self.hparams["freeze_batch_norm"]:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    @override
    def setup(self, stage: str) -> None:
        """Make sure that the head has all classes before any work is done."""
        stream, own = self._stream(), len(self.head.class_names)
        if stream is not None and len(stream.class_names) > own:
            raise InputError(
                f"the stream has {len(stream.class_names)} classes, but the head {own}; make the "
                "head from stream.class_names"
            )

    @override
    def on_fit_start(self) -> None:
        # Lightning keeps the mode that a module is in, and pre-trained models arrive in evaluation.
        self.train()
        stream = self._stream()
        self._task = stream.task if stream else None
        if self._task is not None:
            # The position of every class among the rows of the task's head.
            classes = torch.tensor(self._task.classes, device=self._position.device)
            self._position.fill_(-1)
            self._position[classes] = torch.arange(len(classes), device=classes.device)

    def task_logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Classify a training batch among the classes of the current task.

        Without a `TaskStream` there is one task with all classes.

        Args:
            batch: Images, float [B, 3, H, W], and global labels, int64 [B]; more is ignored.

        Returns:
            Logits, float32 [B, K], and each label's position among the task's K classes, int64 [B].
        """
        images, labels = batch[0], batch[1]
        if self._task is None:
            self._check_labels(labels)
            return self(images), labels
        return self(images, self._task.classes), self._position[labels]

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, targets = self.task_logits(batch)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.hparams["label_smoothing"])
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(targets))
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch[0], batch[1]
        self._check_labels(labels)
        logits = self(images)
        hits = (logits.argmax(dim=1) == labels).float().mean()
        values = {"val/loss": F.cross_entropy(logits, labels), "val/accuracy": 100.0 * hits}
        self.log_dict(values, prog_bar=True, batch_size=len(labels), sync_dist=True)

    @override
    def on_test_start(self) -> None:
        stream, matrix, classes = self._stream(), self.accuracy, len(self.head.class_names)
        if stream is not None:
            tasks = [sorted(task.classes) for task in stream.test_tasks]
            if matrix is None or matrix.task_classes != tasks:
                self.accuracy = matrix = AccuracyMatrix(tasks, classes).to(self.device)
        elif matrix is None or matrix.rows:
            matrix = AccuracyMatrix([range(classes)], classes).to(self.device)
        matrix.reset()  # a test that was stopped may have counted
        self._counter = matrix

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch[0], batch[1]
        by_task = self._counter is self.accuracy and len(batch) > 2
        tasks = batch[2] if by_task else torch.zeros_like(labels)
        self._check_labels(labels)
        self._counter.update(self(images), labels, tasks)

    @override
    def on_test_epoch_end(self) -> None:
        stream = self._stream()
        row = stream.row if stream else 0
        # Summed over processes here, where they can communicate; later the module is on the CPU.
        self._counter.finish_row(row)
        correct, aware, total = self._counter.rows[row]
        seen = slice(0, row + 1)
        self.log("test/accuracy", 100.0 * correct.sum() / total.sum())
        self.log("test/task_aware_accuracy", 100.0 * aware.sum() / total.sum())
        self.log("test/seen_accuracy", 100.0 * correct[seen].sum() / total[seen].sum())

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits over all classes, float32 [B, C]."""
        logits: Tensor = self(batch[0] if isinstance(batch, (tuple, list)) else batch)
        return logits

    @override
    def configure_optimizers(self) -> Any:
        lr, decay = self.hparams["lr"], self.hparams["weight_decay"]
        optimizer = AdamW(self._parameter_groups(), lr=lr, weight_decay=decay)
        steps, warmup = self.trainer.estimated_stepping_batches, self.hparams["warmup_steps"]
        if steps < 0:  # the loader has no length
            steps = math.inf
        if steps == math.inf and self.hparams["schedule"] == "cosine":
            raise InputError(
                "schedule='cosine' ends with the training, but nothing says when that is; give the "
                "Trainer max_epochs, or max_steps where the loader has no length, or choose "
                "schedule='constant'"
            )
        if steps < warmup and self.trainer.is_global_zero and not self._warmup_explained:
            self._warmup_explained = True
            log.info(
                f"a task takes {steps} steps and its warm-up {warmup}: the learning rate ends at "
                f"{100 * steps / warmup:.0f} % of its peak, see warmup_steps"
            )
        factor = LambdaLR(optimizer, lambda step: self._rate(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Group what trains: all at the peak learning rate, or each layer at its own."""
        trained = {n: p for n, p in self.named_parameters() if p.requires_grad}
        lr, decay = self.hparams["lr"], self.hparams["layer_decay"]
        if decay == 1.0:
            return [{"params": list(trained.values())}]
        layers: dict[int, list[nn.Parameter]] = {}
        for name, depth in layer_depths(trained).items():
            layers.setdefault(depth, []).append(trained[name])
        last = max(layers)
        return [{"params": layers[d], "lr": lr * decay ** (last - d)} for d in sorted(layers)]

    def _rate(self, step: int, steps: float) -> float:
        """Give the learning rate at an optimizer step (from 0) as a share of its peak."""
        warmup = self.hparams["warmup_steps"]
        if step < warmup:
            return float((step + 1) / warmup)
        if self.hparams["schedule"] == "constant":
            return 1.0
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    def _check_labels(self, labels: Tensor) -> None:
        """Make sure that labels are those of the head; a `TaskStream` has checked its own."""
        # A GPU would end in an assertion that names nothing, but has to be waited for: later
        # epochs bring the same labels.
        checked = labels.device.type != "cpu" and self.current_epoch > 0
        if self._stream() is not None or checked or labels.is_floating_point() or not len(labels):
            return
        lowest, highest = (int(value) for value in labels.aminmax())
        if lowest < 0 or highest >= len(self.head.class_names):
            check_range(labels.cpu().numpy(), len(self.head.class_names), "the batch")

    def _stream(self) -> TaskStream | None:
        # Not `trainer.datamodule`, which stays where a later call brings loaders of its own.
        loop = self.trainer._active_loop
        data = loop._data_source.instance if loop is not None else None
        return data if isinstance(data, TaskStream) else None


def layer_depths(names: Iterable[str]) -> dict[str, int]:
    """Find the layer of each parameter of an encoder, from its input to its output.

    Parameters are named in the order of the module. Each numbered block is a layer. What comes
    before the first one, such as a stem and embeddings, is layer 0; what comes after, such as a
    last norm and the projection, is the last layer.

    Example:
        >>> layer_depths(["proj", "conv.weight", "blocks.0.w", "blocks.1.w", "norm.weight"])
        {'proj': 3, 'conv.weight': 0, 'blocks.0.w': 1, 'blocks.1.w': 2, 'norm.weight': 3}
    """
    blocks: dict[str, int] = {}
    found: dict[str, int | None] = {}
    for name in names:
        block = _BLOCK.match(name)
        if block:
            found[name] = blocks.setdefault(block[0], len(blocks) + 1)
        else:
            found[name] = None if blocks or _LAST.fullmatch(name) else 0
    return {name: len(blocks) + 1 if depth is None else depth for name, depth in found.items()}
