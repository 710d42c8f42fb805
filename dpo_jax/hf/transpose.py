"""Copies of arrays in memory: cast, and transposed a tile at a time.

numpy's copies and casts, and reads of files, release the GIL, so a few threads are as fast as a few processes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from dpo_jax.types import InputError

THREADS = min(8, os.cpu_count() or 1)  # more are no faster where memory is the limit, and each holds a piece
# Length of a tile along the contiguous axis of the destination, and along that of the source. A tile fits a core's own
# cache; shorter runs cost more calls, longer ones more cache misses.
TILE = (256, 256)
PAD = 64  # bytes added to each row of a tile; without them all rows would compete for the same few cache lines


def pool() -> ThreadPoolExecutor:
    """Threads that read, cast and copy tensors."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="weights")


def cast(array: np.ndarray, dtype: str, place: str) -> np.ndarray:
    """Converts to `dtype`, without a copy if the array has it. Raises InputError if a finite number overflows."""
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


def contiguous(array: np.ndarray) -> np.ndarray:
    """Returns a C-contiguous array, as numpy's ascontiguousarray does, but faster; the array itself if it is one."""
    if array.flags.c_contiguous:
        return array
    result = np.empty(array.shape, array.dtype)
    copy(array, result)
    return result


def copy(numbers: np.ndarray, into: np.ndarray) -> None:
    """Assigns `into[...] = numbers`, faster than numpy where the axes of the two are in different orders in memory.

    Both have one shape and type. numpy walks along one of them, and touches another cache line of the other with every
    number:

        numbers  0 1 2 3      into  0 4 8
                 4 5 6 7            1 5 9
                 8 9 . .            2 6 .

    Here a tile is copied row by row into a scratch array in a core's own cache, and from there to its destination.
    """
    to_order, from_order = fastest_first(into), fastest_first(numbers)
    if to_order[:1] == from_order[:1]:
        into[...] = numbers
        return
    tile = tile_shape(into.shape, to_order, from_order)
    scratch = padded(tile, from_order, into.dtype)
    for corner in itertools.product(*(range(0, size, step) for size, step in zip(into.shape, tile, strict=True))):
        sizes = [min(step, size - at) for at, step, size in zip(corner, tile, into.shape, strict=True)]
        place = tuple(slice(at, at + size) for at, size in zip(corner, sizes, strict=True))
        part = scratch[tuple(map(slice, sizes))]
        part[...] = numbers[place]
        into[place] = part


def fastest_first(array: np.ndarray) -> list[int]:
    """Returns the axes of an array by stride, shortest first; axes of size 1 are last."""
    return sorted(range(array.ndim), key=lambda axis: (array.shape[axis] == 1, array.strides[axis]))


def tile_shape(shape: Sequence[int], *orders: Sequence[int]) -> list[int]:
    """Returns the shape of a tile: at least TILE numbers along the first axes of each order, if there are so many."""
    tile = [1] * len(shape)
    for order, length in zip(orders, TILE, strict=True):
        for axis in order:
            tile[axis] = max(tile[axis], min(shape[axis], length))
            length = -(-length // tile[axis])
    return tile


def padded(shape: Sequence[int], order: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array with its axes in this order in memory, fastest first, and PAD bytes after each row."""
    sizes = [shape[axis] for axis in reversed(order)]
    memory = np.empty((*sizes[:-1], sizes[-1] + PAD // dtype.itemsize), dtype)[..., : sizes[-1]]
    return memory.transpose(np.argsort(list(reversed(order))))
