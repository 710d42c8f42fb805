"""Gradient accumulation over microbatches, in place.

Accumulation happens inside the backward pass: `collect` ties a running sum to each parameter, and the backward pass of
every use of the parameter adds its gradient to that sum. `jax.vjp` of a function that returns the sums, started from
their current values, therefore returns the new ones. Where a use writes into the sum directly (the vocabulary matrix,
block by block, in `logprobs`; embeddings, token by token, in `models.layers`), no array ever holds the gradient of one
microbatch alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from dpo_jax.types import Batch

Crop = Callable[[PyTree], PyTree]  # drops trailing rows, positions and entries of a microbatch's rows

custom_vjp: Any = jax.custom_vjp  # its own annotations lose the return type


@custom_vjp
def collect(params: PyTree, sums: PyTree) -> tuple[PyTree, PyTree]:
    """Returns (params, sums) unchanged; gradients of uses of the returned parameters are added to `sums`.

    The two trees have the same structure. Backward pass: the cotangent of each sum is increased by that of its
    parameter, cast to the type of the sum; `params` themselves get no gradient.
    """
    return params, sums


def _collect_forward(params, sums):
    return (params, sums), None


def _collect_backward(_, cotangents):
    return None, jax.tree.map(lambda grad, total: total + grad.astype(total.dtype), *cotangents)


collect.defvjp(_collect_forward, _collect_backward)


def zeros(params: PyTree) -> PyTree:
    """Zero gradient sums for `params`, in float32 or wider."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)


def mask_absent(present: Array, tree: PyTree) -> PyTree:
    """Sets arrays [P, K] of a tree to 0 in the pairs that are not `present` [P]."""
    return jax.tree.map(lambda x: jnp.where(present[:, None], x, 0), tree)


def each_microbatch(
    fn: Callable[[PyTree, Array, PyTree], tuple[PyTree, PyTree, PyTree]],
    carry: PyTree,
    batch: Batch,
    crops: Sequence[Crop],
) -> tuple[PyTree, PyTree, PyTree]:
    """Calls `fn(rows, present, carry) -> (carry, summand, entries)` for each microbatch in use.

    One microbatch is computed at a time, so that only its activations are alive.

    Args:
      carry: passed from call to call; in the order of `crops`, then of microbatches.
      crops: `batch.crop` selects the one that is applied to each microbatch's rows; empty: nothing is cropped.
    Returns: the last carry, the sum of the summands, and the entries stacked on a leading axis A, 0 where a microbatch
      is not in use or was cropped.
    """

    def call(i, carry, crop=lambda rows: rows):
        rows, present = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), (batch.rows, batch.present)
        )
        return fn(crop(rows), present, carry)

    microbatches = batch.present.shape[0]
    if batch.crop is None and microbatches == 1:
        carry, total, entries = call(0, carry)
        return carry, total, jax.tree.map(lambda x: x[None], entries)
    summand, entries = jax.eval_shape(lambda: call(0, carry)[1:])
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), summand)
    stacked = jax.tree.map(lambda x: jnp.zeros((microbatches, *x.shape), x.dtype), entries)
    state = carry, total, stacked
    used = jnp.arange(microbatches) < batch.count
    for size, crop in enumerate(crops if batch.crop is not None else [lambda rows: rows]):
        # One loop for each size, not a conditional in one loop: a conditional would copy the sums.
        of_size = used if batch.crop is None else used & (batch.crop == size)
        index = jnp.nonzero(of_size, size=microbatches, fill_value=0)[0]

        def add(i, state, index=index, crop=crop):
            carry, summand, entries = call(index[i], state[0], crop)
            # A cropped microbatch has fewer entries: the first rows, and the first entries of each.
            write = functools.partial(_write_at, i=index[i])
            return carry, jax.tree.map(jnp.add, state[1], summand), jax.tree.map(write, state[2], entries)

        state = jax.lax.fori_loop(0, of_size.sum(), add, state)
    return state


def _write_at(stacked, entry, i):
    return jax.lax.dynamic_update_slice(stacked, entry[None], (i, *(0 for _ in entry.shape)))
