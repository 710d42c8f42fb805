"""Qwen3-MoE: Qwen3 with a mixture of experts in place of each feed-forward block."""

from __future__ import annotations

from dpo_jax.hf import config_json
from dpo_jax.hf.families import llama, qwen2
from dpo_jax.hf.tensors import Tensor
from dpo_jax.models.config import DecoderConfig, LayerKind

ARCHITECTURE = "Qwen3MoeForCausalLM"
SKIPPED = llama.SKIPPED
ABSENT = {"num_key_value_heads": 4, "max_position_embeddings": 32768}
# A mix of layers with and without experts is not implemented; no release has it.
NEUTRAL = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)}


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a Qwen3-MoE `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    window = qwen2.take_used_window(fields, place)
    for unread in ("max_window_layers", "intermediate_size"):  # the second is of layers without experts
        fields.pop(unread, None)
    config = llama.read(
        fields,
        place,
        absent=ABSENT,
        kinds=lambda rope: [LayerKind(rope, window)],
        qk_norm="head",
        mlp_width=config_json.take(fields, "moe_intermediate_size", int, place=place, default=768),
        normalize_router=config_json.take(fields, "norm_topk_prob", bool, place=place, default=False),
        **llama.take_biases(fields, place),
        **llama.take_experts(fields, place, experts=128, each=8),
    )
    config_json.finish(fields, place=place, neutral=NEUTRAL)
    return config


def tensors(c: DecoderConfig) -> list[Tensor]:
    """Lists Qwen3-MoE's tensors and the leaves that each fills."""
    experts = llama.expert_tensors(c, "model.layers.{layer}.mlp.")
    return llama.outer_tensors(c) + llama.attention_tensors(c) + llama.norm_tensors(c) + experts
