"""GPT-2: learned positions, LayerNorm, plain MLP; matrices are stored [in, out]."""

from __future__ import annotations

from functools import partial

from dpo_jax.hf import config_json
from dpo_jax.hf.tensors import Tensor, bias, joined_bias, joined_matrix, matrix, plain
from dpo_jax.models.config import DecoderConfig

ARCHITECTURE = "GPT2LMHeadModel"
SKIPPED = r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"  # the causal mask and its fill value
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Dropout is dropped, not refused: every GPT-2 says 0.1, and preference training uses none.
UNUSED = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
SUMMARY = ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")  # summary_*: of another head


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a GPT-2 `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    config_json.join_aliases(fields, ALIASES, place=place)
    take = partial(config_json.take, fields, place=place)
    for name in (*UNUSED, *(f"summary_{each}" for each in SUMMARY), "n_ctx"):
        fields.pop(name, None)
    width, heads = take("n_embd", int, default=768), take("n_head", int, default=12)
    scaled = take("scale_attn_weights", bool, default=True)
    config = DecoderConfig(
        vocab_size=take("vocab_size", int, default=50257),
        width=width,
        layers=take("n_layer", int, default=12),
        heads=heads,
        kv_heads=heads,
        head_dim=config_json.divide(width, heads, f"{place}: n_embd"),
        mlp_width=take("n_inner", int, default=4 * width),
        max_positions=take("n_positions", int, default=1024),
        norm="layernorm",
        norm_eps=take("layer_norm_epsilon", float, default=1e-5),
        query_scale=None if scaled else 1.0,
        scale_by_layer=take("scale_attn_by_inverse_layer_idx", bool, default=False),
        activation=config_json.take_activation(fields, place=place, default="gelu_new", field="activation_function"),
        gated=False,
        learned_positions=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_embeddings=take("tie_word_embeddings", bool, default=True),
    )
    # Both values of reorder_and_upcast_attn give the same sums, which are always in float32 here.
    config_json.finish(fields, place=place, neutral={"reorder_and_upcast_attn": (False, True)})
    return config


def tensors(c: DecoderConfig) -> list[Tensor]:
    """Lists GPT-2's tensors and the leaves that each fills."""
    layer = "h.{layer}."
    heads, wide, narrow = (c.heads, c.head_dim), (c.mlp_width,), (c.width,)
    kernels = tuple(f"blocks/attention/{letter}/kernel" for letter in "qkv")
    biases = tuple(f"blocks/attention/{letter}/bias" for letter in "qkv")
    table = [
        plain("wte.weight", "embed/embedding", (c.vocab_size, c.width)),
        plain("wpe.weight", "positions/embedding", (c.max_positions, c.width)),
        plain(layer + "ln_1.weight", "blocks/attention_norm/scale", narrow),
        plain(layer + "ln_1.bias", "blocks/attention_norm/bias", narrow),
        joined_matrix(layer + "attn.c_attn.weight", kernels, narrow, (heads,) * 3, transposed=False),
        joined_bias(layer + "attn.c_attn.bias", biases, (heads,) * 3),
        matrix(layer + "attn.c_proj.weight", "blocks/attention/o/kernel", heads, narrow, transposed=False),
        bias(layer + "attn.c_proj.bias", "blocks/attention/o/bias", narrow),
        plain(layer + "ln_2.weight", "blocks/mlp_norm/scale", narrow),
        plain(layer + "ln_2.bias", "blocks/mlp_norm/bias", narrow),
        matrix(layer + "mlp.c_fc.weight", "blocks/mlp/up/kernel", narrow, wide, transposed=False),
        bias(layer + "mlp.c_fc.bias", "blocks/mlp/up/bias", wide),
        matrix(layer + "mlp.c_proj.weight", "blocks/mlp/down/kernel", wide, narrow, transposed=False),
        bias(layer + "mlp.c_proj.bias", "blocks/mlp/down/bias", narrow),
        plain("ln_f.weight", "final_norm/scale", narrow),
        plain("ln_f.bias", "final_norm/bias", narrow),
    ]
    # The first checkpoints are of the model without its head; their names lack the prefix.
    table = [each._replace(names=(f"transformer.{each.names[0]}", each.names[0])) for each in table]
    head = "embed/embedding" if c.tie_embeddings else "head/embedding"
    return table + [plain("lm_head.weight", head, (c.vocab_size, c.width), repeats=c.tie_embeddings)]
