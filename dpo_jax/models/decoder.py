"""One configurable causal decoder over packed rows; a family differs only in its `DecoderConfig`.

Flax linen is used narrowly: the `params` collection alone, blocks scanned over a leading layer axis. Outside this
file a model is the nested dict of arrays that `DecoderConfig` documents, and the pure functions below.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dpo_jax.models import experts, layer_kinds, quantized, rope
from dpo_jax.models.attention.choose import PLAIN, Attention
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.layers import Across, affine, lookup, normalize
from dpo_jax.types import check_choice

# What the forward pass of a block keeps for the backward pass besides its input; the rest is computed again.
_KEPT = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("attention", experts.KEPT),
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


class Mixing(NamedTuple):
    """How a mixture of experts is computed, see `experts.mixture`."""

    block: int | None = experts.CPU_BLOCK
    mesh: experts.Spread | None = None


MIXING = Mixing()


class Run(nn.Module):
    """Fields every module shares: what to compute, and how."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    attend: Attention = PLAIN
    across: Kernels | None = None
    mixing: Mixing = MIXING
    adapter_scale: float = 1.0

    @property
    def fields(self) -> dict[str, Any]:
        names = ("config", "dtype", "param_dtype", "attend", "across", "mixing", "adapter_scale")
        return {name: getattr(self, name) for name in names}

    def kernel(self, shape: tuple[int, ...]) -> Array:
        """This module's matrix, decoded if it is held in few bits."""
        if self.has_variable("params", "kernel"):
            held = self.get_variable("params", "kernel")
            if isinstance(held, Mapping):
                return jnp.asarray(quantized.decode(held))
        return jnp.asarray(self.param("kernel", INIT, shape, self.param_dtype))

    def dense(self, name: str, features: int | tuple[int, ...], bias: bool, inputs: int = 1) -> Dense:
        return Dense(**self.fields, features=features, bias=bias, inputs=inputs, name=name)


class Dense(Run):
    """A product over the last `inputs` axes of x, into axes of the sizes `features`; with an adapter beside the kernel,
    see `adapters`, also that of x, A and B."""

    features: int | tuple[int, ...] = 1
    bias: bool = False
    inputs: int = 1

    @nn.compact
    def __call__(self, x):
        given, made = x.shape[x.ndim - self.inputs :], tuple(np.atleast_1d(self.features).tolist())
        kernel = self.kernel((*given, *made))
        bias = self.param("bias", nn.initializers.zeros, made, self.param_dtype) if self.bias else None
        flat = x.reshape(-1, math.prod(given))
        y = self.times(flat, "kernel", kernel, given, made, None if bias is None else bias.astype(self.dtype).ravel())
        if self.has_variable("params", "lora_a"):
            a, b = (jnp.asarray(self.get_variable("params", name)) for name in ("lora_a", "lora_b"))
            low = self.times(flat, "lora_a", a, given, a.shape[-1:])
            # Made again in the backward pass: kept, it would take as much memory as what it is added to.
            y = y + self.adapter_scale * self.times(low, "lora_b", b, b.shape[:1], made, kept=False)
        return y.reshape(*x.shape[: x.ndim - self.inputs], *made)

    def times(self, x, name, matrix, given, made, bias=None, *, kept=True):
        across = None if self.across is None else self.across("/".join((*self.path, name)), given, made)
        return affine(x, matrix.astype(self.dtype).reshape(x.shape[-1], -1), bias, across, kept)


class Norm(Run):
    """RMSNorm or LayerNorm over the last axis, or the last `axes` as one."""

    axes: int = 1

    @nn.compact
    def __call__(self, x):
        c = self.config
        shape = (math.prod(x.shape[x.ndim - self.axes :]),)
        scale = jnp.asarray(self.param("scale", nn.initializers.constant(1 - c.norm_offset), shape, self.param_dtype))
        if c.norm_offset:  # added in float32: next to 1, a bfloat16 has few digits left
            scale = scale.astype(jnp.promote_types(scale.dtype, jnp.float32)) + c.norm_offset
        layer = c.norm == "layernorm"
        bias = jnp.asarray(self.param("bias", nn.initializers.zeros, shape, self.param_dtype)) if layer else None
        # Heads are no more rows: both may be cut, and XLA gathers what it can only write as one cut axis.
        heads = x.shape[2 : x.ndim - self.axes]
        return normalize(x.reshape(-1, *heads, *shape), scale, bias, c.norm_eps).reshape(x.shape)


