"""OLMoE: Llama with norms over all heads of queries and of keys at once, and a mixture of experts in each layer."""

from __future__ import annotations

from dpo_jax.hf import config_json
from dpo_jax.hf.families import llama, qwen3_moe
from dpo_jax.models.config import DecoderConfig

ARCHITECTURE = "OlmoeForCausalLM"
SKIPPED = llama.SKIPPED

tensors = qwen3_moe.tensors


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads an OLMoE `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    config = llama.read(
        fields,
        place,
        absent={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        qk_norm="all",
        qkv_clip=config_json.take(fields, "clip_qkv", float, place=place, default=None),
        normalize_router=config_json.take(fields, "norm_topk_prob", bool, place=place, default=False),
        **llama.take_biases(fields, place),
        **llama.take_experts(fields, place, experts=64, each=8),
    )
    config_json.finish(fields, place=place, neutral={})
    return config
