"""Results made ahead come in order, few wait, and errors come where their results would have."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

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


def test_jobs_are_taken_in_bounded_number_and_answer_in_order():
    taken = []

    def jobs():
        for i in range(20):
            taken.append(i)
            yield lambda i=i: i

    with ThreadPoolExecutor(2) as threads:
        for i, answer in enumerate(prefetch.in_order(threads, jobs(), ahead=2)):
            assert answer == i and len(taken) <= i + 3
    assert taken == list(range(20))


def test_results_keep_their_order_where_a_later_job_ends_first():
    later = threading.Event()

    def first():
        assert later.wait(5)
        return 0

    def second():
        later.set()
        return 1

    with ThreadPoolExecutor(2) as threads:
        assert list(prefetch.in_order(threads, [first, second], ahead=2)) == [0, 1]


def test_the_first_failure_ends_the_jobs():
    done, taken = threading.Event(), []

    def fail():
        raise ValueError("no")

    def jobs():
        for i in range(1000):
            taken.append(i)
            yield fail if i == 3 else done.set

    with ThreadPoolExecutor(8) as threads, pytest.raises(ValueError, match="no"):
        list(prefetch.in_order(threads, jobs(), ahead=8))
    assert done.is_set() and len(taken) <= 4 + 8


def test_closing_cancels_what_waits_and_ends_what_runs():
    started, ended = [], []

    def job(i):
        started.append(i)
        time.sleep(0.05)
        ended.append(i)
        return i

    with ThreadPoolExecutor(1) as threads:
        results = prefetch.in_order(threads, (lambda i=i: job(i) for i in range(100)), ahead=10)
        assert next(results) == 0
        results.close()
        assert started == ended and len(started) <= 3
