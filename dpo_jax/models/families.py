"""The model families that can be read and written, by the `model_type` of their `config.json`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dpo_jax.models import gpt_neox, llama
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.weights import Tensor
from dpo_jax.types import InputError


class Family(NamedTuple):
    """What a family's file offers."""

    architecture: str  # the transformers class, as in config.json
    skipped: str  # pattern of checkpoint tensors that hold nothing a model needs
    decoder_config: Callable[[dict, str], DecoderConfig]  # (config.json, its path for errors)
    tensors: Callable[[DecoderConfig], list[Tensor]]


FAMILIES = {
    "gpt_neox": Family(gpt_neox.ARCHITECTURE, gpt_neox.SKIPPED, gpt_neox.decoder_config, gpt_neox.tensors),
    "llama": Family(llama.ARCHITECTURE, llama.SKIPPED, llama.decoder_config, llama.tensors),
}


def family(hf: dict, place: str) -> Family:
    """The family of a `config.json`. Raises InputError listing the known ones; `place` names the file."""
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(
            f"{place}: model_type",
            got=f"got {name!r}",
            expected=f"one of {', '.join(FAMILIES)}",
            remedy="Other architectures are not implemented.",
        )
    return FAMILIES[name]
