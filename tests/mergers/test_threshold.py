"""The exact magnitude from which TIES keeps values, for vectors too large to be looked at whole."""

import pytest
import torch

from cl_merge.mergers.chunks import Reader
from cl_merge.mergers.threshold import trim_threshold


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["few values", "one value", "bfloat16", "mostly zero", "outliers"])
@pytest.mark.parametrize("room", [1 << 24, 0], ids=["from a bracket", "by counting"])
def test_the_threshold_is_exact_for_large_vectors(density, kind, room):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400_000, generator=generator)
    values = {
        "few values": values.mul(2).round(),
        "one value": torch.full_like(values, -3.0),
        "bfloat16": values.bfloat16().float(),
        "mostly zero": values * (values > 1),
        "outliers": values.pow(9),
    }[kind]
    rank = len(values) - int(density * len(values))
    expected = values.abs().kthvalue(rank).values.item()
    reader = Reader.of({"a": values[:1000], "b": values[1000:]})
    assert trim_threshold(reader, density, room) == expected


def test_the_threshold_is_exact_where_a_sample_misleads():
    # Whatever is sampled of "b" is small, but most of it is not.
    trap = torch.ones(300_000)
    trap[::293] = 1e-3
    values = {"a": torch.linspace(0, 2, 200_000), "b": trap}
    whole = torch.cat(list(values.values()))
    for density in (0.05, 0.3, 0.7):
        rank = len(whole) - int(density * len(whole))
        expected = whole.kthvalue(rank).values.item()
        assert trim_threshold(Reader.of(values), density) == expected
