"""What a run logs: names that are documented, one axis, one entry in every logger."""

import csv
import json
import logging
import math
import re
import struct
from pathlib import Path

import pytest
import torch
from killing import child

from cl_merge import cli
from cl_merge.benchmarks.runs import loggers, run_log
from cl_merge.benchmarks.runs.loggers import ADAPTERS, RunInfo, check_loggers, close_logger
from cl_merge.config.reading import read_config
from cl_merge.config.schema import RunConfig
from cl_merge.errors import InputError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SMALL = [
    "stream.tasks=3",
    "stream.images_per_class=4",
    "stream.test_fraction=0.05",
    "stream.batch_size=8",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "loggers=csv",
]
STEPS = [4, 4, 4]  # batches of 8 from 3 or 4 classes with 4 images, twice
ONE_ROW = ("accuracy", "average_accuracy", "task_aware_accuracy")
EXTRAS = ("tensorboard", "mlflow", "wandb")


def run(folder: Path, *words: str) -> int:
    return cli.main(["run", *SMALL, *words, f"out={folder}"])


def needs(name: str) -> None:
    if name != "csv":
        reason = f"logger {name} is an optional extra, cl-merge[{name}], and not installed"
        pytest.importorskip(ADAPTERS[name].package, reason=reason)
    if name == "mlflow":
        pytest.importorskip("alembic", reason="MLflow's database needs cl-merge[mlflow]")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with every kind of training."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder, "method=magmax", "compare=[independent,lwf,ewc,drift-penalty,joint]") == 0
    return folder


@pytest.fixture(scope="module")
def logged(whole):
    return in_csv(whole)


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    """A run whose layers learn at rates of their own."""
    folder = tmp_path_factory.mktemp("layered") / "run"
    words = ["stream.tasks=1", "optimizer.layer_decay=0.5", "trainer.max_epochs=1"]
    assert run(folder, *words, "compare=false") == 0
    return in_csv(folder)


# Names


def documented() -> dict[str, re.Pattern[str]]:
    """The names in the tables of the documentation, and what matches each."""
    text = (ROOT / "docs/howto/logging.md").read_text()
    names = re.findall(r"^\| `((?:train|eval)/[^`]+)` \|", text, flags=re.MULTILINE)
    holes = {"<training>": "[a-z-]+", "<method>": "[a-z-]+", "<task>": r"\d\d", "<group>": r"\d\d"}
    found = {}
    for name in names:
        pattern = name
        for hole, filling in holes.items():
            pattern = pattern.replace(hole, filling)
        found[name] = re.compile(pattern)
    return found


def test_every_name_that_is_logged_is_documented(logged, layered):
    patterns = documented().values()
    for name in logged | layered:
        assert sum(bool(pattern.fullmatch(name)) for pattern in patterns) == 1, name


def test_every_name_that_is_documented_is_logged(logged, layered):
    for name, pattern in documented().items():
        assert any(pattern.fullmatch(each) for each in logged | layered), name


def test_names_of_methods_of_ones_own_are_taken_by_every_logger():
    assert run_log._word("müde & satt/x") == "m-de-satt-x"


# Steps


def test_the_axis_goes_on_from_task_to_task(logged):
    for name in ("sequential", "independent", "lwf", "ewc", "drift-penalty"):
        for value in ("loss", "lr", "task", "epoch"):
            assert steps(logged[f"train/{name}/{value}"]) == list(range(sum(STEPS))), (name, value)
        assert values(logged[f"train/{name}/task"]) == [0] * 4 + [1] * 4 + [2] * 4
        assert values(logged[f"train/{name}/epoch"]) == [0, 0, 1, 1] * 3
    assert steps(logged["train/lwf/lwf/loss"]) == list(range(STEPS[0], sum(STEPS)))


