"""Interval attention in Pallas kernels for NVIDIA GPUs, compiled by Triton.

Flash attention (Dao et al. 2022; Dao 2023 for the order of the loops) that computes only the blocks of scores with a
visible key. Which ones is data: each program of the grid loops over a list that is made from the bounds beforehand.

    kernel     a program holds                  and loops over
    out        a block of queries of one head   the blocks of keys visible to its queries
    q_grad     a block of queries of one head   the blocks of keys visible to its queries
    kv_grad    a block of keys of one kv head   the blocks of queries that its keys are visible to, of each head in turn

The softmax is in base 2, which GPUs compute in hardware: exp(s - lse) = 2^(s * log2(e) - lse2).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.models.attention.blockwise import pad_rows, visible_blocks
from dpo_jax.types import InputError

LOG2_E = math.log2(math.e)
LOWEST = float(jnp.finfo(jnp.float32).min)  # finite: a query with no visible key so far must not give NaN
NARROWEST, WIDEST = 16, 256  # head widths: least for tensor cores, most for shared memory


class Tile(NamedTuple):
    """Block sizes and launch options of one kernel; sizes are powers of two from 16."""

    queries: int
    keys: int
    warps: int  # of 32 threads, in a program
    stages: int  # loop iterations whose loads are in flight at once


class Blocks(NamedTuple):
    """Tiles of the three kernels."""

    out: Tile
    q_grad: Tile
    kv_grad: Tile


# (bytes of an element, padded head width) -> tiles. They start from the tilings that the Triton tutorial
# 06-fused-attention and PyTorch's FlexAttention (inductor's template heuristics) publish for Ampere and Hopper, reduced
# until, compiled for sm_80 to sm_120, registers hardly spill and a program fits 99 KiB of shared memory.
# No GPU was available, so none was timed: measure again with `benchmarks/gpu_attention.py --sweep`.
# Float32 products are exact and without tensor cores; they are unrolled, so their tiles are small.
TILINGS = {
    (2, 64): Blocks(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    (2, 128): Blocks(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (2, 256): Blocks(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (4, 64): Blocks(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (4, 128): Blocks(Tile(32, 16, 8, 2), Tile(16, 32, 8, 2), Tile(32, 16, 8, 2)),
    (4, 256): Blocks(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}


def choose_blocks(head_dim: int, dtype: DTypeLike) -> Blocks:
    """Returns the tiles for a head width and a type of q, k and v.

    Raises: InputError for heads wider than WIDEST, or a type of neither 2 nor 4 bytes.
    """
    dtype = jnp.dtype(dtype)
    tiling = dtype.itemsize, max(_padded(head_dim), 64)
    if tiling not in TILINGS:
        raise InputError(
            "config.model.attention",
            got=f"'triton' for {dtype} heads of {head_dim}",
            expected=f"heads of at most {WIDEST}, of bfloat16, float16 or float32",
            remedy="Set it to xla.",
        )
    return TILINGS[tiling]


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
      q: already multiplied by the scale, d^-0.5 by default. Any S; one that tiles do not divide is padded, with a copy.
      soft_cap: scores become cap * tanh(scores / cap); None: no cap.
      blocks: the tiles; None: `choose_blocks`.
      interpret: emulate the kernels on any device, for tests.
    Returns: the result in v's type; the softmax and all sums are float32.
    Raises: InputError for heads wider than WIDEST, or a type of neither 2 nor 4 bytes.
    """
    _, length, _, width = q.shape
    if blocks is None:
        blocks = choose_blocks(width, q.dtype)
    multiple = max(max(tile.queries, tile.keys) for tile in blocks)
    q, k, v, key_start, key_end = pad_rows(q, k, v, key_start, key_end, multiple)
    out: Any = _attend(q, k, v, key_start, key_end, soft_cap, blocks, interpret)
    return out[:, :length]


class Visits(NamedTuple):
    """For each block along A, the blocks along B to visit: the first `count` of `blocks`, ascending."""

    blocks: Int[Array, "R A B"]
    count: Int[Array, "R A"]


