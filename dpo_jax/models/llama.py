"""Llama: RMSNorm, gated MLP, grouped-query attention, full rotary embedding."""

from __future__ import annotations

from functools import partial

from dpo_jax.models import hf_config
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.weights import Tensor, bias, matrix, plain
from dpo_jax.types import InputError

ARCHITECTURE = "LlamaForCausalLM"
SKIPPED = r".*\.rotary_emb\.inv_freq"  # a buffer that transformers stored before 4.32
NEUTRAL = {
    "pretraining_tp": (1,),  # splits matrix products, which rounds differently
    "rope_interleaved": (False,),
}


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a Llama `config.json`. Raises InputError on anything it cannot honour; `place` names the file."""
    fields = hf_config.begin(hf, ARCHITECTURE, place)
    take = partial(hf_config.take, fields, place=place)
    width, heads = take("hidden_size", int), take("num_attention_heads", int)
    head_dim = take("head_dim", int, default=None) or hf_config.divide(width, heads, f"{place}: hidden_size")
    theta, fraction = hf_config.take_rope(
        fields, place=place, thetas=("rope_theta",), fractions=("partial_rotary_factor",), fraction=1.0
    )
    if fraction != 1:
        # transformers' Llama reads this field and then rotates whole heads all the same.
        raise InputError(
            f"{place}: partial_rotary_factor", got=f"got {fraction}", expected="1.0", remedy="Delete the field."
        )
    attention_bias = take("attention_bias", bool, default=False)
    kv_heads = take("num_key_value_heads", int, default=heads)
    hf_config.divide(heads, kv_heads, f"{place}: num_attention_heads")
    config = DecoderConfig(
        vocab_size=take("vocab_size", int),
        width=width,
        layers=take("num_hidden_layers", int),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=take("intermediate_size", int),
        max_positions=take("max_position_embeddings", int, default=2048),
        norm="rmsnorm",
        norm_eps=take("rms_norm_eps", float, default=1e-6),
        activation=hf_config.take_activation(fields, place=place, default="silu"),
        gated=True,
        rotary_dim=hf_config.rotary_dim(head_dim, 1.0, f"{place}: head_dim"),
        rope_theta=theta,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=take("mlp_bias", bool, default=False),
        tie_embeddings=take("tie_word_embeddings", bool, default=False),
    )
    hf_config.finish(fields, place=place, neutral=NEUTRAL)
    return config


def tensors(c: DecoderConfig) -> list[Tensor]:
    """Llama's tensor names and how each maps to ours."""
    layer = "model.layers.{layer}."
    q, kv = (c.heads, c.head_dim), (c.kv_heads, c.head_dim)
    wide, narrow = (c.mlp_width,), (c.width,)
    table = [
        plain("model.embed_tokens.weight", "embed/embedding", (c.vocab_size, c.width)),
        plain(layer + "input_layernorm.weight", "blocks/attention_norm/scale", narrow),
        matrix(layer + "self_attn.q_proj.weight", "blocks/attention/q/kernel", narrow, q),
        matrix(layer + "self_attn.k_proj.weight", "blocks/attention/k/kernel", narrow, kv),
        matrix(layer + "self_attn.v_proj.weight", "blocks/attention/v/kernel", narrow, kv),
        matrix(layer + "self_attn.o_proj.weight", "blocks/attention/o/kernel", q, narrow),
        plain(layer + "post_attention_layernorm.weight", "blocks/mlp_norm/scale", narrow),
        matrix(layer + "mlp.gate_proj.weight", "blocks/mlp/gate/kernel", narrow, wide),
        matrix(layer + "mlp.up_proj.weight", "blocks/mlp/up/kernel", narrow, wide),
        matrix(layer + "mlp.down_proj.weight", "blocks/mlp/down/kernel", wide, narrow),
        plain("model.norm.weight", "final_norm/scale", narrow),
    ]
    if c.qkv_bias:
        table += [
            bias(layer + "self_attn.q_proj.bias", "blocks/attention/q/bias", q),
            bias(layer + "self_attn.k_proj.bias", "blocks/attention/k/bias", kv),
            bias(layer + "self_attn.v_proj.bias", "blocks/attention/v/bias", kv),
        ]
    if c.output_bias:
        table += [bias(layer + "self_attn.o_proj.bias", "blocks/attention/o/bias", narrow)]
    if c.mlp_bias:
        table += [
            bias(layer + "mlp.gate_proj.bias", "blocks/mlp/gate/bias", wide),
            bias(layer + "mlp.up_proj.bias", "blocks/mlp/up/bias", wide),
            bias(layer + "mlp.down_proj.bias", "blocks/mlp/down/bias", narrow),
        ]
    leaf = "embed/embedding" if c.tie_embeddings else "head/embedding"
    return table + [plain("lm_head.weight", leaf, (c.vocab_size, c.width), repeats=c.tie_embeddings)]
