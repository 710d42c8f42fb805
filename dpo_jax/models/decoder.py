"""One configurable causal decoder over packed rows; a family differs only in its `DecoderConfig`.

Flax linen is used narrowly: the `params` collection alone, blocks scanned over a leading layer axis. Outside this
file a model is the nested dict of arrays that `DecoderConfig` documents, and the pure functions below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dpo_jax.models.attention import PLAIN, Attention
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.layers import Across, affine, lookup, normalise
from dpo_jax.types import check_choice

# What the forward pass of a block keeps for the backward pass besides its input; the rest is computed again.
_KEPT = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("attention"),
)
REMAT: dict[str, Any] = {
    "none": None,  # everything: nothing is computed twice
    "dots": _KEPT,  # products and attention's result
    "block": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # nothing, and the input waits on the host
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
ACTIVATIONS = {
    "silu": jax.nn.silu,
    # As PyTorch has it; the erfc of jax.nn.gelu takes three times as long on a CPU.
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * 2**-0.5)),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
INIT = nn.initializers.normal(0.02)
# Of a kernel's path, such as blocks/attention/q/kernel, and the sizes of its two sides: how it lies on a mesh.
Kernels = Callable[[str, tuple[int, ...], tuple[int, ...]], Across | None]


class Run(nn.Module):
    """Fields every module shares: what to compute, and how."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    attend: Attention = PLAIN
    across: Kernels | None = None

    @property
    def fields(self) -> dict[str, Any]:
        names = ("config", "dtype", "param_dtype", "attend", "across")
        return {name: getattr(self, name) for name in names}

    def dense(self, name: str, features: int | tuple[int, ...], bias: bool, inputs: int = 1) -> Dense:
        return Dense(**self.fields, features=features, bias=bias, inputs=inputs, name=name)


class Dense(Run):
    """A product over the last `inputs` axes of x, into axes of the sizes `features`."""

    features: int | tuple[int, ...] = 1
    bias: bool = False
    inputs: int = 1

    @nn.compact
    def __call__(self, x):
        given, made = x.shape[x.ndim - self.inputs :], np.atleast_1d(self.features).tolist()
        kernel = self.param("kernel", INIT, (*given, *made), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (*made,), self.param_dtype) if self.bias else None
        width = math.prod(given)
        flat = None if bias is None else bias.astype(self.dtype).ravel()
        across = None if self.across is None else self.across("/".join((*self.path, "kernel")), given, tuple(made))
        y = affine(x.reshape(-1, width), kernel.astype(self.dtype).reshape(width, -1), flat, across)
        return y.reshape(*x.shape[: x.ndim - self.inputs], *made)


class Norm(Run):
    """RMSNorm or LayerNorm."""

    @nn.compact
    def __call__(self, x):
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        layer = self.config.norm == "layernorm"
        bias = jnp.asarray(self.param("bias", nn.initializers.zeros, shape, self.param_dtype)) if layer else None
        return normalise(x.reshape(-1, *shape), jnp.asarray(scale), bias, self.config.norm_eps).reshape(x.shape)


class SelfAttention(Run):
    """Grouped-query self-attention with rotary positions on the leading `rotary_dim` of each head."""

    @nn.compact
    def __call__(self, x, rotation, key_start, key_end):
        c = self.config
        q = rotate(self.dense("q", (c.heads, c.head_dim), c.qkv_bias)(x), rotation)
        k = rotate(self.dense("k", (c.kv_heads, c.head_dim), c.qkv_bias)(x), rotation)
        v = self.dense("v", (c.kv_heads, c.head_dim), c.qkv_bias)(x)
        out = self.attend(q, k, v, key_start, key_end)
        return self.dense("o", c.width, c.output_bias, inputs=2)(out)


class Mlp(Run):
    """Feed-forward block, gated or not."""

    @nn.compact
    def __call__(self, x):
        c = self.config
        act = ACTIVATIONS[c.activation]
        up = self.dense("up", c.mlp_width, c.mlp_bias)(x)
        hidden = act(self.dense("gate", c.mlp_width, c.mlp_bias)(x)) * up if c.gated else act(up)
        return self.dense("down", c.width, c.mlp_bias)(hidden)


class Block(Run):
    """Attention and feed-forward, one after the other or side by side."""

    @nn.compact
    def __call__(self, x, rotation, key_start, key_end):
        x = checkpoint_name(x, "block")
        attended = SelfAttention(**self.fields, name="attention")(
            Norm(**self.fields, name="attention_norm")(x), rotation, key_start, key_end
        )
        if not self.config.parallel_residual:
            x, attended = x + attended, 0.0
        normed = Norm(**self.fields, name="mlp_norm")(x)
        return x + attended + Mlp(**self.fields, name="mlp")(normed), None


