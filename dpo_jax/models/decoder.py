"""One configurable causal decoder over packed rows; families differ only in their `DecoderConfig`.

Flax linen is used narrowly: only the `params` collection, and blocks scanned over a leading layer axis. Outside this
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
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from dpo_jax.models import experts, quantized, rope
from dpo_jax.models.attention.choose import PLAIN, Attention
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.layer_kinds import LayerIndex, LayerInputs, interleaved, layer_index, layer_inputs, select
from dpo_jax.models.layers import KernelSharding, affine, lookup, normalize
from dpo_jax.types import check_choice

# Values that a block saves for the backward pass besides its input; the others are recomputed.
_DOTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("attention", experts.SAVED),
)
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,  # everything: nothing is recomputed
    "dots": _DOTS,  # products and the result of attention
    "block": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # nothing; the input waits on the host
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
ACTIVATIONS = {
    "silu": jax.nn.silu,
    # As in PyTorch; the erfc of jax.nn.gelu takes three times as long on a CPU.
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * 2**-0.5)),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
INIT = nn.initializers.normal(0.02)
Params = dict[str, PyTree]  # nested dict of arrays, as `DecoderConfig` documents
# (path such as blocks/attention/q/kernel, sizes of its input axes, sizes of its output axes) -> its sharding.
KernelShardings = Callable[[str, tuple[int, ...], tuple[int, ...]], KernelSharding | None]


class BlockOptions(NamedTuple):
    """Computation and sharding of a decoder's blocks, apart from its architecture."""

    dtype: DTypeLike = jnp.float32  # compute type; parameters are cast to it where they are used
    remat: str = "none"  # one of REMAT: what the backward pass recomputes
    attend: Attention = PLAIN  # from `attention.choose.make_attention`
    kernel_shardings: KernelShardings | None = None  # None: kernels are not sharded
    mixture: experts.MixtureOptions = experts.MixtureOptions()  # its activation is replaced by the config's
    adapter_scale: float = 1.0  # factor of the products of adapters, if the parameters have any


DEFAULTS = BlockOptions()


