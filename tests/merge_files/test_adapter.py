"""LoRA adapters merge into one, whose factors are the nearest to what was merged."""

import json

import pytest
import torch
from file_cases import same_bits, write
from safetensors.torch import load_file, save_file

from cl_merge.errors import InputError
from cl_merge.merge_files import merge_checkpoints
from cl_merge.merge_files.adapter import factors
from cl_merge.mergers import MERGERS, merge
from cl_merge.storage import open_weights
from cl_merge.task_vectors.task_vector import TaskVector

SHAPES = {
    "layers.0.q": (24, 20),
    "layers.1.q": (24, 20),
    "layers.0.down": (12, 30),
    "thin": (3, 20),
}


def save_adapter(folder, seed, rank=4, dtype=torch.float32, modules=SHAPES, **config):
    """Write an adapter of random factors; its scaling is 2.5."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in modules.items():
        for factor, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            values = torch.randn(shape, generator=generator).to(dtype)
            tensors[f"base_model.model.{module}.lora_{factor}.weight"] = values
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": 2.5 * rank, "task_type": "CAUSAL_LM"}
    about = {"base_model_name_or_path": "someone/base", "target_modules": list(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(plain | about | config))
    return folder


@pytest.fixture
def base(tmp_path):
    weights = {f"{module}.weight": torch.randn(shape) for module, shape in SHAPES.items()}
    weights |= {"norm.weight": torch.ones(20), "steps": torch.tensor(3)}
    return write(tmp_path, "base", weights, "safetensors")


@pytest.fixture
def adapters(tmp_path):
    return [save_adapter(tmp_path / f"adapter{seed}", seed, rank=4 + seed) for seed in range(2)]


def merged_change(adapters, method, scale, **options):
    """What is merged of the products, in float64 but for the rule itself."""
    vectors = []
    for folder in adapters:
        held, config = load_file(folder / "adapter_model.safetensors"), folder / CONFIG
        scaling = json.loads(config.read_text())["lora_alpha"] / json.loads(config.read_text())["r"]
        products = {}
        for name, a in held.items():
            if ".lora_A." in name:
                product = held[name.replace("_A", "_B")].double() @ a.double() * scaling
                plain = name.removeprefix("base_model.model.").replace(".lora_A", "")
                products[plain] = product.float()
        vectors.append(TaskVector(products))
    return {n: scale * v.double() for n, v in merge(vectors, method, **options).items()}


CONFIG = "adapter_config.json"


def change_of(folder):
    with open_weights(folder) as weights:
        return {n: weights.read(n).view(weights.shape(n)).double() for n in weights.names}


@pytest.mark.parametrize("method", ["average", "task-arithmetic"])
def test_the_sum_of_ranks_loses_nothing_of_a_mean_or_sum(base, adapters, tmp_path, method):
    out = tmp_path / "merged"
    done = merge_checkpoints(base, adapters, out, method=method, scale=0.7, lora_rank="auto")
    assert done.adapter.rank == 9
    assert done.adapter.error < done.adapter.worst < 1e-6
    found, expected = change_of(out), merged_change(adapters, method, 0.7)
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        torch.testing.assert_close(found[name], matrix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["magmax", "ties", "tsv", "dare"])
@pytest.mark.parametrize("rank", [1, 5])
def test_no_adapter_of_that_rank_is_nearer(base, adapters, tmp_path, method, rank):
    out, scale = tmp_path / "merged", MERGERS[method].published_scale
    done = merge_checkpoints(base, adapters, out, method=method, lora_rank=rank)
    found, expected = change_of(out), merged_change(adapters, method, scale)
    missing, whole, shares = 0.0, 0.0, {}
    for name, matrix in expected.items():
        values = torch.linalg.svdvals(matrix)
        least = float(values[rank:].square().sum())
        lost = float((found[name] - matrix).square().sum())
        size = float(values.square().sum())
        assert lost == pytest.approx(least, rel=1e-4, abs=1e-9 * size)
        missing, whole, shares[name] = missing + lost, whole + size, (lost / size) ** 0.5
    assert done.adapter.error == pytest.approx((missing / whole) ** 0.5, rel=1e-4)
    assert done.adapter.worst == pytest.approx(max(shares.values()), rel=1e-4)
    assert done.adapter.worst_name == max(shares, key=shares.get)


def test_the_output_is_a_folder_of_peft_like_the_first(base, tmp_path):
    adapters = [save_adapter(tmp_path / str(i), i, dtype=torch.bfloat16) for i in range(2)]
    merge_checkpoints(base, adapters, tmp_path / "merged", lora_rank=6)
    config = json.loads((tmp_path / "merged" / CONFIG).read_text())
    assert {key: config[key] for key in ("peft_type", "r", "lora_alpha", "task_type")} == {
        "peft_type": "LORA",
        "r": 6,
        "lora_alpha": 6,
        "task_type": "CAUSAL_LM",
    }
    assert config["base_model_name_or_path"] == "someone/base"
    assert sorted(config["target_modules"]) == sorted(SHAPES)
    held = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    assert shapes["base_model.model.thin.lora_A.weight"] == (6, 20)
    assert shapes["base_model.model.thin.lora_B.weight"] == (3, 6)
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    assert sorted(file.name for file in (tmp_path / "merged").iterdir()) == [
        CONFIG,
        "adapter_model.safetensors",
    ]


def test_the_base_adds_nothing(base, adapters, tmp_path):
    for name, of in (("with", base), ("without", None)):
        merge_checkpoints(of, adapters, tmp_path / name, method="ties", scale=0.3, lora_rank=3)
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("with", "without"))
    assert same_bits(one, two)
    with pytest.raises(InputError, match="'.*adapter0' is a task vector, but the base must hold"):
        merge_checkpoints(adapters[0], adapters[1:], tmp_path / "m", lora_rank=3)


def test_transposed_layers_stay_transposed(base, tmp_path):
    weights = {f"{module}.weight": torch.randn(shape[::-1]) for module, shape in SHAPES.items()}
    base = write(tmp_path, "turned", weights, "safetensors")
    adapters = [save_adapter(tmp_path / str(i), i, fan_in_fan_out=True) for i in range(2)]
    merge_checkpoints(base, adapters, tmp_path / "merged", method="average", lora_rank="auto")
    found = change_of(tmp_path / "merged")
    for name, matrix in merged_change(adapters, "average", 1.0).items():
        torch.testing.assert_close(found[name], matrix.T, rtol=1e-5, atol=1e-5)


def test_the_same_bits_on_any_number_of_threads(base, adapters, tmp_path, two_threads):
    merge_checkpoints(base, adapters, tmp_path / "two", method="ties", lora_rank=5)
    torch.set_num_threads(1)
    merge_checkpoints(base, adapters, tmp_path / "one", method="ties", lora_rank=5)
    one, two = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


def test_a_large_matrix_is_searched_and_loses_hardly_more_than_the_least():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 200, generator=generator)
    spectrum = torch.linalg.svdvals(matrix.double())
    for rank in (2, 8):
        left, right = factors(matrix, rank)
        lost = torch.linalg.norm(matrix.double() - left.double() @ right.double())
        assert float(lost / spectrum[rank:].norm()) == pytest.approx(1, abs=2e-3)
    product = matrix[:, :8] @ matrix[:8]
    left, right = factors(product, 8)
    torch.testing.assert_close(left @ right, product, rtol=1e-4, atol=1e-4)
    assert all(not bool(part.any()) for part in factors(torch.zeros(90, 80), 2))


def test_a_merge_that_moved_nothing_has_no_error(base, adapters, tmp_path):
    done = merge_checkpoints(base, adapters, tmp_path / "m", scale=0.0, lora_rank=2)
    assert (done.adapter.error, done.adapter.worst) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "lora_rank must be a whole number of 1 or more, not 0"),
        (2.5, "lora_rank must be a whole number of 1 or more, not 2.5"),
        (21, "lora_rank=21 is more than any adapted matrix can have; expected 1 to 20"),
    ],
)
def test_impossible_ranks_are_refused(base, adapters, tmp_path, rank, message):
    with pytest.raises(InputError, match=message):
        merge_checkpoints(base, adapters, tmp_path / "merged", lora_rank=rank)
    assert not (tmp_path / "merged").exists()


def test_what_is_no_adapter_is_refused_by_name(base, adapters, tmp_path):
    merge_checkpoints(base, adapters, tmp_path / "tuned.safetensors")
    wrong = "only LoRA adapters merge into one, and these are none: .*tuned.safetensors. What they"
    with pytest.raises(InputError, match=wrong):
        merge_checkpoints(base, [tmp_path / "tuned.safetensors"], tmp_path / "m", lora_rank=2)
    with pytest.raises(InputError, match="lora_rank keeps the names of adapters"):
        merge_checkpoints(base, adapters, tmp_path / "m", lora_rank=2, strip_prefix="layers.")
    with pytest.raises(InputError, match="is a file, but an adapter is a folder; name one"):
        merge_checkpoints(base, adapters, tmp_path / "m.safetensors", lora_rank=2)


def test_factors_that_the_dtype_cannot_hold_are_an_error(base, adapters, tmp_path):
    with pytest.raises(
        InputError, match=r"the factors of 'layers.*' overflow float16; use a wider"
    ):
        merge_checkpoints(base, adapters, tmp_path / "m", scale=1e12, lora_rank=2, dtype="float16")
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_peft_computes_with_it_what_the_merged_model_computes(tmp_path, transposed):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, intermediate_size=48)
    targets = ["q_proj", "down_proj"]
    if transposed:
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)
        targets = ["c_attn", "c_fc"]

    def fresh():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    fresh().save_pretrained(tmp_path / "base")
    for seed in range(2):
        options = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=transposed)
        model = peft.get_peft_model(fresh(), options)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / f"adapter{seed}")
    adapters = [tmp_path / f"adapter{seed}" for seed in range(2)]
    for options in ({"method": "average"}, {"method": "ties", "density": 0.9}):
        name = options["method"]
        merge_checkpoints(tmp_path / "base", adapters, tmp_path / f"{name}-whole", **options)
        merge_checkpoints(
            tmp_path / "base",
            adapters,
            tmp_path / name,
            lora_rank=8 if name == "average" else 32,
            **options,
        )
        words = torch.arange(20).view(2, 10)
        load = transformers.AutoModelForCausalLM.from_pretrained
        with torch.no_grad():
            expected = load(tmp_path / f"{name}-whole").eval()(words).logits
            found = peft.PeftModel.from_pretrained(fresh(), tmp_path / name)(words).logits
            before = fresh()(words).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert float((expected - before).abs().max()) > 0.01
