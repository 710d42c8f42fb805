"""SmolLM3: Llama in which every fourth layer has no rotary positions."""

from __future__ import annotations

from dpo_jax.hf import config_json
from dpo_jax.hf.config_json import Fields
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
    rotated = take_rotated(fields, place)
    window = qwen2.take_used_window(fields, place, absent=None)
    slides = config_json.take_sliding(
        fields, place=place, window=window, default=lambda layer: window is not None and not rotated[layer]
    )
    config = llama.read(
        fields,
        place,
        absent=ABSENT,
        kinds=lambda rope: [
            LayerKind(rope if has_rope else None, window if slides_here else None)
            for has_rope, slides_here in zip(rotated, slides, strict=True)
        ],
        mlp_bias=config_json.take(fields, "mlp_bias", bool, place=place, default=False),
        **llama.take_biases(fields, place),
    )
    config_json.finish(fields, place=place, neutral={})
    return config


def take_rotated(fields: Fields, place: str) -> list[bool]:
    """Removes the fields on layers without rotary positions; returns, for each layer, whether it has them."""
    layers = config_json.take(dict(fields), "num_hidden_layers", int, place=place)
    every = config_json.take(fields, "no_rope_layer_interval", int, place=place, default=4)
    flags = fields.pop("no_rope_layers", None)  # despite its name, 1 where a layer has rotary positions
    if flags is None:
        return [(layer + 1) % every != 0 for layer in range(layers)]
    if not isinstance(flags, list) or len(flags) < layers or not set(flags) <= {0, 1}:
        raise InputError(
            f"{place}: no_rope_layers",
            got=f"got {flags!r:.200}",
            expected=f"0 or 1 for each of {layers} layers",
            remedy="Compare the file with the one the model was published with.",
        )
    return [bool(each) for each in flags[:layers]]
