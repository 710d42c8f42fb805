"""Work done ahead in threads: results in order, a bounded number of them waiting."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
DEPTH = 2  # batches made ahead of the one in use


def in_order(threads: Executor, jobs: Iterable[Callable[[], T]], *, ahead: int) -> Generator[T, None, None]:
    """Yields what the jobs return, in their order, while up to `ahead` later ones run or wait to run.

    A job is taken from `jobs` only when it may start, so few results wait in memory, however many jobs there are.
    An error of a job is raised where its result would have come. At the end, after an error, and when the iterator
    is closed, jobs that have not started are cancelled, and the others have ended.
    """
    to_start = iter(jobs)
    running: collections.deque[Future[T]] = collections.deque()
    try:
        while True:
            running.extend(threads.submit(job) for job in itertools.islice(to_start, ahead + 1 - len(running)))
            if not running:
                return
            yield running.popleft().result()
    finally:
        for each in running:
            each.cancel()
        wait(running)


def ahead(
    make: Callable[[int], T], steps: Iterable[int], *, depth: int = DEPTH
) -> Generator[tuple[T, float], None, None]:
    """Yields `make(step)` of each step and the seconds waited for it; one thread makes up to `depth` ahead.

    Order, errors and closing: as for `in_order`.
    """
    jobs = (functools.partial(make, step) for step in steps)
    with (
        ThreadPoolExecutor(1, thread_name_prefix="prefetch") as threads,
        contextlib.closing(in_order(threads, jobs, ahead=depth)) as results,
    ):
        started = time.perf_counter()
        for result in results:
            yield result, time.perf_counter() - started
            started = time.perf_counter()
