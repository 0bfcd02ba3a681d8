"""A sentence encoder learns the intents of customers domain by domain: merged, regularized, joint.

    python intents.py --data FOLDER [--seed 0] [--utterances 40]

FOLDER holds train.parquet and test.parquet with the columns text, label and domain, such as
CLINC150 (Larson et al., EMNLP 2019): 150 intents of 10 domains, each a task. The encoder is
MiniLM-L6, which the extra `lite` brings; the head is made of the embedded names of the intents and
does not train.
Prints the accuracy over all intents after the last task, in per cent.
"""

import argparse
from collections.abc import Callable, Iterable

import lightning as L
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from cl_merge import EWC, ClassStatistics, LwF, MergeCallback
from cl_merge.models.lite import packaged_weights

SCALE = 20.0


class Encoder(nn.Module):
    """Sentence embeddings of unit length."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.model = AutoModel.from_pretrained(folder, add_pooling_layer=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed sentences, tokens [B, L] with 0 behind their ends; float [B, D]."""
        tokens = tokens[:, : int((tokens != 0).sum(dim=1).max())]  # no longer than the longest
        mask = (tokens != 0).long()
        states = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        means = (states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return F.normalize(means, dim=1)


class Intents(L.LightningModule):
    """A classifier that knows nothing of merging."""

    def __init__(self, encoder: Encoder, head: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("head", head)
        self.classes = list(range(len(head)))  # of the task in training
        self.seen: list[int] = []  # of all tasks before it
        self.classify: Callable[[Intents, list[Tensor]], Tensor] | None = None

    def logits(self, features: Tensor, classes: list[int]) -> Tensor:
        """Logits [B, K] of features [B, D] among some intents."""
        return SCALE * features @ self.head[classes].T

    def task_logits(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and targets among the intents of the task."""
        tokens, labels = batch
        targets = torch.tensor([self.classes.index(int(label)) for label in labels])
        return self.logits(self.encoder(tokens), self.classes), targets

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Compute the loss of a batch."""
        return F.cross_entropy(*self.task_logits(batch))

    def test_step(self, batch: list[Tensor]) -> None:
        """Log the accuracy of a batch over all intents."""
        tokens, labels = batch
        if self.classify is not None:
            scores = self.classify(self, batch)
        else:
            scores = self.logits(self.encoder(tokens), list(range(len(self.head))))
        right = scores.argmax(dim=1) == labels
        self.log("accuracy", right.float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer, afresh for every task."""
        return torch.optim.AdamW(self.parameters(), lr=5e-5)


class Study:
    """The data, and what is trained on it."""

    def __init__(self, folder: str, seed: int, utterances: int) -> None:
        self.seed, self.folder = seed, str(packaged_weights()[1])
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        train = Dataset.from_parquet(f"{folder}/train.parquet")
        test = Dataset.from_parquet(f"{folder}/test.parquet")
        names = [name.replace("_", " ") for name in train.features["label"].names]
        L.seed_everything(seed, verbose=False)
        frame = train.to_pandas().groupby("label").sample(utterances, random_state=seed)
        self.tasks = [group for _, group in frame.groupby("domain")]
        self.all = frame
        self.test = self.loader(test["text"], test["label"], 250)
        with torch.no_grad():
            self.head = Encoder(self.folder).eval()(self.tokens(names))

    def tokens(self, texts: Iterable[str]) -> Tensor:
        """Token numbers [N, L], with 0 behind the ends."""
        found = self.tokenizer(list(texts), padding=True, truncation=True, max_length=48)
        return torch.tensor(found["input_ids"])

    def loader(self, texts: Iterable[str], labels: Iterable[int], size: int = 32) -> DataLoader:
        """Make a loader, shuffled where it is for training."""
        data = TensorDataset(self.tokens(texts), torch.tensor(list(labels)))
        return DataLoader(data, batch_size=size, shuffle=size == 32)

    def train(self, *make: Callable[[Intents], L.Callback], joint: bool = False) -> tuple:
        """Train all tasks with callbacks; the module and the callbacks."""
        L.seed_everything(self.seed, verbose=False)
        module = Intents(Encoder(self.folder), self.head)
        callbacks = [made(module) for made in make]
        for task in [self.all] if joint else self.tasks:
            module.classes = sorted(set(task["label"]))
            trainer(3, *callbacks).fit(module, self.loader(task["text"], task["label"]))
            module.seen = sorted({*module.seen, *module.classes})
        return module, *callbacks

    def show(self, what: str, module: Intents, *callbacks: L.Callback) -> None:
        """Print the accuracy over all intents."""
        found = trainer(1, *callbacks).test(module, self.test, verbose=False)[0]["accuracy"]
        print(f"{what:34} {100 * found:5.1f}", flush=True)


def trainer(epochs: int, *callbacks: L.Callback) -> L.Trainer:
    """Make a trainer that keeps quiet: each task has a new one."""
    return L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def features(module: Intents, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings and labels, of which class statistics are made."""
    return module.encoder(batch[0]), batch[1]


def main() -> None:
    """Train in every way and print the accuracy of each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--utterances", type=int, default=40)
    words = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    study = Study(words.data, words.seed, words.utterances)
    study.show("zero-shot", Intents(Encoder(study.folder), study.head))

    for start in ("sequential", "independent"):
        merges = [MergeCallback(name, start=start) for name in ("magmax", "average", "ties")]
        module, *_ = study.train(*(lambda _, m=merge: m for merge in merges))
        if start == "sequential":
            study.show("sequential", module)
        for merge in merges:
            for scale in dict.fromkeys((merge.scale, 1.0)):
                merge.scale = scale
                study.show(f"{merge.merger.name} of {start}, scale {scale:g}", module, merge)

    def lwf(module: Intents) -> L.Callback:
        def readout(features: Tensor, _: object) -> Tensor:
            return module.logits(features, module.seen or module.classes)

        return LwF(target="encoder", readout=readout)

    for name, regularizer in {"lwf": lwf, "ewc": lambda _: EWC(samples=200)}.items():
        module, _, merge = study.train(regularizer, lambda _: MergeCallback("magmax"))
        study.show(name, module)
        study.show(f"{name} + magmax", module, merge)

    statistics = ClassStatistics(features=features, classes=len(study.head))
    module, merge, _ = study.train(lambda _: MergeCallback("magmax"), lambda _: statistics)
    module.classify = statistics.classify
    study.show("magmax + class statistics", module, merge, statistics)
    study.show("joint", study.train(joint=True)[0])


if __name__ == "__main__":
    main()