class Table(Run):
    """A vocabulary matrix [V, D]: embeddings in, or the head out."""

    @nn.compact
    def __call__(self):
        return self.param("embedding", INIT, (self.config.vocab_size, self.config.width), self.param_dtype)


class Decoder(Run):
    """Embedded tokens to final hidden states. Tables belong to the parameters; what precedes and follows reads them."""

    remat: str = "none"

    @nn.compact
    def __call__(self, x, positions, key_start, key_end):
        if self.is_initializing():
            for name in ("embed",) if self.config.tie_embeddings else ("embed", "head"):
                Table(**self.fields, name=name)()
        rotation = rotary_angles(self.config, positions, self.dtype)
        block = Block if self.remat == "none" else nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, nn.broadcast),  # typed as an int
            length=self.config.layers,
        )
        x, _ = blocks(**self.fields, name="blocks")(x, rotation, key_start, key_end)
        return Norm(**self.fields, name="final_norm")(x)


def rotary_angles(config: DecoderConfig, positions: Int[Array, "R S"], dtype: Any):
    """(cos, sin) of every position's rotation, [R, S, 1, rotary_dim / 2]; None if nothing rotates.

    angle[p, i] = p * theta^(-2i / rotary_dim); Su et al. 2021, section 3.2.2.
    """
    if not config.rotary_dim:
        return None
    # Angles in float32 whatever the compute type: bfloat16 cannot tell position 257 from 258.
    wide = jnp.promote_types(dtype, jnp.float32)
    frequency = config.rope_theta ** (-jnp.arange(0, config.rotary_dim, 2, dtype=wide) / config.rotary_dim)
    angle = positions[..., None, None].astype(wide) * frequency[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "R S H d"], rotation) -> Float[Array, "R S H d"]:
    """Turns the pairs (x[i], x[i + rotary_dim / 2]) by their angles and leaves the dimensions after them alone."""
    if rotation is None:
        return x
    cos, sin = rotation
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def init(key: Array, config: DecoderConfig, *, dtype: Any = jnp.float32) -> dict:
    """Random parameters, normal with standard deviation 0.02, in the tree that `DecoderConfig` documents."""
    rows, x = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, config.width), dtype)
    return dict(Decoder(config, dtype, dtype).init(key, x, rows, rows, rows + 1)["params"])


def forward(
    params: dict,
    config: DecoderConfig,
    tokens: Int[Array, "R S"],
    positions: Int[Array, "R S"],
    key_start: Int[Array, "R S"],
    key_end: Int[Array, "R S"],
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    attend: Attention = PLAIN,
) -> Float[Array, "R S D"]:
    """Final hidden states of tokens; arguments as in `hidden_states`."""
    x, _ = lookup(jnp.asarray(params["embed"]["embedding"]), tokens, None)
    return hidden_states(params, config, x, positions, key_start, key_end, dtype=dtype, remat=remat, attend=attend)


def hidden_states(
    params: dict,
    config: DecoderConfig,
    x: Float[Array, "R S D"],
    positions: Int[Array, "R S"],
    key_start: Int[Array, "R S"],
    key_end: Int[Array, "R S"],
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    attend: Attention = PLAIN,
    across: Kernels | None = None,
) -> Float[Array, "R S D"]:
    """Final hidden states, normalised, ready for the head.

    Args:
      params: the tree that `DecoderConfig` documents; tables of the vocabulary are not read.
      x: embedded tokens.
      positions: where each token stands in its own sequence, from 0; not its index in the row.
      key_start, key_end: the keys each token attends to, [key_start, key_end) in row indices, never empty.
      dtype: the compute type; parameters are cast to it where they are used.
      remat: what the backward pass recomputes, one of REMAT.
      attend: attention, of `attention.make_attention`.
      across: how kernels lie on a mesh; None: on one device.
    """
    module = Decoder(config, dtype, attend=attend, across=across, remat=remat)
    return cast(jax.Array, module.apply({"params": params}, x.astype(dtype), positions, key_start, key_end))


def head(params: dict) -> Float[Array, "V D"]:
    """The vocabulary matrix that turns hidden states into logits: its own, or the tied embeddings."""
    return params.get("head", params["embed"])["embedding"]


def check_remat(name: str) -> None:
    """Raises InputError unless it names a policy."""
    check_choice("config.model.remat", name, REMAT)
