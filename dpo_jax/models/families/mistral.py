"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from dpo_jax.models import hf_config
from dpo_jax.models.config import DecoderConfig, LayerKind
from dpo_jax.models.families import llama

ARCHITECTURE = "MistralForCausalLM"
SKIPPED = llama.SKIPPED
ABSENT = {"num_key_value_heads": 8, "max_position_embeddings": 131072}

tensors = llama.tensors


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a Mistral `config.json`. Raises InputError on anything it cannot honour; `place` names the file."""
    fields = hf_config.begin(hf, ARCHITECTURE, place)
    window = hf_config.take_window(fields, place=place, absent=4096)
    config = llama.read(fields, place, absent=ABSENT, kinds=lambda rope: [LayerKind(rope, window)])
    hf_config.finish(fields, place=place, neutral={})
    return config
