"""Gemma 3, text: Gemma 2 with normalized queries and keys, and other rotary frequencies in layers with a window."""

from __future__ import annotations

from dpo_jax.hf import config_json
from dpo_jax.hf.config_json import Fields, RopeFields
from dpo_jax.hf.families import gemma, gemma2, llama
from dpo_jax.models.config import DecoderConfig, LayerKind, Rope
from dpo_jax.types import InputError

ARCHITECTURE = "Gemma3ForCausalLM"
SKIPPED = llama.SKIPPED
ABSENT = gemma2.ABSENT | {"max_position_embeddings": 131072, "rope_theta": 1e6}

tensors = gemma2.tensors


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a Gemma 3 text `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    local = take_local_rope(fields, place)
    window = config_json.take_window(fields, place=place, absent=4096)
    every = config_json.take(fields, "sliding_window_pattern", int, place=place, default=6)
    slides = config_json.take_sliding(
        fields, place=place, window=window, default=lambda layer: (layer + 1) % every != 0
    )
    config = gemma2.read(
        fields,
        place,
        absent=ABSENT,
        qk_norm="head",
        kinds=lambda rope: [LayerKind(local, window) if each else LayerKind(rope) for each in slides],
        logit_soft_cap=gemma2.take_cap(fields, "final_logit_softcapping", place, absent=None),
    )
    config_json.finish(fields, place=place, neutral=gemma.NEUTRAL)
    return config


def take_local_rope(fields: Fields, place: str) -> Rope:
    """Removes and returns the rotary frequencies of layers with a window.

    The rotary fields of the other layers are left under the names that they have in other families.
    """
    by_type = fields.pop("rope_parameters", None) or {}
    if not isinstance(by_type, dict) or not by_type.keys() <= {"sliding_attention", "full_attention"}:
        raise InputError(
            f"{place}: rope_parameters",
            got=f"got {by_type!r:.200}",
            expected="an object of sliding_attention and full_attention",
            remedy="Compare the file with the one the model was published with.",
        )
    fields["rope_parameters"] = by_type.get("full_attention")
    own = {name: fields.pop(name, None) for name in ("rope_local_base_freq",)}
    own |= {"rope_parameters": by_type.get("sliding_attention"), "model_type": fields.get("model_type")}
    sizes = {name: fields.get(name) for name in ("head_dim", "max_position_embeddings")}
    return config_json.take_rope(
        own,
        place=place,
        head_dim=config_json.take(sizes, "head_dim", int, place=place, default=ABSENT["head_dim"]),
        max_positions=config_json.take(
            sizes, "max_position_embeddings", int, place=place, default=ABSENT["max_position_embeddings"]
        ),
        family=RopeFields(thetas=("rope_local_base_freq",)),
    )
