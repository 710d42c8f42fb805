"""Interval attention in plain XLA, a block of queries by a block of keys at a time.

Blocks that no query may attend to are skipped, forward and backward, and no S x S array exists: the softmax is
accumulated from block to block as in flash attention (Dao et al. 2022, algorithms 1 and 4), and the backward pass
recomputes each block of scores. Weights are not rounded to the compute type: they are relative to the largest score so
far, so rounding them would make a token's result depend on its place in the row, and at step 0 the policy would differ
from the reference.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

BLOCK = 64  # queries and keys in a block: small enough to skip most of a packed row, and scores fit a cache


def attention(
    q: Float[Array, "R S H d"],
    k: Float[Array, "R S K d"],
    v: Float[Array, "R S K d"],
    key_start: Int[Array, "R S"],
    key_end: Int[Array, "R S"],
    *,
    soft_cap: float | None = None,
    block: int = BLOCK,
) -> Float[Array, "R S H d"]:
    """Softmax attention of every query over its interval of keys; see `attention.make_attention`.

    Args:
      q: already multiplied by the scale, d^-0.5 by default.
      soft_cap: scores become cap * tanh(scores / cap); None: no cap.
      block: queries and keys in a block.
    """
    rows, length, heads, width = q.shape
    kv_heads = k.shape[2]
    q, k, v, key_start, key_end = pad_rows(q, k, v, key_start, key_end, block)
    q = jnp.moveaxis(q.reshape(rows, -1, kv_heads, heads // kv_heads, width), 1, 3)  # [R, K, G, S, d], G = H / K
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)  # [R, K, S, d]
    out = _attend(q, k, v, key_start, key_end, soft_cap, block)
    return jnp.moveaxis(out, 3, 1).reshape(rows, -1, heads, width)[:, :length]


def pad_rows(q: Array, k: Array, v: Array, key_start: Array, key_end: Array, multiple: int) -> tuple[Array, ...]:
    """Pads rows to a multiple of so many positions; each added position attends to itself alone."""
    rows, length = key_start.shape
    pad = -length % multiple
    if not pad:
        return q, k, v, key_start, key_end
    widen = functools.partial(jnp.pad, pad_width=((0, 0), (0, pad), (0, 0), (0, 0)))
    added = jnp.broadcast_to(jnp.arange(length, length + pad), (rows, pad))
    return widen(q), widen(k), widen(v), jnp.append(key_start, added, 1), jnp.append(key_end, added + 1, 1)


def visible_blocks(
    key_start: Int[Array, "R S"], key_end: Int[Array, "R S"], query_block: int, key_block: int
) -> Bool[Array, "R Q K"]:
    """Whether any query of block q may attend to any key of block k [R, Q, K]; both sizes divide S.

    Counts intervals: each adds 1 to the blocks from its first to its last key, as +1 at its first block and -1 after
    its last, summed from left to right.
    """
    rows, length = key_start.shape
    queries, keys = length // query_block, length // key_block
    row = jnp.arange(rows)[:, None]
    of = jnp.arange(length)[None] // query_block
    edges = jnp.zeros((rows, queries, keys + 1), jnp.int32)
    edges = edges.at[row, of, key_start // key_block].add(1).at[row, of, (key_end - 1) // key_block + 1].add(-1)
    return jnp.cumsum(edges, axis=2)[:, :, :-1] > 0


class _Visits(NamedTuple):
    """List of (query block, key block) pairs to compute; the pairs of one query block are adjacent."""

    row: Int[Array, "n"]
    query: Int[Array, "n"]
    key: Int[Array, "n"]
    count: Int[Array, ""]  # entries in use, the first ones


def _visits(key_start, key_end, block) -> _Visits:
    visible = visible_blocks(key_start, key_end, block, block)
    row, query, key = jnp.nonzero(visible, size=visible.size, fill_value=0)
    return _Visits(row, query, key, visible.sum())


custom_vjp: Any = jax.custom_vjp  # its own annotations lose the return type


@functools.partial(custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, key_start, key_end, soft_cap, block):
    return _forward(q, k, v, key_start, key_end, soft_cap, block)[0]


def _scores(q, k, key_start, key_end, at, soft_cap, block):
    """Returns scores of two blocks [K, G, q, k], and whether each key is in its query's interval [1, 1, q, k]."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("hgqd,hkd->hgqk", q, k, preferred_element_type=wide)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    row, query, key = at
    start, end = (jax.lax.dynamic_slice(x, (row, query * block), (1, block))[0] for x in (key_start, key_end))
    keys = key * block + jnp.arange(block)[None]
    return scores, ((keys >= start[:, None]) & (keys < end[:, None]))[None, None]


