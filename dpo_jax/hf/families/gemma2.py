"""Gemma 2: Gemma with norms before and after its blocks, a window in every other layer, and soft caps."""

from __future__ import annotations

from typing import Any

from dpo_jax.hf import config_json
from dpo_jax.hf.config_json import Fields
from dpo_jax.hf.families import gemma, llama
from dpo_jax.hf.tensors import Tensor
from dpo_jax.models.config import DecoderConfig, LayerKind

ARCHITECTURE = "Gemma2ForCausalLM"
SKIPPED = llama.SKIPPED
ABSENT = gemma.ABSENT | {"num_key_value_heads": 4}
NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a Gemma 2 `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    window = config_json.take_window(fields, place=place, absent=4096)
    slides = config_json.take_sliding(fields, place=place, window=window, default=lambda layer: layer % 2 == 0)
    config = read(
        fields,
        place,
        absent=ABSENT,
        kinds=lambda rope: [LayerKind(rope, window if each else None) for each in slides],
        attention_soft_cap=take_cap(fields, "attn_logit_softcapping", place, absent=50.0),
        logit_soft_cap=take_cap(fields, "final_logit_softcapping", place, absent=30.0),
    )
    config_json.finish(fields, place=place, neutral=gemma.NEUTRAL)
    return config


def read(fields: Fields, place: str, **decided: Any) -> DecoderConfig:
    """Reads as `gemma.read` does, with the norms and the scale of queries that Gemma 2 and 3 have."""
    scalar = config_json.take(fields, "query_pre_attn_scalar", float, place=place, default=256)
    activation = config_json.take_activation(
        fields, place=place, default="gelu_pytorch_tanh", field="hidden_activation"
    )
    fields.pop("hidden_act", None)  # present too, and not read by transformers
    return gemma.read(fields, place, norms="both", query_scale=scalar**-0.5, activation=activation, **decided)


def take_cap(fields: Fields, name: str, place: str, *, absent: float | None) -> float | None:
    """Removes a soft cap and returns it: None if it is null, `absent` if it is missing."""
    return config_json.take(fields, name, float, place=place, default=None) if name in fields else absent


def tensors(c: DecoderConfig) -> list[Tensor]:
    """Lists the tensors of Gemma 2 and 3 and the leaves that each fills."""
    return llama.tensors(c, norms=NORMS)
