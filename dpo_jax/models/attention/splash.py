"""Interval attention on TPUs: JAX's own splash attention, given masks that are data.

Splash computes a mask inside the kernel from one integer a query, its `q_sequence`, and the index of the key. Here
that integer holds both bounds of the query's interval. Which blocks it visits at all it looks up in small integer
arrays in scalar memory; they are made from the bounds too, for each row, so a block that no query can see is neither
computed nor fetched, and rows with other intervals run through the same program.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.models.attention.blockwise import visible_blocks

BITS = 15  # of each bound: rows hold fewer than 2**15 positions


class Blocks(NamedTuple):
    """Queries and keys in a block, of all three kernels."""

    queries: int
    keys: int


def choose_blocks(length: int) -> Blocks:
    """Block sizes for rows of so many positions, a multiple of 128.

    Smaller than what suits causal attention over one long sequence: packed pairs are some hundred positions long, and
    the part of a block that nobody sees is computed in vain. 256 queries fill the matrix unit of every generation; with
    128 keys to each, rows of short pairs keep near their real work. Chosen by counting blocks, not by timing.
    """
    return Blocks(256 if length % 256 == 0 else 128, 128)


def attention(
    q: Float[Array, "R S H d"],
    k: Float[Array, "R S K d"],
    v: Float[Array, "R S K d"],
    key_start: Int[Array, "R S"],
    key_end: Int[Array, "R S"],
    *,
    soft_cap: float | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "R S H d"]:
    """Softmax attention of every query over its interval of keys; see `attention.make_attention`.

    Args:
      q: scaled by d^-0.5 already.
      soft_cap: scores become cap * tanh(scores / cap); None: they stay as they are.
      blocks: sizes that divide S; None: those of `choose_blocks`.
      interpret: run the kernel's program without a TPU, for tests.
    Raises: ValueError unless S is a multiple of 128 and below 2**15.
    """
    length = q.shape[1]
    if length % 128 or length >= 1 << BITS:
        raise ValueError(f"splash attention takes rows of a multiple of 128 below {1 << BITS}, not of {length}")
    blocks = blocks or choose_blocks(length)
    make = functools.partial(_row, soft_cap=soft_cap, blocks=blocks, interpret=interpret)
    # Heads go first before the loop and not in it, or the loop would hold one more array of the queries' size.
    by_head = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    # One row after the other: the arrays in scalar memory differ.
    out = jax.lax.map(lambda row: make(*row), (*by_head, key_start, key_end))
    return jnp.swapaxes(out, 1, 2).astype(v.dtype)


def _row(q, k, v, key_start, key_end, *, soft_cap, blocks, interpret):
    visible = visible_blocks(key_start[None], key_end[None], *blocks)
    bounds = ((key_start << BITS) | key_end).astype(jnp.int32)
    by_query, by_key = (_mask_info(visible, bounds, along) for along in (2, 1))
    kernel: Any = splash.SplashAttentionKernel(
        by_query,
        by_query,
        by_key,
        block_sizes=splash.BlockSizes(
            block_q=blocks.queries,
            block_kv=blocks.keys,
            block_q_dkv=blocks.queries,
            block_kv_dkv=blocks.keys,
            block_q_dq=blocks.queries,
            block_kv_dq=blocks.keys,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name="attention",
        mask_function=_sees,
        interpret=interpret,
    )
    return kernel(q, k, v)


def _sees(bounds, key):
    return (key >= (bounds >> BITS)) & (key < (bounds & ((1 << BITS) - 1)))


def _mask_info(visible: Bool[Array, "1 Q K"], bounds: Int[Array, "S"], along: int) -> Any:
    """What splash's kernels look up: whether to compute a block, and which to fetch for it.

    Args:
      along: the axis of `visible` that a kernel walks along, 2 for keys and 1 for queries.
    """
    make: Any = MaskInfo  # typed as numpy's
    return make(
        data_next=next_visible(visible[0], along - 1)[None],
        mask_next=None,
        block_mask=visible.astype(jnp.int32),
        partial_mask_blocks=None,
        q_sequence=bounds,
    )


def next_visible(visible: Bool[Array, "Q K"], along: int) -> Int[Array, "Q K"]:
    """Index along the axis of the next visible block in walking order, at a visible one its own; after the last, its.

    A kernel fetches the block that is named here, so at a skipped one it fetches what it needs next, once. Along keys
    the walk goes on to the next block of queries. Along queries it begins again at the same block of keys for every
    head, and a head's queries are its own, so past the last one needed nothing more is fetched.
    """
    walks = visible.reshape(1, -1) if along == 1 else visible.T
    place = jnp.arange(walks.shape[1])[None]
    ahead = jax.lax.cummin(jnp.where(walks, place, walks.shape[1]), axis=1, reverse=True)
    last = jnp.max(jnp.where(walks, place, 0), axis=1, keepdims=True)
    found = jnp.minimum(ahead, last).astype(jnp.int32)
    return found.reshape(visible.shape) % visible.shape[1] if along == 1 else found.T


def visited(key_start: Int[Array, "R S"], key_end: Int[Array, "R S"], blocks: Blocks) -> tuple[int, int]:
    """Blocks that each kernel computes for these rows, and those that causal attention over whole rows would."""
    rows, length = key_start.shape
    bounds = ((key_start << BITS) | key_end).astype(jnp.int32)
    visible = visible_blocks(key_start, key_end, *blocks)
    given = sum(int(_mask_info(row[None], line, 2).block_mask.sum()) for row, line in zip(visible, bounds, strict=True))
    index = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return given, int(visible_blocks(jnp.zeros_like(index), index + 1, *blocks).sum())
