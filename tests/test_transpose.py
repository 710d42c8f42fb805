"""Copies: that every number stays in its place."""

import ml_dtypes
import numpy as np
import pytest

from dpo_jax.hf import transpose


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("tile", [(1, 1), (3, 5), (256, 512)])
def test_copy_between_any_orders_of_axes_keeps_numbers_in_place(monkeypatch, dtype, tile):
    monkeypatch.setattr(transpose, "TILE", tile)
    rng = np.random.default_rng(0)
    for shape in [(), (7,), (1, 1), (13, 1), (9, 14), (5, 1, 8), (4, 3, 2, 6)]:
        for _ in range(8):
            axes = rng.permutation(len(shape))
            numbers = np.asarray(rng.normal(size=[shape[axis] for axis in axes]), dtype).transpose(np.argsort(axes))
            into = np.zeros([2 * size for size in shape], dtype)  # gaps, too
            into = into[(*(slice(0, size) for size in shape), ...)]
            assert numbers.shape == into.shape == shape
            transpose.copy(numbers, into)
            np.testing.assert_array_equal(into, numbers)


def test_copy_of_one_number_repeated_is_that_number():
    into = np.zeros((3, 4), np.float32)
    transpose.copy(np.broadcast_to(np.arange(4, dtype=np.float32), (3, 4)), into.reshape(4, 3).T)
    assert into.reshape(4, 3).T.tolist() == [[0, 1, 2, 3]] * 3


def test_contiguous_copies_only_what_is_not():
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert transpose.contiguous(numbers) is numbers
    transposed = transpose.contiguous(numbers.T)
    assert transposed.flags.c_contiguous and transposed.tolist() == numbers.T.tolist()
