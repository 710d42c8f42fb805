"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and an optional window in its late layers."""

from __future__ import annotations

from typing import Any

from dpo_jax.hf import config_json
from dpo_jax.hf.config_json import Fields
from dpo_jax.hf.families import llama
from dpo_jax.models.config import DecoderConfig, LayerKind

ARCHITECTURE = "Qwen2ForCausalLM"
SKIPPED = llama.SKIPPED
ABSENT = {"num_key_value_heads": 32, "max_position_embeddings": 32768}

tensors = llama.tensors


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a Qwen2 `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    config = read(fields, place, absent=ABSENT, qkv_bias=True)
    config_json.finish(fields, place=place, neutral={})
    return config


def read(fields: Fields, place: str, **decided: Any) -> DecoderConfig:
    """Reads as `llama.read` does, with a window in layers from `max_window_layers` on or in `layer_types`."""
    window = take_used_window(fields, place)
    first = fields.pop("max_window_layers", None)
    first = 28 if first is None else first
    slides = config_json.take_sliding(
        fields, place=place, window=window, default=lambda layer: window is not None and layer >= first
    )
    return llama.read(
        fields, place, kinds=lambda rope: [LayerKind(rope, window if each else None) for each in slides], **decided
    )


def take_used_window(fields: Fields, place: str, absent: int | None = 4096) -> int | None:
    """Removes `sliding_window` and `use_sliding_window` and returns the window; None unless the second is true."""
    window = config_json.take_window(fields, place=place, absent=absent)
    return window if config_json.take(fields, "use_sliding_window", bool, place=place, default=False) else None
