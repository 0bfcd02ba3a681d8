"""Merges as YAML files of mergekit describe them, for the methods that are here, too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_merge.config.reading import read_yaml
from cl_merge.errors import InputError, listing, unknown_name

_NEEDED = object()
"""In place of a default: a value must be given."""


@dataclass(frozen=True)
class _Method:
    """A method of mergekit: its name here, and its parameters with mergekit's own defaults."""

    name: str
    base: bool = True  # whether weights are merged into a base, or as they are
    each: Mapping[str, Any] = field(default_factory=dict)  # of each model
    shared: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)  # what has no other value here


_WEIGHT = {"weight": _NEEDED}
_DENSITY = {**_WEIGHT, "density": 1.0}
_SUM, _MEAN = ({"normalize": normalize, "lambda": 1.0} for normalize in (False, True))
_KEPT, _RESCALED = ({"rescale": rescale} for rescale in (False, True))
_METHODS = {
    "linear": _Method("average", False, _WEIGHT, {"normalize": True}),
    "slerp": _Method("slerp", False, {}, {"t": _NEEDED}),
    "nuslerp": _Method(
        "slerp", True, _WEIGHT, fixed={"nuslerp_row_wise": False, "nuslerp_flatten": True}
    ),
    "karcher": _Method("karcher", False),
    "task_arithmetic": _Method("task-arithmetic", True, _WEIGHT, _SUM, _KEPT),
    "ties": _Method("ties", True, _DENSITY, _MEAN, _KEPT),
    "dare_linear": _Method("dare", True, _DENSITY, _SUM, _RESCALED),
    "dare_ties": _Method("dare-ties", True, _DENSITY, _SUM, _RESCALED),
    "breadcrumbs": _Method("breadcrumbs", True, _DENSITY, _SUM | {"gamma": 0.01}, _KEPT),
    "della": _Method("della", True, _DENSITY, _MEAN | {"epsilon": 0.15}, _RESCALED),
    "della_linear": _Method("della", True, _DENSITY, _SUM | {"epsilon": 0.15}, _RESCALED),
    "model_stock": _Method("model-stock", fixed={"filter_wise": False}),
    "sce": _Method("sce", True, {}, {"select_topk": 1.0}),
}
_ELECTING = ("ties", "dare_ties", "della")  # which divide by the weights that agree, not by all
_SMALL = 1e-8  # a sum of weights that counts as 0
_ANY = ("int8_mask",)  # which says how a mask is kept in memory, and changes no value
_TOP = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype")
_REFUSED = {
    "modules": "parts of models are merged by themselves, with --include",
    "tokenizer": "the tokenizer is copied from the base",
    "chat_template": "the tokenizer is copied from the base",
}


def read_mergekit(file: str | Path) -> dict[str, Any]:
    """Read a file of mergekit as arguments of `merge_checkpoints`.

    Returns:
        ``base``, None where weights are merged as they are, ``tasks``, ``method``, ``scale``,
        ``weights``, ``dtype`` and options of the method.

    Raises:
        InputError: If it is no such file, or says what is not possible here; names each key.
    """
    return _File(file).arguments()


