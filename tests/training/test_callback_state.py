"""Which of the saved states is a callback's."""

import pytest

from cl_merge.callbacks import EWC, LwF, MergeCallback
from cl_merge.errors import InputError
from cl_merge.training.callback_state import state_of

FORMER = "MergeCallback{'method': 'ties', 'start': 'sequential'}"


def test_a_state_is_found_by_its_key_and_by_the_one_without_options():
    callback = MergeCallback("ties", density=0.3)
    assert state_of(callback, {callback.state_key: 1, FORMER: 2}) == 1
    assert state_of(callback, {FORMER: 2}) == 2
    assert state_of(callback, {LwF(target="net").state_key: 3}) is None
    assert state_of(EWC(), {EWC().state_key: 4}) == 4


@pytest.mark.parametrize("options", [{}, {"density": 0.4}, {"exclude": ["*.bias"]}])
def test_a_state_of_other_options_is_refused(options):
    saved = {MergeCallback("ties", density=0.3).state_key: 1}
    with pytest.raises(InputError, match="'density': 0.3.*; make it with the saved options"):
        state_of(MergeCallback("ties", **options), saved)


@pytest.mark.parametrize(
    ("callback", "saved"),
    [(MergeCallback("magmax"), MergeCallback("ties")), (LwF(target="a"), LwF(target="b"))],
)
def test_a_state_of_another_method_or_target_is_refused_and_not_passed_over(callback, saved):
    with pytest.raises(InputError, match=r"has the state of .*, but this is"):
        state_of(callback, {saved.state_key: 1})
