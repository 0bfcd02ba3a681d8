"""Formats ``torch`` and ``onnx``: from images to logits, as a program and as a graph."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_merge.benchmarks.export.comparing import check_logits, probe
from cl_merge.benchmarks.runs.trained_run import FinishedRun, Restored
from cl_merge.task_vectors.module_weights import copies, install

# The oldest version whose exporter is known to write every model; that of 2.6 fails.
_ONNX_NEEDS = (2, 11)

# A file of ONNX's own format ends at 2 GB; larger weights lie beside it.
_ONE_FILE = 1_900_000_000


def write_torch(restored: Restored, folder: Path) -> None:
    """Write the classifier as ``model.pt2``, and compare what it gives."""
    torch.export.save(_traced(restored), folder / "model.pt2")
    check_logits("torch", torch.export.load(folder / "model.pt2").module(), restored)


def onnx_reason(run: FinishedRun) -> str | None:
    """Why this torch cannot write a graph; None if it can."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version >= _ONNX_NEEDS:
        return None
    return f"it needs torch {'.'.join(map(str, _ONNX_NEEDS))}, and this is {torch.__version__}"


def write_onnx(restored: Restored, folder: Path) -> None:
    """Write the classifier as ``model.onnx``: input ``images``, output ``logits``, any batch."""
    program, file = _traced(restored), folder / "model.onnx"
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    with _quiet():
        graph = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            external_data=size > _ONE_FILE,
            verbose=False,
        )
    assert graph is not None  # noqa: S101 - so with dynamo
    graph.save(file, external_data=size > _ONE_FILE)
    check_logits("onnx", _session(file), restored)


class Network(nn.Module):
    """Classify images with nothing but tensors, as the evaluation of a run does.

    What a run does with callbacks stands here in plain operations without branches, which torch and
    ONNX can write down: the text head alone, or its vote with class statistics. Of two encoders the
    second one is a copy of the first with the pre-trained weights.
    """

    text: Tensor
    seen: Tensor

    def __init__(self, restored: Restored) -> None:
        super().__init__()
        self.visual = _plain_copy(restored.model.visual)
        self.base: nn.Module | None = None
        self.register_buffer("text", restored.model.head.weight.detach().clone())
        self.discriminants = nn.ModuleDict()
        voting = restored.voting
        if voting is not None and voting.statistics is not None:
            found = voting.statistics.discriminants()
            self.discriminants.update({encoder: one.float() for encoder, one in found.items()})
            self._vote = voting.statistics.vote
            if "base" in found and voting.base:
                self.base = _plain_copy(restored.model.visual)
                given = voting.base | voting.base_buffers
                prefix = "visual."
                own = {n.removeprefix(prefix): t for n, t in given.items() if n.startswith(prefix)}
                install(self.base.state_dict(), copies(own))
            self.register_buffer("seen", voting.statistics.base.counts > 0)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images [B, 3, H, W]: logits, or log-probabilities after a vote."""
        merged = F.normalize(self.visual(images), dim=-1)
        text = F.linear(merged, self.text)
        if not self.discriminants:
            return text
        features = {"merged": merged, "base": merged}
        if self.base is not None:
            features["base"] = F.normalize(self.base(images), dim=-1)
        # Of classes not seen nothing is used; zeros keep infinities out of the arithmetic.
        scores = [
            found.scores(features[name]).masked_fill(~self.seen, 0.0)  # type: ignore[operator]
            for name, found in self.discriminants.items()
        ]
        return self._vote.combine(text, torch.stack(scores).mean(dim=0), self.seen)


def _plain_copy(visual: nn.Module) -> nn.Module:
    """Copy an image encoder without what only makes it faster here."""
    copied = copy.deepcopy(visual).to(memory_format=torch.contiguous_format)
    for module in copied.modules():
        module._forward_pre_hooks.clear()
    return copied


def _traced(restored: Restored) -> torch.export.ExportedProgram:
    """Write down what the classifier computes, for any number of images."""
    images = probe(restored.clip.image_size)
    batch = {"images": {0: torch.export.Dim.DYNAMIC}}
    # Older versions of torch cannot trace the fused attention of their own layers.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return torch.export.export(Network(restored), (images,), dynamic_shapes=batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _session(file: Path) -> Callable[[Tensor], Tensor]:
    """Run a graph on the CPU."""
    onnxruntime: Any = import_module("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def logits(images: Tensor) -> Tensor:
        (found,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(found)

    return logits


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter tells its own developers from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