class _File:
    def __init__(self, file: str | Path) -> None:
        self._file = file
        self._top = {k: value for k, value in read_yaml(file).items() if value is not None}
        self._wrong: list[str] = []

    def arguments(self) -> dict[str, Any]:
        top, name = self._top, str(self._top.get("merge_method"))
        if name not in _METHODS:
            raise self._error(str(unknown_name("merge_method", name, _METHODS)))
        method, shared = _METHODS[name], [top.get("parameters") or {}]
        self._check_keys(top, [*_TOP, "tokenizer_source"], _REFUSED)
        base = self._reference(top["base_model"]) if "base_model" in top else None
        if method.base and name != "nuslerp" and base is None:
            self._wrong.append(f"{name} needs a base_model")
        models = self._models(shared)
        found = [(self._model(model), model.get("parameters") or {}) for model in models]
        inputs = self._inputs(name, method, base, found)
        for level in shared:
            known = [*method.each, *method.shared, *method.fixed, *_ANY]
            self._check_keys(level, known, {}, "parameters.")
        for _, own in found:
            self._check_keys(own, list(method.each), {}, "parameters.")
        options = self._options(name, method, shared, [own for _, own in inputs])
        dtype = top.get("out_dtype", top.get("dtype"))
        if dtype is not None and not isinstance(dtype, str):
            self._wrong.append(f"dtype must be a name, such as float32, not {dtype!r}")
        self._check_tokenizer(base, [path for path, _ in inputs])
        if self._wrong:
            raise self._error("; ".join(dict.fromkeys(self._wrong)))
        return {
            "base": base if method.base else None,
            "tasks": [path for path, _ in inputs],
            "method": method.name,
            "dtype": dtype,
            **options,
        }

    def _error(self, message: str) -> InputError:
        return InputError(f"config {self._file}: {message}")

    def _models(self, shared: list[Any]) -> list[Any]:
        """The models; parameters of the slice, if it is of one, go before those of all."""
        given = [key for key in ("models", "slices") if key in self._top]
        models = self._top[given[0]] if len(given) == 1 else None
        if not isinstance(models, list) or not models:
            raise self._error("expected a list of models, or one of slices")
        if given == ["models"]:
            return models
        if len(models) > 1:
            raise self._error(
                f"{len(models)} slices; models are merged whole, in one slice of all layers"
            )
        part = models[0]
        if not isinstance(part, dict) or not isinstance(part.get("sources"), list):
            raise self._error("expected a slice with a list of sources")
        self._check_keys(part, ["sources", "parameters"], {}, "slices.")
        shared.insert(0, part.get("parameters") or {})
        return [self._source(source) for source in part["sources"]]

    def _source(self, source: Any) -> Any:
        """A model of a slice, if it is of all layers."""
        if not isinstance(source, dict):
            return source
        ends, path = source.get("layer_range"), source.get("model")
        if ends != [0, _layers(path)]:
            self._wrong.append(
                f"layer_range {ends} of '{path}': models are merged whole, from 0 to the "
                "num_hidden_layers of a folder's config.json"
            )
        return {key: value for key, value in source.items() if key != "layer_range"}

    def _model(self, model: Any) -> str:
        if not isinstance(model, dict) or "model" not in model:
            raise self._error(f"expected 'model: PATH', not {model!r}")
        self._check_keys(model, ["model", "parameters"], {}, "models.")
        return self._reference(model["model"])

    def _reference(self, model: Any) -> str:
        if isinstance(model, str) and "+" not in model:
            return model
        raise self._error(
            f"the model {model!r} is not one path or id; merge an adapter into its model first, or "
            "give it as a task, on the command line"
        )

    def _inputs(
        self, name: str, method: _Method, base: str | None, models: list[tuple[str, Any]]
    ) -> list[tuple[str, Any]]:
        """The models that are merged, without the base, or with it as the first of them."""
        others = [model for model in models if model[0] != base]
        if name in ("slerp", "nuslerp") and len(others) != 2 - (name == "slerp"):
            self._wrong.append(f"{name} merges two models, one of slerp is the base_model")
        if method.base:
            return others
        if base is None or name == "slerp":
            return models if base is None else [(base, None), *others]
        if len(others) == len(models):
            self._wrong.append(f"base_model: {name} has no base; name one of the models, or none")
        return [model for model in models if model[0] == base] + others

    def _value(self, key: str, levels: Sequence[Any], default: Any) -> Any:
        """What the first of several mappings says of a parameter."""
        own = [level for level in levels if isinstance(level, dict)]
        value = next((level[key] for level in own if key in level), default)
        if value is _NEEDED:
            self._wrong.append(f"parameters.{key} is missing")
            return 1.0
        if key == "lambda" and isinstance(value, list) and all(isinstance(v, dict) for v in value):
            return self._patterns(value)
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(
            value, (int, float)
        ):
            of = "; lists are gradients over layers, or values by name, which do not exist here"
            kind = "true or false" if isinstance(default, bool) else "a number"
            more = of if isinstance(value, (list, dict)) else ""
            self._wrong.append(f"parameters.{key} must be {kind}, not {value!r}{more}")
            return default if default is not _NEEDED else 1.0
        return value

    def _patterns(self, value: list[dict[str, Any]]) -> dict[str, float]:
        """The scales of parameters by name that a list of filters says."""
        found: dict[str, float] = {}
        for one in value:
            self._check_keys(one, ["filter", "value"], {}, "parameters.lambda.")
            part = one.get("filter") or "*"
            scale = self._value("value", [one], _NEEDED)
            found.setdefault("*" if part == "*" else f"*{part}*", scale)
        if "*" not in found:
            self._wrong.append("parameters.lambda has no value without a filter")
        return found

    def _check_tokenizer(self, base: str | None, models: list[str]) -> None:
        source, first = self._top.get("tokenizer_source"), base or next(iter(models), None)
        if source not in (None, "base", first):
            self._wrong.append(
                f"tokenizer_source {source} does not exist here: the tokenizer is copied from "
                f"{first}; leave it out if that will do"
            )

    def _options(
        self, name: str, method: _Method, shared: list[Any], own: list[Any]
    ) -> dict[str, Any]:
        """Options, weights and scale here, of the parameters of each model and of all."""
        each = {
            key: [self._value(key, [level, *shared], default) for level in own]
            for key, default in method.each.items()
        }
        values = {key: self._value(key, shared, one) for key, one in method.shared.items()}
        for key, only in method.fixed.items():
            if self._value(key, shared, only) != only:
                self._wrong.append(f"{key}={not only} does not exist here")
        is_zero = "weight" in each and abs(sum(each["weight"])) < _SMALL
        if is_zero and values.get("normalize") and name not in _ELECTING:
            self._wrong.append("parameters.weight: they add up to 0, by which normalize divides")
        return {} if self._wrong else _translated(name, each, values)

    def _check_keys(
        self,
        given: Mapping[str, Any],
        known: Sequence[str] | Mapping[str, Any],
        refused: Mapping[str, str],
        place: str = "",
    ) -> None:
        if not isinstance(given, dict):
            self._wrong.append(f"{place or 'parameters'} must be keys and values, not {given!r}")
            return
        for key in given:
            if key in refused:
                self._wrong.append(f"{place}{key}: {refused[key]}")
            elif key not in known:
                self._wrong.append(f"{place}{key} does not exist here; known: {listing(known, 30)}")


