"""Interval attention: each query sees the keys in its own half-open interval, whatever that expresses.

Causality, prompt sharing, packing and padding all arrive as the two bounds, so this one function is the only
place where backends differ: plain XLA (`blockwise`), splash attention on TPUs, a Pallas kernel on GPUs.

    out[q] = sum_k softmax_k(cap(q . k * scale)) v[k] over key_start[q] <= k < key_end[q]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dpo_jax.models.attention import blockwise
from dpo_jax.types import InputError, check_choice

IMPLEMENTATIONS = ("auto", "xla", "splash", "triton")
PLATFORM = {"splash": "tpu", "triton": "gpu"}  # where each kernel runs
SPLASH_ROW = 128, 2**15 - 1  # splash takes rows of a multiple of the one and at most the other
TRITON_HEAD = 256  # the widest head that triton takes
XLA_ACCELERATOR_BLOCK = 512  # of the plain path where products must be large to be fast

Attention = Callable[..., Array]  # (q, k, v, key_start, key_end, *, scale, soft_cap) -> out, see make_attention


class Spread(NamedTuple):
    """Where rows and heads lie on a mesh; a kernel runs on each device's share."""

    mesh: Mesh
    rows: tuple[str, ...]
    heads: str | None


def choose(name: str, platform: str, *, head_dim: int, row_length: int) -> str:
    """The implementation that a configured name stands for.

    Args:
      name: one of IMPLEMENTATIONS; `auto` is the platform's own kernel where it takes heads and rows of these sizes.
      platform: of the devices: cpu, gpu, tpu.
    Raises: InputError for an unknown name, or a kernel that does not run there or not on such rows.
    """
    check_choice("config.model.attention", name, IMPLEMENTATIONS)
    multiple, longest = SPLASH_ROW
    fits = {"splash": row_length % multiple == 0 and row_length <= longest, "triton": head_dim <= TRITON_HEAD}
    if name == "auto":
        own = next((kernel for kernel, where in PLATFORM.items() if where == platform), "xla")
        return own if fits.get(own, True) else "xla"
    if PLATFORM.get(name, platform) != platform:
        raise InputError(
            "config.model.attention",
            got=f"{name!r}, a kernel for {PLATFORM[name]}, on {platform}",
            expected="auto or xla",
            remedy="Change it, or run where it can.",
        )
    if not fits.get(name, True):
        raise InputError(
            "config.model.attention",
            got=f"{name!r} for rows of {row_length} positions and heads of {head_dim}",
            expected=f"for splash rows of a multiple of {multiple}, at most {longest}, for triton heads of at most "
            f"{TRITON_HEAD}",
            remedy="Change it, or data.row_length, or set it to auto.",
        )
    return name


def make_attention(name: str = "xla", *, platform: str = "cpu", spread: Spread | None = None) -> Attention:
    """Returns `attention(q, k, v, key_start, key_end, *, scale, soft_cap) -> out`, with `choose` done.

    q is [R, S, H, d]; k and v are [R, S, K, d], each of their heads shared by H / K query heads in order; the bounds
    are indices into S, and no interval is empty. The result, [R, S, H, d], is of v's type; the softmax itself is
    float32 or wider. Scores are q . k times `scale` (None: d^-0.5), and then soft_cap * tanh(scores / soft_cap) unless
    that is None.

    Args:
      spread: how rows and heads lie on a mesh; None: on one device.
    """
    if name == "splash":
        from dpo_jax.models.attention.splash import attention as kernel
    elif name == "triton":
        from dpo_jax.models.attention.triton import attention as kernel
    else:
        block = blockwise.BLOCK if platform == "cpu" else XLA_ACCELERATOR_BLOCK
        kernel = functools.partial(blockwise.attention, block=block)

    def attention(
        q: Float[Array, "R S H d"],
        k: Float[Array, "R S K d"],
        v: Float[Array, "R S K d"],
        key_start: Int[Array, "R S"],
        key_end: Int[Array, "R S"],
        *,
        scale: float | None = None,
        soft_cap: float | None = None,
    ) -> Float[Array, "R S H d"]:
        here = functools.partial(kernel, soft_cap=soft_cap)
        if spread is not None:
            of_heads, of_rows = PartitionSpec(spread.rows, None, spread.heads), PartitionSpec(spread.rows)
            here = jax.shard_map(
                here,
                mesh=spread.mesh,
                in_specs=(of_heads, of_heads, of_heads, of_rows, of_rows),
                out_specs=of_heads,
                check_vma=False,
            )
        return here(q * (q.shape[-1] ** -0.5 if scale is None else scale), k, v, key_start, key_end)

    return attention


PLAIN = make_attention()
