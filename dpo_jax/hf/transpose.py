"""Copies of arrays in memory: cast, and transposed a tile at a time.

numpy's copies and casts, and calls that read, let other threads run, so a few threads are as fast as a few processes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from dpo_jax.types import InputError

THREADS = min(8, os.cpu_count() or 1)  # more gain nothing where memory is the limit, and each holds a piece
# Numbers of a tile along the axis that is contiguous where it goes, and along that where it comes from. A tile of them
# fits the cache next to a core; shorter runs cost more calls, longer ones more misses.
TILE = (256, 256)
PAD = 64  # bytes by which the rows of a tile are longer, or all would compete for the same few lines of a cache


def pool() -> ThreadPoolExecutor:
    """Threads that read, cast and copy tensors."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="weights")


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


def contiguous(array: np.ndarray) -> np.ndarray:
    """As numpy's ascontiguousarray, but with `copy`; the array itself if it is already."""
    if array.flags.c_contiguous:
        return array
    result = np.empty(array.shape, array.dtype)
    copy(array, result)
    return result


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
