"""Everything that class statistics keep of a stream, and how a task adds to it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_merge.class_statistics.class_scatters import RANK, ClassScatters
from cl_merge.class_statistics.discriminant import (
    Discriminant,
    QuadraticDiscriminant,
    leave_one_out_scores,
)
from cl_merge.class_statistics.drift import (
    FORMER_HOLD,
    FORMER_RIDGE,
    HOLD,
    RIDGE,
    DriftCompensation,
)
from cl_merge.class_statistics.moments import ClassGaussians, FeatureMoments
from cl_merge.class_statistics.vote import Vote, choose_vote, no_losses, vote_losses
from cl_merge.errors import InputError, unknown_name
from cl_merge.storage.files import load_tensors, save_tensors

ENCODERS = ("both", "base", "merged")
FORMAT = "cl_merge.statistics"

# Of statistics that were saved before these were options.
FORMER_OPTIONS: dict[str, Any] = {"ridge": FORMER_RIDGE, "hold": FORMER_HOLD, "rank": 0}


class StreamStatistics:
    """Class statistics of a stream's images under the base encoder and under the merged one.

    Args:
        classes: Number of classes, C.
        features: Length of the features, D.
        encoders: Whose features classify: ``"base"``, ``"merged"`` or ``"both"``.
        ridge: See `DriftCompensation`.
        hold: See `DriftCompensation`.
        rank: In how many directions each class may have a covariance of its own, of base features;
            see `ClassScatters`. 0 gives all classes the same one, and takes no memory.

    Attributes:
        base: Moments of base features of all tasks.
        scatters: Of base features of each class; None with ``encoders="merged"`` or rank 0.
        drift: Statistics of merged features, moved on as the merged model drifts; None with
            ``encoders="base"``.
        vote: How much text head and statistics count, as chosen after the last task.
        losses: Of all votes on the images of all tasks, each when its task ended.
        tasks: Number of tasks in it.

    Raises:
        InputError: If the encoders are something else, the ridge is not above 0, or hold or rank
            are below.
    """

    def __init__(
        self,
        classes: int,
        features: int,
        encoders: str = "both",
        *,
        ridge: float = RIDGE,
        hold: float = HOLD,
        rank: int = RANK,
    ) -> None:
        if encoders not in ENCODERS:
            raise unknown_name("encoders", encoders, ENCODERS)
        if not 0 < ridge < float("inf"):
            raise InputError(f"ridge={ridge}; expected a finite number above 0")
        if not 0 <= hold < float("inf"):
            raise InputError(f"hold={hold}; expected a finite number from 0")
        if type(rank) is not int or rank < 0:
            raise InputError(f"rank={rank}; expected a whole number from 0")
        self.classes = classes
        self.features = features
        self.encoders = encoders
        self.base = FeatureMoments(classes, features)
        self.options = {"ridge": ridge, "hold": hold, "rank": rank}
        self.drift: DriftCompensation | None = None
        if encoders != "base":
            self.drift = DriftCompensation(classes, features, ridge, hold)
        self.scatters: ClassScatters | None = None
        if encoders != "merged" and rank:
            self.scatters = ClassScatters(classes, features, rank)
        self.vote = Vote()
        self.losses = no_losses()
        self.tasks = 0

    def learn(
        self,
        base: Tensor,
        merged: Tensor | None,
        labels: Tensor,
        text: Tensor | None = None,
        *,
        total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        """Take up the images of a task; under several processes each has its own.

        Args:
            base: Their unit features under the base encoder, float [N, D].
            merged: The same under the merged model of today; may be None with ``"base"``.
            labels: Their classes, int64 [N].
            text: The text head's logits for them, float [N, C]; None leaves the text head out of
                the vote among classes seen.
            total: Sums an int64 tensor over all processes.

        Raises:
            InputError: If features are not finite, those under the merged model are missing, or a
                label lies outside the classes. The statistics are as they were.
        """
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise InputError(
                f"labels from {int(labels.min())} to {int(labels.max())}, but the statistics are "
                f"of {self.classes} classes; expected 0 to {self.classes - 1}"
            )
        vectors = [base]
        if self.drift is not None:
            if merged is None:
                raise InputError(f"encoders='{self.encoders}' need the merged model's features")
            vectors.append(merged)
        task = FeatureMoments(self.classes, len(vectors) * self.features)
        task.update(torch.cat(vectors, dim=1), labels)
        task.reduce(total)
        before = copy.deepcopy(self.base)
        self.base.add(task.first(self.features))
        if self.drift is not None:
            self.drift.update(before, task)
        if self.scatters is not None:
            self._learn_scatters(self.scatters, before, base, labels, task.counts, total)
        self.vote = Vote(text=0.0)
        if text is not None:
            # Chosen leave-one-out, for which an image may not be the only one of its class.
            usable = self.base.counts[labels] > 1
            features: dict[str, Any] = {"base": base, "merged": merged}
            gaussians, scores = self.gaussians(), []
            for encoder, found in self.discriminants().items():
                pair = features[encoder][usable], labels[usable]
                if isinstance(found, QuadraticDiscriminant):
                    scores.append(found.leave_one_out_scores(*pair))
                else:
                    scores.append(leave_one_out_scores(*pair, gaussians[encoder]))
            mean = sum(scores[1:], start=scores[0]) / len(scores)
            losses = vote_losses(text[usable], mean, labels[usable], total=total)
            self.losses = self.losses + losses
            self.vote = choose_vote(self.losses)
        self.tasks += 1

    def gaussians(self) -> dict[str, ClassGaussians]:
        """The distributions that classify, by encoder: ``"base"``, ``"merged"``."""
        gaussians = {}
        if self.encoders != "merged":
            gaussians["base"] = ClassGaussians.of(self.base)
        if self.drift is not None:
            gaussians["merged"] = self.drift.gaussians(self.base.counts)
        return gaussians

    def discriminants(self) -> dict[str, Discriminant | QuadraticDiscriminant]:
        """The discriminants of these distributions, by encoder."""
        return {
            encoder: QuadraticDiscriminant(of, self.scatters)
            if encoder == "base" and self.scatters is not None
            else Discriminant.of(of)
            for encoder, of in self.gaussians().items()
        }

    def _learn_scatters(
        self,
        scatters: ClassScatters,
        before: FeatureMoments,
        base: Tensor,
        labels: Tensor,
        counts: Tensor,
        total: Callable[[Tensor], Tensor],
    ) -> None:
        """Add a task's images to each class's own scatter; counts are over all processes."""
        old, shared = ClassGaussians.of(before), ClassGaussians.of(self.base).covariance()[0]
        for label in counts.nonzero()[:, 0].tolist():
            own = base[labels == label]
            moments = FeatureMoments(1, self.features)
            moments.update(own, torch.zeros(len(own), dtype=torch.int64))
            moments.reduce(total)
            scatters.update(label, ClassGaussians.of(moments), old, shared)

    def state_dict(self) -> dict[str, Tensor]:
        """The state as tensors by name."""
        state = {f"base.{name}": tensor for name, tensor in self.base.tensors().items()}
        if self.drift is not None:  # named as in the first files of this format
            state |= {f"carried.{name}": tensor for name, tensor in self.drift.tensors().items()}
        if self.scatters is not None:
            state |= {f"own.{name}": tensor for name, tensor in self.scatters.tensors().items()}
        state["losses"] = self.losses
        state["vote"] = torch.tensor([self.vote.text, self.vote.statistics], dtype=torch.float64)
        state["tasks"] = torch.tensor(self.tasks)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned, copied; `InputError` if it is of another shape."""
        state = {"losses": no_losses()} | dict(state)  # former ones were of the last task only
        for name, own in self.state_dict().items():
            if name not in state:
                raise InputError(f"no tensor '{name}' in the saved class statistics")
            saved = state[name]
            if (saved.shape, saved.dtype) != (own.shape, own.dtype):
                raise InputError(
                    f"saved class statistics '{name}' are {list(saved.shape)} of {saved.dtype}; "
                    f"expected {list(own.shape)} of {own.dtype}"
                )
        parts = {name.partition(".")[2]: tensor for name, tensor in state.items()}
        self.base.load_tensors(parts)
        if self.drift is not None:
            self.drift.load_tensors(parts)
        if self.scatters is not None:
            self.scatters.load_tensors(parts)
        self.vote = Vote(*state["vote"].tolist())
        self.losses = state["losses"].to(device="cpu", copy=True)
        self.tasks = int(state["tasks"])

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the statistics as safetensors, whole or not at all.

        Args:
            path: Where.
            metadata: More to write into the header, under other names than its own: ``format``,
                ``encoders``, ``ridge``, ``hold``, ``rank``.

        Raises:
            StorageError: If the file cannot be written.
        """
        own = {"format": FORMAT, "encoders": self.encoders}
        own |= {name: json.dumps(value) for name, value in self.options.items()}
        save_tensors(path, self.state_dict(), dict(metadata or {}) | own)

    @classmethod
    def load(cls, path: str | Path) -> StreamStatistics:
        """Read what `save` has written; `InputError` if it is missing or something else."""
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path}: holds no class statistics; expected what save() wrote")
        try:
            # Of base features alone the first files name no ridge.
            saved = {name: json.loads(metadata.get(name, "null")) for name in FORMER_OPTIONS}
            options = {name: saved[name] or former for name, former in FORMER_OPTIONS.items()}
            classes, features = tensors["base.sums"].shape
            made = cls(classes, features, metadata["encoders"], **options)
            made.load_state_dict(tensors)
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path}: damaged class statistics ({error})") from error
        return made
