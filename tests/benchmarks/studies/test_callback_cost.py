"""What merging costs beside a training, counted on a small module."""

import torch

from cl_merge.benchmarks.studies.callback_cost import measure


def test_seconds_of_each_step_and_bytes_that_stay():
    module = torch.nn.Linear(512, 1024, bias=False)
    *seconds, model, kept = measure(module, "magmax", tasks=2)
    assert len(seconds) == 4
    assert all(float(value) >= 0 for value in seconds)
    assert (model, kept) == ("2", "4")  # MiB: the base and one accumulator
    assert measure(module, "ties", tasks=1)[-1] == "8"  # two sums, and two counts of half the size
