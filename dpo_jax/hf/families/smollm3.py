"""SmolLM3: Llama in which every fourth layer knows no positions."""

from __future__ import annotations

from dpo_jax.hf import config_json
from dpo_jax.hf.families import llama, qwen2
from dpo_jax.models.config import DecoderConfig, LayerKind
from dpo_jax.types import InputError

ARCHITECTURE = "SmolLM3ForCausalLM"
SKIPPED = llama.SKIPPED
ABSENT = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2e6,
    "tie_word_embeddings": True,
}

tensors = llama.tensors


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a SmolLM3 `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    turning = take_turning(fields, place)
    window = qwen2.take_used_window(fields, place, absent=None)
    slides = config_json.take_sliding(
        fields, place=place, window=window, default=lambda layer: window is not None and not turning[layer]
    )
    config = llama.read(
        fields,
        place,
        absent=ABSENT,
        kinds=lambda rope: [
            LayerKind(rope if turns else None, window if each else None)
            for turns, each in zip(turning, slides, strict=True)
        ],
        mlp_bias=config_json.take(fields, "mlp_bias", bool, place=place, default=False),
        **llama.take_biases(fields, place),
    )
    config_json.finish(fields, place=place, neutral={})
    return config


def take_turning(fields: dict, place: str) -> list[bool]:
    """Removes what says of each layer whether its queries and keys turn."""
    layers = config_json.take(dict(fields), "num_hidden_layers", int, place=place)
    every = config_json.take(fields, "no_rope_layer_interval", int, place=place, default=4)
    given = fields.pop("no_rope_layers", None)  # 1 where a layer does turn
    if given is None:
        return [(layer + 1) % every != 0 for layer in range(layers)]
    if not isinstance(given, list) or len(given) < layers or not set(given) <= {0, 1}:
        raise InputError(
            f"{place}: no_rope_layers",
            got=f"got {given!r:.200}",
            expected=f"0 or 1 for each of {layers} layers",
            remedy="Compare the file with the one the model was published with.",
        )
    return [bool(each) for each in given[:layers]]
