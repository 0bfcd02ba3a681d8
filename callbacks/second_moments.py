"""Second moments of inputs and of gradients, which tell how a change of weights moves features."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_merge.callbacks.fisher import Reduce, requiring_gradients, singles, zeros_for
from cl_merge.errors import InputError
from cl_merge.task_vectors.module_weights import evaluating

Layers = Sequence[tuple[str, nn.Module]]
"""Names of weights, and layers that have them; tied layers have the same."""

Calls = list[tuple[str, nn.Module, Tensor, Tensor]]
"""Of every call of a layer the name of its weight, the layer, the input and the output."""


@dataclass
class SecondMoments:
    """Means over images, float32 or better.

    Attributes:
        inputs: Of what a linear layer or convolution takes, summed over its places, [n, n], by the
            name of its weight, [out, n] as a matrix.
        gradients: Of the gradients of v·f at its outputs, the mean over its places, [out, out].
        elements: Of the gradient of v·f by each element of all other parameters, by name.
    """

    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    elements: dict[str, Tensor]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter((self.inputs, self.gradients, self.elements))


def second_moments(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    features: Callable[[Any], Tensor],
    *,
    seed_of: Callable[[int], int],
    total: Reduce = lambda tensor: tensor,
    limit: int | None = None,
) -> SecondMoments:
    """Estimate them on images, each by itself, with v from N(0, I) and f the unit features.

    Args:
        module: The module; in evaluation mode while it is asked.
        parameters: Those of its parameters that are of interest, by name.
        batches: The images, in batches.
        features: Makes features [B, ...] of a batch, not normalised, with a graph.
        seed_of: Makes the seed of v of the index of an image, from 0; v is drawn on the CPU.
        total: Sums a tensor over all processes.
        limit: Take at most so many images of this process.

    Raises:
        InputError: If there is no image, or a moment is not finite.
    """
    images = singles(batches)
    # A compiled part would hide the calls of its layers.
    with (
        torch.enable_grad(),
        evaluating(module),
        requiring_gradients(parameters),
        torch.compiler.set_stance("force_eager"),
    ):
        first = next(images, None)
        if first is None:
            raise InputError("the task has no image whose features could be kept in place")
        layers = _called(first, features, _layers(module, parameters), parameters)
        sums = _zeros(layers, zeros_for(parameters))
        others = {name: parameters[name] for name in sums.elements}
        count = torch.zeros((), device=next(iter(parameters.values())).device)
        for index, image in enumerate(itertools.islice(itertools.chain([first], images), limit)):
            calls, unit = _unit_features(image, features, layers)
            count += 1
            if not unit.requires_grad:
                continue
            generator = torch.Generator().manual_seed(seed_of(index))
            drawn = torch.randn(unit.shape, generator=generator).to(unit)
            wanted = [*(output for *_, output in calls), *others.values()]
            found = torch.autograd.grad((unit * drawn).sum(), wanted, allow_unused=True)
            _add_layers(sums, calls, found)
            for name, gradient in zip(others, found[len(calls) :], strict=True):
                if gradient is not None:
                    sums.elements[name].add_(gradient.square())
    return _means(sums, total, float(total(count)))


def _called(
    image: Any,
    features: Callable[[Any], Tensor],
    layers: Layers,
    parameters: Mapping[str, nn.Parameter],
) -> Layers:
    """Leave out layers whose weight is used in another way than by calling them."""
    calls, unit = _unit_features(image, features, layers)
    if not unit.requires_grad:  # nothing that they depend on trains
        return []
    used = torch.autograd.grad(unit.sum(), list(parameters.values()), allow_unused=True)
    elsewhere = {n for n, gradient in zip(parameters, used, strict=True) if gradient is not None}
    elsewhere -= {name for name, *_ in calls}
    return [(name, layer) for name, layer in layers if name not in elsewhere]


def _unit_features(
    image: Any, features: Callable[[Any], Tensor], layers: Layers
) -> tuple[Calls, Tensor]:
    """The unit features of an image, [1, D], and the calls of layers that they took."""
    with _recording(layers) as calls:
        unit = F.normalize(features(image).flatten(1), dim=1)
    return list(calls), unit


def _means(sums: SecondMoments, total: Reduce, images: float) -> SecondMoments:
    """The means over all images of all processes, without what the features do not depend on."""
    for moments in sums:
        for name, moment in moments.items():
            moments[name] = total(moment).div_(images)
            if not moments[name].isfinite().all():
                raise InputError(f"the gradient of the features by '{name}' is not finite")
    reached = {
        n for moments in (sums.gradients, sums.elements) for n in moments if moments[n].any()
    }
    return SecondMoments(*({n: m[n] for n in m if n in reached} for m in sums))


def _layers(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Layers:
    """The linear layers and convolutions whose weights are among the parameters."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = (layer for layer in module.modules() if _is_matrix(layer))
    return [(names[id(layer.weight)], layer) for layer in found if id(layer.weight) in names]


def _is_matrix(layer: nn.Module) -> bool:
    # Subclasses may do something else with their weight, or not be called at all.
    if type(layer) is nn.Conv2d:
        padded = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return padded and layer.groups == 1
    return type(layer) is nn.Linear


def _zeros(layers: Layers, like: Mapping[str, Tensor]) -> SecondMoments:
    weights = {name: like[name].flatten(1) for name, _ in layers}
    found = SecondMoments({}, {}, {n: zeros for n, zeros in like.items() if n not in weights})
    for name, weight in weights.items():
        found.gradients[name], found.inputs[name] = (weight.new_zeros(n, n) for n in weight.shape)
    return found


@contextmanager
def _recording(layers: Layers) -> Iterator[Calls]:
    """Record the calls of layers."""
    calls: Calls = []

    def record(
        name: str, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        (inputs,) = (*given, *named.values())
        calls.append((name, layer, inputs.detach(), output))

    with ExitStack() as hooks:
        for name, layer in layers:
            hook = layer.register_forward_hook(partial(record, name), with_kwargs=True)
            hooks.callback(hook.remove)
        yield calls


def _add_layers(sums: SecondMoments, calls: Calls, gradients: Sequence[Tensor | None]) -> None:
    """Add what one image gives: a layer that is called again has more places."""
    places: dict[str, int] = {}
    of_image: dict[str, Tensor] = {}
    for (name, layer, inputs, _), gradient in zip(calls, gradients[: len(calls)], strict=True):
        if gradient is None:  # the features do not depend on this call
            continue
        rows = _rows(layer, inputs).to(sums.inputs[name])
        sums.inputs[name].addmm_(rows.T, rows)
        slopes = _channels_last(layer, gradient).to(rows)
        of_image[name] = of_image.get(name, 0) + slopes.T @ slopes
        places[name] = places.get(name, 0) + len(slopes)
    for name, moment in of_image.items():
        sums.gradients[name].add_(moment, alpha=1 / places[name])


def _rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What a layer multiplies its weight with at each place, [places, n]."""
    if not isinstance(layer, nn.Conv2d):
        return inputs.reshape(-1, inputs.shape[-1])
    padding = cast("tuple[int, ...]", layer.padding)  # no word, see _is_matrix
    patches = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
    return patches.mT.flatten(0, -2)


def _channels_last(layer: nn.Module, outputs: Tensor) -> Tensor:
    """Outputs as [places, out]."""
    if isinstance(layer, nn.Conv2d):
        outputs = outputs.flatten(2).mT
    return outputs.reshape(-1, outputs.shape[-1])
