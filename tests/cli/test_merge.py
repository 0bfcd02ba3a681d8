"""What ``cl-merge merge`` takes, prints and returns."""

import json
import re

import pytest
import torch
from file_cases import in_memory, listed, random_weights, read, same_bits, tuned, write
from safetensors import safe_open

from cl_merge import cli
from cl_merge.cli.merge import read_scale, read_size
from cl_merge.errors import InputError
from cl_merge.mergers import MERGERS

LAYOUT = {
    "visual.attn.weight": (torch.float32, (8, 6)),
    "visual.mlp.weight": (torch.bfloat16, (8, 6)),
    "text.weight": (torch.float32, (5, 4)),
    "steps": (torch.int64, ()),
}
TASKS = [f"task{seed}.safetensors" for seed in range(3)]


@pytest.fixture
def base():
    return random_weights(LAYOUT, 0)


@pytest.fixture
def tasks(base):
    return [tuned(base, seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def files(tmp_path, base, tasks, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name, weights in zip(("base", "task0", "task1", "task2"), (base, *tasks), strict=True):
        write(tmp_path, name, weights, "safetensors")
    return tmp_path


@pytest.fixture
def merge(capsys):
    """Merge the three tasks; returns exit code, output and errors."""

    def run(*words, output="m.safetensors", files=TASKS):
        code = cli.main(["merge", "base.safetensors", *files, "-o", output, *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def output(folder, name="m.safetensors"):
    return read(folder / name)


@pytest.mark.parametrize("before", [[], ["task0.safetensors"]])
def test_names_after_two_dashes_may_begin_with_one(merge, files, before):
    (files / "task1.safetensors").rename(files / "-1.safetensors")
    code, text, _ = merge("--", "-1.safetensors", files=before)
    assert code == 0
    assert f"merged from {len(before) + 1} task" in text


def test_it_merges_and_tells_what_it_did(merge, files, base, tasks):
    code, printed, complained = merge()
    assert (code, complained) == (0, "")
    assert same_bits(output(files), in_memory(base, tasks, "magmax"))
    assert re.fullmatch(
        r"m\.safetensors: 3 tensors merged from 3 tasks, 1 taken from the base\n"
        r"method magmax, scale 0\.5; read 1\.\d+ KB in \d+\.\d s, \S+ [KMG]B/s\n",
        printed,
    )


def test_method_options_and_scale(merge, files, base, tasks):
    code, printed, _ = merge("--method", "ties", "--set", "density=0.5", "--scale", "0.7")
    assert code == 0
    assert same_bits(output(files), in_memory(base, tasks, "ties", 0.7, density=0.5))
    assert "method ties (density=0.5, per_parameter=False, " in printed
    assert "), scale 0.7; read" in printed


def test_scales_by_pattern_in_any_order(merge, files, base, tasks):
    words = ["--scale", "0.25", "--scale", "visual.*attn*=1.5", "--scale", "visual.*=-1"]
    code, printed, _ = merge(*words)
    assert code == 0
    scales = {"visual.attn.weight": 1.5, "visual.mlp.weight": -1.0}
    expected = {n: in_memory(base, tasks, "magmax", scales.get(n, 0.25))[n] for n in base}
    assert same_bits(output(files), expected)
    assert 'scale {"visual.*attn*": 1.5, "visual.*": -1.0, "*": 0.25}' in printed


def test_a_scale_that_grows_with_depth(merge, files):
    layers = {f"layers.{i}.weight": torch.zeros(4) for i in range(3)}
    write(files, "base", layers, "safetensors")
    write(files, "t", {name: torch.ones(4) for name in layers}, "safetensors")
    assert merge("--scale", "lines:0.25:0.75", files=["t.safetensors"])[0] == 0
    assert [float(tensor[0]) for tensor in output(files).values()] == [0.25, 0.5, 0.75]
    for words in (["lines:1"], ["lines:a:b"], ["lines:0:1", "0.5"]):
        given = [word for number in words for word in ("--scale", number)]
        code, _, complained = merge(*given, files=["t.safetensors"], output="o.safetensors")
        assert code == 2
        assert "expected lines:LOW:HIGH alone, as in lines:0.2:1" in complained


def test_include_and_exclude(merge, files, base, tasks):
    code, printed, complained = merge("--include", "visual.*", "--exclude", "*mlp*")
    assert code == 0
    expected = in_memory(base, tasks, "magmax")["visual.attn.weight"]
    assert same_bits(output(files), {**base, "visual.attn.weight": expected})
    assert "1 tensor merged from 3 tasks, 3 taken from the base" in printed
    assert " ".join(complained.split()) == (
        "tensors that are not merged differ between the inputs; the base's were taken: "
        "text.weight, visual.mlp.weight"
    )


def test_adapters_become_an_adapter_and_its_error_is_told(merge, files):
    for seed in range(2):
        folder = files / f"adapter{seed}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 2}')
        factors = {"A": (2, 6), "B": (8, 2)}
        prefix = "base_model.model.visual.attn.lora_"
        tensors = {f"{prefix}{k}.weight": torch.randn(shape) for k, shape in factors.items()}
        write(folder, "adapter_model", tensors, "safetensors")
    adapters = ["adapter0", "adapter1"]
    code, printed, _ = merge("--lora-rank", "auto", output="a", files=adapters)
    assert code == 0
    assert re.match(
        r"a: 1 tensor merged from 2 tasks into an adapter of rank 4\n"
        r"relative error 0\.\d+, at most 0\.\d+ \(visual\.attn\.weight\)\n"
        r"method magmax, scale 0\.5; read ",
        printed,
    )
    code, _, complained = merge("--lora-rank", "few", output="b", files=adapters)
    assert code == 2
    assert "--lora-rank few: expected a whole number, or auto" in complained


def test_a_folder_is_sharded_by_size(merge, files):
    assert merge("--shard-size", "0.1KB", output="merged")[0] == 0
    assert "model.safetensors.index.json" in listed(files / "merged")
    assert len([name for name in listed(files / "merged") if "safetensors" in name]) == 4
    assert merge(output="whole")[0] == 0
    assert listed(files / "whole") == ["README.md", "model.safetensors"]
    assert same_bits(output(files, "merged"), output(files, "whole"))


def test_a_method_of_ones_own(merge, files, base, tasks):
    (files / "mine.py").write_text(
        "from cl_merge.mergers import MaxMagnitude\n"
        "class Mine(MaxMagnitude):\n    name = 'mine'\n    published_scale = 1.0\n"
    )
    code, printed, _ = merge("--method", "mine.py:Mine")
    assert code == 0
    assert same_bits(output(files), in_memory(base, tasks, "magmax", 1.0))
    assert "method mine.py:Mine, scale 1.0" in printed


def test_tasks_that_a_pattern_names_are_merged_by_number(merge, files, base, tasks):
    order = ["task0.safetensors", "task10.safetensors", "task2.safetensors"]
    (files / "task1.safetensors").rename(files / order[1])
    code, _, complained = merge("--method", "ema", files=order)
    assert code == 0
    assert "in the order of their numbers" in complained
    in_order = [tasks[0], tasks[2], tasks[1]]
    assert same_bits(output(files), in_memory(base, in_order, "ema"))


def test_one_task(merge):
    assert "3 tensors merged from 1 task, 1 taken" in merge(files=TASKS[:1])[1]


def test_an_output_that_exists_is_replaced_only_if_asked(merge, files):
    (files / "m.safetensors").write_bytes(b"mine")
    code, printed, complained = merge()
    assert (code, printed) == (2, "")
    assert complained.startswith("cl-merge: the output 'm.safetensors' exists; give another name")
    assert (files / "m.safetensors").read_bytes() == b"mine"
    assert merge("--overwrite")[0] == 0
    assert "steps" in output(files)


def test_brackets_in_names_are_shown_as_they_are(merge):
    assert merge(output="[red].safetensors")[1].startswith("[red].safetensors: 3 tensors")


def test_the_output_can_be_merged_again(merge, files):
    merge(output="one.safetensors")
    assert merge(files=["one.safetensors", "task0.safetensors"])[0] == 0
    with safe_open(files / "m.safetensors", framework="pt") as file:
        inputs = json.loads(file.metadata()["cl_merge.inputs"])
    assert [entry["file"] for entry in inputs] == [
        "base.safetensors",
        "one.safetensors",
        "task0.safetensors",
    ]


def test_warnings_are_shown(merge):
    code, _, complained = merge(files=["task0.safetensors", "base.safetensors"])
    assert code == 0
    assert " ".join(complained.split()) == "'base.safetensors' is given more than once"


WRONG = {
    "method": (["--method", "tie"], "unknown method 'tie'; did you mean 'ties'?"),
    "option": (
        ["--method", "ties", "--set", "densty=0.3"],
        "unknown option of method 'ties' 'densty'; did you mean 'density'?",
    ),
    "argument as option": (
        ["--set", "scale=0.3"],
        "unknown option of method 'magmax' 'scale'. Known: none; without --set: --scale",
    ),
    "name of the engine's as option": (
        ["--set", "output=x"],
        "unknown option of method 'magmax' 'output'. Known: none",
    ),
    "number as option": (["--set", "3=4"], "unknown option of method 'magmax' '3'. Known: none"),
    "nested option": (["--set", "a.b=1"], "unknown option of method 'magmax' 'a'. Known: none"),
    "no setting": (
        ["--set", "density"],
        "'density' is no setting; expected key=value, such as density=0.3",
    ),
    "value of an option": (
        ["--method", "ties", "--set", "density=high"],
        "density must be a number above 0 and at most 1, or a list",
    ),
    "scale": (
        ["--scale", "big"],
        "--scale big: expected a number, or PATTERN=NUMBER as in 'visual.*=0.3'",
    ),
    "scale of a pattern": (["--scale", "visual.*=big"], "--scale visual.*=big: expected a number"),
    "scale twice": (["--scale", "1", "--scale", "2"], "--scale is given twice; give it once"),
    "pattern twice": (
        ["--scale", "v*=1", "--scale", "v*=2"],
        "--scale is given twice for 'v*'; give it once",
    ),
    "infinite scale": (["--scale", "inf"], "the scale must be a finite number, not inf"),
    "pattern of a scale": (["--scale", "vis*l=1"], "scale: the pattern 'vis*l' fits no parameter"),
    "include": (["--include", "image.*"], "include: the pattern 'image.*' fits no parameter"),
    "exclude": (["--exclude", "step"], "exclude: the pattern 'step' fits no parameter"),
    "size": (["--shard-size", "5 apples"], "--shard-size 5 apples: expected a size such as 5GB"),
    "importance": (["--importance", "base.safetensors"], "'magmax' takes no importances"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(merge, files, what):
    before = listed(files)
    words, message = WRONG[what]
    code, printed, complained = merge(*words)
    assert (code, printed) == (2, "")
    assert complained.startswith(f"cl-merge: {message}")
    assert complained.count("\n") == 1
    assert listed(files) == before


def test_inputs_that_do_not_match_are_one_line(merge, files):
    torch.save({"else": torch.ones(2)}, files / "other.pt")
    code, _, complained = merge(files=["other.pt"])
    assert code == 2
    assert complained.startswith("cl-merge: 'other.pt' has other tensors than the base")
    assert complained.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["base.safetensors"], ["base.safetensors", "task0.pt"]])
def test_missing_arguments_show_the_usage(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["merge", *words])
    assert stop.value.code == 2
    assert "usage: cl-merge merge" in capsys.readouterr().err


def test_help_lists_all_methods_with_their_scales_and_options(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["merge", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    for name, merger in MERGERS.items():
        assert any(line[:2] == [name, f"{merger.published_scale:g}"] for line in lines), name
    assert "density=0.2" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "scale"),
    [
        (None, None),
        (["0.5"], 0.5),
        (["-1e-3"], -0.001),
        (["a=1"], {"a": 1.0}),
        (["2", "a=b=1"], {"a=b": 1.0, "*": 2.0}),
        (["*=2"], 2.0),
    ],
)
def test_scales_are_read(words, scale):
    found = read_scale(words)
    assert found == scale
    assert not isinstance(scale, dict) or list(found) == list(scale)


@pytest.mark.parametrize(
    ("word", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500 MB", 500 * 10**6),
        ("1.5g", 15 * 10**8),
        ("2tb", 2 * 10**12),
        ("7", 7),
        ("7B", 7),
        (".5K", 500),
    ],
)
def test_sizes_are_read(word, size):
    assert read_size(word) == size


@pytest.mark.parametrize("word", ["", "GB", "-1GB", "0", "0.5", "1e9", "5PB", "5GBB", "inf"])
def test_what_is_no_size_is_refused(word):
    with pytest.raises(InputError, match="expected a size such as 5GB or 500MB"):
        read_size(word)


@pytest.mark.parametrize(
    "words",
    [
        "base.safetensors task0.safetensors task1.safetensors -o o.safetensors --method ties",
        "base.safetensors -o o.safetensors task0.safetensors --method ties task1.safetensors",
        "-o o.safetensors base.safetensors --method ties task0.safetensors task1.safetensors",
        "--method ties -o o.safetensors base.safetensors task0.safetensors task1.safetensors",
    ],
)
def test_files_may_stand_before_between_and_behind_options(files, base, tasks, words):
    assert cli.main(["merge", *words.split()]) == 0
    assert same_bits(output(files, "o.safetensors"), in_memory(base, tasks[:2], "ties"))
    assert cli.main(["inspect", "task0.safetensors", "--base", "base.safetensors", TASKS[1]]) == 0


@pytest.mark.parametrize(
    "words", ["", "base.safetensors", "base.safetensors --method ties", "--no-base a.pt"]
)
def test_a_merge_of_nothing_says_what_is_missing(files, words, capsys):
    assert cli.main(["merge", *words.split(), "-o", "o.safetensors"]) == 2
    assert "give BASE and at least one TASK, or --config FILE" in capsys.readouterr().err
    assert not (files / "o.safetensors").exists()
