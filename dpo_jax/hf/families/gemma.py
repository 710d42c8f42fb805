"""Gemma: Llama with scaled embeddings, scales of norms that start at 0, and GeLU."""

from __future__ import annotations

from typing import Any

from dpo_jax.hf import config_json
from dpo_jax.hf.config_json import Fields
from dpo_jax.hf.families import llama
from dpo_jax.models.config import DecoderConfig

ARCHITECTURE = "GemmaForCausalLM"
SKIPPED = llama.SKIPPED
NEUTRAL = {"use_bidirectional_attention": (False,)}
ABSENT = {
    "num_key_value_heads": 16,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "tie_word_embeddings": True,
}

tensors = llama.tensors


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a Gemma `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    activation = config_json.take_activation(fields, place=place, default="gelu_pytorch_tanh")
    # The first releases say gelu and mean its approximation; they have the right name in a field that is not read.
    activation = "gelu_tanh" if activation == "gelu" else activation
    fields.pop("hidden_activation", None)
    config = read(fields, place, absent=ABSENT, activation=activation)
    config_json.finish(fields, place=place, neutral=NEUTRAL)
    return config


def read(fields: Fields, place: str, **decided: Any) -> DecoderConfig:
    """Reads as `llama.read` does, with the scaled embeddings and norms that all Gemmas have."""
    width = config_json.take(dict(fields), "hidden_size", int, place=place)
    return llama.read(
        fields, place, embedding_scale=width**0.5, norm_offset=1.0, **llama.take_biases(fields, place), **decided
    )
