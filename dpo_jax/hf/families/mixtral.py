"""Mixtral: Mistral with a mixture of experts in place of each feed-forward block."""

from __future__ import annotations

from dpo_jax.hf import config_json
from dpo_jax.hf.families import llama
from dpo_jax.hf.tensors import Tensor
from dpo_jax.models.config import DecoderConfig, LayerKind

ARCHITECTURE = "MixtralForCausalLM"
SKIPPED = llama.SKIPPED
ABSENT = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
NEUTRAL = {"router_jitter_noise": (0,)}


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a Mixtral `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    window = config_json.take_window(fields, place=place)
    config = llama.read(
        fields,
        place,
        absent=ABSENT,
        kinds=lambda rope: [LayerKind(rope, window)],
        normalize_router=True,
        **llama.take_experts(fields, place, experts=8, each=2),
    )
    config_json.finish(fields, place=place, neutral=NEUTRAL)
    return config


def tensors(c: DecoderConfig) -> list[Tensor]:
    """Lists Mixtral's tensors and the leaves that each fills."""
    experts = llama.expert_tensors(c, "model.layers.{layer}.block_sparse_moe.", names=("w1", "w3", "w2"))
    return llama.outer_tensors(c) + llama.attention_tensors(c) + llama.norm_tensors(c) + experts
