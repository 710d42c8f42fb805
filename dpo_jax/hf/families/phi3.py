"""Phi-3 and Phi-4: Llama with fused projections, and LongRoPE in the long-context ones."""

from __future__ import annotations

from dpo_jax.hf import config_json
from dpo_jax.hf.families import llama
from dpo_jax.hf.tensors import Tensor, joined_matrix, matrix, plain
from dpo_jax.models.config import DecoderConfig, LayerKind

ARCHITECTURE = "Phi3ForCausalLM"
SKIPPED = llama.SKIPPED
NEUTRAL = {"resid_pdrop": (0,), "embd_pdrop": (0,)}


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a Phi-3 `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    window = config_json.take_window(fields, place=place)
    config = llama.read(
        fields,
        place,
        absent={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        kinds=lambda rope: [LayerKind(rope, window)],
        # The first releases have older names of LongRoPE.
        rope_fields=config_json.RopeFields(partial=True, aliases={"su": "longrope", "yarn": "longrope"}),
    )
    config_json.finish(fields, place=place, neutral=NEUTRAL)
    return config


def tensors(c: DecoderConfig) -> list[Tensor]:
    """Lists Phi-3's tensors and the leaves that each fills."""
    layer = "model.layers.{layer}."
    q, kv = (c.heads, c.head_dim), (c.kv_heads, c.head_dim)
    wide, narrow = (c.mlp_width,), (c.width,)
    qkv = tuple(f"blocks/attention/{letter}/kernel" for letter in "qkv")
    gate_up = ("blocks/mlp/gate/kernel", "blocks/mlp/up/kernel")
    return llama.outer_tensors(c) + [
        plain(layer + "input_layernorm.weight", "blocks/attention_norm/scale", narrow),
        joined_matrix(layer + "self_attn.qkv_proj.weight", qkv, narrow, (q, kv, kv)),
        matrix(layer + "self_attn.o_proj.weight", "blocks/attention/o/kernel", q, narrow),
        plain(layer + "post_attention_layernorm.weight", "blocks/mlp_norm/scale", narrow),
        joined_matrix(layer + "mlp.gate_up_proj.weight", gate_up, narrow, (wide, wide)),
        matrix(layer + "mlp.down_proj.weight", "blocks/mlp/down/kernel", wide, narrow),
    ]
