"""Interval attention: each query sees the keys in its own half-open interval, whatever that expresses.

Causality, prompt sharing, packing and padding all arrive as the two bounds, so this one function is the only
place where a backend's kernel may differ.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.types import check_choice

IMPLEMENTATIONS = ("auto", "xla")
QUERY_BLOCK = 512  # queries whose scores are alive at once on the XLA path; bounds memory at S * QUERY_BLOCK


def attention(
    q: Float[Array, "R Q H d"],
    k: Float[Array, "R S K d"],
    v: Float[Array, "R S K d"],
    key_start: Int[Array, "R Q"],
    key_end: Int[Array, "R Q"],
    *,
    implementation: str = "auto",
) -> Float[Array, "R Q H d"]:
    """Softmax attention of every query over its interval of keys.

    out[q] = sum_k softmax_k(q . k / sqrt(d)) v[k] over key_start[q] <= k < key_end[q]

    Args:
      q, k, v: H query heads share K key and value heads in order, H a multiple of K.
      key_start, key_end: bounds as indices into S; every interval holds at least one key.
      implementation: one of IMPLEMENTATIONS; `auto` is the best there is for the backend, now always `xla`.
    Returns: the weighted values in v's dtype; the softmax itself is computed in float32 or wider.
    Raises: InputError for an unknown implementation.
    """
    check_choice("config.model.attention", implementation, IMPLEMENTATIONS)
    rows, queries, heads, width = q.shape
    q = q.reshape(rows, queries, k.shape[2], heads // k.shape[2], width) * width**-0.5
    block = _query_block(queries)
    if block == queries:
        return _attend(q, k, v, key_start, key_end).reshape(rows, queries, heads, width)

    # One block of queries at a time; its scores are recomputed in the backward pass instead of kept.
    def blocks(x):
        return jnp.moveaxis(x.reshape(rows, queries // block, block, *x.shape[2:]), 1, 0)

    attend = jax.checkpoint(lambda args: _attend(args[0], k, v, args[1], args[2]))
    out = jax.lax.map(attend, (blocks(q), blocks(key_start), blocks(key_end)))
    return jnp.moveaxis(out, 0, 1).reshape(rows, queries, heads, width)


def _query_block(queries: int) -> int:
    """The largest divisor of `queries` not above QUERY_BLOCK; `queries` itself where it is short or has none."""
    if queries <= 2 * QUERY_BLOCK:
        return queries
    return next((b for b in range(QUERY_BLOCK, QUERY_BLOCK // 8, -1) if queries % b == 0), queries)


def _attend(q, k, v, key_start, key_end):
    wide = jnp.promote_types(q.dtype, jnp.float32)
    keys = jnp.arange(k.shape[1])[None, None, :]
    visible = (keys >= key_start[:, :, None]) & (keys < key_end[:, :, None])
    scores = jnp.einsum("rqkgd,rskd->rkgqs", q, k, preferred_element_type=wide)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rkgqs,rskd->rqkgd", weights, v)
