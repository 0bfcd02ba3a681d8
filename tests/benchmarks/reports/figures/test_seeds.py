"""Means and spreads over seeds."""

import math
import statistics

import pytest

from cl_merge.benchmarks.reports.figures.seeds import number, over_seeds, seeds_note


def test_each_point_has_its_mean_and_sample_standard_deviation():
    line = over_seeds([[1.0, 5.0], [2.0, 5.0], [6.0, 8.0]])
    assert line.means == (3.0, 6.0)
    assert line.spreads == pytest.approx((statistics.stdev([1, 2, 6]), statistics.stdev([5, 5, 8])))
    assert line.upper[1] - line.lower[1] == pytest.approx(2 * line.spreads[1])
    assert line.seeds == 3


def test_one_seed_has_no_spread_and_missing_values_do_not_count():
    line = over_seeds([[1.0, None, None], [None, None, 3.0]])
    assert line.means[::2] == (1.0, 3.0)
    assert math.isnan(line.means[1])
    assert all(math.isnan(spread) for spread in line.spreads)


def test_tables_have_rounded_numbers_and_none_for_what_is_no_number():
    assert number(12.3456) == 12.3
    assert number(0.12345, 3) == 0.123
    assert number(math.nan) is None


def test_captions_say_what_bands_are():
    assert seeds_note(1) == "One seed."
    assert seeds_note(3).startswith("Mean over 3 seeds; the band is one standard deviation")