class DecoderModule(nn.Module):
    """Fields that all modules of the decoder share."""

    config: DecoderConfig
    options: BlockOptions = DEFAULTS
    param_dtype: DTypeLike = jnp.float32

    @property
    def shared(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("config", "options", "param_dtype")}

    def kernel(self, shape: tuple[int, ...]) -> Array:
        """Returns this module's matrix, decoded if it is quantized."""
        if self.has_variable("params", "kernel"):
            stored = self.get_variable("params", "kernel")
            if isinstance(stored, Mapping):
                return jnp.asarray(quantized.decode(stored))
        return jnp.asarray(self.param("kernel", INIT, shape, self.param_dtype))

    def kernel_sharding(self, name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> KernelSharding | None:
        shardings = self.options.kernel_shardings
        return None if shardings is None else shardings("/".join((*self.path, name)), inputs, outputs)

    def dense(self, name: str, features: int | tuple[int, ...], bias: bool, inputs: int = 1) -> Dense:
        return Dense(**self.shared, features=features, bias=bias, inputs=inputs, name=name)


class Dense(DecoderModule):
    """Linear map of the last `inputs` axes of x to axes of sizes `features`; an adapter adds scale * x A B."""

    features: int | tuple[int, ...] = 1
    bias: bool = False
    inputs: int = 1

    @nn.compact
    def __call__(self, x):
        inputs, outputs = x.shape[x.ndim - self.inputs :], tuple(np.atleast_1d(self.features).tolist())
        kernel = self.kernel((*inputs, *outputs))
        bias = self.param("bias", nn.initializers.zeros, outputs, self.param_dtype) if self.bias else None
        bias = None if bias is None else bias.astype(self.options.dtype).ravel()
        flat = x.reshape(-1, math.prod(inputs))
        y = self.product(flat, kernel, bias, self.kernel_sharding("kernel", inputs, outputs))
        if self.has_variable("params", "lora_a"):
            a, b = (jnp.asarray(self.get_variable("params", name)) for name in ("lora_a", "lora_b"))
            low = self.product(flat, a, None, self.kernel_sharding("lora_a", inputs, a.shape[-1:]))
            # Recomputed in the backward pass: saved, it would take as much memory as the product it is added to.
            sharding = self.kernel_sharding("lora_b", b.shape[:1], outputs)
            y = y + self.options.adapter_scale * self.product(low, b, None, sharding, saveable=False)
        return y.reshape(*x.shape[: x.ndim - self.inputs], *outputs)

    def product(self, x, matrix, bias, sharding, saveable=True):
        return affine(x, matrix.astype(self.options.dtype).reshape(x.shape[-1], -1), bias, sharding, saveable)


class Norm(DecoderModule):
    """RMSNorm or LayerNorm over the last `axes` axes, flattened to one."""

    axes: int = 1

    @nn.compact
    def __call__(self, x):
        c = self.config
        shape = (math.prod(x.shape[x.ndim - self.axes :]),)
        scale = jnp.asarray(self.param("scale", nn.initializers.constant(1 - c.norm_offset), shape, self.param_dtype))
        if c.norm_offset:  # added in float32: near 1, bfloat16 resolves 1/128 only
            scale = scale.astype(jnp.promote_types(scale.dtype, jnp.float32)) + c.norm_offset
        layer = c.norm == "layernorm"
        bias = jnp.asarray(self.param("bias", nn.initializers.zeros, shape, self.param_dtype)) if layer else None
        # Heads stay a separate axis: flattening two sharded axes, rows and heads, into one forces an all-gather.
        heads = x.shape[2 : x.ndim - self.axes]
        return normalize(x.reshape(-1, *heads, *shape), scale, bias, c.norm_eps).reshape(x.shape)


class SelfAttention(DecoderModule):
    """Grouped-query self-attention."""

    @nn.compact
    def __call__(self, x, index: LayerIndex, inputs: LayerInputs):
        c = self.config
        q = self.dense("q", (c.heads, c.head_dim), c.qkv_bias)(x)
        k = self.dense("k", (c.kv_heads, c.head_dim), c.qkv_bias)(x)
        v = self.dense("v", (c.kv_heads, c.head_dim), c.qkv_bias)(x)
        if c.qk_norm:
            axes = {"head": 1, "all": 2}[c.qk_norm]
            q = Norm(**self.shared, axes=axes, name="q_norm")(q)
            k = Norm(**self.shared, axes=axes, name="k_norm")(k)
        if c.qkv_clip is not None:
            q, k, v = (jnp.clip(each, -c.qkv_clip, c.qkv_clip) for each in (q, k, v))
        tables = select(inputs.rotary_tables, index.kind)
        if tables is not None:
            rotate = functools.partial(rope.rotate, tables=tables, interleaved=interleaved(c))
            q, k = rotate(q), rotate(k)
        if index.number is not None:
            q = q / index.number.astype(q.dtype)
        key_start = select(inputs.key_starts, index.kind)
        scores = dict(scale=c.query_scale, soft_cap=c.attention_soft_cap)
        out = self.options.attend(q, k, v, key_start, inputs.key_end, **scores)
        return self.dense("o", c.width, c.output_bias, inputs=2)(out)


class Mlp(DecoderModule):
    """Feed-forward block, gated or not."""

    @nn.compact
    def __call__(self, x):
        c = self.config
        act = ACTIVATIONS[c.activation]
        up = self.dense("up", c.mlp_width, c.mlp_bias)(x)
        hidden = act(self.dense("gate", c.mlp_width, c.mlp_bias)(x)) * up if c.gated else act(up)
        return self.dense("down", c.width, c.mlp_bias)(hidden)


class Experts(DecoderModule):
    """Mixture of experts; also returns the router's statistics of each token."""

    @nn.compact
    def __call__(self, x, counted):
        c, flat = self.config, x.reshape(-1, x.shape[-1])
        options = self.options.mixture._replace(activation=ACTIVATIONS[c.activation])
        router = self.matrix("router", (c.width, c.experts)).astype(self.options.dtype)
        weights, chosen, probabilities = experts.route(
            flat,
            router,
            top_k=c.experts_per_token,
            normalize=c.normalize_router,
            router_sharding=self.kernel_sharding("router/kernel", (c.width,), (c.experts,)),
            sharding=options.sharding,
        )
        y = experts.mixture(
            flat,
            weights,
            chosen,
            self.matrix("gate", (c.experts, c.width, c.mlp_width)),
            self.matrix("up", (c.experts, c.width, c.mlp_width)),
            self.matrix("down", (c.experts, c.mlp_width, c.width)),
            options,
        )
        statistics = experts.routing(probabilities, chosen, counted.ravel())
        return y.reshape(x.shape), {name: values.reshape(counted.shape) for name, values in statistics.items()}

    def matrix(self, name: str, shape: tuple[int, ...]) -> Array:
        return jnp.asarray(Kernel(**self.shared, shape=shape, name=name)())


class Kernel(DecoderModule):
    """The matrix of a product that its parent computes."""

    shape: tuple[int, ...] = ()

    @nn.compact
    def __call__(self):
        return self.kernel(self.shape)


class Block(DecoderModule):
    """Attention and feed-forward, in sequence or in parallel; also returns router statistics, if there are experts."""

    @nn.compact
    def __call__(self, x, index: LayerIndex, inputs: LayerInputs):
        c = self.config
        x = checkpoint_name(x, "block")
        before, after = c.norms in ("before", "both"), c.norms in ("after", "both")

        def norm(name, x, enabled):
            return Norm(**self.shared, name=name)(x) if enabled else x

        normed = norm("attention_norm", x, before)
        attended = SelfAttention(**self.shared, name="attention")(normed, index, inputs)
        attended = norm("attention_post_norm", attended, after)
        if not c.parallel_residual:
            x, attended = x + attended, 0.0
        normed = normed if c.shared_norm else norm("mlp_norm", x, before)
        if c.experts:
            y, statistics = Experts(**self.shared, name="experts")(normed, inputs.counted)
        else:
            y, statistics = Mlp(**self.shared, name="mlp")(normed), None
        return x + attended + norm("mlp_post_norm", y, after), statistics


class Table(DecoderModule):
    """Embedding table [size, D]: of tokens, of positions, or of the head."""

    size: int = 0

    @nn.compact
    def __call__(self):
        return self.param("embedding", INIT, (self.size, self.config.width), self.param_dtype)


class Bias(DecoderModule):
    """Bias of the logits [V]."""

    @nn.compact
    def __call__(self):
        return self.param("bias", nn.initializers.zeros, (self.config.vocab_size,), self.param_dtype)


class Decoder(DecoderModule):
    """Maps embedded tokens to final hidden states; it initializes embedding and head, but reads neither."""

    dropped_tokens: int = 0

    @nn.compact
    def __call__(self, x, positions, key_start, key_end):
        c = self.config
        if self.is_initializing():
            for name in ("embed",) if c.tie_embeddings else ("embed", "head"):
                Table(**self.shared, size=c.vocab_size, name=name)()
            if c.head_bias:
                Bias(**self.shared, name="logits")()
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        if c.learned_positions:
            table = jnp.asarray(Table(**self.shared, size=c.max_positions, name="positions")())
            x = x + jnp.take(table, positions, axis=0).astype(x.dtype)
        remat, dtype = self.options.remat, self.options.dtype
        block = Block if remat == "none" else nn.remat(Block, prevent_cse=False, policy=REMAT[remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (0, nn.broadcast)),  # annotated as ints
            length=c.layers,
        )
        inputs = layer_inputs(c, positions, key_start, key_end, dtype, self.dropped_tokens)
        x, statistics = blocks(**self.shared, name="blocks")(x, layer_index(c), inputs)
        statistics = {name: values.mean(0) for name, values in (statistics or {}).items()}
        return Norm(**self.shared, name="final_norm")(x), statistics


def init(key: Array, config: DecoderConfig, *, dtype: DTypeLike = jnp.float32) -> Params:
    """Returns random parameters, normal with standard deviation 0.02, in the tree that `DecoderConfig` documents."""
    rows, x = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, config.width), dtype)
    return dict(Decoder(config, BlockOptions(dtype), dtype).init(key, x, rows, rows, rows + 1)["params"])


