"""Interval attention in plain XLA, a block of queries by a block of keys at a time.

Blocks that no query can see are not computed, forward or backward, and no array of S * S exists: the softmax is carried
from block to block as in flash attention (Dao et al. 2022, algorithms 1 and 4), and the backward pass makes each block
of scores again. Weights are not rounded to the compute type: they are relative to the largest score so far, so what a
token gets would depend on where it stands in its row, and the policy would not be the reference at step 0.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

BLOCK = 64  # queries and keys in a block: a packed row is near its real work, and a block of scores fits a cache


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
      q: scaled by d^-0.5 already.
      soft_cap: scores become cap * tanh(scores / cap); None: they stay as they are.
      block: queries and keys in a block.
    """
    rows, length, heads, width = q.shape
    kv_heads = k.shape[2]
    q, k, v, key_start, key_end = pad_rows(q, k, v, key_start, key_end, block)
    q = jnp.moveaxis(q.reshape(rows, -1, kv_heads, heads // kv_heads, width), 1, 3)
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    out = _attend(q, k, v, key_start, key_end, soft_cap, block)
    return jnp.moveaxis(out, 3, 1).reshape(rows, -1, heads, width)[:, :length]


def pad_rows(q, k, v, key_start, key_end, multiple: int) -> Any:
    """The same with rows of a multiple of so many positions; what is added sees itself alone."""
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
    """Which blocks of keys some query of a block may see; S is a multiple of both sizes.

    Every interval adds one to the blocks from its first to its last key: +1 where it begins, -1 behind its end.
    """
    rows, length = key_start.shape
    queries, keys = length // query_block, length // key_block
    row = jnp.arange(rows)[:, None]
    of = jnp.arange(length)[None] // query_block
    edges = jnp.zeros((rows, queries, keys + 1), jnp.int32)
    edges = edges.at[row, of, key_start // key_block].add(1).at[row, of, (key_end - 1) // key_block + 1].add(-1)
    return jnp.cumsum(edges, axis=2)[:, :, :-1] > 0


class _Visit(NamedTuple):
    """The pairs of blocks to compute, a query block's together."""

    row: Int[Array, "n"]
    query: Int[Array, "n"]
    key: Int[Array, "n"]
    count: Int[Array, ""]


def _visits(key_start, key_end, block) -> _Visit:
    visible = visible_blocks(key_start, key_end, block, block)
    row, query, key = jnp.nonzero(visible, size=visible.size, fill_value=0)
    return _Visit(row, query, key, visible.sum())


custom_vjp: Any = jax.custom_vjp  # its own annotations say nothing of what a function returns


@functools.partial(custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, key_start, key_end, soft_cap, block):
    return _forward(q, k, v, key_start, key_end, soft_cap, block)[0]


def _scores(q, k, key_start, key_end, at, soft_cap, block):
    """Scores of one pair of blocks [K, G, q, k], and which of them count."""
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
    of_query, of_key = functools.partial(_Block, axis=3, size=block), functools.partial(_Block, axis=2, size=block)

    def visit(n, carry):
        most, exp_sum, out = carry
        row, query, key = at = visits.row[n], visits.query[n], visits.key[n]
        here, there = of_query(row, query), of_key(row, key)
        scores, seen = _scores(here.get(q), there.get(k), key_start, key_end, at, soft_cap, block)
        scores = jnp.where(seen, scores, jnp.finfo(wide).min)
        before = here.get(most)
        now = jnp.maximum(before, scores.max(-1))
        # A query that sees nothing yet counts each masked key as exp(0); the first real score takes that back to 0.
        weights, shrink = jnp.exp(scores - now[..., None]), jnp.exp(before - now)
        new = jnp.einsum("hgqk,hkd->hgqd", weights, there.get(v).astype(wide))
        exp_sum = here.put(exp_sum, here.get(exp_sum) * shrink + weights.sum(-1))
        return here.put(most, now), exp_sum, here.put(out, here.get(out) * shrink[..., None] + new)

    zeros = jnp.zeros(q.shape[:-1], wide)
    start = jnp.full_like(zeros, jnp.finfo(wide).min), zeros, jnp.zeros(q.shape, wide)
    most, exp_sum, out = jax.lax.fori_loop(0, visits.count, visit, start)
    # Named, so that a remat policy which keeps products keeps these too.
    out = checkpoint_name((out / exp_sum[..., None]).astype(v.dtype), "attention")
    log_z = checkpoint_name(most + jnp.log(exp_sum), "attention")
    return out, (q, k, v, key_start, key_end, out, log_z)


def _backward(soft_cap, block, saved, cotangent):
    q, k, v, key_start, key_end, out, log_z = saved
    wide = log_z.dtype
    visits = _visits(key_start, key_end, block)
    of_query, of_key = functools.partial(_Block, axis=3, size=block), functools.partial(_Block, axis=2, size=block)
    spent = jnp.einsum("rhgqd,rhgqd->rhgq", out, cotangent, preferred_element_type=wide)

    def visit(n, carry):
        q_grad, k_grad, v_grad = carry
        row, query, key = at = visits.row[n], visits.query[n], visits.key[n]
        here, there = of_query(row, query), of_key(row, key)
        q_here, out_grad, k_there, v_there = (
            x.astype(wide) for x in (here.get(q), here.get(cotangent), there.get(k), there.get(v))
        )
        scores, seen = _scores(q_here, k_there, key_start, key_end, at, soft_cap, block)
        weights = jnp.where(seen, jnp.exp(scores - here.get(log_z)[..., None]), 0)
        pulled = jnp.einsum("hgqd,hkd->hgqk", out_grad, v_there)
        slope = weights * (pulled - here.get(spent)[..., None])
        if soft_cap is not None:
            slope = slope * (1 - jnp.square(scores / soft_cap))
        to_q = jnp.einsum("hgqk,hkd->hgqd", slope, k_there)
        to_k = jnp.einsum("hgqk,hgqd->hkd", slope, q_here)
        to_v = jnp.einsum("hgqk,hgqd->hkd", weights, out_grad)
        return here.add(q_grad, to_q), there.add(k_grad, to_k), there.add(v_grad, to_v)

    start = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))
    grads = jax.lax.fori_loop(0, visits.count, visit, start)
    return *(grad.astype(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)), None, None


_attend.defvjp(_forward, _backward)


class _Block(NamedTuple):
    """One row's block of queries or keys, along `axis` of arrays [R, K, ...]."""

    row: Any
    index: Any
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
