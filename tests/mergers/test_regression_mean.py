"""RegMean against a least-squares problem in numpy, and the Gram matrices that it needs."""

import io

import numpy as np
import pytest
import torch
from torch import nn

from cl_merge import MergeCallback, StreamMerger, gram_matrices
from cl_merge.benchmarks.methods.method import find_method
from cl_merge.errors import InputError
from cl_merge.mergers import reference
from cl_merge.mergers.regression_mean import RegressionMean

pytestmark = pytest.mark.usefixtures("any_chunk")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def merged(stack, grams, **options):
    merger = RegressionMean(**options)
    for matrix, gram in zip(stack, grams, strict=True):
        merger.update({"w": matrix}, {"w": gram})
    return merger.merged()["w"]


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("shape", [(6, 4), (3, 8)])
def test_the_layer_is_nearest_to_what_each_task_puts_out(tasks, shape):
    """Least squares over the inputs of all tasks: T x = τ_t x."""
    stack, inputs = normal(tasks, *shape), normal(tasks, 40, shape[1], seed=1).double()
    grams = inputs.mT @ inputs / 40
    outputs = inputs @ stack.double().mT
    rows, wanted = inputs.flatten(0, 1).numpy(), outputs.flatten(0, 1).numpy()
    nearest = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    found = merged(stack, grams.float(), off_diagonal=1.0)
    np.testing.assert_allclose(found, nearest, 1e-4, 1e-4)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.5, 0.9])
def test_it_matches_the_readable_reference(off_diagonal):
    stack, inputs = normal(4, 5, 7), normal(4, 20, 7, seed=1)
    grams = inputs.mT @ inputs
    expected = reference.regmean(stack.double(), grams.double(), off_diagonal)
    found = merged(stack, grams, off_diagonal=off_diagonal)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_weights_in_place_of_task_vectors_give_the_same():
    base, stack, inputs = normal(5, 7, seed=3), normal(3, 5, 7), normal(3, 20, 7, seed=1)
    grams = inputs.mT @ inputs
    expected = merged(base + stack, grams) - base
    torch.testing.assert_close(merged(stack, grams), expected, rtol=1e-4, atol=1e-5)


def test_what_has_no_gram_matrix_is_averaged():
    merger = RegressionMean()
    vectors = [{"w": normal(2, 3, seed=s), "other": normal(2, 3, seed=9 + s)} for s in range(3)]
    vectors = [{**v, "bias": v["w"][0], "kernel": v["other"].view(1, 2, 3, 1)} for v in vectors]
    for vector in vectors:
        merger.update(vector, {"w": torch.eye(3), "elsewhere": torch.eye(2)})
    found = merger.merged()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, torch.stack([v[name] for v in vectors]).mean(dim=0))


def test_inputs_that_no_task_has_are_averaged():
    first, second = torch.tensor([[2.0, 4.0]]), torch.tensor([[6.0, 8.0]])
    gram = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(merged([first, second], [3 * gram, gram]), torch.tensor([[3.0, 6]]))
    nothing = [torch.zeros(2, 2)] * 2
    assert torch.equal(merged([first, second], nothing), torch.tensor([[4.0, 6.0]]))


def test_it_keeps_the_same_whatever_the_number_of_tasks_and_goes_on_from_a_state():
    stack, inputs = normal(4, 5, 7), normal(4, 20, 7, seed=1)
    grams, sizes = inputs.mT @ inputs, set()
    merger = RegressionMean()
    for matrix, gram in zip(stack, grams, strict=True):
        merger.update({"w": matrix}, {"w": gram})
        kept = merger.state_dict()["accumulators"]["w"]
        sizes.add(sum(tensor.nbytes for tensor in kept.values()))
        file = io.BytesIO()
        torch.save(merger.state_dict(), file)
        file.seek(0)
        merger = RegressionMean()
        merger.load_state_dict(torch.load(file, weights_only=True))
    assert sizes == {12 * 35 + 8 * 49 + 8}
    assert torch.equal(merger.merged()["w"], merged(stack, grams))


