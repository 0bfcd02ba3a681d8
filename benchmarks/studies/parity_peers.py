"""What other libraries make of the inputs of `parity`; run by it, where they are installed.

It imports nothing of this library. Each result is a file of weights, or a text that says why not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
_MODEL = "model.safetensors"


def main() -> None:
    """Write a result for each case."""
    for peer, name, tasks in json.loads((FOLDER / "cases.json").read_text()):
        make = {"FusionBench": fusion_bench, "mergekit": mergekit, "peft": peft}[peer]
        to = FOLDER / f"{peer}-{name}.safetensors"
        try:
            result = {key: value.detach().contiguous() for key, value in make(name, tasks).items()}
            save_file(result, to)
        except Exception as error:
            to.with_suffix(".txt").write_text(f"{type(error).__name__}: {error}"[:100])


def states(tasks: int) -> tuple[State, list[State]]:
    """The base and the tasks."""
    read = [load_file(FOLDER / f"task{task}" / _MODEL) for task in range(tasks)]
    return load_file(FOLDER / "base" / _MODEL), read


def moved(base: State, change: State, scale: float = 1.0) -> State:
    """The base plus a change."""
    return {name: tensor + scale * change[name] for name, tensor in base.items()}


def fusion_bench(name: str, tasks: int) -> State:
    """Call the functions of FusionBench that its methods are made of."""
    base, tuned = states(tasks)
    vectors = [{n: t - base[n] for n, t in one.items()} for one in tuned]
    lists = {n: [one[n] for one in tuned] for n in base}
    method = "fusion_bench.method."

    def beside(kind: str) -> list[State]:
        return [load_file(FOLDER / f"{kind}{task}.safetensors") for task in range(tasks)]

    if name in ("magmax", "task_arithmetic"):
        merge = getattr(import_module(f"{method}{name}"), f"{name}_merge")
        scale = {"magmax": 0.5, "task_arithmetic": 0.3}[name]
        return dict(merge(Plain(base), [Plain(one) for one in tuned], scale).state_dict())
    if name == "simple_average":
        return dict(import_module(f"{method}simple_average").simple_average(tuned))
    if name.startswith("ties"):
        utils = import_module(f"{method}ties_merging.ties_merging_utils")
        flat = torch.vstack([utils.state_dict_to_vector(one) for one in vectors])
        found = utils.ties_merging(flat, reset_thresh=20, merge_func=name.split()[-1])
        return moved(base, utils.vector_to_state_dict(found, base), 0.3)
    if name == "fisher":
        merge = import_module(f"{method}fisher_merging.fisher_merging").merging_with_fisher_weights
        return dict(merge(lists, beside("fisher"), torch.ones(tasks), False, 0.0))
    if name == "regmean":
        merge = import_module(f"{method}regmean.regmean").merging_with_regmean_weights
        grams = [{n.removesuffix(".weight"): g for n, g in one.items()} for one in beside(name)]
        return dict(merge(lists, grams, 0.9))
    if name == "emr":
        return moved(base, import_module(f"{method}emr_merging.utils").emr_merge(vectors)[0])
    if name == "tsv":
        utils = import_module(f"{method}task_singular_vector.utils.TSVM_utils")
        reduced = utils.compute_and_sum_svd_mem_reduction
        return moved(base, reduced(vectors, exclude_keys=[], accelerator="cpu"))
    if name == "iso_c":
        utils = import_module(f"{method}isotropic_merging.iso_utils")
        return moved(base, utils.iso_c(vectors, accelerator="cpu"))
    if name == "iso_cts":
        utils = import_module(f"{method}isotropic_merging.iso_utils")
        return moved(base, utils.iso_cts(vectors, 0.8, accelerator="cpu"))
    if name == "wudi":
        return moved(base, import_module(f"{method}wudi.wudi").wudi_merging(vectors, "cpu"))
    if name == "slerp":
        slerp = import_module(f"{method}slerp.slerp_utils").slerp
        return {n: slerp(0.5, *pair) for n, pair in lists.items()}
    pool = SimpleNamespace(
        load_pretrained_model=lambda: model("base"),
        load_model=model,
        model_names=[f"task{task}" for task in range(tasks)],
    )
    if name == "model_stock":
        algorithm = import_module(f"{method}model_stock.model_stock").ModelStock()
    else:
        clip: Any = import_module("transformers.models.clip.modeling_clip")
        if not hasattr(clip, "CLIPVisionTransformer"):  # gone from transformers 5, imported unused
            clip.CLIPVisionTransformer = clip.CLIPVisionModel
        options: dict[str, Any] = {"shuffle_order": False, "save_on_every_step": False}
        algorithm = import_module(f"{method}opcm.opcm_general").OPCM(alpha=0.5, **options)
        type(algorithm).log_dir = None
    return dict(algorithm.run(pool).state_dict())


def model(name: str) -> Any:
    """Load one of the inputs as a module."""
    return import_module("transformers").AutoModelForCausalLM.from_pretrained(FOLDER / name)


class Plain:
    """What functions for modules ask of one; some of them refuse parameters beside sums."""

    def __init__(self, state: State) -> None:
        self._state = state

    def state_dict(self, keep_vars: bool = False) -> State:
        """As of a module."""
        return dict(self._state)

    def load_state_dict(self, state: State) -> None:
        """As of a module."""
        self._state = state


def mergekit(name: str, tasks: int) -> State:
    """Run mergekit's command."""
    names = [str(FOLDER / f"task{task}") for task in range(tasks)]
    base, weight = str(FOLDER / "base"), {"parameters": {"weight": 1.0}}
    plain: list[dict[str, Any]] = [{"model": one} for one in names]
    weighed: list[dict[str, Any]] = [{"model": one, **weight} for one in names]
    config: dict[str, Any] = {"merge_method": name, "dtype": "float32", "models": weighed}
    config["parameters"] = {
        "task_arithmetic": {"normalize": False, "lambda": 1.0},
        "ties": {"density": 0.2, "normalize": True},
        "breadcrumbs": {"density": 0.8, "gamma": 0.05, "normalize": False},
        "sce": {"select_topk": 0.5},
        "slerp": {"t": 0.5},
    }.get(name, {})
    if name in ("karcher", "model_stock", "sce", "slerp"):
        config["models"] = plain
    if name not in ("linear", "karcher"):
        config["base_model"] = names[0] if name == "slerp" else base
    path, out = FOLDER / f"{name}.yaml", FOLDER / f"mergekit-{name}"
    path.write_text(json.dumps(config))  # which is YAML too
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(done.stderr.strip().split("\n")[-1])
    return dict(load_file(out / _MODEL))


def peft(name: str, tasks: int) -> State:
    """Call the functions that peft combines weights of adapters with, a tensor at a time."""
    utils, (base, tuned) = import_module("peft.utils.merge_utils"), states(tasks)
    kind, _, sign = name.partition(", ")
    merge: Callable[..., Tensor] = getattr(utils, kind)
    options: dict[str, Any] = {} if kind == "task_arithmetic" else {"density": 0.2}
    if sign:
        options["majority_sign_method"] = sign
    change = {
        n: merge([one[n] - tensor for one in tuned], torch.ones(tasks), **options)
        for n, tensor in base.items()
    }
    return moved(base, change)


if __name__ == "__main__":
    main()
