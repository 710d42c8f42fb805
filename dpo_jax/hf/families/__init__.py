"""The model families that can be read and written, by the `model_type` of their `config.json`."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from dpo_jax.hf.families import (
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    gptj,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from dpo_jax.hf.tensors import Tensor
from dpo_jax.models.config import DecoderConfig
from dpo_jax.types import InputError, shown


class Family(NamedTuple):
    """The parts of a family's file that the rest of the package uses."""

    architecture: str  # the transformers class, as in config.json
    skipped: str  # pattern of checkpoint tensors that hold nothing a model needs
    decoder_config: Callable[[dict, str], DecoderConfig]  # (config.json, its path for errors)
    tensors: Callable[[DecoderConfig], list[Tensor]]


def _family(module: ModuleType) -> Family:
    return Family(module.ARCHITECTURE, module.SKIPPED, module.decoder_config, module.tensors)


FAMILIES = {
    "gemma": _family(gemma),
    "gemma2": _family(gemma2),
    "gemma3_text": _family(gemma3),
    "gpt2": _family(gpt2),
    "gpt_neox": _family(gpt_neox),
    "gptj": _family(gptj),
    "llama": _family(llama),
    "mistral": _family(mistral),
    "mixtral": _family(mixtral),
    "olmo2": _family(olmo2),
    "olmoe": _family(olmoe),
    "phi3": _family(phi3),
    "qwen2": _family(qwen2),
    "qwen3": _family(qwen3),
    "qwen3_moe": _family(qwen3_moe),
    "smollm3": _family(smollm3),
}


def family(hf: dict, place: str) -> Family:
    """Returns the family of a `config.json`; `place` names the file.

    Raises: InputError for an unknown one, with the known ones, and whether Llama's reader accepts the file.
    """
    name = hf.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    try:
        llama.decoder_config(hf | {"architectures": None}, place)
        problem = "its config.json reads like Llama's"
        remedy = "If it is Llama by another name, say so in a copy: model_type llama, architectures LlamaForCausalLM."
    except InputError as error:
        field = error.place.removeprefix(place).removeprefix(": ")
        problem = f"as Llama's, its config.json has {f'{field}: ' if field else ''}{error.got.removeprefix('got ')}"
        remedy = "Other architectures are not implemented; docs/families.md says how to add one."
    raise InputError(
        f"{place}: model_type",
        got=f"{'missing' if name is None else f'got {shown(name)}'}; {problem}",
        expected=f"one of {', '.join(FAMILIES)}",
        remedy=remedy,
    )
