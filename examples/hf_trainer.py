"""StreamMerger in the Trainer of Hugging Face transformers, by a callback of a few lines.

    python hf_trainer.py

A small language model reads counting in one language after another. Config and weights are made
here, nothing is downloaded; `AutoModelForCausalLM.from_pretrained(...)` goes in their place.
"""

from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from cl_merge import StreamMerger

COUNTING = {
    "english": "zero one two three four five six seven eight nine ten",
    "german": "null eins zwei drei vier sechs sieben acht neun zehn elf",
    "italian": "zero uno due tre quattro cinque sei sette otto nove dieci",
}


class MergeTasks(TrainerCallback):
    """Every call of ``train`` is a task.

    For ``start="independent"`` or ``"merged"`` call `begin_task` before the Trainer is made
    instead: by now its optimizer may have copied weights.
    """

    def __init__(self, stream: StreamMerger) -> None:
        self.stream = stream

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Note where the task starts."""
        self.stream.begin_task()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Fold what it changed."""
        self.stream.end_task()


class Counting(Dataset):
    """Stretches of counting, as letters by their numbers."""

    def __init__(self, words: str, size: int = 96) -> None:
        every = words.split()
        starts = torch.randint(6, (size,)).tolist()
        texts = [" ".join(every[start : start + 6])[:24] for start in starts]
        self.tokens = [torch.tensor([ord(letter) % 32 for letter in text]) for text in texts]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def main() -> None:
    """Train three tasks and merge; print the loss of each, in nats a letter."""
    set_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    module = GPT2LMHeadModel(config)
    data = {name: Counting(words) for name, words in COUNTING.items()}
    trainer(module, data["english"], epochs=1).train()  # stands for the pre-training

    stream = StreamMerger(module, "magmax")
    for name in data:
        trainer(module, data[name], 3, MergeTasks(stream)).train()

    print(f"{'':12}", *(f"{name:>8}" for name in data))
    show("last task", module, data)
    with stream.merged_weights():
        show("merged", module, data)


def trainer(
    module: GPT2LMHeadModel, data: Counting, epochs: int = 1, *callbacks: TrainerCallback
) -> Trainer:
    """Make a Trainer that keeps quiet: each task has a new one."""
    arguments = TrainingArguments(
        output_dir="hf_trainer",
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    made = Trainer(module, arguments, train_dataset=data, callbacks=list(callbacks))
    made.remove_callback(PrinterCallback)
    return made


def show(what: str, module: GPT2LMHeadModel, data: dict[str, Counting]) -> None:
    """Print the loss of each task."""
    losses = [trainer(module, each).evaluate(each)["eval_loss"] for each in data.values()]
    print(f"{what:12}", *(f"{loss:8.2f}" for loss in losses))


if __name__ == "__main__":
    main()
