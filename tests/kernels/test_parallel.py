"""Work on several threads gives what work on one gives, and leaves torch as it was."""

import threading
import time

import pytest
import torch

from cl_merge.kernels.parallel import in_threads


@pytest.fixture(autouse=True, params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items():
    def slow_at_first(item):
        time.sleep(0.02 if item < 2 else 0)
        return -item

    assert in_threads(slow_at_first, range(20)) == [-item for item in range(20)]
    assert in_threads(slow_at_first, []) == []


def test_the_first_error_is_raised_and_nothing_new_begins(threads):
    begun = []

    def fail(item):
        begun.append(item)
        if item == 5:
            raise ValueError("five")
        time.sleep(0.01)

    with pytest.raises(ValueError, match="five"):
        in_threads(fail, range(1000))
    assert len(begun) <= 6 + threads


def test_torch_keeps_its_number_of_threads(threads):
    inside = set(in_threads(lambda _: torch.get_num_threads(), range(10)))
    assert inside == {1}
    assert torch.get_num_threads() == threads


def test_work_within_work_starts_no_more_threads(threads):
    def outer(_):
        return in_threads(lambda _: threading.get_ident(), range(5))

    for found in in_threads(outer, range(4)):
        assert len(set(found)) == 1 or threads == 1
