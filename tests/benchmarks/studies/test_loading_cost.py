"""That loading and the model are both timed, in every pass."""

import pytest

from cl_merge.benchmarks.runs.settings import read_settings
from cl_merge.benchmarks.studies.loading_cost import PASSES, measure


@pytest.mark.slow
def test_seconds_of_loading_and_of_the_model_in_each_pass():
    found = measure(read_settings(["stream.batch_size=100", "stream.cache=true"]))
    assert len(found) == PASSES
    assert all(load > 0 and model > 0 for load, model in found)
