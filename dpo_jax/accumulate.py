"""Gradients of several microbatches, added up where their sum lies.

A sum goes backwards through a microbatch: every use of a parameter passes the sum on unchanged, and its backward pass
adds the parameter's gradient to what comes back. `jax.vjp` of a function that ends in the sums, started from their
values, so gives the new ones. Where a use writes into the sum in place (the vocabulary matrix, block by block, in
`logprobs`; embeddings, token by token, in `models.layers`), no array holds the gradient of one microbatch alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpo_jax.types import Batch

Crop = Callable[[Any], Any]  # takes the rows of a microbatch to fewer of them

custom_vjp: Any = jax.custom_vjp  # its own annotations say nothing of what a function returns


@custom_vjp
def collect(params: Any, sums: Any) -> tuple[Any, Any]:
    """(params, sums), two trees of the same form: what is then done with the parameters is differentiated into `sums`.

    Backward pass: each sum's cotangent plus its parameter's, in the type of the sum; `params` themselves get none.
    """
    return params, sums


def _collect_forward(params, sums):
    return (params, sums), None


def _collect_backward(_, cotangents):
    return None, jax.tree.map(lambda grad, total: total + grad.astype(total.dtype), *cotangents)


collect.defvjp(_collect_forward, _collect_backward)


def zeros(params: Any) -> Any:
    """Sums of no gradient yet, float32 or wider."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)


def _put(array, part, i):
    return jax.lax.dynamic_update_slice(array, part[None], (i, *(0 for _ in part.shape)))


def mask_absent(here, tree):
    return jax.tree.map(lambda x: jnp.where(here[:, None], x, 0), tree)


def each_microbatch(
    fn: Callable[[Any, Array, Any], tuple[Any, Any, Any]], carry: Any, batch: Batch, crops: Sequence[Crop]
) -> tuple[Any, Any, Any]:
    """Calls `fn(rows, present, carry) -> (carry, found, entries)` for the microbatches in use, one at a time, so that
    one's activations are alive; returns the last carry, the sum of what was found, and the entries of each."""

    def at(i, carry, crop=lambda rows: rows):
        rows, here = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), (batch.rows, batch.present)
        )
        return fn(crop(rows), here, carry)

    microbatches = batch.present.shape[0]
    if batch.crop is None and microbatches == 1:
        carry, found, entries = at(0, carry)
        return carry, found, jax.tree.map(lambda x: x[None], entries)
    found, entries = jax.eval_shape(lambda: at(0, carry)[1:])
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)
    empty = jax.tree.map(lambda x: jnp.zeros((microbatches, *x.shape), x.dtype), entries)
    totals = carry, nothing, empty
    used = jnp.arange(microbatches) < batch.count
    for size, crop in enumerate(crops if batch.crop is not None else [lambda rows: rows]):
        # A loop for each size, not a choice in one: a conditional would copy what it is to add to.
        chosen = used if batch.crop is None else used & (batch.crop == size)
        index = jnp.nonzero(chosen, size=microbatches, fill_value=0)[0]

        def add(i, totals, index=index, crop=crop):
            carry, found, entries = at(index[i], totals[0], crop)
            # Those of a microbatch that is cut are fewer, the first rows and the first entries of each.
            put = functools.partial(_put, i=index[i])
            return carry, jax.tree.map(jnp.add, totals[1], found), jax.tree.map(put, totals[2], entries)

        totals = jax.lax.fori_loop(0, chosen.sum(), add, totals)
    return totals