def _forward(q, k, v, key_start, key_end, soft_cap, block):
    wide = jnp.promote_types(q.dtype, jnp.float32)
    visits = _visits(key_start, key_end, block)
    query_block, key_block = (
        functools.partial(_Block, axis=3, size=block),
        functools.partial(_Block, axis=2, size=block),
    )

    def visit(n, carry):
        max_score, exp_sum, out = carry
        row, query, key = at = visits.row[n], visits.query[n], visits.key[n]
        queries, keys = query_block(row, query), key_block(row, key)
        scores, visible = _scores(queries.get(q), keys.get(k), key_start, key_end, at, soft_cap, block)
        scores = jnp.where(visible, scores, jnp.finfo(wide).min)
        old_max = queries.get(max_score)
        new_max = jnp.maximum(old_max, scores.max(-1))
        # A query with no visible key so far counts each masked one as exp(0); its first real score rescales that to 0.
        weights, rescale = jnp.exp(scores - new_max[..., None]), jnp.exp(old_max - new_max)
        added = jnp.einsum("hgqk,hkd->hgqd", weights, keys.get(v).astype(wide))
        exp_sum = queries.put(exp_sum, queries.get(exp_sum) * rescale + weights.sum(-1))
        return queries.put(max_score, new_max), exp_sum, queries.put(out, queries.get(out) * rescale[..., None] + added)

    zeros = jnp.zeros(q.shape[:-1], wide)
    start = jnp.full_like(zeros, jnp.finfo(wide).min), zeros, jnp.zeros(q.shape, wide)
    max_score, exp_sum, out = jax.lax.fori_loop(0, visits.count, visit, start)
    # Named so that remat policies which save products save these too.
    out = checkpoint_name((out / exp_sum[..., None]).astype(v.dtype), "attention")
    log_z = checkpoint_name(max_score + jnp.log(exp_sum), "attention")
    return out, (q, k, v, key_start, key_end, out, log_z)


def _backward(soft_cap, block, saved, cotangent):
    q, k, v, key_start, key_end, out, log_z = saved  # q, out [R, K, G, S, d]; k, v [R, K, S, d]; log_z [R, K, G, S]
    wide = log_z.dtype
    visits = _visits(key_start, key_end, block)
    query_block, key_block = (
        functools.partial(_Block, axis=3, size=block),
        functools.partial(_Block, axis=2, size=block),
    )
    # [R, K, G, S] out . dL/dout = sum_k w_k dL/dw_k, the common term of the softmax's gradient
    out_dot_grad = jnp.einsum("rhgqd,rhgqd->rhgq", out, cotangent, preferred_element_type=wide)

    def visit(n, carry):
        q_grad, k_grad, v_grad = carry
        row, query, key = at = visits.row[n], visits.query[n], visits.key[n]
        queries, keys = query_block(row, query), key_block(row, key)
        q_part, out_grad, k_part, v_part = (  # [K, G, q, d], [K, G, q, d], [K, k, d], [K, k, d]
            x.astype(wide) for x in (queries.get(q), queries.get(cotangent), keys.get(k), keys.get(v))
        )
        scores, visible = _scores(q_part, k_part, key_start, key_end, at, soft_cap, block)
        weights = jnp.where(visible, jnp.exp(scores - queries.get(log_z)[..., None]), 0)  # [K, G, q, k] softmax
        to_weights = jnp.einsum("hgqd,hkd->hgqk", out_grad, v_part)  # [K, G, q, k] dL/dw = dL/dout . v
        # [K, G, q, k] dL/dscore = w (dL/dw - sum_k w_k dL/dw_k)
        to_scores = weights * (to_weights - queries.get(out_dot_grad)[..., None])
        if soft_cap is not None:
            to_scores = to_scores * (1 - jnp.square(scores / soft_cap))  # [K, G, q, k] times d cap tanh(s / cap) / ds
        to_q = jnp.einsum("hgqk,hkd->hgqd", to_scores, k_part)  # [K, G, q, d] dL/dq = sum_k dL/dscore k
        to_k = jnp.einsum("hgqk,hgqd->hkd", to_scores, q_part)  # [K, k, d] dL/dk = sum_{g, q} dL/dscore q
        to_v = jnp.einsum("hgqk,hgqd->hkd", weights, out_grad)  # [K, k, d] dL/dv = sum_{g, q} w dL/dout
        return queries.add(q_grad, to_q), keys.add(k_grad, to_k), keys.add(v_grad, to_v)

    start = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))
    grads = jax.lax.fori_loop(0, visits.count, visit, start)
    return *(grad.astype(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)), None, None


_attend.defvjp(_forward, _backward)


class _Block(NamedTuple):
    """A block of one row's queries or keys, to read and write along `axis` of arrays [R, K, ...]."""

    row: Int[Array, ""]
    index: Int[Array, ""]  # of the block
    axis: int
    size: int

    def _start(self, array):
        return (self.row, *(self.index * self.size if i == self.axis else 0 for i in range(1, array.ndim)))

    def get(self, array):
        sizes = [1, *(self.size if i == self.axis else n for i, n in enumerate(array.shape) if i)]
        return jax.lax.dynamic_slice(array, self._start(array), sizes)[0]

    def put(self, array, block):
        return jax.lax.dynamic_update_slice(array, block[None].astype(array.dtype), self._start(array))

    def add(self, array, block):
        return self.put(array, self.get(array) + block)