def test_the_learning_rate_is_that_of_each_step(logged):
    cosine = [1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert values(logged["train/sequential/lr"]) == pytest.approx(3 * cosine)


def test_layers_log_their_rates_from_the_first(layered):
    rates = [layered[name][0][1] for name in sorted(layered) if "/lr/group_" in name]
    assert len(rates) > 2
    assert rates[-1] / rates[-2] == pytest.approx(2)
    assert rates == sorted(rates)


def test_evaluations_stand_where_their_task_ended(logged):
    for method in ("magmax", "independent", "lwf", "ewc", "drift-penalty"):
        assert steps(logged[f"eval/{method}/accuracy"]) == [4, 8, 12]
        assert steps(logged[f"eval/{method}/task_02/accuracy"]) == [4, 8, 12]
        assert steps(logged[f"eval/{method}/forgetting"]) == [8, 12]
    assert steps(logged["eval/zero-shot/accuracy"]) == [0]
    assert steps(logged["eval/joint/accuracy"]) == [len(logged["train/joint/loss"])] == [10]


# Values


def test_after_the_last_task_the_figures_are_those_of_the_results(whole, logged):
    results = json.loads((whole / "results.json").read_text())["methods"]
    for method, result in results.items():
        for name, value in result["metrics"].items():
            if method == "zero-shot" and name not in ONE_ROW:
                value = None
            series = logged.get(f"eval/{method}/{name}")
            assert (series is None) == (value is None), (method, name)
            assert series is None or series[-1][1] == pytest.approx(value), (method, name)


def test_after_every_task_the_figures_are_those_of_a_stream_that_ends_there(whole, logged):
    results = json.loads((whole / "results.json").read_text())
    images = [task["test_images"] for task in results["tasks"]]
    zero = results["methods"]["zero-shot"]["matrix"][0]
    for method in ("magmax", "independent", "ewc"):
        found, matrix = results["methods"][method], results["methods"][method]["matrix"]
        at = {name: values(logged[f"eval/{method}/{name}"]) for name in found["metrics"]}
        assert at["accuracy"] == pytest.approx(found["seen"])
        for task in range(3):
            column = values(logged[f"eval/{method}/task_{task:02d}/accuracy"])
            aware = values(logged[f"eval/{method}/task_{task:02d}/task_aware_accuracy"])
            assert column == pytest.approx([row[task] for row in matrix])
            assert aware == pytest.approx([row[task] for row in found["matrix_task_aware"]])
        seen = found["matrix_task_aware"][1][:2]
        mean = sum(n * x for n, x in zip(images, seen, strict=False)) / sum(images[:2])
        assert at["task_aware_accuracy"][1] == pytest.approx(mean)
        assert at["average_accuracy"][1] == pytest.approx((matrix[1][0] + matrix[1][1]) / 2)
        assert at["average_incremental_accuracy"][1] == pytest.approx(sum(found["seen"][:2]) / 2)
        assert at["backward_transfer"][0] == pytest.approx(matrix[1][0] - matrix[0][0])
        assert at["forgetting"][0] == pytest.approx(matrix[0][0] - matrix[1][0])
        assert at["forward_transfer"][0] == pytest.approx(matrix[0][1] - zero[1])


# One run, however often it was stopped


def test_a_run_that_is_killed_has_no_gap_and_repeats_only_equal_values(tmp_path):
    needs("tensorboard")
    words = ["method=magmax", "compare=false", "checkpoint_seconds=0", "stream.tasks=2"]

    def work(folder):
        torch.set_num_threads(1)  # a fork has none of the threads that there were
        return run(folder, *words, "loggers=[csv,tensorboard]")

    assert child(lambda: work(tmp_path / "whole")) is not None
    killed, kills = tmp_path / "killed", 0
    # At its first flush to the disk, then each time 14 further on.
    while child(lambda: work(killed), writes=27 if kills else 1) is None:
        kills += 1
    assert kills >= 3
    for read in (in_csv, in_tensorboard):
        found, expected = read(killed), read(tmp_path / "whole")
        assert found.keys() == expected.keys()
        for name, series in expected.items():
            assert {(s, v) for s, v in found[name]} == {(s, v) for s, v in series}, name


ROWS = [
    (0, {"a/x": 1.0, "b": 5.0}),
    (1, {"a/x": 2.0}),
    (4, {"a/x": 3.0, "b": 6.0}),
    (2, {"c": 7.0}),
]
SERIES = {"a/x": [[0, 1.0], [1, 2.0], [4, 3.0]], "b": [[0, 5.0], [4, 6.0]], "c": [[2, 7.0]]}


def opened(name, folder):
    options = {"mode": "offline"} if name == "wandb" else {}
    return ADAPTERS[name].open(RunInfo("title", {"seed": 3}, folder / "logs"), options)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "wandb"])
def test_a_logger_that_is_opened_again_goes_on(name, tmp_path):
    needs(name)
    for rows in (ROWS[:2], ROWS[2:]):
        logger = opened(name, tmp_path)
        for step, metrics in rows:
            logger.log_metrics(metrics, step)
        close_logger(logger, "success")
    found = in_logger(name, tmp_path)
    assert {name: series for name, series in found.items() if name != "hp_metric"} == SERIES


