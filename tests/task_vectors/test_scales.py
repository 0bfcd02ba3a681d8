"""Scales: one factor, or one for each layer."""

import re

import pytest
import torch

from cl_merge.errors import InputError
from cl_merge.task_vectors.scales import Scales, lines_scales, scaled

NAMES = ["visual.blocks.0.attn.weight", "visual.blocks.0.mlp.weight", "visual.proj"]


def test_nothing_is_the_default_and_a_number_is_for_all():
    assert [Scales.read(None, 0.5).of(name) for name in NAMES] == [0.5] * 3
    assert [Scales.read(2, 0.5).of(name) for name in NAMES] == [2.0] * 3


def test_the_first_pattern_that_fits_counts_and_the_default_is_for_the_rest():
    scales = Scales.read({"*attn*": 0.1, "visual.blocks.*": 0.2}, default=0.5)
    assert [scales.of(name) for name in NAMES] == [0.1, 0.2, 0.5]


def test_the_pattern_for_everything_replaces_the_default_wherever_it_stands():
    for given in ({"*attn*": 0.1, "*": 0.3}, {"*": 0.3, "*attn*": 0.1}):
        assert [Scales.read(given, 0.5).of(name) for name in NAMES] == [0.1, 0.3, 0.3]


@pytest.mark.parametrize("given", [None, 0.3, {"*attn*": 0.1}, {"a": 1, "b": 2, "*": 3}])
def test_what_is_written_to_json_reads_back_the_same(given):
    scales = Scales.read(given, 0.5)
    assert Scales.read(scales.plain(), 9.0) == scales
    assert Scales.read(scales, 9.0) == scales


@pytest.mark.parametrize(
    ("given", "shown"), [(0.5, "0.5"), (1.0, "1"), ({"a": 0.5}, "0.3-0.5"), ({"a": 0.3}, "0.3")]
)
def test_tables_show_a_number_or_a_range(given, shown):
    assert str(Scales.read(given, 0.3)) == shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (float("inf"), "the scale must be a finite number, not inf"),
        (True, "the scale must be a finite number, not True"),
        ("much", "the scale must be a finite number, not 'much'"),
        ({"*attn*": None}, "'*attn*': the scale must be a finite number, not None"),
    ],
)
def test_what_is_no_finite_number_is_named(given, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        Scales.read(given, 0.5)


def test_a_pattern_that_fits_nothing_is_named_with_the_nearest_name():
    Scales.read({"*attn*": 0.1}, 0.5).check(NAMES)
    message = (
        "scale: the pattern 'visual.pro' fits no parameter; did you mean 'visual.proj'? Patterns "
        "fit whole names, as in 'visual.*'"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        Scales.read({"visual.pro": 0.1}, 0.5).check(NAMES)


def test_each_parameter_moves_by_its_own_scale_and_the_others_stay():
    base = {name: torch.ones(2) for name in NAMES}
    changes = [(NAMES[0], torch.ones(2)), (NAMES[1], torch.full((2,), 2.0))]
    found = dict(scaled(base, changes, Scales.read({"*attn*": 0.5}, 0.25)))
    assert found.keys() == base.keys()
    assert [float(found[name][0]) for name in NAMES] == [1.5, 1.5, 1.0]
    assert all(float(tensor[0]) == 1.0 for tensor in base.values())


@pytest.mark.parametrize(
    "block",
    [
        "visual.blocks.{}.mlp.weight",
        "layers.{}.experts.7.w",
        "{}.weight",
        "a.encoder_layer_{}.ln_1.b",
    ],
)
def test_lines_grow_in_a_straight_line_from_the_first_block_to_the_last(block):
    names = ["embed", "head.weight", *(block.format(i) for i in range(11))]
    scales = Scales.read(lines_scales(names, 0.2, 0.8), default=9)
    scales.check(names)
    found = [scales.of(name) for name in names]
    assert found[:2] == [0.2, 0.2]
    assert found[2:] == pytest.approx([0.2 + 0.06 * depth for depth in range(11)])


def test_lines_take_each_list_of_blocks_by_itself_and_fall_too():
    names = [f"encoder.{i}.w" for i in (4, 5, 6)] + [f"decoder.block.{i}.w" for i in (0, 1)]
    scales = Scales.read(lines_scales([*names, "only.0.w"], 1.0, 0.0), default=9)
    assert [scales.of(name) for name in [*names, "only.0.w"]] == [1.0, 0.5, 0.0, 1.0, 0.0, 1.0]


def test_lines_without_blocks_or_in_stages_are_an_error():
    with pytest.raises(InputError, match="lines: no name has a number that counts blocks"):
        lines_scales(["conv1.weight", "only.0.weight"], 0.2, 1.0)
    with pytest.raises(InputError, match=r"lines: 'layer1\.0' is a block of a stage"):
        lines_scales(["layer1.0.conv1.weight", "layer1.1.conv1.weight"], 0.2, 1.0)
    with pytest.raises(InputError):
        lines_scales(["a.0.w", "a.1.w"], 0.2, float("nan"))