def forward(
    params: Params,
    config: DecoderConfig,
    tokens: Int[Array, "R S"],
    positions: Int[Array, "R S"],
    key_start: Int[Array, "R S"],
    key_end: Int[Array, "R S"],
    options: BlockOptions = DEFAULTS,
) -> Float[Array, "R S D"]:
    """Computes the final hidden states of tokens; arguments as in `hidden_states`."""
    x, _ = lookup(jnp.asarray(params["embed"]["embedding"]), tokens, None)
    return hidden_states(params, config, x, positions, key_start, key_end, options)[0]


def hidden_states(
    params: Params,
    config: DecoderConfig,
    x: Float[Array, "R S D"],
    positions: Int[Array, "R S"],
    key_start: Int[Array, "R S"],
    key_end: Int[Array, "R S"],
    options: BlockOptions = DEFAULTS,
    *,
    dropped_tokens: int = 0,
) -> tuple[Float[Array, "R S D"], dict[str, Float[Array, "R S"]]]:
    """Computes the final hidden states, normalized, as the head reads them.

    Args:
      params: the tree that `DecoderConfig` documents; embedding and head are not read.
      x: embedded tokens.
      positions: position of each token in its own sequence, from 0; not its index in the row.
      key_start, key_end: the keys each token attends to, [key_start, key_end) in row indices, never empty.
      dropped_tokens: trailing tokens of each sequence that the rows leave out, such as the last one, which predicts
        nothing; rotary frequencies that depend on a sequence's length count them.
    Returns: the hidden states, and the statistics of `experts.routing` for each token, averaged over layers, if there
      are experts.
    """
    module = Decoder(config, options, dropped_tokens=dropped_tokens)
    return cast(Any, module.apply({"params": params}, x.astype(options.dtype), positions, key_start, key_end))


def logits(params: Params, config: DecoderConfig, hidden: Float[Array, "R S D"]) -> Float[Array, "R S V"]:
    """Computes all logits at all positions, float32 or wider; `logprobs` computes log-probs without such an array."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    head = jnp.asarray(params.get("head", params["embed"])["embedding"]).astype(hidden.dtype)
    values = jnp.einsum("rsd,vd->rsv", hidden, head, preferred_element_type=wide)
    if config.head_bias:
        values = values + params["logits"]["bias"].astype(wide)[None, None]
    cap = config.logit_soft_cap
    return values if cap is None else cap * jnp.tanh(values / cap)


def check_remat(name: str) -> None:
    """Raises InputError unless `name` is one of REMAT."""
    check_choice("config.model.remat", name, REMAT)
