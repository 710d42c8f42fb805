"""Copies of parts of tensors between memory and files: cut into pieces, turned a tile at a time, several at once.

numpy copies, casts and file reads all let other threads run, so a few threads are as fast as a few processes.
"""

from __future__ import annotations

import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import NamedTuple, TypeVar

import ml_dtypes
import numpy as np

from dpo_jax.models.weights import Tensor
from dpo_jax.types import InputError

THREADS = min(8, os.cpu_count() or 1)  # more gain nothing where memory is the limit, and each holds a piece
# Numbers of a tile along the axis that is contiguous where it goes, and along that where it comes from. A tile of them
# fits the cache next to a core; shorter runs cost more calls, longer ones more misses.
TILE = (256, 512)
PAD = 64  # bytes by which the rows of a tile are longer, or all would compete for the same few lines of a cache

Index = tuple[slice, ...]  # as jax.make_array_from_callback gives it
T = TypeVar("T")


def pool() -> ThreadPoolExecutor:
    """Threads for `ahead`."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="weights")


def ahead(threads: Executor, jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What the jobs return, in their order, while the next few run; none runs any more once this has ended.

    A job is asked for only when a thread will soon be free, so few pieces wait in memory, however many there are.
    """
    running: collections.deque[Future[T]] = collections.deque()
    try:
        for job in jobs:
            if len(running) > THREADS:
                yield running.popleft().result()
            running.append(threads.submit(job))
        while running:
            yield running.popleft().result()
    finally:
        for each in running:
            each.cancel()
        wait(running)


class Part(NamedTuple):
    """A part of a view of a tensor: where it lies in the view, and where its numbers stand in the tensor."""

    index: Index
    begin: int  # bytes from the start of the tensor
    span: int  # bytes from there to the end of its last number, with those between that it skips
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def within(self, memory: bytes | np.ndarray, dtype: str, begin: int = 0) -> np.ndarray:
        """The numbers in memory of their own, where they begin after so many bytes."""
        return np.ndarray(self.shape, dtype, memory, begin, self.strides)


def cut(tensor: np.ndarray, view: np.ndarray, *, piece: int, gap: int) -> Iterator[Part]:
    """Parts of a view in the order in which they stand in the tensor; together they are all of the view.

    The view is halved along the axis of the longest stride until a part spans no more than so many bytes. Only its
    address and strides are looked at, so a tensor that was never filled, and takes no room, will do.

    Args:
      piece: bytes, of parts that skip nothing.
      gap: bytes, of parts that skip some.
    """
    todo = [tuple(slice(0, size) for size in view.shape)] if view.size else []
    while todo:
        index = todo.pop()
        part = view[(*index, ...)]  # with the dots even a single number stays an array
        steps = zip(part.shape, part.strides, strict=True)
        span = part.itemsize + sum((size - 1) * stride for size, stride in steps)
        if part.size == 1 or span <= (piece if span == part.nbytes else gap):
            yield Part(index, part.ctypes.data - tensor.ctypes.data, span, part.shape, part.strides)
            continue
        _, axis = max((stride, i) for i, stride in enumerate(part.strides) if part.shape[i] > 1)
        start, stop = index[axis].start, index[axis].stop
        middle = (start + stop) // 2
        todo += [(*index[:axis], half, *index[axis + 1 :]) for half in (slice(middle, stop), slice(start, middle))]


class Band(NamedTuple):
    """A stretch of a tensor without gaps, and what it is made of."""

    begin: int  # bytes from the start of the tensor
    bytes: int
    parts: list[tuple[int, Part]]  # each with the number of the leaf that it is of


def bands(tensor: Tensor, dtype: str, *, piece: int) -> list[Band]:
    """Cuts a tensor of this type into stretches, in order, made of the leaves that it fills.

    Where rows of several leaves take turns, a stretch has the same rows of all; otherwise it is `piece` bytes at most.
    """
    found: list[Band] = []
    empty = np.empty(tensor.shape, dtype)  # never filled
    views = tensor.to_leaves(empty)
    parts = [(i, part) for i, view in enumerate(views) for part in cut(empty, view, piece=piece, gap=piece)]
    for i, part in sorted(parts, key=lambda each: each[1].begin):
        end = part.begin + part.span
        if found and part.begin < found[-1].begin + found[-1].bytes:
            begin, length, before = found.pop()
            found.append(Band(begin, max(begin + length, end) - begin, [*before, (i, part)]))
        else:
            found.append(Band(part.begin, part.span, [(i, part)]))
    assert sum(band.bytes for band in found) == sum(view.nbytes for view in views) == empty.nbytes, "gaps, or overlaps"
    return found