@pytest.mark.parametrize("lost", [2, 5, 10])  # the line's end, and more of its numbers
def test_a_line_of_csv_that_was_cut_off_is_left_out(lost, tmp_path):
    logger = opened("csv", tmp_path)
    for step, value in ((0, 1.25), (1000, 2.25)):
        logger.log_metrics({"a": value, "b": value}, step)
    close_logger(logger, "success")
    file = tmp_path / "logs/csv/metrics.csv"
    file.write_bytes(file.read_bytes()[:-lost])
    close_logger(opened("csv", tmp_path), "success")
    assert in_csv(tmp_path) == {"a": [[0, 1.25]], "b": [[0, 1.25]]}


def test_wandb_goes_on_in_the_same_run(tmp_path):
    needs("wandb")
    runs = []
    for _ in range(2):
        logger = opened("wandb", tmp_path)
        for step, metrics in ROWS:
            logger.log_metrics(metrics, step)
        runs.append(logger.experiment.id)
        close_logger(logger, "success")
        assert in_wandb(tmp_path) == SERIES
    assert runs[0] == runs[1]
    assert (tmp_path / "logs" / "wandb.json").exists()


def test_mlflow_goes_on_in_the_same_run(tmp_path):
    needs("mlflow")
    states = []
    for status in ("failed", "success"):
        logger = opened("mlflow", tmp_path)
        client, name = logger.experiment, logger.run_id
        states.append(client.get_run(name).info.status)
        close_logger(logger, status)
        states.append(client.get_run(name).info.status)
    assert states == ["RUNNING", "FAILED", "RUNNING", "FINISHED"]
    experiment = client.get_experiment_by_name("cl-merge").experiment_id
    assert [found.info.run_id for found in client.search_runs([experiment])] == [name]
    assert client.get_run(name).data.params == {"seed": "3"}


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """A run whose logger failed on the way, and which a method joined later; what it said."""
    folder, calls, said = tmp_path_factory.mktemp("joined") / "run", [], []
    log_metrics = loggers.CSVLogger.log_metrics

    def fail(self, metrics, step):
        calls.append(step)
        if len(calls) == 3:
            raise ConnectionError("the server is gone")
        log_metrics(self, metrics, step)

    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    run_log.log.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loggers.CSVLogger, "log_metrics", fail)
        assert run(folder, "method=max-abs", "compare=false") == 0
    run_log.log.removeHandler(handler)
    assert run(folder, "method=max-abs", "compare=[independent]") == 0
    return folder, said, len(calls)


def test_a_logger_that_fails_costs_a_warning_and_goes_on_with_the_next_run(joined):
    folder, said, calls = joined
    assert calls == 3
    assert len(said) == 1
    assert said[0].startswith("logger CSVLogger failed (the server is gone) and gets nothing more")
    assert steps(in_csv(folder)["eval/zero-shot/accuracy"]) == [0]


def test_a_method_that_joins_a_run_is_logged_as_if_it_had_been_there(joined, logged):
    found = in_csv(joined[0])
    names = [name for name in logged if name.startswith("eval/independent/")]
    assert names
    for name in names:
        assert found[name] == logged[name], name


def test_the_settings_are_written_once_by_their_names_on_the_command_line(whole):
    from lightning.pytorch.core.saving import load_hparams_from_yaml

    found = load_hparams_from_yaml(str(whole / "logs/csv/hparams.yaml"))
    assert found["stream.tasks"] == 3
    assert found["trainer.max_epochs"] == 2
    assert not [name for name in found if name.startswith("loggers")]


# What it must not do


def test_loggers_change_no_bit_of_what_is_learned(whole, tmp_path, capsys):
    there = [name for name in EXTRAS if all_there(name)]
    options = "{" + ",".join(["csv: null", *(f"{n}: {{}}" for n in there if n != "wandb")])
    options += ", wandb: {mode: offline}}" if "wandb" in there else "}"
    words = ["method=magmax", "compare=false", "trainer.max_epochs=1"]
    assert run(tmp_path / "with", *words, f"loggers={options}") == 0
    assert "results.json, logs, accuracy_matrix.png" in capsys.readouterr().out
    assert run(tmp_path / "without", *words, "loggers=false") == 0
    assert not (tmp_path / "without" / "logs").exists()
    assert "results.json, accuracy_matrix.png" in capsys.readouterr().out
    found = {
        name: {f.name: f.read_bytes() for f in (tmp_path / name).rglob("*.safetensors")}
        for name in ("with", "without")
    }
    assert len(found["with"]) == 4
    assert found["with"] == found["without"]
    series = in_csv(tmp_path / "with")
    for name in there:
        names = in_logger(name, tmp_path / "with").keys() - {"hp_metric"}
        assert names == series.keys(), name


