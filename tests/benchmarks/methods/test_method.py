"""What the names of methods mean, and what is said of names that mean nothing."""

import pytest

from cl_merge.benchmarks.methods.method import (
    METHODS,
    find_method,
    grouped_methods,
)
from cl_merge.errors import InputError


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from cl_merge import merge_method\n"
        "@merge_method('median-of-mine', scale=0.5)\n"
        "def median(values): return values.median(dim=0).values\n"
        "@merge_method('mine-aligned')\n"
        "def taken(values): return values.mean(dim=0)\n"
    )
    return f"{file}:median"


@pytest.mark.parametrize("plain", ["magmax", "ties", "ties-sequential", "lwf-magmax", "opcm"])
@pytest.mark.parametrize(("ending", "kind"), [("statistics", "both"), ("aligned", "aligned")])
def test_whatever_merges_may_have_class_statistics(plain, ending, kind):
    found, without = find_method(f"{plain}-{ending}"), find_method(plain)
    assert (found.name, found.statistics, found.text) == (f"{plain}-{ending}", kind, True)
    assert (found.merger, found.training) == (without.merger, without.training)
    assert found.merging == without.name
    # They are at the scale that is lowered where features drift too far.
    lowered = find_method(f"{plain}-drift")
    assert found.plain == lowered
    assert (lowered.scale, lowered.plain, lowered.merging) == ("drift", lowered, plain)
    assert find_method(found.name) == found
    # What the paper and its runs say is of the text head alone, but for how to merge.
    assert found.paper is None
    assert found.published == without.published


def test_the_endings_follow_those_of_trainings():
    assert find_method("ties-independent-aligned").name == "ties-aligned"
    assert find_method("ties-sequential-aligned").plain == find_method("ties-sequential-drift")
    assert find_method("ties-sequential-statistics").plain == find_method("ties-sequential-drift")
    assert find_method("magmax-sequential-statistics") is METHODS["magmax-statistics"]
    assert find_method("magmax-drift-aligned") is METHODS["magmax-aligned"]
    assert find_method("ties-drift-statistics") == find_method("ties-statistics")
    assert find_method("magmax-sequential-drift") is METHODS["magmax-drift"]


def test_a_method_of_ones_own_may_have_them_too(mine):
    found = find_method(f"{mine}-aligned")
    assert (found.name, found.training, found.merger) == (
        "median-of-mine-aligned",
        "independent",
        mine,
    )
    assert found.plain == find_method(f"{mine}-drift")
    assert found.plain.name == "median-of-mine-drift"
    assert (
        find_method(f"{mine}-sequential-statistics").name == "median-of-mine-sequential-statistics"
    )


def test_what_needs_no_merging_is_its_own_plain_method():
    for name in ("streaming-lda", "zero-shot", "lwf", "magmax"):
        assert find_method(name).plain == find_method(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero-shot-statistics", "'zero-shot' merges nothing; expected a method that merges"),
        ("lwf-statistics", "'lwf' merges nothing; expected a method that merges"),
        ("streaming-lda-aligned", "'streaming-lda' has class statistics already"),
        ("magmax-statistics-aligned", "'magmax-statistics' has class statistics already"),
        (
            "magmax-statistic",
            "unknown method 'magmax-statistic'; did you mean 'magmax-statistics'?",
        ),
        ("magmx-aligned", "unknown method 'magmx'; did you mean 'magmax'?"),
        ("-aligned", "unknown method '-aligned'"),
    ],
)
def test_wrong_endings_are_told_apart(name, message):
    with pytest.raises(InputError) as raised:
        find_method(name)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_merger_cannot_take_the_name_of_one_with_class_statistics(mine):
    with pytest.raises(InputError, match="calls itself 'mine-aligned', which is the name of"):
        find_method(mine.replace(":median", ":taken"))


def test_tables_show_class_statistics_in_a_group_of_their_own():
    trainings = {
        "ties-aligned": "independent",
        "magmax": "sequential",
        "streaming-lda": "sequential",
    }
    assert grouped_methods(trainings) == {
        "sequential training": ["magmax"],
        "class statistics": ["streaming-lda", "ties-aligned"],
    }
