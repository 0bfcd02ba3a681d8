"""Each example runs as its first lines say, and prints what its README shows."""

import os
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from forked import forked
from safetensors.torch import load_file

from cl_merge.cli import main as cl_merge

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(folder, command):
    """Run a command of an example in a folder of its own; what it printed."""
    script, *arguments = shlex.split(command)

    def work():
        os.chdir(folder)
        sys.argv = [script, *arguments]
        with redirect_stdout(StringIO()) as printed:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return printed.getvalue()

    # All that an example imports, and this takes most of its time, is there already.
    printed = forked(work, folder / "printed.txt")
    assert isinstance(printed, str), f"it ended with {printed}"
    return printed


def table(text):
    """Rows of numbers, by what stands before them."""
    rows = re.findall(r"^(\S.*?)((?: +-?\d+\.\d+)+)$", text, flags=re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in rows}


def mean(numbers):
    return sum(numbers) / len(numbers)


def test_plain_module_remembers_more_merged_than_fine_tuned(tmp_path):
    found = table(run(tmp_path, "plain_module.py"))
    assert list(found) == ["pre-trained", "fine-tuned", "merged"]
    assert mean(found["merged"]) > mean(found["fine-tuned"]) > mean(found["pre-trained"])
    assert found["merged"][0] > found["fine-tuned"][0] + 10


def test_lightning_cli_carries_the_tasks_through_checkpoints(tmp_path):
    folder = EXAMPLES / "lightning_cli"
    commands = re.findall(r"^    python main\.py (.*)$", (folder / "main.py").read_text(), re.M)
    assert [command.split()[0] for command in commands] == ["fit", "fit", "fit", "test"]
    *fits, test = [
        command.replace("config.yaml", str(folder / "config.yaml")) for command in commands
    ]
    for command in fits:
        run(tmp_path, f"lightning_cli/main.py {command}")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)
    (state,) = saved["callbacks"].values()
    base = torch.load(tmp_path / "base.ckpt", weights_only=True)["state_dict"]
    assert state["merger"]["tasks"] == 2
    assert all(torch.equal(base[name], value) for name, value in state["base"].items())

    merged = run(tmp_path, f"lightning_cli/main.py {test}")
    tuned = run(tmp_path, f"lightning_cli/main.py {test} --trainer.callbacks null")
    assert accuracy(merged) > accuracy(tuned) + 0.1


def test_options_of_a_method_stand_in_a_configuration_as_the_docs_say(tmp_path):
    page = (EXAMPLES.parent / "docs/howto/callback.md").read_text()
    wanted = yaml.safe_load(re.search(r"```yaml\n(trainer:.*?)```", page, re.S)[1])
    config = yaml.safe_load((EXAMPLES / "lightning_cli/config.yaml").read_text())
    config["trainer"] |= wanted["trainer"] | {"max_epochs": 1}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    run(tmp_path, "lightning_cli/main.py fit -c own.yaml --data.task noisy --to one.ckpt")
    (state,) = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"].values()
    assert state["merger"]["method"] == "ties"
    assert state["merger"]["options"]["density"] == 0.1


def accuracy(printed):
    return float(re.search(r"accuracy\D+(\d\.\d+)", printed)[1])


def test_text_classification_remembers_more_merged_than_fine_tuned(tmp_path):
    found = table(run(tmp_path, "text_classification.py"))
    assert list(found) == ["pre-trained", "fine-tuned", "merged"]
    assert found["merged"][1] > found["fine-tuned"][1]
    assert mean(found["merged"]) > mean(found["pre-trained"])


def test_intents_are_learned_in_every_way(tmp_path):
    intents = {
        "spending": ["what have i spent on food", "how much went to food", "my spending on rent"],
        "transfer": ["send money to ann", "wire ten pounds to bob", "move money to savings"],
        "flights": ["book a flight to rome", "i need a plane to oslo", "find flights to lima"],
        "luggage": ["my suitcase is lost", "where is my bag", "they lost my luggage"],
    }
    rows = [
        {"text": text, "label": label, "domain": label // 2}
        for label, texts in enumerate(intents.values())
        for text in texts
    ]
    names = ClassLabel(names=list(intents))
    columns = {"text": Value("string"), "label": names, "domain": Value("int64")}
    for part in ("train", "test"):
        Dataset.from_list(rows, Features(columns)).to_parquet(tmp_path / f"{part}.parquet")
    found = table(run(tmp_path, f"intents.py --data {tmp_path} --utterances 3"))
    assert found["joint"][0] > 90
    assert found["magmax + class statistics"][0] > 90
    assert {"zero-shot", "sequential", "lwf", "ewc", "lwf + magmax", "ewc + magmax"} < set(found)


def test_a_plain_loop_remembers_more_merged_than_fine_tuned(tmp_path):
    found = table(run(tmp_path, "plain_torch.py"))
    assert list(found) == ["fine-tuned", "merged"]
    assert found["merged"][0] > found["fine-tuned"][0] + 10


def test_the_trainer_of_transformers_remembers_more_merged_than_the_last_task(tmp_path):
    found = table(run(tmp_path, "hf_trainer.py"))
    assert list(found) == ["last task", "merged"]
    assert mean(found["merged"]) < mean(found["last task"])


def test_lora_saves_the_adapter_that_it_measured(tmp_path):
    printed = run(tmp_path, "lora.py adapter")
    found = table(printed)
    assert found["loaded adapter"] == found["merged factors"]
    assert found["merged products"] != found["merged factors"]
    assert float(re.search(r"relative to the products: (\d\.\d+)", printed)[1]) > 0.1
    assert mean(found["merged factors"]) > mean(found["fine-tuned"])
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(saved) == 6
    assert all("lora_" in name for name in saved)


def test_own_merger_gives_the_same_in_a_callback_and_on_the_command_line(tmp_path):
    assert "merged 2 tasks with decay, {'rate': 0.7}" in run(tmp_path, "own_merger.py out")
    out = tmp_path / "out"
    tasks = [str(out / f"task{task}.safetensors") for task in (0, 1)]
    method = ["--method", f"{EXAMPLES}/own_merger.py:decay", "--set", "rate=0.7"]
    merged = out / "merged.safetensors"
    done = cl_merge(["merge", str(out / "base.safetensors"), *tasks, *method, "-o", str(merged)])
    assert not done
    expected = load_file(out / "by_callback.safetensors")
    found = load_file(merged)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_own_data_runs_from_one_file(tmp_path, capsys, monkeypatch):
    assert "wrote 240 pictures" in run(tmp_path, "own_data.py photos")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_data.yaml").write_text((EXAMPLES / "own_data.yaml").read_text())
    done = cl_merge(["run", "data=own_data.yaml", "out=out", "trainer.max_epochs=1"])
    assert not done
    printed = capsys.readouterr().out
    assert "own_data with glyph: 8 classes in 4" in " ".join(printed.split())
    assert re.search(r"magmax +0\.5", printed)


def test_class_statistics_know_all_classes_where_the_head_knows_some(tmp_path):
    found = table(run(tmp_path, "class_statistics.py"))
    assert list(found) == ["after task 1", "after task 2", "after task 3"]
    head, statistics = found["after task 3"]
    assert statistics > 85 > head