def copy(numbers: np.ndarray, into: np.ndarray) -> None:
    """`into[...] = numbers` for arrays of one shape and type, faster than numpy where their axes are in other orders.

    numpy then walks along one of both, and touches another line of memory with every number of the other:

        numbers  0 1 2 3      into  0 4 8
                 4 5 6 7            1 5 9
                 8 9 . .            2 6 .

    Here a tile goes row by row into memory of a core's own cache, and from there column by column into rows.
    """
    there, here = fastest_first(into), fastest_first(numbers)
    if there[:1] == here[:1]:
        into[...] = numbers
        return
    tile = tile_shape(into.shape, there, here)
    scratch = padded(tile, here, into.dtype)
    for corner in itertools.product(*(range(0, size, step) for size, step in zip(into.shape, tile, strict=True))):
        sizes = [min(step, size - at) for at, step, size in zip(corner, tile, into.shape, strict=True)]
        place = tuple(slice(at, at + size) for at, size in zip(corner, sizes, strict=True))
        part = scratch[tuple(map(slice, sizes))]
        part[...] = numbers[place]
        into[place] = part


def fastest_first(array: np.ndarray) -> list[int]:
    """The axes of an array, that of the shortest stride first; those without length last."""
    return sorted(range(array.ndim), key=lambda axis: (array.shape[axis] == 1, array.strides[axis]))


def tile_shape(shape: Sequence[int], *orders: Sequence[int]) -> list[int]:
    """Part of a shape that has TILE numbers or more along the first axes of each order, where there are so many."""
    tile = [1] * len(shape)
    for order, wanted in zip(orders, TILE, strict=True):
        for axis in order:
            tile[axis] = max(tile[axis], min(shape[axis], wanted))
            wanted = -(-wanted // tile[axis])
    return tile


def padded(shape: Sequence[int], order: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array with axes in this order in memory, fastest first, and PAD bytes after each run along the first."""
    sizes = [shape[axis] for axis in reversed(order)]
    memory = np.empty((*sizes[:-1], sizes[-1] + PAD // dtype.itemsize), dtype)[..., : sizes[-1]]
    return memory.transpose(np.argsort(list(reversed(order))))


def cast(array: np.ndarray, dtype: str, place: str) -> np.ndarray:
    """`array` as `dtype`, without a copy where it has it already. Raises InputError if a finite number overflows."""
    with np.errstate(over="ignore"):
        result = array.astype(dtype, copy=False)
    narrower = ml_dtypes.finfo(result.dtype).max < ml_dtypes.finfo(array.dtype).max
    if narrower and not np.all(finite := np.isfinite(result)) and np.any(np.isfinite(array) & ~finite):
        raise InputError(
            place,
            got=f"holds numbers beyond the range of {dtype}",
            expected=f"magnitudes up to {float(ml_dtypes.finfo(result.dtype).max):.3g}",
            remedy="Use bfloat16 or float32.",
        )
    return result


def tensor_bytes(
    tensor: Tensor, arrays: Sequence[np.ndarray], dtype: str, name: str, *, piece: int
) -> Iterator[Callable[[], memoryview]]:
    """Jobs that make the bytes of a tensor of this type, one stretch after another, from the leaves that it fills."""

    def join(band: Band) -> memoryview:
        numbers = [cast(arrays[i][(*part.index, ...)], dtype, name) for i, part in band.parts]
        if len(numbers) == 1 and numbers[0].strides == band.parts[0][1].strides:
            return raw(numbers[0])  # in the order of the file as it stands
        joined = np.empty(band.bytes, np.uint8)
        for each, (_, part) in zip(numbers, band.parts, strict=True):
            copy(each, part.within(joined, dtype, part.begin - band.begin))
        return joined.data

    for band in bands(tensor, dtype, piece=piece):
        yield functools.partial(join, band)


def raw(array: np.ndarray) -> memoryview:
    """The bytes of an array as they stand in memory; its axes may be in any order there, and nothing between."""
    slowest_first = fastest_first(array)[::-1]
    return array.transpose(slowest_first).reshape(-1).view(np.uint8).data
