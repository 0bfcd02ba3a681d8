"""The base of parameters that begin to train late, or are not there yet."""

import pytest
from plain import Plain, fit, same, weights
from torch import nn

from cl_merge import TaskVector
from cl_merge.callbacks import MergeCallback
from cl_merge.errors import InputError


def test_a_module_that_unfreezes_itself_as_a_batch_starts():
    class Thawing(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            self.net.requires_grad_(True)

    module, callback = Thawing(), MergeCallback()
    base = weights(module)
    module.net.requires_grad_(False)
    with pytest.warns(UserWarning, match="no floating-point parameter that requires a gradient"):
        trained = fit(module, callback, 0)
    assert same(dict(callback.merged()), dict(TaskVector.between(base, trained)))


def test_lazy_parameters_are_named():
    module = Plain()
    module.net[2] = nn.LazyLinear(3)
    with pytest.raises(InputError, match=r"lazy parameters are not known yet: net\.2\.weight"):
        fit(module, MergeCallback(), 0)
