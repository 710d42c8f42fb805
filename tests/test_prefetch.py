"""What is made ahead comes in order, and what goes wrong comes where it belongs."""

import contextlib
import threading

import pytest

from dpo_jax.runtime import prefetch


def test_results_come_in_order_and_no_more_than_asked_ahead():
    made, release = [], threading.Event()

    def make(step):
        made.append(step)
        return step * 10

    with contextlib.closing(prefetch.ahead(make, range(100), depth=2)) as fed:
        assert [next(fed)[0] for _ in range(3)] == [0, 10, 20]
        release.wait(0.2)
        assert made == list(range(len(made))) and len(made) <= 5


def test_waiting_is_counted():
    slow = threading.Event()
    threading.Timer(0.2, slow.set).start()
    ((_, waited),) = prefetch.ahead(lambda step: slow.wait(5), range(1))
    assert 0.05 < waited < 5


def test_an_error_is_raised_where_its_result_would_have_come():
    def make(step):
        if step == 2:
            raise ValueError("two")
        return step

    fed = prefetch.ahead(make, range(5))
    assert [next(fed)[0], next(fed)[0]] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(fed)
