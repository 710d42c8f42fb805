"""Chooses the implementation of interval attention: each query attends to its own half-open interval of keys.

Causality, shared prompts, packing and padding are all expressed by the two bounds, so this function is the only place
where backends differ: plain XLA (`blockwise`), splash attention on TPUs, a Pallas kernel on GPUs.

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
SPLASH_ROW = 128, 2**15 - 1  # splash needs rows of a multiple of the first number, and at most the second
TRITON_HEAD = 256  # widest head that triton supports
XLA_ACCELERATOR_BLOCK = 512  # block of `blockwise` on accelerators, where products must be large to be fast

Attention = Callable[..., Array]  # (q, k, v, key_start, key_end, *, scale, soft_cap) -> out, see make_attention


class AttentionSharding(NamedTuple):
    """Mesh axes over which attention is sharded; a kernel runs on each device's rows and heads."""

    mesh: Mesh
    rows: tuple[str, ...]
    heads: str | None  # None: replicated


def choose(name: str, platform: str, *, head_dim: int, row_length: int) -> str:
    """Returns the implementation that a configured name selects.

    Args:
      name: one of IMPLEMENTATIONS; `auto` is the platform's own kernel if it supports heads and rows of these sizes.
      platform: of the devices: cpu, gpu, tpu.
    Raises: InputError for an unknown name, or a kernel that does not run on this platform or on such rows.
    """
    check_choice("config.model.attention", name, IMPLEMENTATIONS)
    multiple, longest = SPLASH_ROW
    supported = {"splash": row_length % multiple == 0 and row_length <= longest, "triton": head_dim <= TRITON_HEAD}
    if name == "auto":
        own = next((kernel for kernel, where in PLATFORM.items() if where == platform), "xla")
        return own if supported.get(own, True) else "xla"
    if PLATFORM.get(name, platform) != platform:
        raise InputError(
            "config.model.attention",
            got=f"{name!r}, a kernel for {PLATFORM[name]}, on {platform}",
            expected="auto or xla",
            remedy=f"Give --config.model.attention=auto, or run on a {PLATFORM[name]}.",
        )
    if not supported.get(name, True):
        raise InputError(
            "config.model.attention",
            got=f"{name!r} for rows of {row_length} positions and heads of {head_dim}",
            expected=f"a row length that is a multiple of {multiple}, at most {longest}"
            if name == "splash"
            else f"heads of at most {TRITON_HEAD}",
            remedy="Give --config.model.attention=auto"
            + (", or change --config.data.row_length." if name == "splash" else "."),
        )
    return name


def make_attention(name: str = "xla", *, platform: str = "cpu", sharding: AttentionSharding | None = None) -> Attention:
    """Returns `attention(q, k, v, key_start, key_end, *, scale, soft_cap) -> out` of an implementation.

    q is [R, S, H, d]; k and v are [R, S, K, d], and each of their heads serves H / K adjacent query heads; key_start
    and key_end [R, S] are indices into S, and no interval is empty. out [R, S, H, d] has v's type; the softmax is
    float32 or wider. Scores are q . k times `scale` (None: d^-0.5), and then soft_cap * tanh(scores / soft_cap) unless
    soft_cap is None.

    Args:
      name: an implementation that `choose` returned.
      sharding: how rows and heads are sharded over a mesh; None: on one device.
    """
    if name == "splash":
        from dpo_jax.models.attention import splash

        kernel = splash.attention
    elif name == "triton":
        from dpo_jax.models.attention import triton

        kernel = triton.attention
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
        attend = functools.partial(kernel, soft_cap=soft_cap)
        if sharding is not None:
            heads, bounds = PartitionSpec(sharding.rows, None, sharding.heads), PartitionSpec(sharding.rows)
            attend = jax.shard_map(
                attend,
                mesh=sharding.mesh,
                in_specs=(heads, heads, heads, bounds, bounds),
                out_specs=heads,
                check_vma=False,
            )
        return attend(q * (q.shape[-1] ** -0.5 if scale is None else scale), k, v, key_start, key_end)

    return attention


PLAIN = make_attention()
