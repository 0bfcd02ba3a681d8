"""LoRA adapters of peft are task vectors: what peft itself makes of them, or a refusal."""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from cl_merge.errors import InputError
from cl_merge.merge_files import merge_checkpoints
from cl_merge.storage import open_weights
from cl_merge.storage.lora import adapter_weights
from cl_merge.storage.weights import StoredTensor, Weights

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, intermediate_size=48, vocab_size=60)
    return transformers.BertModel(config, add_pooling_layer=False)


def gpt2():
    """Its layers have their weights transposed."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=16)
    return transformers.GPT2Model(config)


CASES = {
    "plain": (bert, {"target_modules": ["query", "value"]}),
    "rank-stabilised": (bert, {"target_modules": ["query"], "use_rslora": True, "r": 6}),
    "patterns": (
        bert,
        {
            "target_modules": ["query", "dense"],
            "rank_pattern": {"query": 2},
            "alpha_pattern": {"layer.1.attention.self.query": 3, "dense": 5},
        },
    ),
    "transposed": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


def adapted(make, folder, seed, **options):
    """Save an adapter of random factors; returns the weights that peft merges with it."""
    torch.manual_seed(10 + seed)
    model = peft.get_peft_model(make(), peft.LoraConfig(**({"r": 4, "lora_alpha": 10} | options)))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return {n: t.clone() for n, t in model.merge_and_unload().state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_changes_what_peft_changes(tmp_path, case):
    make, options = CASES[case]
    make().save_pretrained(tmp_path / "base")
    expected = adapted(make, tmp_path / "adapter", 0, **options)
    with open_weights(tmp_path / "adapter") as weights:
        assert weights.is_task_vector
        assert weights.kind == "LoRA adapter"
        assert set(weights.names) < set(expected)
    merge_checkpoints(
        tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", method="average", scale=1.0
    )
    found = make().from_pretrained(tmp_path / "merged").state_dict()
    before = make().state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
    with open_weights(tmp_path / "adapter") as weights:
        assert all(not torch.equal(found[name], before[name]) for name in weights.names)


@pytest.mark.slow
def test_products_are_merged_and_not_factors(tmp_path):
    bert().save_pretrained(tmp_path / "base")
    options = {"target_modules": ["query"]}
    each = [adapted(bert, tmp_path / str(seed), seed, **options) for seed in range(2)]
    files = [tmp_path / "0", tmp_path / "1"]
    merge_checkpoints(tmp_path / "base", files, tmp_path / "merged", method="average", scale=1.0)
    found = bert().from_pretrained(tmp_path / "merged").state_dict()
    for name in each[0]:
        mean = (each[0][name] + each[1][name]) / 2
        torch.testing.assert_close(found[name], mean, rtol=1e-5, atol=1e-5)


REFUSED = {
    "DoRA": ({"use_dora": True}, "has use_dora: DoRA scales the columns of the base too"),
    "biases": ({"bias": "all"}, "has bias=all: it trains biases"),
    "whole modules": ({"modules_to_save": ["encoder.layer.1"]}, "has modules_to_save"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "which changed the base's weights too"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_adapters_that_change_more_are_refused(tmp_path, what):
    options, message = REFUSED[what]
    adapted(bert, tmp_path / "adapter", 0, target_modules=["query"], **options)
    with pytest.raises(InputError, match=message):
        open_weights(tmp_path / "adapter")


def test_adapters_of_other_kinds_are_refused(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(InputError, match="is an adapter of type IA3, not LORA; merge it into its"):
        open_weights(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(InputError, match="is no configuration of an adapter"):
        open_weights(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(InputError, match="holds more than factors A and B of layers: x"):
        open_weights(tmp_path)


FACTORS = {f"base_model.model.l.lora_{name}.weight": torch.ones(2, 2) for name in "AB"}
A, B = FACTORS
DAMAGED = {
    "no alpha": ({"lora_alpha": None}, {}, "gives no number lora_alpha for 'l'"),
    "infinite alpha": ({"lora_alpha": math.inf}, {}, "gives no number lora_alpha for 'l'"),
    "a pattern that is none": ({"alpha_pattern": {"(": 1}}, {}, "lora_alpha for 'l' .missing"),
    "a list of patterns": ({"alpha_pattern": ["l"]}, {}, "gives no number lora_alpha for 'l'"),
    "no product": ({}, {A: torch.ones(3, 2)}, r"B of 'l' is \(2, 2\) and A is \(3, 2\), which"),
    "rank 0": ({}, {A: torch.ones(0, 2), B: torch.ones(2, 0)}, "which have no product"),
    "integers": ({}, {A: torch.ones(2, 2, dtype=torch.int8)}, "the factors of 'l' are integers"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_adapters_are_refused_when_they_are_opened(tmp_path, case):
    config, factors, message = DAMAGED[case]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    save_file(FACTORS | factors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message):
        open_weights(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="holds no factors A and B of layers"):
        open_weights(tmp_path)


def test_threads_that_need_one_product_compute_it_once(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    reads = []

    def read(start, stop):
        reads.append((start, stop))
        time.sleep(0.02)
        return torch.ones(stop - start)

    shapes = {"A": torch.Size([2, 4]), "B": torch.Size([6, 2])}
    factors = {
        f"l.lora_{factor}.weight": StoredTensor(torch.float32, shape, read)
        for factor, shape in shapes.items()
    }
    weights = adapter_weights(tmp_path, Weights(tmp_path, "safetensors", factors))
    with ThreadPoolExecutor(4) as threads:
        parts = threads.map(lambda i: weights.read("l.weight", 6 * i, 6 * i + 6), range(4))
        assert torch.equal(torch.cat(list(parts)), torch.full((24,), 8.0))
    assert len(reads) == 2
