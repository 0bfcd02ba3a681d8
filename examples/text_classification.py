"""MergeCallback with a transformer of Hugging Face: three domains of reviews, merged with MagMax.

    python text_classification.py

Is a review good or bad? The words that tell are others in every domain, and some change sides:
"unpredictable" is praise for a film and a fault of a train. Config and weights are made here,
nothing is downloaded; `AutoModelForSequenceClassification.from_pretrained(...)` and its tokenizer
go in their place.
"""

import itertools
import random

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from cl_merge.callbacks import MergeCallback

# Nouns, words of praise and of blame in each domain; the first stands for the pre-training.
DOMAINS = {
    "general": ("thing day one", "good great lovely fine", "bad awful poor terrible"),
    "films": (
        "film plot actor scene",
        "moving witty gripping unpredictable dark",
        "dull flat predictable long fast",
    ),
    "meals": (
        "soup steak sauce waiter",
        "tasty fresh crisp tender hot",
        "salty stale greasy burnt cold",
    ),
    "trains": (
        "train seat station driver",
        "punctual clean quiet fast predictable",
        "late dirty crowded unpredictable hot",
    ),
}
OPENINGS = ("the", "this", "our", "that", "my")
ADVERBS = ("very", "quite", "really", "rather", "so")


class Reviews(L.LightningModule):
    """A transformer in a module that knows nothing of merging."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.model = BertForSequenceClassification(
            BertConfig(
                vocab_size=words,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=16,
            )
        )

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Compute the loss of a batch."""
        tokens, labels = batch
        loss: Tensor = self.model(input_ids=tokens, labels=labels).loss
        return loss

    def test_step(self, batch: list[Tensor]) -> None:
        """Log the accuracy of a batch."""
        tokens, labels = batch
        right = self.model(input_ids=tokens).logits.argmax(dim=1) == labels
        self.log("accuracy", right.float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer, afresh for every task."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Train three domains and merge; print the accuracy on each, in per cent."""
    L.seed_everything(0, verbose=False)
    corpora = {name: reviews(*words) for name, words in DOMAINS.items()}
    known = {word for corpus in corpora.values() for text, _ in corpus for word in text.split()}
    vocabulary = {word: number for number, word in enumerate(sorted(known))}
    loaders = {name: split(corpus, vocabulary) for name, corpus in corpora.items()}
    tests = {name: test for name, (_, test) in loaders.items()}

    module = Reviews(len(vocabulary))
    trainer(5).fit(module, loaders["general"][0])
    print(f"{'':12}", *(f"{name:>8}" for name in DOMAINS))
    show("pre-trained", trainer(), module, tests)

    merge = MergeCallback("magmax")
    for name in ("films", "meals", "trains"):
        trainer(5, merge).fit(module, loaders[name][0])

    show("fine-tuned", trainer(), module, tests)
    show("merged", trainer(1, merge), module, tests)


def reviews(nouns: str, praise: str, blame: str) -> list[tuple[str, int]]:
    """Write every review that the words of a domain allow, with 1 for praise, in random order."""
    found = [
        (f"{opening} {noun} was {adverb} {word}", label)
        for label, words in enumerate((blame, praise))
        for opening, noun, adverb, word in itertools.product(
            OPENINGS, nouns.split(), ADVERBS, words.split()
        )
    ]
    random.shuffle(found)
    return found


def split(
    corpus: list[tuple[str, int]], vocabulary: dict[str, int]
) -> tuple[DataLoader, DataLoader]:
    """Make the loaders of training and test: all reviews are equally long, so none is padded."""
    tokens = torch.tensor([[vocabulary[word] for word in text.split()] for text, _ in corpus])
    data = TensorDataset(tokens, torch.tensor([label for _, label in corpus]))
    train, test = torch.utils.data.random_split(data, [0.7, 0.3])
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=500)


def trainer(epochs: int = 1, *callbacks: L.Callback) -> L.Trainer:
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


def show(
    what: str, trainer: L.Trainer, module: L.LightningModule, tests: dict[str, DataLoader]
) -> None:
    """Print the accuracy on each domain."""
    found = [trainer.test(module, test, verbose=False)[0]["accuracy"] for test in tests.values()]
    print(f"{what:12}", *(f"{100 * accuracy:8.1f}" for accuracy in found))


if __name__ == "__main__":
    main()
