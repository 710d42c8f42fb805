"""GPT-J: LayerNorm shared by attention and a plain MLP side by side, interleaved rotary, a bias on the logits."""

from __future__ import annotations

from functools import partial

from dpo_jax.hf import config_json
from dpo_jax.hf.families import gpt2
from dpo_jax.hf.tensors import Tensor, bias, matrix, plain
from dpo_jax.models import rope
from dpo_jax.models.config import DecoderConfig, LayerKind, Rope
from dpo_jax.types import InputError

ARCHITECTURE = "GPTJForCausalLM"
SKIPPED = r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)"  # buffers that old versions stored
NEUTRAL = {"resid_pdrop": (0,), "embd_pdrop": (0,), "attn_pdrop": (0,), "scale_attn_weights": (True,)}
UNUSED = ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout")


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a GPT-J `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    config_json.join_aliases(fields, gpt2.ALIASES, place=place)
    take = partial(config_json.take, fields, place=place)
    for name in (*UNUSED, "rotary"):
        fields.pop(name, None)
    width, heads = take("n_embd", int, default=4096), take("n_head", int, default=16)
    head_dim = config_json.divide(width, heads, f"{place}: n_embd")
    config = DecoderConfig(
        vocab_size=take("vocab_size", int, default=50400),
        width=width,
        layers=take("n_layer", int, default=28),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        mlp_width=take("n_inner", int, default=4 * width),
        max_positions=take("n_positions", int, default=2048),
        kinds=(LayerKind(rotary(take("rotary_dim", int, default=64), head_dim, place)),),
        norm="layernorm",
        norm_eps=take("layer_norm_epsilon", float, default=1e-5),
        shared_norm=True,
        activation=config_json.take_activation(fields, place=place, default="gelu_new", field="activation_function"),
        gated=False,
        parallel_residual=True,
        mlp_bias=True,
        head_bias=True,
        tie_embeddings=take("tie_word_embeddings", bool, default=False),
    )
    config_json.finish(fields, place=place, neutral=NEUTRAL)
    return config


def rotary(dim: int, head_dim: int, place: str) -> Rope:
    """Returns the rotary frequencies of `dim` dimensions of a head. Raises InputError unless `dim` is even and fits."""
    if dim % 2 or dim > head_dim:
        raise InputError(
            f"{place}: rotary_dim",
            got=f"got {dim}",
            expected=f"an even number up to {head_dim}",
            remedy="Compare the file with the one the model was published with.",
        )
    return rope.usual(dim, interleaved=True)


def tensors(c: DecoderConfig) -> list[Tensor]:
    """Lists GPT-J's tensors and the leaves that each fills."""
    layer = "transformer.h.{layer}."
    heads, wide, narrow = (c.heads, c.head_dim), (c.mlp_width,), (c.width,)
    shape, head = (c.vocab_size, c.width), "embed/embedding" if c.tie_embeddings else "head/embedding"
    return [
        plain("transformer.wte.weight", "embed/embedding", shape),
        plain(layer + "ln_1.weight", "blocks/attention_norm/scale", narrow),
        plain(layer + "ln_1.bias", "blocks/attention_norm/bias", narrow),
        matrix(layer + "attn.q_proj.weight", "blocks/attention/q/kernel", narrow, heads),
        matrix(layer + "attn.k_proj.weight", "blocks/attention/k/kernel", narrow, heads),
        matrix(layer + "attn.v_proj.weight", "blocks/attention/v/kernel", narrow, heads),
        matrix(layer + "attn.out_proj.weight", "blocks/attention/o/kernel", heads, narrow),
        matrix(layer + "mlp.fc_in.weight", "blocks/mlp/up/kernel", narrow, wide),
        bias(layer + "mlp.fc_in.bias", "blocks/mlp/up/bias", wide),
        matrix(layer + "mlp.fc_out.weight", "blocks/mlp/down/kernel", wide, narrow),
        bias(layer + "mlp.fc_out.bias", "blocks/mlp/down/bias", narrow),
        plain("transformer.ln_f.weight", "final_norm/scale", narrow),
        plain("transformer.ln_f.bias", "final_norm/bias", narrow),
        plain("lm_head.weight", head, shape, repeats=c.tie_embeddings),
        plain("lm_head.bias", "logits/bias", (c.vocab_size,)),
    ]