def test_processes_other_than_the_first_log_nothing(tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    words = ["stream.tasks=1", "trainer.max_epochs=1", "method=sequential", "compare=false"]
    assert run(tmp_path / "run", *words) == 0
    assert not (tmp_path / "run" / "logs").exists()


# Bad input


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("loggers=tensorbord", "unknown logger 'tensorbord'; did you mean 'tensorboard'"),
        ("loggers=[csv,mflow]", "unknown logger 'mflow'; did you mean 'mlflow'"),
        ("loggers=3", "loggers=3; expected a name, a list of names, or false"),
        ("loggers={csv: 5}", "loggers.csv=5; expected options of the logger, by name"),
    ],
)
def test_what_is_no_logger_is_refused_when_settings_are_read(word, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read_config([word], {})


def test_a_logger_that_is_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    for name in EXTRAS:
        with pytest.raises(InputError, match=rf'loggers={name}.*pip install "cl-merge\[{name}\]"'):
            check_loggers(RunConfig(loggers=name))


@pytest.mark.parametrize(
    ("name", "option", "nearest"),
    [("wandb", "projct", "project"), ("mlflow", "experiment", "experiment_name")],
)
def test_an_option_that_a_logger_does_not_have_is_refused(name, option, nearest):
    needs(name)
    message = f"unknown option 'loggers.{name}.{option}'; did you mean '{nearest}'?"
    with pytest.raises(InputError, match=re.escape(message)):
        check_loggers(RunConfig(loggers={name: {option: 1}}))


def test_csv_takes_no_options():
    with pytest.raises(InputError, match="unknown option 'loggers.csv.version'"):
        check_loggers(RunConfig(loggers={"csv": {"version": 1}}))


def test_a_server_that_cannot_be_is_refused_before_anything_trains(tmp_path, capsys):
    needs("mlflow")
    words = ["loggers={mlflow: {tracking_uri: 'nowhere://x'}}", "compare=false"]
    assert run(tmp_path / "run", *words) == 2
    assert "cl-merge: loggers.mlflow: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "task_vectors").exists()


def test_loggers_of_the_trainer_are_refused_but_may_be_switched_off():
    with pytest.raises(InputError, match="trainer.logger=x; loggers= names"):
        check_loggers(RunConfig(trainer={"logger": "x"}))
    assert check_loggers(RunConfig(trainer={"logger": False}, loggers="csv")) == {}
    assert check_loggers(RunConfig(loggers=False)) == check_loggers(RunConfig(loggers=[])) == {}


# What several tests need


def steps(series: list[list[float]]) -> list[int]:
    return [int(step) for step, _ in series]


def values(series: list[list[float]]) -> list[float]:
    return [value for _, value in series]


def all_there(name: str) -> bool:
    try:
        needs(name)
    except pytest.skip.Exception:
        return False
    return True


def in_logger(name: str, folder: Path) -> dict[str, list[list[float]]]:
    """By name what a logger of a run holds."""
    if name == "csv":
        return in_csv(folder)
    if name == "tensorboard":
        return in_tensorboard(folder)
    return in_mlflow(folder) if name == "mlflow" else in_wandb(folder)


def in_csv(folder: Path) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {}
    with (folder / "logs/csv/metrics.csv").open() as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    found.setdefault(name, []).append([step, float(value)])
    return found


def in_tensorboard(folder: Path) -> dict[str, list[list[float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = str(folder / "logs/tensorboard")
    events = EventAccumulator(place, size_guidance={"scalars": 0}, purge_orphaned_data=False)
    names = events.Reload().Tags()["scalars"]
    return {name: [[e.step, e.value] for e in events.Scalars(name)] for name in names}


def in_mlflow(folder: Path) -> dict[str, list[list[float]]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'logs/mlflow/mlflow.db'}")
    run = client.get_run(json.loads((folder / "logs/mlflow.json").read_text())["id"])
    return {
        name: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def in_wandb(folder: Path) -> dict[str, list[list[float]]]:
    """What the newest file of W&B holds: protobuf messages in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    file = max(folder.glob("logs/wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime_ns)
    data, place, whole, found = file.read_bytes(), 7, b"", {}
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block is empty
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of a record, or its last part
            record = Record.FromString(whole)
            whole = b""
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            step = row.pop("trainer/global_step", None)
            for name, value in row.items():
                if not name.startswith("_"):
                    found.setdefault(name, []).append([step, value])
    return found
