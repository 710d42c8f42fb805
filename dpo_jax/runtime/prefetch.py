"""The next batches are made while the device computes this one."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
DEPTH = 2  # made ahead of the one in use


def ahead(
    make: Callable[[int], T], steps: Iterable[int], *, depth: int = DEPTH
) -> Generator[tuple[T, float], None, None]:
    """Yields `make(step)` of each step in order, made in a thread up to `depth` ahead, and the seconds waited for it.

    What `make` raises is raised where its result would have come. Closing the iterator drops what was made ahead.
    """
    to_make = iter(steps)
    pending: collections.deque[Future[T]] = collections.deque()
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        try:
            while True:
                pending.extend(pool.submit(make, step) for step in islice(to_make, depth + 1 - len(pending)))
                if not pending:
                    return
                started = time.perf_counter()
                made = pending.popleft().result()
                yield made, time.perf_counter() - started
        finally:
            for each in pending:
                each.cancel()