def visits(visible: Bool[Array, "R A B"]) -> Visits:
    """Lists, for each block along A, the visible blocks along B."""
    return Visits(jnp.argsort(~visible, axis=-1, stable=True).astype(jnp.int32), visible.sum(-1, dtype=jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, key_start, key_end, soft_cap, blocks, interpret):
    return _forward(q, k, v, key_start, key_end, soft_cap, blocks, interpret)[0]


def _forward(q, k, v, key_start, key_end, soft_cap, blocks, interpret):
    out, lse = _call_out(q, k, v, key_start, key_end, soft_cap, blocks.out, interpret)
    # Named so that remat policies which save products save these too.
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, key_start, key_end, out, lse)


# Jitted because jax 0.10 recomputes an unused kernel call under remat, but drops an unused jit.
@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _call_out(q, k, v, key_start, key_end, soft_cap, tile, interpret):
    rows, length, heads, width = q.shape
    spec = _specs_by_query(q, k, tile)
    return pl.pallas_call(
        functools.partial(_out_kernel, tile, soft_cap, width),
        grid=(length // tile.queries, heads, rows),
        in_specs=[spec.q, spec.k, spec.k, spec.bound, spec.bound, spec.list, spec.count],
        out_specs=[spec.q, spec.stat],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, v.dtype),
            jax.ShapeDtypeStruct((rows, heads, length), jnp.float32),
        ],
        compiler_params=_params(tile),
        interpret=interpret,
    )(q, k, v, key_start, key_end, *visits(visible_blocks(key_start, key_end, tile.queries, tile.keys)))


