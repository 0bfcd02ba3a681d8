"""A user's own method: as a function, by its name, and by the place of its file or module."""

import inspect
import json
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from plain import Plain, fit, loader, same, trainer, weights

from cl_merge import TaskVector
from cl_merge.callbacks import MergeCallback
from cl_merge.errors import InputError
from cl_merge.merge_files import merge_checkpoints
from cl_merge.mergers import (
    MERGERS,
    MaxMagnitude,
    Merger,
    find_merger,
    fold_method,
    get_merger,
    merge,
    merge_method,
)
from cl_merge.mergers.registry import is_location
from cl_merge.mergers.stack import StackMerger
from cl_merge.stream_merger import StreamMerger


@pytest.fixture(autouse=True)
def _forget_methods():
    """Leave no method behind for other tests."""
    before = dict(MERGERS)
    yield
    MERGERS.clear()
    MERGERS.update(before)


@pytest.fixture
def middle():
    @merge_method("middle", scale=0.7)
    def middle(values, *, lower: bool = True):
        """Take the median over tasks."""
        return values.quantile(0.5, dim=0, interpolation="lower" if lower else "higher")

    return middle


def error_of(function, *args, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    return str(caught.value)


def values(*numbers):
    return [{"w": torch.tensor([number])} for number in numbers]


# What the decorators make.


def test_a_function_of_all_tasks_becomes_a_merger_class(middle):
    assert issubclass(middle, StackMerger)
    assert middle.__doc__ == "Take the median over tasks."
    assert (middle.name, middle.published_scale, middle.unit) == ("middle", 0.7, "element")
    assert middle.__name__ == "middle"
    assert middle.__module__ == __name__
    assert MERGERS["middle"] is middle
    assert middle().options == {"lower": True}
    assert middle(lower=False).lower is False


def test_it_works_as_an_instance_and_by_its_name(middle):
    vectors = values(1.0, 4.0, 2.0, 9.0)
    merger = middle(lower=False)
    for vector in vectors:
        merger.update(vector)
    assert merger.merged()["w"].tolist() == [4]
    assert get_merger("middle", lower=False).options == {"lower": False}
    merged = merge(vectors, "middle")
    assert merged["w"].tolist() == [2]
    assert merged.metadata == {"method": "middle", "options": '{"lower": true}', "tasks": "4"}


def test_a_function_of_one_task_at_a_time_becomes_a_merger_of_constant_memory():
    @fold_method("decay", scale=0.5)
    def decay(merged, vector, task, *, rate: float = 0.5):
        """Weigh older tasks less."""
        assert (merged == 0).all() or task
        return rate * merged + vector + task

    assert issubclass(decay, Merger)
    assert not issubclass(decay, StackMerger)
    assert decay.published_scale == 0.5
    merger = decay(rate=0.25)
    sizes = set()
    for vector in values(8.0, 4.0, 2.0):
        merger.update(vector)
        sizes.add(sum(len(kept) for kept in merger.state_dict()["accumulators"].values()))
    assert sizes == {1}
    assert merger.merged()["w"].tolist() == [(8 * 0.25 + 5) * 0.25 + 4]


def test_a_method_is_called_like_its_function_unless_it_is_given_a_name():
    @merge_method()
    def take_first(values):
        return values[0]

    @fold_method
    def take_last(merged, vector, task):
        return vector

    assert take_first.name == "take-first"
    assert merge(values(1.0, 2.0), "take-first")["w"].tolist() == [1]
    assert merge(values(1.0, 2.0), "take-last")["w"].tolist() == [2]


def test_whole_parameters_come_in_their_shape():
    seen = []

    @merge_method("shapes", unit="parameter")
    def shapes(values):
        seen.append(tuple(values.shape))
        return values.sum(dim=0)

    @fold_method("shapes-too", unit="parameter")
    def shapes_too(merged, vector, task):
        seen.append((tuple(merged.shape), tuple(vector.shape)))
        return merged + vector

    vectors = [{"a": torch.ones(2, 3), "b": torch.ones(())}] * 2
    assert merge(vectors, "shapes")["a"].tolist() == [[2] * 3] * 2
    assert sorted(seen) == [(2,), (2, 2, 3)]
    seen.clear()
    assert merge(vectors, "shapes-too")["a"].tolist() == [[2] * 3] * 2
    assert sorted(seen) == [((), ())] * 2 + [((2, 3), (2, 3))] * 2


@pytest.mark.parametrize("chunk", [7, 1 << 18])
def test_chunks_and_mixed_inputs_make_no_difference(middle, make_vector, chunk):
    merger = middle()
    merger.chunk_size = chunk
    vectors = [make_vector(seed) for seed in range(3)]
    merged = merge(vectors, merger)
    for name, tensor in merged.items():
        expected = torch.stack([v[name].float() for v in vectors]).median(dim=0).values
        assert torch.equal(tensor, expected)


def test_results_of_other_precision_are_taken_in_float32():
    @merge_method("wide")
    def wide(values):
        return values.double().mean(dim=0)

    @fold_method("narrow")
    def narrow(merged, vector, task):
        return vector.bfloat16()

    assert merge(values(1.0, 2.0), "wide")["w"].dtype == torch.float32
    assert merge(values(1.0, 2.0), "narrow")["w"].dtype == torch.float32


def test_a_function_may_change_what_it_is_given():
    @merge_method("careless")
    def careless(values):
        return values.mul_(2)[0]

    @fold_method("careless-too")
    def careless_too(merged, vector, task):
        vector.mul_(2)
        return merged.add_(vector)

    for method, expected in (("careless", 2), ("careless-too", 6)):
        merger = get_merger(method)
        given = values(1.0, 2.0)
        for vector in given:
            merger.update(vector)
        assert [merger.merged()["w"].item() for _ in range(2)] == [expected] * 2
        assert [vector["w"].item() for vector in given] == [1, 2]


def test_a_state_goes_on_and_another_options_state_is_an_error(middle):
    first, second = middle(), middle()
    first.update(values(1.0)[0])
    second.load_state_dict(first.state_dict())
    second.update(values(5.0)[0])
    assert second.merged()["w"].tolist() == [1]
    assert "is of method 'middle' with options {'lower': True}" in error_of(
        middle(lower=False).load_state_dict, first.state_dict()
    )


@merge_method("picklable")
def picklable(values):
    """Stand at the top of a module, as pickle wants it."""
    return values[0]


del MERGERS["picklable"]  # or the tests of all methods would find it


def test_the_class_can_be_pickled():
    assert pickle.loads(pickle.dumps(picklable)) is picklable


# In a callback.


def test_a_callback_takes_an_instance_a_name_or_a_place(middle, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(METHODS)
    for method in (middle(), "middle", f"{file}:halfway"):
        module, callback = Plain(), MergeCallback(method)
        base = weights(module)
        vectors = [TaskVector.between(base, fit(module, callback, task)) for task in range(3)]
        trainer(callback).test(module, loader(0), verbose=False)
        expected = {
            name: torch.stack([vector[name] for vector in vectors]).median(dim=0).values
            for name in base
        }
        assert same(dict(callback.merged()), expected)
        assert same(module.seen["test"], TaskVector(expected).apply_to(base, scale=0.7))
    assert error_of(MergeCallback, "middle", lowr=True) == (
        "unknown option of method 'middle' 'lowr'; did you mean 'lower'? Known: lower"
    )


# Bad definitions.


@pytest.mark.parametrize("name", ["magmax", "max-abs", "ties"])
def test_a_built_in_name_is_taken(name):
    assert error_of(merge_method(name), lambda values: values[0]) == (
        f"'{name}' is a built-in method; give yours another name"
    )
    assert get_merger("magmax").__class__ is MaxMagnitude


def test_defining_a_method_again_replaces_it(middle):
    @merge_method("middle")
    def again(values):
        return values[0]

    assert MERGERS["middle"] is again
    assert merge(values(3.0, 1.0, 2.0), "middle")["w"].tolist() == [3]


@pytest.mark.parametrize("name", ["", "a b", "a:b", "-a", "a/b", 3])
def test_a_name_that_cannot_be_typed_is_an_error(name):
    assert error_of(merge_method(name), lambda values: values[0]) == (
        f"a method's name is made of letters, digits, '-', '_' and '.', which {name!r} is not"
    )


def test_a_lambda_needs_a_name():
    assert "which '<lambda>' is not" in error_of(merge_method(), lambda values: values[0])


def test_a_unit_that_is_not_known_is_an_error():
    assert error_of(merge_method("m", unit="elements"), lambda values: values[0]) == (
        "unknown unit of method 'm' 'elements'; did you mean 'element'? Known: element, parameter"
    )


@pytest.mark.parametrize("scale", [float("nan"), "1", None])
def test_a_scale_that_is_no_number_is_an_error(scale):
    assert error_of(merge_method("m", scale=scale), lambda values: values[0]) == (
        f"the scale must be a finite number, not {scale!r}"
    )


@pytest.mark.parametrize(
    ("function", "takes"),
    [
        (lambda: 0, ""),
        (lambda values, rate=0.5: 0, "values, rate=0.5"),
        (lambda *values: 0, "*values"),
        (lambda values, **options: 0, "values, **options"),
        (lambda *, values=0: 0, "*, values=0"),
    ],
)
def test_a_function_of_other_arguments_is_an_error(function, takes):
    assert error_of(merge_method("m"), function) == (
        "method 'm': the function must take (values) and its options after a '*', as in "
        f"(values, *, rate=0.5), but takes ({takes})"
    )


def test_a_fold_of_other_arguments_is_an_error():
    assert error_of(fold_method("f"), lambda merged, vector: merged) == (
        "method 'f': the function must take (merged, vector, task) and its options after a '*', as "
        "in (merged, vector, task, *, rate=0.5), but takes (merged, vector)"
    )


def test_an_option_without_a_default_is_an_error():
    assert error_of(merge_method("m"), lambda values, *, rate: values[0]) == (
        "method 'm': the option rate needs a default"
    )


@pytest.mark.parametrize(
    "option", ["tasks", "options", "combine", "update", "name", "_given", "scale", "method"]
)
def test_an_option_that_would_hide_a_part_of_the_merger_is_an_error(option):
    space = {}
    exec(f"def function(values, *, {option}=1): return values[0]", space)
    assert error_of(merge_method("m"), space["function"]) == (
        f"method 'm': no option can be called {option}, which means something else to those who merge"
    )


@pytest.mark.parametrize("taker", [merge, merge_checkpoints, MergeCallback, StreamMerger])
def test_what_those_who_take_options_take_themselves_is_refused(taker):
    taken = inspect.signature(taker).parameters.values()
    names = [parameter.name for parameter in taken if parameter.kind is not parameter.VAR_KEYWORD]
    for name in names:
        space = {}
        exec(f"def function(values, *, {name}=1): return values[0]", space)
        assert "no option can be called" in error_of(merge_method("m"), space["function"])


@pytest.mark.parametrize("value", [torch.ones(1), (1, 2), {1, 2}, float("nan"), object])
def test_an_option_that_json_cannot_hold_is_an_error(value):
    def function(values, *, limit=value):
        return values[0]

    assert error_of(merge_method("m"), function) == (
        "option limit of method 'm' must be a plain value (number, text, true or false, none, or "
        f"lists and dictionaries of these), not {value!r}"
    )


def test_values_of_options_are_checked():
    @merge_method("checked")
    def checked(values, *, limit: float = 0.1, kind: str = "a", sharp: bool = False, free=None):
        return values[0]

    merger = checked(limit=1, kind="b", sharp=True, free=[1, {"a": None}])
    assert json.loads(json.dumps(merger.options)) == merger.options
    assert error_of(checked, limit="0.2") == (
        "option limit of method 'checked' must be a number, as 0.1 is, not '0.2'"
    )
    assert error_of(checked, limit=True) == (
        "option limit of method 'checked' must be a number, as 0.1 is, not True"
    )
    assert error_of(checked, sharp=1) == (
        "option sharp of method 'checked' must be true or false, as False is, not 1"
    )
    assert error_of(checked, kind=3) == (
        "option kind of method 'checked' must be text, as 'a' is, not 3"
    )
    assert error_of(checked, free=torch.ones(1)).startswith("option free of method 'checked' must")
    for make in (checked, lambda **options: get_merger("checked", **options)):
        assert error_of(make, limt=1) == (
            "unknown option of method 'checked' 'limt'; did you mean 'limit'? "
            "Known: limit, kind, sharp, free"
        )


# Bad results.

BAD = {
    "returned a list, not a tensor": lambda like: like.tolist(),
    "returned None, not a tensor": lambda like: None,
    "returned a number, not a tensor": lambda like: 0.5,
    "returned shape (1,) instead of (3,)": lambda like: like[:1],
    "returned shape () instead of (3,)": lambda like: like.sum(),
    "returned torch.int64, not floating point": lambda like: like.long(),
    "returned torch.bool, not floating point": lambda like: like > 0,
    "returned NaN or infinity": lambda like: like / 0,
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_result_is_named(message):
    @merge_method("bad")
    def bad(values):
        return BAD[message](values[0])

    @fold_method("bad-too")
    def bad_too(merged, vector, task):
        return BAD[message](vector)

    vectors = [{"layer.weight": torch.ones(3)}]
    for method in ("bad", "bad-too"):
        assert error_of(merge, vectors, method) == (
            f"in method '{method}', parameter layer.weight: the function {message}"
        )


def test_an_error_in_the_function_tells_where_it_was():
    @merge_method("broken")
    def broken(values):
        return values[7]

    with pytest.raises(IndexError) as caught:
        merge(values(1.0), "broken")
    assert caught.value.__notes__ == ["in method 'broken', parameter w"]


# Files and modules.

METHODS = textwrap.dedent('''
    from cl_merge.mergers import Average, fold_method, merge_method

    @merge_method("half-way", scale=0.7)
    def halfway(values, *, lower: bool = True):
        """Take the median over tasks."""
        return values.quantile(0.5, dim=0, interpolation="lower" if lower else "higher")

    @fold_method()
    def latest(merged, vector, task):
        return vector

    class Own(Average):
        name = "own"

    def plain(values):
        return values[0]

    number = 3
''')


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_methods.py"
    path.write_text(METHODS)
    yield path
    for name in [name for name in sys.modules if name.startswith("methods_in_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["halfway", "half-way"])
def test_a_method_is_found_in_a_file(file, name):
    assert merge(values(1.0, 3.0, 2.0), f"{file}:{name}")["w"].tolist() == [2]
    assert get_merger(f"{file}:{name}", lower=False).options == {"lower": False}
    assert merge(values(1.0), f"{file}:{name}").metadata["method"] == f"{file}:{name}"
    assert MERGERS["half-way"] is find_merger(f"{file}:halfway")


def test_a_class_of_a_file_is_a_method_too(file):
    assert merge(values(1.0, 3.0), f"{file}:Own")["w"].tolist() == [2]
    assert get_merger(f"{file}:own").name == "own"
    assert get_merger(f"{file}:latest").name == "latest"


def test_a_file_is_run_once_until_it_changes(file):
    first = find_merger(f"{file}:latest")
    assert find_merger(f"{file}:latest") is first
    file.write_text(METHODS.replace("return vector", "return vector * 2"))
    os.utime(file, ns=(1, 1))
    assert find_merger(f"{file}:latest") is not first
    assert merge(values(1.0), f"{file}:latest")["w"].tolist() == [2]


def test_files_of_one_name_do_not_mix(tmp_path):
    for folder, factor in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            METHODS.replace("return vector", f"return vector * {factor}")
        )
    results = [merge(values(1.0), f"{tmp_path / f}/mine.py:latest")["w"].item() for f in "aba"]
    assert results == [2, 3, 2]


def test_a_file_may_hold_dataclasses_and_import_what_is_beside_it(file):
    file.with_name("helper_beside.py").write_text("FACTOR = 5")
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from helper_beside import FACTOR\n"
        "from cl_merge.mergers import merge_method\n"
        "@dataclass\n"
        "class Setting:\n"
        "    factor: int = FACTOR\n"
        "@merge_method()\n"
        "def scaled(values):\n"
        "    return values[0] * Setting().factor\n"
    )
    assert merge(values(2.0), f"{file}:scaled")["w"].tolist() == [10]
    del sys.modules["helper_beside"]


def test_a_file_that_failed_can_be_mended(file):
    file.write_text("1 / 0")
    assert "ZeroDivisionError" in error_of(find_merger, f"{file}:latest")
    assert not [name for name in sys.modules if name.startswith("methods_in_my_methods")]
    file.write_text(METHODS)
    os.utime(file, ns=(1, 1))
    assert find_merger(f"{file}:latest").name == "latest"


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "package_of_methods"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text(METHODS)
    yield "package_of_methods.inner"
    for name in [name for name in sys.modules if name.startswith("package_of_methods")]:
        del sys.modules[name]


def test_a_method_is_found_in_a_module_of_the_working_directory(module):
    before = list(sys.path)
    assert merge(values(1.0, 3.0, 2.0), f"{module}:halfway")["w"].tolist() == [2]
    assert sys.path == before


def test_a_missing_method_is_an_error_that_names_the_nearest(file, module):
    for where in (str(file), module):
        assert error_of(get_merger, f"{where}:halfwy") == (
            f"unknown method in '{where}' 'halfwy'; did you mean 'halfway'? "
            "Known: halfway, latest, Own, half-way, own"
        )


def test_a_function_without_a_decorator_is_an_error(file):
    assert error_of(get_merger, f"{file}:plain") == (
        f"'plain' in '{file}' is no merger; decorate the function with @merge_method or "
        "@fold_method, or make it a subclass of Merger"
    )
    assert error_of(get_merger, f"{file}:number").startswith(
        f"unknown method in '{file}' 'number'."
    )


def test_a_missing_file_is_an_error_that_names_the_nearest(file):
    near, far = file.with_name("my_method.py"), file.parent / "none" / "zzz.py"
    assert error_of(get_merger, f"{near}:median") == (
        f"there is no file '{near}' to take a method from; did you mean 'my_methods.py'?"
    )
    assert error_of(get_merger, f"{far}:median") == (
        f"there is no file '{far}' to take a method from"
    )


def test_a_missing_module_is_an_error_that_names_the_nearest(module):
    assert error_of(get_merger, "package_of_methods.iner:halfway") == (
        "there is no module 'package_of_methods.iner' to take a method from; did you mean "
        "'package_of_methods.inner'?"
    )
    assert error_of(get_merger, "package_of_method.inner:halfway") == (
        "there is no module 'package_of_method' to take a method from; did you mean "
        "'package_of_methods'?"
    )


@pytest.mark.parametrize("place", [":median", "file.py:", ":"])
def test_half_a_place_is_an_error(place):
    assert error_of(get_merger, place) == (
        f"'{place}' does not tell where a method is; expected 'path/to/file.py:name' or "
        "'package.module:name'"
    )


@pytest.mark.parametrize("where", ["..", "a b", ".a", "a..b", "a/b", "file.2"])
def test_what_is_neither_file_nor_module_is_an_error(where):
    assert error_of(get_merger, f"{where}:median") == (
        f"'{where}' is neither a Python file, as in 'path/to/file.py:name', nor a module, as in "
        "'package.module:name'"
    )


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "raises ZeroDivisionError: division by zero"),
        ("def (", "raises SyntaxError: "),
        ("import not_installed_anywhere", "raises ModuleNotFoundError: No module named 'not_"),
        ("from cl_merge.mergers import nothing", "raises ImportError: cannot import name"),
    ],
)
def test_code_that_raises_is_named(file, module, code, message):
    file.write_text(code)
    assert error_of(get_merger, f"{file}:median").startswith(f"'{file}' {message}")
    inner = file.parent / "package_of_methods" / "inner.py"
    inner.write_text(code)
    assert error_of(get_merger, f"{module}:median").startswith(f"'{module}' {message}")


def test_a_bad_definition_in_a_file_is_told_as_it_is(file):
    file.write_text(METHODS + "\n@merge_method('ties')\ndef ties(values): return values[0]\n")
    assert error_of(get_merger, f"{file}:ties") == (
        "'ties' is a built-in method; give yours another name"
    )


def test_a_location_is_told_from_a_name():
    assert is_location("a.py:b")
    assert not is_location("magmax")


@pytest.mark.slow
def test_the_working_directory_hides_no_installed_module(tmp_path):
    (tmp_path / "json.py").write_text("raise RuntimeError")
    script = (
        "import sys; sys.path = [p for p in sys.path if p]\n"
        "from cl_merge.errors import InputError\n"
        "from cl_merge.mergers import get_merger\n"
        "try: get_merger('json:dumps')\n"
        "except InputError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("'dumps' in 'json' is no merger")
