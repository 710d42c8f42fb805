"""Interval attention on TPUs: JAX's own splash attention, with masks computed at run time.

Splash computes its mask inside the kernel from one integer per query, `q_sequence`, and the index of the key. Here that
integer holds both bounds of the query's interval. The kernel looks up which blocks to visit in small integer arrays in
scalar memory. They are computed from the bounds of each row as well, so a block that no query may attend to is neither
computed nor fetched, and rows with other intervals run the same compiled program.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.models.attention.blockwise import visible_blocks

BITS = 15  # of each bound: rows hold fewer than 2**15 positions


class Blocks(NamedTuple):
    """Block sizes of all three kernels: forward, gradient of q, gradients of k and v."""

    queries: int
    keys: int


def choose_blocks(length: int) -> Blocks:
    """Returns block sizes for rows of so many positions, a multiple of 128.

    They are smaller than usual for causal attention over one long sequence: packed pairs are some hundred positions
    long, and the masked part of a visited block is wasted work. 256 queries fill the matrix unit of every TPU
    generation; 128 keys waste little on rows of short pairs. Chosen by counting blocks, not by timing.
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
      q: already multiplied by the scale, d^-0.5 by default.
      soft_cap: scores become cap * tanh(scores / cap); None: no cap.
      blocks: sizes that divide S; None: `choose_blocks`.
      interpret: emulate the kernel on any device, for tests.
    Raises: ValueError unless S is a multiple of 128 and below 2**15.
    """
    length = q.shape[1]
    if length % 128 or length >= 1 << BITS:
        raise ValueError(f"splash attention takes rows of a multiple of 128 below {1 << BITS}, not of {length}")
    blocks = blocks or choose_blocks(length)
    attend_row = functools.partial(_attend_row, soft_cap=soft_cap, blocks=blocks, interpret=interpret)
    # Heads are moved first outside the loop: inside it, the loop would hold one more array of the queries' size.
    by_head = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    # One row at a time, because each has its own arrays in scalar memory.
    out = jax.lax.map(lambda row: attend_row(*row), (*by_head, key_start, key_end))
    return jnp.swapaxes(out, 1, 2).astype(v.dtype)


def _attend_row(q, k, v, key_start, key_end, *, soft_cap, blocks, interpret):
    visible = visible_blocks(key_start[None], key_end[None], *blocks)
    bounds = ((key_start << BITS) | key_end).astype(jnp.int32)
    by_query, by_key = (_mask_info(visible, bounds, along) for along in (2, 1))
    kernel: Any = splash_attention_kernel.SplashAttentionKernel(
        by_query,
        by_query,
        by_key,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=blocks.queries,
            block_kv=blocks.keys,
            block_q_dkv=blocks.queries,
            block_kv_dkv=blocks.keys,
            block_q_dq=blocks.queries,
            block_kv_dq=blocks.keys,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name="attention",
        mask_function=_is_visible,
        interpret=interpret,
    )
    return kernel(q, k, v)


def _is_visible(bounds, key):
    return (key >= (bounds >> BITS)) & (key < (bounds & ((1 << BITS) - 1)))


def _mask_info(visible: Bool[Array, "1 Q K"], bounds: Int[Array, "S"], along: int) -> Any:
    """Builds the lookup arrays of splash's kernels: whether to compute each block, and which block to fetch for it.

    Args:
      along: the axis of `visible` in a kernel's inner loop, 2 for keys and 1 for queries.
    """
    make: Any = MaskInfo  # its fields are annotated as numpy arrays
    return make(
        data_next=next_visible(visible[0], along - 1)[None],
        mask_next=None,
        block_mask=visible.astype(jnp.int32),
        partial_mask_blocks=None,
        q_sequence=bounds,
    )


def next_visible(visible: Bool[Array, "Q K"], along: int) -> Int[Array, "Q K"]:
    """Index along the axis of the first visible block at or after each block, in iteration order; at most the last one.

    A kernel fetches the block that is named here, so while it skips blocks it fetches the next one it needs, once.
    Along keys (1) the iteration continues into the next block of queries. Along queries (0) it starts again at the same
    block of keys for every head, and each head has its own queries, so nothing is fetched after the last visible one.
    """
    sequence = visible.reshape(1, -1) if along == 1 else visible.T
    index = jnp.arange(sequence.shape[1])[None]
    following = jax.lax.cummin(jnp.where(sequence, index, sequence.shape[1]), axis=1, reverse=True)
    last = jnp.max(jnp.where(sequence, index, 0), axis=1, keepdims=True)
    fetched = jnp.minimum(following, last).astype(jnp.int32)
    return fetched.reshape(visible.shape) % visible.shape[1] if along == 1 else fetched.T


def visited(key_start: Int[Array, "R S"], key_end: Int[Array, "R S"], blocks: Blocks) -> tuple[int, int]:
    """Counts the blocks that each kernel computes for these rows, and those of causal attention over whole rows."""
    rows, length = key_start.shape
    bounds = ((key_start << BITS) | key_end).astype(jnp.int32)
    visible = visible_blocks(key_start, key_end, *blocks)
    computed = sum(
        int(_mask_info(row[None], line, 2).block_mask.sum()) for row, line in zip(visible, bounds, strict=True)
    )
    index = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return computed, int(visible_blocks(jnp.zeros_like(index), index + 1, *blocks).sum())
