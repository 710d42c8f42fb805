"""OLMo 2: Llama with norms after its blocks instead of before, and over all heads of queries and of keys at once."""

from __future__ import annotations

from dpo_jax.hf import config_json
from dpo_jax.hf.families import llama
from dpo_jax.hf.tensors import Tensor
from dpo_jax.models.config import DecoderConfig

ARCHITECTURE = "Olmo2ForCausalLM"
SKIPPED = llama.SKIPPED
ABSENT = {"rms_norm_eps": 1e-5}
NORMS = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads an OLMo 2 `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    config = llama.read(fields, place, absent=ABSENT, norms="after", qk_norm="all", **llama.take_biases(fields, place))
    config_json.finish(fields, place=place, neutral={})
    return config


def tensors(c: DecoderConfig) -> list[Tensor]:
    """Lists OLMo 2's tensors and the leaves that each fills."""
    return llama.tensors(c, norms=NORMS)
