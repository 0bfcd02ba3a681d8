"""How near the mergers come to what other libraries compute, method by method.

    python -m venv peers && peers/bin/pip install mergekit==0.1.5 fusion-bench==0.2.33 peft
    python -m cl_merge.benchmarks.studies.parity --peers peers/bin/python

Makes a small Llama of random float32 weights, and tasks that moved from it in random directions, of
which half is common to all: the cosine between two is 0.5. The embedding stays as it is, since OPCM
in FusionBench treats it unlike other matrices. All is merged here and, by an interpreter of their
own, with mergekit's command line and the functions of FusionBench and peft, with the same settings.
A difference is the largest one in a tensor as a share of the largest change in it; the table has
the largest over all tensors. Methods that draw random numbers are left out.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_merge.benchmarks.studies import harness
from cl_merge.merge_files import merge_checkpoints

_FROZEN = "model.embed_tokens.weight"
_SIZE = {"width": 64, "inner": 96, "layers": 2, "words": 120}
_TASKS = 3


@dataclass(frozen=True)
class Case:
    """What is merged here, and by what name `parity_peers` knows its counterpart."""

    peer: str
    name: str
    method: str
    scale: float | None = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    with_base: bool = True
    tasks: int = _TASKS


_OWN = {"per_parameter": True}
CASES = (
    Case("FusionBench", "magmax", "magmax", 0.5),
    Case("FusionBench", "simple_average", "average"),
    Case("FusionBench", "task_arithmetic", "task-arithmetic", 0.3),
    Case("FusionBench", "ties, mean", "ties", 0.3),
    Case("FusionBench", "ties, sum", "ties", 0.3, {"combine": "sum"}),
    Case("FusionBench", "fisher", "fisher"),
    Case("FusionBench", "regmean", "regmean"),
    Case("FusionBench", "emr", "emr"),
    Case("FusionBench", "tsv", "tsv"),
    Case("FusionBench", "iso_c", "iso-c"),
    Case("FusionBench", "iso_cts", "iso-cts"),
    Case("FusionBench", "opcm", "opcm"),
    Case("FusionBench", "wudi", "wudi"),
    Case("FusionBench", "model_stock", "model-stock"),
    Case("FusionBench", "slerp", "slerp", None, with_base=False, tasks=2),
    Case("mergekit", "linear", "average"),
    Case("mergekit", "task_arithmetic", "task-arithmetic"),
    Case("mergekit", "ties", "ties", options=_OWN),
    Case("mergekit", "breadcrumbs", "breadcrumbs", options={"density": 0.8, "gamma": 0.05}),
    Case("mergekit", "sce", "sce", options={"density": 0.5}),
    Case("mergekit", "model_stock", "model-stock"),
    Case("mergekit", "karcher", "karcher", None, with_base=False),
    Case("mergekit", "slerp", "slerp", None, with_base=False, tasks=2),
    Case("mergekit", "nuslerp", "slerp", tasks=2),
    Case("peft", "task_arithmetic", "task-arithmetic"),
    Case("peft", "ties, total", "ties", options=_OWN),
    Case("peft", "ties, frequency", "ties", options={**_OWN, "sign": "count"}),
    Case("peft", "magnitude_prune", "ties", options={**_OWN, "sign": "none", "combine": "sum"}),
)


def main() -> None:
    """Compare everything and print a table."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("--peers", required=True, help="interpreter that has the other libraries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="cases of these names"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="parity-") as temporary:
        folder = Path(temporary)
        make_inputs(folder, given.seed)
        cases = [case for case in CASES if not given.only or case.name in given.only]
        (folder / "cases.json").write_text(json.dumps([[c.peer, c.name, c.tasks] for c in cases]))
        script = Path(__file__).with_name("parity_peers.py")
        subprocess.run([given.peers, str(script), str(folder)], check=True)  # noqa: S603
        rows = [[case.name, case.peer, _here(case), _compared(case, folder)] for case in cases]
    title = f"{_TASKS} tasks, a small Llama, float32, seed {given.seed}"
    harness.show(title, ["method", "library", "here", "largest difference"], rows)


def make_inputs(folder: Path, seed: int) -> None:
    """Write a base, tasks, Gram matrices and importances."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = {name: normal(shape) * 0.05 for name, shape in llama_shapes(**_SIZE).items()}
    states, common = {"base": base}, {n: normal(tuple(t.shape)) for n, t in base.items()}
    for task in range(_TASKS):
        changes = {name: shared + normal(tuple(shared.shape)) for name, shared in common.items()}
        changes[_FROZEN].zero_()
        states[f"task{task}"] = {n: t + 0.007 * changes[n] for n, t in base.items()}
        squares = {name: normal(tuple(t.shape)).square() for name, t in base.items()}
        save_file(squares, folder / f"fisher{task}.safetensors")
        inputs = {n: normal((2 * t.shape[1], t.shape[1])) for n, t in base.items() if _is_linear(n)}
        grams = {name: rows.T @ rows / len(rows) for name, rows in inputs.items()}
        save_file(grams, folder / f"regmean{task}.safetensors")
    for name, state in states.items():
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(llama_config(**_SIZE)))


def llama_config(width: int, inner: int, layers: int, words: int) -> dict[str, Any]:
    """Make what ``config.json`` says of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "vocab_size": words,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def llama_shapes(width: int, inner: int, layers: int, words: int) -> dict[str, tuple[int, ...]]:
    """Name the tensors of a Llama, with their shapes."""
    layer: dict[str, tuple[int, ...]] = {f"self_attn.{n}_proj": (width, width) for n in "qkvo"}
    layer |= {f"mlp.{name}_proj": (inner, width) for name in ("gate", "up")}
    layer |= {"mlp.down_proj": (width, inner)}
    layer |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    found = {_FROZEN: (words, width), "model.norm.weight": (width,)}
    found |= {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(layers)
        for name, shape in layer.items()
    }
    return {**found, "lm_head.weight": (words, width)}


def _is_linear(name: str) -> bool:
    return "_proj" in name or name.startswith("lm_head")


def _here(case: Case) -> str:
    options = [f"{key}={value}" for key, value in case.options.items()]
    return " ".join([case.method, *options, *([] if case.with_base else ["--no-base"])])


def _compared(case: Case, folder: Path) -> str:
    theirs = folder / f"{case.peer}-{case.name}.safetensors"
    if not theirs.exists():
        return theirs.with_suffix(".txt").read_text()
    ours = folder / f"here-{theirs.name}"
    tasks = [folder / f"task{task}" for task in range(case.tasks)]
    beside = [folder / f"{case.method}{task}.safetensors" for task in range(case.tasks)]
    merge_checkpoints(
        folder / "base" if case.with_base else None,
        tasks,
        ours,
        method=case.method,
        scale=case.scale,
        importances=beside if beside[0].exists() else (),
        **case.options,
    )
    base = load_file(folder / "base" / "model.safetensors")
    one, other = load_file(ours), load_file(theirs)
    changed = (name for name in base if name != _FROZEN)
    return f"{max(_difference(one[n], other[n], base[n]) for n in changed):.1e}"


def _difference(one: Tensor, other: Tensor, base: Tensor) -> float:
    return float((one - other).abs().max() / (other - base).abs().max())


if __name__ == "__main__":
    main()
