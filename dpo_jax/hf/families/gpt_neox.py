"""GPT-NeoX and Pythia: LayerNorm, plain MLP, fused query-key-value, partial rotary, parallel residual."""

from __future__ import annotations

from functools import partial

from dpo_jax.hf import config_json
from dpo_jax.hf.tensors import Tensor, bias, interleaved_bias, interleaved_matrix, matrix, plain
from dpo_jax.models.config import DecoderConfig, LayerKind

ARCHITECTURE = "GPTNeoXForCausalLM"
# Buffers that transformers stored before 4.32: the causal mask, its fill value, and rotary frequencies.
SKIPPED = r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"

ROPE = config_json.RopeFields(
    fraction=0.25,
    partial=True,
    thetas=("rotary_emb_base", "rope_theta"),
    fractions=("rotary_pct", "partial_rotary_factor"),
)


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a GPT-NeoX `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    take = partial(config_json.take, fields, place=place)
    width, heads = take("hidden_size", int), take("num_attention_heads", int)
    head_dim = config_json.divide(width, heads, f"{place}: hidden_size")
    max_positions = take("max_position_embeddings", int, default=2048)
    rope = config_json.take_rope(
        fields,
        place=place,
        head_dim=head_dim,
        max_positions=max_positions,
        family=ROPE,
    )
    attention_bias = take("attention_bias", bool, default=True)
    config = DecoderConfig(
        vocab_size=take("vocab_size", int),
        width=width,
        layers=take("num_hidden_layers", int),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        mlp_width=take("intermediate_size", int),
        max_positions=max_positions,
        kinds=(LayerKind(rope),),
        norm="layernorm",
        norm_eps=take("layer_norm_eps", float, default=1e-5),
        activation=config_json.take_activation(fields, place=place, default="gelu"),
        gated=False,
        parallel_residual=take("use_parallel_residual", bool, default=True),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=True,
        tie_embeddings=take("tie_word_embeddings", bool, default=False),
    )
    config_json.finish(fields, place=place, neutral={})
    return config


def tensors(c: DecoderConfig) -> list[Tensor]:
    """Lists GPT-NeoX's tensors and the leaves that each fills."""
    layer = "gpt_neox.layers.{layer}."
    kernels = tuple(f"blocks/attention/{letter}/kernel" for letter in "qkv")
    biases = tuple(f"blocks/attention/{letter}/bias" for letter in "qkv")
    heads = (c.heads, c.head_dim)
    wide, narrow = (c.mlp_width,), (c.width,)
    # transformers names the head embed_out in files, whatever its name in memory.
    head = ("embed_out.weight", "lm_head.weight")
    table = [
        plain("gpt_neox.embed_in.weight", "embed/embedding", (c.vocab_size, c.width)),
        plain(layer + "input_layernorm.weight", "blocks/attention_norm/scale", narrow),
        plain(layer + "input_layernorm.bias", "blocks/attention_norm/bias", narrow),
        interleaved_matrix(layer + "attention.query_key_value.weight", kernels, c.width, *heads),
        matrix(layer + "attention.dense.weight", "blocks/attention/o/kernel", heads, narrow),
        plain(layer + "post_attention_layernorm.weight", "blocks/mlp_norm/scale", narrow),
        plain(layer + "post_attention_layernorm.bias", "blocks/mlp_norm/bias", narrow),
        matrix(layer + "mlp.dense_h_to_4h.weight", "blocks/mlp/up/kernel", narrow, wide),
        bias(layer + "mlp.dense_h_to_4h.bias", "blocks/mlp/up/bias", wide),
        matrix(layer + "mlp.dense_4h_to_h.weight", "blocks/mlp/down/kernel", wide, narrow),
        bias(layer + "mlp.dense_4h_to_h.bias", "blocks/mlp/down/bias", narrow),
        plain("gpt_neox.final_layer_norm.weight", "final_norm/scale", narrow),
        plain("gpt_neox.final_layer_norm.bias", "final_norm/bias", narrow),
    ]
    if c.qkv_bias:
        table += [interleaved_bias(layer + "attention.query_key_value.bias", biases, *heads)]
    if c.output_bias:
        table += [bias(layer + "attention.dense.bias", "blocks/attention/o/bias", narrow)]
    leaf = "embed/embedding" if c.tie_embeddings else "head/embedding"
    return table + [plain(head, leaf, (c.vocab_size, c.width), repeats=c.tie_embeddings)]