class SelfAttention(Run):
    """Grouped-query self-attention."""

    @nn.compact
    def __call__(self, x, which, layers):
        c = self.config
        q = self.dense("q", (c.heads, c.head_dim), c.qkv_bias)(x)
        k = self.dense("k", (c.kv_heads, c.head_dim), c.qkv_bias)(x)
        v = self.dense("v", (c.kv_heads, c.head_dim), c.qkv_bias)(x)
        if c.qk_norm:
            axes = {"head": 1, "all": 2}[c.qk_norm]
            q = Norm(**self.fields, axes=axes, name="q_norm")(q)
            k = Norm(**self.fields, axes=axes, name="k_norm")(k)
        if c.qkv_clip is not None:
            q, k, v = (jnp.clip(each, -c.qkv_clip, c.qkv_clip) for each in (q, k, v))
        kind, number = which
        rotation = layer_kinds.of_kind(layers.rotations, kind)
        if rotation is not None:
            turn = functools.partial(rope.rotate, rotation=rotation, interleaved=layer_kinds.interleaved(c))
            q, k = turn(q), turn(k)
        if number is not None:
            q = q / number.astype(q.dtype)
        key_start = layer_kinds.of_kind(layers.key_starts, kind)
        out = self.attend(q, k, v, key_start, layers.key_end, scale=c.query_scale, soft_cap=c.attention_soft_cap)
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


class Experts(Run):
    """Feed-forward blocks of which each token goes through those that a router chooses."""

    @nn.compact
    def __call__(self, x, counted):
        c, flat = self.config, x.reshape(-1, x.shape[-1])
        router = self.param_of("router", (c.width, c.experts)).astype(self.dtype)
        path = "/".join((*self.path, "router", "kernel"))
        across = None if self.across is None else self.across(path, (c.width,), (c.experts,))
        weights, chosen, probabilities = experts.route(
            flat,
            router,
            top_k=c.experts_per_token,
            normalize=c.normalize_router,
            across=across,
            spread=self.mixing.mesh,
        )
        made = experts.mixture(
            flat,
            weights,
            chosen,
            self.param_of("gate", (c.experts, c.width, c.mlp_width)),
            self.param_of("up", (c.experts, c.width, c.mlp_width)),
            self.param_of("down", (c.experts, c.mlp_width, c.width)),
            activation=ACTIVATIONS[c.activation],
            block=self.mixing.block,
            spread=self.mixing.mesh,
        )
        found = experts.routing(probabilities, chosen, counted.ravel())
        return made.reshape(x.shape), {name: values.reshape(counted.shape) for name, values in found.items()}

    def param_of(self, name: str, shape: tuple[int, ...]) -> Array:
        return jnp.asarray(Kernel(**self.fields, shape=shape, name=name)())


class Kernel(Run):
    """A product's matrix, for what does more with it than multiply."""

    shape: tuple[int, ...] = ()

    @nn.compact
    def __call__(self):
        return self.kernel(self.shape)


class Block(Run):
    """Attention and feed-forward, one after the other or side by side."""

    @nn.compact
    def __call__(self, x, which, layers):
        c = self.config
        x = checkpoint_name(x, "block")
        before, after = c.norms in ("before", "both"), c.norms in ("after", "both")

        def norm(name, x, there):
            return Norm(**self.fields, name=name)(x) if there else x

        read = norm("attention_norm", x, before)
        attended = SelfAttention(**self.fields, name="attention")(read, which, layers)
        attended = norm("attention_post_norm", attended, after)
        if not c.parallel_residual:
            x, attended = x + attended, 0.0
        read = read if c.shared_norm else norm("mlp_norm", x, before)
        if c.experts:
            made, found = Experts(**self.fields, name="experts")(read, layers.counted)
        else:
            made, found = Mlp(**self.fields, name="mlp")(read), None
        return x + attended + norm("mlp_post_norm", made, after), found


