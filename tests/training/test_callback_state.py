"""Which of the saved states is a callback's."""

import pytest

from cl_merge.callbacks import EWC, MergeCallback
from cl_merge.errors import InputError
from cl_merge.training.callback_state import state_of

FORMER = "MergeCallback{'method': 'ties', 'start': 'sequential'}"


def test_a_state_is_found_by_its_key_and_by_the_one_without_options():
    callback = MergeCallback("ties", density=0.3)
    assert state_of(callback, {callback.state_key: 1, FORMER: 2}) == 1
    assert state_of(callback, {FORMER: 2}) == 2
    assert state_of(callback, {MergeCallback("magmax").state_key: 3}) is None
    assert state_of(EWC(), {EWC().state_key: 4}) == 4


@pytest.mark.parametrize("options", [{}, {"density": 0.4}, {"exclude": ["*.bias"]}])
def test_a_state_of_other_options_is_refused(options):
    saved = {MergeCallback("ties", density=0.3).state_key: 1}
    with pytest.raises(InputError, match="'density': 0.3.*; make it with the saved options"):
        state_of(MergeCallback("ties", **options), saved)
