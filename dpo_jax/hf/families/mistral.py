"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from dpo_jax.hf import config_json
from dpo_jax.hf.families import llama
from dpo_jax.models.config import DecoderConfig, LayerKind

ARCHITECTURE = "MistralForCausalLM"
SKIPPED = llama.SKIPPED
ABSENT = {"num_key_value_heads": 8, "max_position_embeddings": 131072}

tensors = llama.tensors


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a Mistral `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    window = config_json.take_window(fields, place=place, absent=4096)
    config = llama.read(fields, place, absent=ABSENT, kinds=lambda rope: [LayerKind(rope, window)])
    config_json.finish(fields, place=place, neutral={})
    return config