class Table(Run):
    """Vectors by number [size, D]: embeddings in, positions, or the head out."""

    size: int = 0

    @nn.compact
    def __call__(self):
        return self.param("embedding", INIT, (self.size, self.config.width), self.param_dtype)


class Bias(Run):
    """One number for each word of the vocabulary [V]."""

    @nn.compact
    def __call__(self):
        return self.param("bias", nn.initializers.zeros, (self.config.vocab_size,), self.param_dtype)


class Decoder(Run):
    """Embedded tokens to final hidden states. Tables belong to the parameters; what precedes and follows reads them."""

    remat: str = "none"
    unfed: int = 0

    @nn.compact
    def __call__(self, x, positions, key_start, key_end):
        c = self.config
        if self.is_initializing():
            for name in ("embed",) if c.tie_embeddings else ("embed", "head"):
                Table(**self.fields, size=c.vocab_size, name=name)()
            if c.head_bias:
                Bias(**self.fields, name="logits")()
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        if c.learned_positions:
            table = jnp.asarray(Table(**self.fields, size=c.max_positions, name="positions")())
            x = x + jnp.take(table, positions, axis=0).astype(x.dtype)
        block = Block if self.remat == "none" else nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (0, nn.broadcast)),  # typed as ints
            length=c.layers,
        )
        layers = layer_kinds.all_layers(c, positions, key_start, key_end, self.dtype, self.unfed)
        x, found = blocks(**self.fields, name="blocks")(x, layer_kinds.each_layer(c), layers)
        found = {name: values.mean(0) for name, values in (found or {}).items()}
        return Norm(**self.fields, name="final_norm")(x), found


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
    given = positions, key_start, key_end
    return hidden_states(params, config, x, *given, dtype=dtype, remat=remat, attend=attend)[0]


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
    mixing: Mixing = MIXING,
    adapter_scale: float = 1.0,
    unfed: int = 0,
) -> tuple[Float[Array, "R S D"], dict[str, Float[Array, "R S"]]]:
    """Final hidden states, normalized, ready for the head; and of a mixture of experts, see `experts.routing`, what its
    layers find of every token, on average.

    Args:
      params: the tree that `DecoderConfig` documents; tables of the vocabulary are not read.
      x: embedded tokens.
      positions: where each token stands in its own sequence, from 0; not its index in the row.
      key_start, key_end: the keys each token attends to, [key_start, key_end) in row indices, never empty.
      dtype: the compute type; parameters are cast to it where they are used.
      remat: what the backward pass recomputes, one of REMAT.
      attend: attention, of `attention.make_attention`.
      across: how kernels lie on a mesh; None: on one device.
      mixing: how experts do, and how they are computed.
      adapter_scale: what the products of adapters are multiplied by, where `params` have some.
      unfed: tokens at the end of each sequence that are not among these, as one is not that predicts nothing; some
        models turn by how long a sequence is.
    """
    how = dict(attend=attend, across=across, mixing=mixing, adapter_scale=adapter_scale)
    module = Decoder(config, dtype, **cast(Any, how), remat=remat, unfed=unfed)
    return cast(Any, module.apply({"params": params}, x.astype(dtype), positions, key_start, key_end))


def logits(params: dict, config: DecoderConfig, hidden: Float[Array, "R S D"]) -> Float[Array, "R S V"]:
    """Logits of all words at all positions, float32 or wider: for few of them, where `logprobs` is for many."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    head = jnp.asarray(params.get("head", params["embed"])["embedding"]).astype(hidden.dtype)
    found = jnp.einsum("rsd,vd->rsv", hidden, head, preferred_element_type=wide)
    if config.head_bias:
        found = found + params["logits"]["bias"].astype(wide)[None, None]
    cap = config.logit_soft_cap
    return found if cap is None else cap * jnp.tanh(found / cap)


def check_remat(name: str) -> None:
    """Raises InputError unless it names a policy."""
    check_choice("config.model.remat", name, REMAT)
