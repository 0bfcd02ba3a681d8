"""A file of mergekit means here what it means there, or says which key does not exist here."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from file_cases import listed, read, write

from cl_merge import cli
from cl_merge.cli.mergekit import read_mergekit

SHAPES = {"model.mlp.weight": (8, 6), "model.attn.weight": (6, 6), "norm": (6,)}
WEIGHTS = [0.5, 0.25, 1.0]


@pytest.fixture
def states(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    for seed, name in enumerate(("base", "a", "b", "c")):
        generator = torch.Generator().manual_seed(seed)
        found.append({n: torch.randn(s, generator=generator) for n, s in SHAPES.items()})
        write(tmp_path / name, "model", found[-1], "safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    return found


def config(**top):
    """A file with the models a, b, and c, unless it says otherwise; returns its name."""
    each = [{"model": m, "parameters": {"weight": w}} for m, w in zip("abc", WEIGHTS, strict=True)]
    with open("merge.yml", "w") as file:
        yaml.safe_dump({"models": each} | top if "slices" not in top else top, file)
    return "merge.yml"


def plain(*models):
    return [{"model": model} for model in models]


def merged(**top):
    assert (
        cli.main(["merge", "--config", config(**top), "-o", "out.safetensors", "--overwrite"]) == 0
    )
    return read(Path("out.safetensors"))


def check(found, expected):
    for name in SHAPES:
        torch.testing.assert_close(found[name].double(), expected(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False, None])
def test_linear_is_of_the_weights_and_normalized_unless_it_says_not(states, normalize):
    parameters = {} if normalize is None else {"normalize": normalize}
    found = merged(merge_method="linear", parameters=parameters)
    total = 1 if normalize is False else sum(WEIGHTS)

    def expected(name):
        rows = zip(states[1:], WEIGHTS, strict=True)
        return sum(state[name].double() * w for state, w in rows) / total

    check(found, expected)


@pytest.mark.parametrize("normalize", [True, False, None])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_task_arithmetic_is_of_changes_and_not_normalized_unless_it_says_so(
    states, normalize, factor
):
    parameters = {"lambda": factor} | ({} if normalize is None else {"normalize": normalize})
    found = merged(merge_method="task_arithmetic", base_model="base", parameters=parameters)
    total = sum(WEIGHTS) if normalize else 1

    def expected(name):
        base = states[0][name].double()
        rows = zip(states[1:], WEIGHTS, strict=True)
        return base + factor / total * sum((s[name].double() - base) * w for s, w in rows)

    check(found, expected)


def test_ties_trims_parameters_and_divides_by_the_weights_that_agree(states):
    found = merged(merge_method="ties", base_model="base", parameters={"density": 0.5})

    def expected(name):
        base = states[0][name].double().flatten()
        rows = []
        for state, weight in zip(states[1:], WEIGHTS, strict=True):
            # As there, changes are float32 before they are ranked.
            row = (state[name].double().flatten() - base).float().double()
            row[row.abs().argsort()[: len(row) - len(row) // 2]] = 0
            rows.append(row * weight)
        rows = torch.stack(rows)
        agree = rows.sign() == torch.where(rows.sum(dim=0) >= 0, 1, -1)
        divisor = (agree * torch.tensor(WEIGHTS, dtype=torch.float64)[:, None]).sum(dim=0)
        change = (rows * agree).sum(dim=0) / divisor.masked_fill(divisor == 0, 1)
        return (base + change).view(SHAPES[name])

    check(found, expected)


def arguments(**top):
    return read_mergekit(config(**top))


def test_each_method_means_one_here(states):
    based = {"base": "base", "tasks": ["a", "b", "c"], "dtype": None}
    dense = [
        {"model": m, "parameters": {"weight": 1, "density": d}}
        for m, d in zip("abc", (1, 0.5, 0.1), strict=True)
    ]
    of_dense = {"density": [1, 0.5, 0.1]}
    ones = {"task_weights": [1, 1, 1]}
    in_mean, in_sum = {**ones, "combine": "mean"}, {**ones, "combine": "sum"}
    for method, given, expected in (
        (
            "ties",
            {"int8_mask": True},
            of_dense | in_mean | {"method": "ties", "per_parameter": True, "scale": 1.0},
        ),
        ("dare_ties", {"lambda": 2}, of_dense | in_sum | {"method": "dare-ties", "scale": 2}),
        (
            "dare_linear",
            {"normalize": True},
            of_dense | {"method": "dare", "weights": [1, 1, 1], "scale": 1 / 3},
        ),
        (
            "breadcrumbs",
            {},
            of_dense | {"method": "breadcrumbs", "weights": [1, 1, 1], "gamma": 0.01, "scale": 1.0},
        ),
        (
            "della",
            {"epsilon": 0.1},
            of_dense | in_mean | {"method": "della", "epsilon": 0.2, "scale": 1.0},
        ),
        (
            "della_linear",
            {"epsilon": 0.1},
            of_dense
            | {
                "method": "della",
                "weights": [1, 1, 1],
                "sign": "none",
                "combine": "sum",
                "epsilon": 0.2,
                "scale": 1.0,
            },
        ),
    ):
        found = arguments(models=dense, merge_method=method, base_model="base", parameters=given)
        assert found == based | expected
    found = arguments(
        models=plain("base", "a", "b", "c"), merge_method="model_stock", base_model="base"
    )
    assert found == based | {"method": "model-stock", "scale": 1.0}
    found = arguments(
        models=plain(*"abc"), merge_method="sce", base_model="base", parameters={"select_topk": 0.1}
    )
    assert found == based | {"method": "sce", "density": 0.1, "scale": 1.0}
    without = {"base": None, "dtype": None}
    found = arguments(models=plain(*"abc"), merge_method="karcher", base_model="b")
    assert found == without | {"tasks": ["b", "a", "c"], "method": "karcher"}
    found = arguments(
        models=plain("a", "base"), merge_method="slerp", base_model="base", parameters={"t": 0.2}
    )
    assert found == without | {"tasks": ["base", "a"], "method": "slerp", "t": 0.2}
    pair = [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 1), ("b", 3))]
    found = arguments(models=pair, merge_method="nuslerp")
    assert found == without | {"tasks": ["a", "b"], "method": "slerp", "t": 0.75}
    found = arguments(models=pair, merge_method="nuslerp", base_model="base")
    assert found == {
        "base": "base",
        "dtype": None,
        "tasks": ["a", "b"],
        "method": "slerp",
        "t": 0.75,
    }


def test_one_slice_of_all_layers_is_a_whole_model(states):
    sources = [{"model": m, "layer_range": [0, 3]} for m in ("base", "a")]
    slices = [{"sources": sources, "parameters": {"t": 0.5}}]
    found = merged(slices=slices, merge_method="slerp", base_model="base", tokenizer_source="base")
    whole = merged(
        models=plain("base", "a"), merge_method="slerp", base_model="base", parameters={"t": 0.5}
    )
    assert all(torch.equal(found[name], whole[name]) for name in SHAPES)


def test_filters_of_lambda_are_scales_by_name(states):
    filters = [{"filter": "mlp", "value": 0.5}, {"value": 0.25}]
    top = {"merge_method": "task_arithmetic", "base_model": "base"}
    assert arguments(**top, parameters={"lambda": filters})["scale"] == {"*mlp*": 0.5, "*": 0.25}
    found = merged(**top, parameters={"lambda": filters})
    half, quarter = (merged(**top, parameters={"lambda": number}) for number in (0.5, 0.25))
    for name in SHAPES:
        assert torch.equal(found[name], (half if "mlp" in name else quarter)[name])


def test_the_dtype_of_the_output_is_that_of_the_file_or_of_the_command(states):
    top = {"merge_method": "linear", "dtype": "float32", "out_dtype": "bfloat16"}
    assert {t.dtype for t in merged(**top).values()} == {torch.bfloat16}
    words = ["merge", "--config", config(**top), "--dtype", "float16", "-o", "half.safetensors"]
    assert cli.main(words) == 0
    assert {t.dtype for t in read(Path("half.safetensors")).values()} == {torch.float16}


TA = {"merge_method": "task_arithmetic", "base_model": "base"}
GRADIENT = "lists are gradients over layers, or values by name, which do not exist here"


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"merge_method": "passthrough"}, "unknown merge_method 'passthrough'"),
        ({}, "unknown merge_method 'None'"),
        ({"merge_method": "task_arithmetic"}, "task_arithmetic needs a base_model"),
        (TA | {"models": []}, "expected a list of models, or one of slices"),
        (TA | {"models": ["a"]}, "expected 'model: PATH', not 'a'"),
        (TA | {"models": plain("a+lora")}, "the model 'a+lora' is not one path or id"),
        (TA | {"models": plain("a")}, "parameters.weight is missing"),
        (TA | {"chat_template": "auto"}, "chat_template: the tokenizer is copied from the base"),
        (
            TA | {"tokenizer_source": "union"},
            "tokenizer_source union does not exist here: the tokenizer is copied from base",
        ),
        (TA | {"modules": {}, "nmae": 1}, "modules: parts of models are merged by themselves"),
        (TA | {"nmae": 1}, "nmae does not exist here"),
        (TA | {"parameters": {"density": 0.5}}, "parameters.density does not exist here"),
        (
            TA | {"parameters": {"lambda": [0, 1]}},
            f"parameters.lambda must be a number, not [0, 1]; {GRADIENT}",
        ),
        (
            TA | {"parameters": {"lambda": [{"filter": "mlp", "value": 1}]}},
            "parameters.lambda has no value without a filter",
        ),
        (
            TA | {"parameters": {"normalize": 1}},
            "parameters.normalize must be true or false, not 1",
        ),
        (TA | {"parameters": {"rescale": True}}, "rescale=True does not exist here"),
        (TA | {"parameters": [1]}, "parameters. must be keys and values, not [1]"),
        ({"merge_method": "linear", "base_model": "base"}, "base_model: linear has no base"),
        (
            {"merge_method": "slerp", "base_model": "a", "parameters": {"t": 0.5}},
            "slerp merges two models",
        ),
        (
            TA
            | {
                "models": [
                    {"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}
                ]
            },
            GRADIENT,
        ),
        (
            TA | {"models": [{"model": "a", "parameters": {"weight": 1, "lambda": 2}}]},
            "parameters.lambda does not exist here; known: weight",
        ),
        (TA | {"slices": [{"sources": []}] * 2}, "2 slices; models are merged whole"),
        (
            TA | {"slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]},
            "layer_range [0, 2] of 'a'",
        ),
        (
            TA
            | {
                "models": [{"model": "a", "parameters": {"weight": 0}}],
                "parameters": {"normalize": True},
            },
            "parameters.weight: they add up to 0",
        ),
    ],
)
def test_what_a_file_cannot_say_is_named(states, top, message, capsys):
    before = listed(".")
    assert cli.main(["merge", "--config", config(**top), "-o", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cl-merge: config merge.yml: ")
    assert message in line
    assert set(listed(".")) - set(before) == {"merge.yml"}


def test_the_words_of_the_command_and_a_file_do_not_mix(states, capsys):
    for words, named in (
        (["base", "a"], "BASE"),
        (["--method", "ties", "--scale", "1"], "--method, --scale"),
        (["--no-base", "--weight", "1"], "--no-base, --weight"),
    ):
        assert cli.main(["merge", *words, "--config", config(**TA), "-o", "out"]) == 2
        assert f"--config says what {named} would say; give one" in capsys.readouterr().err
    assert cli.main(["merge", "--config", "none.yml", "-o", "out"]) == 2
    assert "config none.yml: " in capsys.readouterr().err
    assert cli.main(["merge", "base", "-o", "out"]) == 2
    assert "give BASE and at least one TASK, or --config FILE" in capsys.readouterr().err
