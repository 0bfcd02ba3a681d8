"""What a user's function returns, and what is given in its place, is checked before a task trains."""

import pytest
from plain import Plain, loader, trainer

from cl_merge.callbacks import (
    EWC,
    AutoScale,
    ClassStatistics,
    DriftPenalty,
    DriftScale,
    MergeCallback,
)
from cl_merge.errors import InputError


def one(module, batch):
    return module.net(batch[0])


def two(module, batch):
    return module.net(batch[0]), batch[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EWC(logits=one), r"returned a Tensor; give EWC\(logits=...\)"),
        (lambda: MergeCallback("fisher", logits=one), r"give MergeCallback\(logits=...\)"),
        (
            lambda: MergeCallback(scale=AutoScale(logits=one), held_out=lambda: loader(0)),
            r"returned a Tensor; give scale=AutoScale\(logits=...\)",
        ),
        (lambda: ClassStatistics(features=one, classes=3), r"and labels \[batch\]"),
        (lambda: DriftPenalty(features=two), r"a tuple of 2; give DriftPenalty\(features=...\)"),
        (
            lambda: MergeCallback(scale=DriftScale(features=two)),
            r"a tuple of 2; give scale=DriftScale\(features=...\)",
        ),
        (
            lambda: MergeCallback(scale="auto", held_out=loader(0)),
            "held_out is a DataLoader; expected a function",
        ),
    ],
)
def test_what_it_returns_is_named_with_what_it_should_return(make, message):
    module = Plain()
    with pytest.raises(InputError, match=message):
        trainer(make()).fit(module, loader(0))
    assert module.trainer.global_step == 0


def test_a_callback_and_its_core_say_what_they_hold():
    merge = MergeCallback("ties", density=0.3)
    assert repr(merge).endswith("'options': {'density': 0.3}}: tasks=0>")
    assert repr(merge.stream) == "<StreamMerger: ties, tasks=0>"