WRONG = {
    "no Gram matrix of what is merged, but has v; expected names of weights, such as w": {
        "v": torch.eye(3)
    },
    r"no Gram matrices of inputs: w \(2, 3\) for a weight of shape \(2, 3\); expected \[n, n\]": {
        "w": torch.ones(2, 3)
    },
    r"no symmetric matrix, with a diagonal of 0 or more: w": {"w": torch.eye(3).roll(1, 0)},
    r"with a diagonal of 0 or more: w": {"w": -torch.eye(3)},
    "NaN or infinity in w": {"w": torch.eye(3) / 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_gram_matrix_is_an_error(message):
    with pytest.raises(InputError, match=f"the importance of task 0.* {message}"):
        RegressionMean().update({"w": torch.ones(2, 3)}, WRONG[message])


def test_none_at_all_or_of_other_weights_is_an_error():
    vector = {"w": torch.ones(2, 3), "v": torch.ones(2, 3)}
    merger = RegressionMean()
    needs = "'regmean' needs the Gram matrices of the inputs of layers, as gram_matrices collects"
    with pytest.raises(InputError, match=needs):
        merger.update(vector)
    merger.update(vector, {"w": torch.eye(3)})
    with pytest.raises(InputError, match="than the tasks before; missing: w; extra: v"):
        merger.update(vector, {"v": torch.eye(3)})
    assert merger.tasks == 1


def test_where_none_are_collected_it_is_refused_at_once():
    with pytest.raises(InputError, match="which MergeCallback does not collect; merge afterwards"):
        MergeCallback("regmean")
    with pytest.raises(InputError, match="which runs do not collect; merge files"):
        find_method("regmean-sequential")


def test_a_stream_takes_them_at_the_end_of_each_task():
    torch.manual_seed(0)
    model, grams, vectors = nn.Sequential(nn.Linear(3, 2)), [], []
    stream = StreamMerger(model, "regmean")
    for task in range(2):
        stream.begin_task()
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 3))
        grams.append(gram_matrices(model, [normal(8, 3, seed=task)]))
        vectors.append(stream.end_task(grams[-1])["0.weight"])
    expected = merged(vectors, [gram["0.weight"] for gram in grams])
    torch.testing.assert_close(stream.merged()["0.weight"], expected)


class Odd(nn.Module):
    """A layer that is used twice, one that never is, one in three dimensions, and dropout."""

    def __init__(self):
        super().__init__()
        self.twice, self.never = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen = nn.Dropout().eval()

    def forward(self, x, shift=0.0):
        return self.twice(input=self.frozen(self.twice(x + shift)))


@pytest.mark.parametrize("kind", ["tensor", "pair", "mapping", "function"])
def test_gram_matrices_are_of_all_that_goes_in(kind):
    model, batches = Odd(), [normal(2, 3, 4, seed=seed) for seed in range(3)]
    forms = {
        "tensor": batches,
        "pair": [(batch, torch.tensor(0)) for batch in batches],
        "mapping": [{"x": batch, "shift": 0.0} for batch in batches],
        "function": [{"images": batch} for batch in batches],
    }
    forward = (lambda model, batch: model(batch["images"])) if kind == "function" else None
    found = gram_matrices(model, forms[kind], forward)
    rows = torch.cat(batches).view(-1, 4)
    rows = torch.cat([rows, model.twice(rows)]).detach().double()
    assert list(found) == ["twice.weight"]
    expected = rows.T @ rows / len(rows)
    torch.testing.assert_close(found["twice.weight"].double(), expected, rtol=1e-5, atol=1e-5)
    assert (model.training, model.frozen.training) == (True, False)
    assert not model.twice._forward_pre_hooks


def test_a_model_without_inputs_or_layers_has_none():
    with pytest.raises(InputError, match="no linear layer of the model was called"):
        gram_matrices(Odd(), [])
    with pytest.raises(InputError, match="no linear layer of the model was called"):
        gram_matrices(nn.ReLU(), [torch.ones(2)])
