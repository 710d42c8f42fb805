"""Qwen3: Qwen2 with normalized queries and keys, and with optional biases."""

from __future__ import annotations

from dpo_jax.hf import config_json
from dpo_jax.hf.families import llama, qwen2
from dpo_jax.models.config import DecoderConfig

ARCHITECTURE = "Qwen3ForCausalLM"
SKIPPED = llama.SKIPPED
ABSENT = qwen2.ABSENT | {"head_dim": 128}

tensors = llama.tensors


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a Qwen3 `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    config = qwen2.read(fields, place, absent=ABSENT, qk_norm="head", **llama.take_biases(fields, place))
    config_json.finish(fields, place=place, neutral={})
    return config