def _backward(soft_cap, blocks, interpret, saved, grad):
    q, k, v, key_start, key_end, out, lse = saved  # q, out, grad [R, S, H, d]; k, v [R, S, K, d]; lse [R, H, S]
    rows, length, heads, width = q.shape
    # [R, H, S] out . dL/dout = sum_k w_k dL/dw_k, the common term of the softmax's gradient
    out_dot_grad = jnp.einsum("rshd,rshd->rhs", out, grad, preferred_element_type=jnp.float32)
    args = q, k, v, grad, lse, out_dot_grad, key_start, key_end

    tile, spec = blocks.q_grad, _specs_by_query(q, k, blocks.q_grad)
    reads = [spec.q, spec.k, spec.k, spec.q, spec.stat, spec.stat, spec.bound, spec.bound, spec.list, spec.count]
    q_grad = pl.pallas_call(
        functools.partial(_q_grad_kernel, tile, soft_cap, width),
        grid=(length // tile.queries, heads, rows),
        in_specs=reads,
        out_specs=spec.q,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_params(tile),
        interpret=interpret,
    )(*args, *visits(visible_blocks(key_start, key_end, tile.queries, tile.keys)))

    tile, spec = blocks.kv_grad, _specs_by_key(q, k, blocks.kv_grad)
    reads = [spec.q, spec.k, spec.k, spec.q, spec.stat, spec.stat, spec.bound, spec.bound, spec.list, spec.count]
    k_grad, v_grad = pl.pallas_call(
        functools.partial(_kv_grad_kernel, tile, soft_cap, width),
        grid=(length // tile.keys, k.shape[2], rows),
        in_specs=reads,
        out_specs=[spec.k, spec.k],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=_params(tile),
        interpret=interpret,
    )(*args, *visits(visible_blocks(key_start, key_end, tile.queries, tile.keys).swapaxes(1, 2)))
    return q_grad, k_grad, v_grad, None, None


_attend.defvjp(_forward, _backward)


class _Specs(NamedTuple):
    """Block specs of each kind of array: the part that one program of the grid reads or writes."""

    q: pl.BlockSpec  # [R, S, H, d]
    k: pl.BlockSpec  # [R, S, K, d]
    stat: pl.BlockSpec  # [R, H, S]
    bound: pl.BlockSpec  # [R, S]
    list: pl.BlockSpec  # [R, A, B]
    count: pl.BlockSpec  # [R, A]


def _specs_by_query(q, k, tile):
    """Specs of the program that holds block `n` of the queries of head `h` in row `r`."""
    length, heads, width = q.shape[1:]
    group, padded = heads // k.shape[2], _padded(width)
    return _Specs(
        q=pl.BlockSpec((None, tile.queries, None, padded), lambda n, h, r: (r, n, h, 0)),
        k=pl.BlockSpec((None, length, None, padded), lambda n, h, r: (r, 0, jax.lax.div(h, group), 0)),
        stat=pl.BlockSpec((None, None, tile.queries), lambda n, h, r: (r, h, n)),
        bound=pl.BlockSpec((None, tile.queries), lambda n, h, r: (r, n)),
        list=pl.BlockSpec((None, None, length // tile.keys), lambda n, h, r: (r, n, 0)),
        count=pl.BlockSpec((None, None), lambda n, h, r: (r, n)),
    )


def _specs_by_key(q, k, tile):
    """Specs of the program that holds block `n` of the keys of kv head `h` in row `r`; it reads its group's queries."""
    length, heads, width = q.shape[1:]
    group, padded = heads // k.shape[2], _padded(width)
    return _Specs(
        q=pl.BlockSpec((None, length, group, padded), lambda n, h, r: (r, 0, h, 0)),
        k=pl.BlockSpec((None, tile.keys, None, padded), lambda n, h, r: (r, n, h, 0)),
        stat=pl.BlockSpec((None, group, length), lambda n, h, r: (r, h, 0)),
        bound=pl.BlockSpec((None, length), lambda n, h, r: (r, 0)),
        list=pl.BlockSpec((None, None, length // tile.queries), lambda n, h, r: (r, n, 0)),
        count=pl.BlockSpec((None, None), lambda n, h, r: (r, n)),
    )


def _params(tile):
    return plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)


def _out_kernel(tile, soft_cap, width, *refs):
    """Writes out [q, d] and the base-2 log-sum-exp of its scores [q], for one block of queries."""
    q_ref, k_ref, v_ref, start_ref, end_ref, list_ref, count_ref, out_ref, lse_ref = refs
    q = _load(q_ref, slice(None), width)
    start, end = start_ref[...][:, None], end_ref[...][:, None]

    def visit(n, carry):
        out, max_score, exp_sum = carry
        at = list_ref[n] * tile.keys
        k, v = (_load(ref, pl.ds(at, tile.keys), width) for ref in (k_ref, v_ref))
        keys = at + jnp.arange(tile.keys)[None]
        scores = _cap(_dot(q, k, trans_b=True), soft_cap) * LOG2_E
        scores = jnp.where((keys >= start) & (keys < end), scores, LOWEST)
        new_max = jnp.maximum(max_score, scores.max(1))
        # A query with no visible key so far counts each masked one as 2^0; its first real score rescales that to 0.
        weights, rescale = jnp.exp2(scores - new_max[:, None]), jnp.exp2(max_score - new_max)
        out = out * rescale[:, None] + _dot(weights.astype(v.dtype), v)
        return out, new_max, exp_sum * rescale + weights.sum(1)

    zeros = jnp.zeros(tile.queries, jnp.float32)
    first = jnp.zeros(q.shape, jnp.float32), jnp.full_like(zeros, LOWEST), zeros
    out, max_score, exp_sum = jax.lax.fori_loop(0, count_ref[...], visit, first)
    _store(out_ref, out / exp_sum[:, None], width)
    lse_ref[...] = max_score + jnp.log2(exp_sum)


def _q_grad_kernel(tile, soft_cap, width, *refs):
    """Writes dL/dq [q, d] of one block of queries."""
    q_ref, k_ref, v_ref, grad_ref, lse_ref, out_dot_grad_ref, start_ref, end_ref, list_ref, count_ref, q_grad_ref = refs
    q, grad = _load(q_ref, slice(None), width), _load(grad_ref, slice(None), width)
    lse, out_dot_grad, start, end = (ref[...][:, None] for ref in (lse_ref, out_dot_grad_ref, start_ref, end_ref))

    def visit(n, q_grad):
        at = list_ref[n] * tile.keys
        k, v = (_load(ref, pl.ds(at, tile.keys), width) for ref in (k_ref, v_ref))
        keys = at + jnp.arange(tile.keys)[None]
        scores = _cap(_dot(q, k, trans_b=True), soft_cap)  # [q, k]
        weights = jnp.where((keys >= start) & (keys < end), jnp.exp2(scores * LOG2_E - lse), 0)  # [q, k] softmax
        # [q, k] dL/d(q . k) = w (dL/dw - sum_k w_k dL/dw_k) cap', with dL/dw = dL/dout . v
        to_scores = weights * (_dot(grad, v, trans_b=True) - out_dot_grad) * _cap_slope(scores, soft_cap)
        return q_grad + _dot(to_scores.astype(k.dtype), k)  # [q, d] dL/dq = sum_k dL/d(q . k) k

    _store(q_grad_ref, jax.lax.fori_loop(0, count_ref[...], visit, jnp.zeros(q.shape, jnp.float32)), width)


def _kv_grad_kernel(tile, soft_cap, width, *refs):
    """Writes dL/dk and dL/dv [k, d] of one block of keys, summed over the query heads of its group."""
    q_ref, k_ref, v_ref, grad_ref, lse_ref, out_dot_grad_ref, start_ref, end_ref, list_ref, count_ref, *outputs = refs
    k_grad_ref, v_grad_ref = outputs
    k, v = _load(k_ref, slice(None), width), _load(v_ref, slice(None), width)
    keys = (pl.program_id(0) * tile.keys + jnp.arange(tile.keys))[:, None]
    group = q_ref.shape[1]

    def visit(n, carry):
        k_grad, v_grad = carry
        # All heads of a block before the next block: the heads of a position are adjacent in memory.
        block, head = jax.lax.div(n, group), jax.lax.rem(n, group)
        at = pl.ds(list_ref[block] * tile.queries, tile.queries)
        q, grad = (_load(ref, (at, head), width) for ref in (q_ref, grad_ref))
        lse, out_dot_grad = (ref[head, at][None] for ref in (lse_ref, out_dot_grad_ref))
        start, end = (ref[at][None] for ref in (start_ref, end_ref))
        # Scores are [k, q], so that no product needs its left side transposed in registers.
        scores = _cap(_dot(k, q, trans_b=True), soft_cap)  # [k, q]
        weights = jnp.where((keys >= start) & (keys < end), jnp.exp2(scores * LOG2_E - lse), 0)  # [k, q] softmax
        # [k, q] dL/d(q . k) = w (dL/dw - sum_k w_k dL/dw_k) cap', with dL/dw = v . dL/dout
        to_scores = weights * (_dot(v, grad, trans_b=True) - out_dot_grad) * _cap_slope(scores, soft_cap)
        v_grad = v_grad + _dot(weights.astype(grad.dtype), grad)  # [k, d] dL/dv = sum_q w dL/dout
        return k_grad + _dot(to_scores.astype(q.dtype), q), v_grad  # [k, d] dL/dk = sum_q dL/d(q . k) q

    zeros = jnp.zeros(k.shape, jnp.float32)
    k_grad, v_grad = jax.lax.fori_loop(0, count_ref[...] * group, visit, (zeros, zeros))
    _store(k_grad_ref, k_grad, width)
    _store(v_grad_ref, v_grad, width)


def _dot(a, b, **options):
    return plgpu.dot(a, b, allow_tf32=False, **options)  # matters for float32 only


def _cap(scores, soft_cap):
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _cap_slope(scores, soft_cap):
    return 1 if soft_cap is None else 1 - jnp.square(scores / soft_cap)


def _load(ref, at, width):
    """Loads positions of a block; lanes beyond the head's width are zeros."""
    ref = ref.at[at]
    return ref[...] if ref.shape[-1] == width else plgpu.load(ref, mask=_lanes(ref, width), other=0)


def _store(ref, value, width):
    plgpu.store(ref, value.astype(ref.dtype), mask=None if ref.shape[-1] == width else _lanes(ref, width))


def _lanes(ref, width):
    return jnp.broadcast_to(jnp.arange(ref.shape[-1]) < width, ref.shape)


def _padded(width: int) -> int:
    return max(NARROWEST, pl.next_power_of_2(width))
