"""Llama, and the fields of `config.json` and names of tensors that other families share with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dpo_jax.hf import config_json
from dpo_jax.hf.config_json import Fields, RopeFields
from dpo_jax.hf.tensors import Tensor, bias, matrix, plain
from dpo_jax.models.config import DecoderConfig, LayerKind, Rope, by_layer
from dpo_jax.types import InputError

ARCHITECTURE = "LlamaForCausalLM"
SKIPPED = r".*\.rotary_emb\.inv_freq"  # a buffer that transformers stored before 4.32
# Of nanotron's checkpoints: queries and keys of neighboring dimensions are rotated, which transformers does not know.
NEUTRAL = {"rope_interleaved": (False,)}
LAYER = "model.layers.{layer}."
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def decoder_config(hf: dict, place: str) -> DecoderConfig:
    """Reads a Llama `config.json`. Raises InputError on anything it cannot honor; `place` names the file."""
    fields = config_json.begin(hf, ARCHITECTURE, place)
    biases = take_biases(fields, place)
    fields.pop("pretraining_tp", None)  # matrix products in so many parts: the same sums
    mlp_bias = config_json.take(fields, "mlp_bias", bool, place=place, default=False)
    config = read(fields, place, mlp_bias=mlp_bias, **biases)
    config_json.finish(fields, place=place, neutral=NEUTRAL)
    return config


def read(
    fields: Fields,
    place: str,
    *,
    absent: Mapping[str, object] | None = None,
    kinds: Callable[[Rope], Sequence[LayerKind]] = lambda rope: [LayerKind(rope)],
    rope_fields: RopeFields = config_json.ROPE,
    **decided: Any,
) -> DecoderConfig:
    """Takes the fields that other families share with Llama, and builds the configuration.

    Args:
      absent: the family's defaults of fields that a file may lack.
      kinds: from the model's rotary frequencies, the kind of every layer, or one kind for all layers.
      rope_fields: how the family writes its rotary positions; its theta is the one in `absent`, if any.
      decided: fields of `DecoderConfig` that the family sets itself.
    """
    absent = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6} | dict(absent or {})
    take = partial(config_json.take, fields, place=place)
    width, heads = take("hidden_size", int), take("num_attention_heads", int)
    head_dim = take("head_dim", int, default=absent.get("head_dim"))
    head_dim = head_dim or config_json.divide(width, heads, f"{place}: hidden_size")
    kv_heads = take("num_key_value_heads", int, default=absent.get("num_key_value_heads", heads))
    config_json.divide(heads, kv_heads, f"{place}: num_attention_heads")
    max_positions = take("max_position_embeddings", int, default=absent["max_position_embeddings"])
    rope_fields = rope_fields._replace(theta=absent.get("rope_theta", rope_fields.theta))
    rope = config_json.take_rope(
        fields, place=place, head_dim=head_dim, max_positions=max_positions, family=rope_fields
    )
    if "activation" not in decided:
        decided["activation"] = config_json.take_activation(fields, place=place, default="silu")
    return DecoderConfig(
        vocab_size=take("vocab_size", int),
        width=width,
        layers=take("num_hidden_layers", int),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=decided.pop("mlp_width", None) or take("intermediate_size", int),
        max_positions=max_positions,
        **by_layer(kinds(rope)),
        norm="rmsnorm",
        norm_eps=take("rms_norm_eps", float, default=absent["rms_norm_eps"]),
        gated=True,
        tie_embeddings=take("tie_word_embeddings", bool, default=absent.get("tie_word_embeddings", False)),
        **decided,
    )


def take_biases(fields: Fields, place: str) -> dict[str, Any]:
    """Removes `attention_bias`, which is for all four projections, and returns the fields of `DecoderConfig`."""
    present = config_json.take(fields, "attention_bias", bool, place=place, default=False)
    return {"qkv_bias": present, "output_bias": present}


def take_experts(fields: Fields, place: str, *, experts: int, each: int) -> dict[str, Any]:
    """Removes the numbers of experts in a layer and for each token, and returns the fields of `DecoderConfig`.

    The weight of the load-balancing loss is dropped: that loss is chosen by `train.router_balance`.

    Args:
      experts, each: the defaults of the two.
    """
    for unread in ("router_aux_loss_coef", "output_router_logits"):
        fields.pop(unread, None)
    # transformers has written either name for the same family.
    count = config_json.agreed({name: fields.pop(name, None) for name in ("num_experts", "num_local_experts")}, place)
    counts = {
        "experts": config_json.take({"num_experts": count}, "num_experts", int, place=place, default=experts),
        "experts_per_token": config_json.take(fields, "num_experts_per_tok", int, place=place, default=each),
    }
    if counts["experts_per_token"] > counts["experts"]:
        raise InputError(
            f"{place}: num_experts_per_tok",
            got=f"got {counts['experts_per_token']} of {counts['experts']} experts",
            expected="no more than there are",
            remedy="Compare the file with the one the model was published with.",
        )
    return counts


def tensors(c: DecoderConfig, *, norms: Mapping[str, str] = NORMS) -> list[Tensor]:
    """Lists Llama's tensors and the leaves that each fills.

    Args:
      norms: {our name of a norm in a block: the family's}.
    """
    return outer_tensors(c) + norm_tensors(c, norms) + attention_tensors(c) + mlp_tensors(c, LAYER + "mlp.")


def outer_tensors(c: DecoderConfig) -> list[Tensor]:
    """Lists the tensors outside the blocks: embeddings, final norm, head."""
    shape, head = (c.vocab_size, c.width), "embed/embedding" if c.tie_embeddings else "head/embedding"
    return [
        plain("model.embed_tokens.weight", "embed/embedding", shape),
        plain("model.norm.weight", "final_norm/scale", (c.width,)),
        plain("lm_head.weight", head, shape, repeats=c.tie_embeddings),
    ]


def norm_tensors(c: DecoderConfig, norms: Mapping[str, str] = NORMS) -> list[Tensor]:
    """Lists the norms in blocks; `norms` as for `tensors`."""
    return [plain(f"{LAYER}{theirs}.weight", f"blocks/{ours}/scale", (c.width,)) for ours, theirs in norms.items()]


def attention_tensors(c: DecoderConfig) -> list[Tensor]:
    """Lists the tensors of self-attention."""
    at = LAYER + "self_attn."
    q, kv = (c.heads, c.head_dim), (c.kv_heads, c.head_dim)
    narrow = (c.width,)
    table = [
        matrix(at + "q_proj.weight", "blocks/attention/q/kernel", narrow, q),
        matrix(at + "k_proj.weight", "blocks/attention/k/kernel", narrow, kv),
        matrix(at + "v_proj.weight", "blocks/attention/v/kernel", narrow, kv),
        matrix(at + "o_proj.weight", "blocks/attention/o/kernel", q, narrow),
    ]
    if c.qkv_bias:
        table += [
            bias(at + "q_proj.bias", "blocks/attention/q/bias", q),
            bias(at + "k_proj.bias", "blocks/attention/k/bias", kv),
            bias(at + "v_proj.bias", "blocks/attention/v/bias", kv),
        ]
    if c.output_bias:
        table += [bias(at + "o_proj.bias", "blocks/attention/o/bias", narrow)]
    if c.qk_norm:
        sizes = {"q": c.head_dim, "k": c.head_dim} if c.qk_norm == "head" else {"q": q[0] * q[1], "k": kv[0] * kv[1]}
        table += [
            plain(f"{at}{letter}_norm.weight", f"blocks/attention/{letter}_norm/scale", (size,))
            for letter, size in sizes.items()
        ]
    return table


def mlp_tensors(
    c: DecoderConfig, at: str, *, block: str = "mlp", names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
) -> list[Tensor]:
    """Lists the tensors of a gated feed-forward block.

    Args:
      at: beginning of the names.
      block: our name of the block.
      names: the family's names of gate, up and down.
    """
    wide, narrow = (c.mlp_width,), (c.width,)
    sides = {"gate": (narrow, wide), "up": (narrow, wide), "down": (wide, narrow)}
    table = [
        matrix(f"{at}{theirs}.weight", f"blocks/{block}/{ours}/kernel", *sides[ours])
        for ours, theirs in zip(sides, names, strict=True)
    ]
    if c.mlp_bias:
        table += [
            bias(f"{at}{theirs}.bias", f"blocks/{block}/{ours}/bias", sides[ours][1])
            for ours, theirs in zip(sides, names, strict=True)
        ]
    return table


def expert_tensors(
    c: DecoderConfig, at: str, *, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
) -> list[Tensor]:
    """Lists the tensors of a mixture of experts: the router's, and each expert's as in `mlp_tensors`."""
    router = matrix(at + "gate.weight", "blocks/experts/router/kernel", (c.width,), (c.experts,))
    return [router, *mlp_tensors(c, at + "experts.{expert}.", block="experts", names=names)]