def _layers(path: Any) -> int | None:
    """How many layers a model in a folder says that it has."""
    config = Path(str(path)) / "config.json"
    try:
        layers: int | None = json.loads(config.read_text(encoding="utf-8")).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError):
        return None
    return layers


def _translated(name: str, each: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Scale, weights and options of a method here, from its parameters there."""
    weights, scale = each.get("weight", []), shared.get("lambda", 1.0)
    normalize, total = shared.get("normalize", False), sum(weights)
    found = {"density": each["density"]} if "density" in each else {}
    if name == "linear":
        return {"weights": [w * len(weights) / (total if normalize else 1) for w in weights]}
    if name == "slerp":
        return {"t": shared["t"]}
    if name == "nuslerp":
        return {"t": weights[1] / total if abs(total) >= 1e-6 else 0.5}
    if name == "karcher":
        return {}
    if name == "sce":
        return {"density": shared["select_topk"], "scale": 1.0}
    if name in _ELECTING:
        found |= {"task_weights": weights, "combine": "mean" if normalize else "sum"}
    elif weights:
        found |= {"weights": weights}
        factor = 1 / total if normalize else 1.0
        scale = (
            {pattern: number * factor for pattern, number in scale.items()}
            if isinstance(scale, dict)
            else scale * factor
        )
    if name == "ties":
        found |= {"per_parameter": True}
    if name == "della_linear":
        found |= {"sign": "none", "combine": "sum"}
    if "gamma" in shared:
        found |= {"gamma": shared["gamma"]}
    if "epsilon" in shared:
        # There it is to either side of the density, and has no effect where that is 1.
        found |= {"epsilon": 0 if set(each["density"]) == {1} else 2 * shared["epsilon"]}
    return {**found, "scale": scale}
