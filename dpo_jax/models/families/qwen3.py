"""Qwen3: Qwen2 with normalised queries and keys, and without biases unless asked for."""

from __future__ import annotations

from dpo_jax.models import hf_config
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.families import llama, qwen2

ARCHITECTURE = "Qwen3ForCausalLM"
SKIPPED = llama.SKIPPED
ABSENT = qwen2.ABSENT | {"head_dim": 128}

tensors = llama.tensors


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a Qwen3 `config.json`. Raises InputError on anything it cannot honour; `place` names the file."""
    fields = hf_config.begin(hf, ARCHITECTURE, place)
    config = qwen2.read(fields, place, absent=ABSENT, qk_norm="head", **llama.take_biases(fields, place))
    hf_config.finish(fields, place=place, neutral={})
    return config
