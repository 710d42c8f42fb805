"""Strict reading of a Hugging Face `config.json`: every field is used, known to change nothing, or refused.

A family takes the fields it understands out of a copy; what is left over at the end must be harmless.
"""

from __future__ import annotations

from typing import Any

from dpo_jax.types import InputError

REQUIRED = object()

# Fields that any Hugging Face configuration may hold and that no causal decoder's forward pass reads. Names that
# begin with an underscore are private to transformers and count as harmless too.
HARMLESS = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype use_cache initializer_range name_or_path
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
    id2label label2id num_labels problem_type classifier_dropout finetuning_task task_specific_params
    return_dict output_hidden_states output_attentions attn_implementation torchscript use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward is_decoder gradient_checkpointing tie_encoder_decoder tie_last_hidden_states
    custom_pipeline custom_pipelines unsloth_fixed unsloth_version is_llama_config transformers.js_config
    """.split()
    # Defaults for text generation, which old configurations keep here.
    + """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty
    do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens target_lookbehind temperature top_k top_p typical_p
    """.split()
)

# Fields that change the model unless they have one of these values. Training here uses no dropout, so a
# configuration that asks for it is refused rather than quietly overruled.
NEUTRAL: dict[str, tuple] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "attention_dropout": (0,),
    "hidden_dropout": (0,),
    "attention_probs_dropout_prob": (0,),
    "hidden_dropout_prob": (0,),
}

# transformers' names of activations, and ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",  # torch's default: the exact one, by erf
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}

ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def begin(hf: dict, architecture: str, place: str) -> dict[str, Any]:
    """A copy of `hf` to take fields from. Raises InputError if it describes another class, or quantised weights."""
    named = hf.get("architectures") or [architecture]
    if architecture not in named:
        raise InputError(
            f"{place}: architectures",
            got=f"got {named}",
            expected=architecture,
            remedy="Other heads and variants compute something else; start from the causal language model itself.",
        )
    if hf.get("quantization_config"):
        raise InputError(
            f"{place}: quantization_config",
            got="the weights are quantised",
            expected="plain floating-point weights",
            remedy="Train from the checkpoint this one was quantised from.",
        )
    return dict(hf)


def take(fields: dict[str, Any], name: str, kind: type, *, place: str, default: Any = REQUIRED) -> Any:
    """Removes a field and returns its value; absent and null both mean `default`.

    Raises: InputError if a required field is absent, or a value is not of `kind`; numbers must be positive.
    """
    value = fields.pop(name, None)
    if value is None and default is not REQUIRED:
        return default
    if not fits(value, kind):
        raise InputError(
            f"{place}: {name}",
            got="missing" if value is None else f"got {value!r}",
            expected=f"a {'' if kind in (str, bool) else 'positive '}{kind.__name__}",
            remedy="Compare the file with the one the model was published with.",
        )
    return kind(value)


def fits(value: Any, kind: type) -> bool:
    """Whether a JSON value is of `kind` (whole numbers are floats, truth values are not numbers) and positive."""
    if kind in (str, bool):
        return isinstance(value, kind)
    return isinstance(value, (int, kind)) and not isinstance(value, bool) and value > 0


def divide(whole: int, parts: int, place: str) -> int:
    """The quotient, exactly. Raises InputError, naming `place`, if there is a remainder."""
    if whole % parts:
        raise InputError(
            place,
            got=f"got {whole}, which {parts} does not divide",
            expected=f"a multiple of {parts}",
            remedy="Compare the file with the one the model was published with.",
        )
    return whole // parts


def rotary_dim(head_dim: int, fraction: float, place: str) -> int:
    """Leading dimensions of a head that rotate. Raises InputError unless they are 2, 4, ... up to `head_dim`."""
    rotating = int(head_dim * fraction)
    if rotating % 2 or not 2 <= rotating <= head_dim:
        raise InputError(
            place,
            got=f"{fraction} of a head's {head_dim} dimensions would rotate",
            expected=f"an even number from 2 to {head_dim}",
            remedy="Compare the file with the one the model was published with.",
        )
    return rotating


def take_activation(fields: dict[str, Any], *, place: str, default: str) -> Any:
    """Removes `hidden_act` and returns our name for it. Raises InputError if it is not implemented."""
    name = take(fields, "hidden_act", str, place=place, default=default)
    if name not in ACTIVATIONS:
        raise InputError(
            f"{place}: hidden_act",
            got=f"got {name!r}",
            expected=f"one of {', '.join(ACTIVATIONS)}",
            remedy="This activation is not implemented.",
        )
    return ACTIVATIONS[name]


def take_rope(
    fields: dict[str, Any], *, place: str, thetas: tuple[str, ...], fractions: tuple[str, ...], fraction: float
) -> tuple[float, float]:
    """Removes every rotary field; returns (theta, fraction of each head that rotates).

    Since transformers 5 the values stand in `rope_parameters`; before, they stood at the top level beside
    `rope_scaling`. Wherever the same value is given more than once, all must agree.

    Args:
      thetas, fractions: top-level names of the two values.
      fraction: the default of the second; that of theta is 10000.
    Raises: InputError if positions are scaled, or two places disagree.
    """
    given_thetas = {name: fields.pop(name, None) for name in thetas}
    given_fractions = {name: fields.pop(name, None) for name in fractions}
    for key in ("rope_parameters", "rope_scaling"):
        rope = fields.pop(key, None) or {}
        check_rope(rope, f"{place}: {key}")
        given_thetas[f"{key}.rope_theta"] = rope.get("rope_theta")
        given_fractions[f"{key}.partial_rotary_factor"] = rope.get("partial_rotary_factor")
    return agreed(given_thetas, place, 10000.0), agreed(given_fractions, place, fraction)


def check_rope(rope: Any, place: str) -> None:
    """Raises InputError unless `rope` is plain rotary embedding: type "default", and no parameters of another."""
    kinds = {str(rope[key]) for key in ("rope_type", "type") if key in rope} if isinstance(rope, dict) else {repr(rope)}
    if kinds - {"default"}:
        raise InputError(
            place,
            got=f"got type {', '.join(sorted(kinds))}",
            expected='type "default"',
            remedy="Scaled rotary positions are not implemented, and leaving them out would change every log-prob.",
        )
    if unknown := sorted(rope.keys() - ROPE_KEYS):
        raise InputError(
            place,
            got=f"got {', '.join(f'{key}={rope[key]!r}' for key in unknown)}",
            expected=f"only {', '.join(sorted(ROPE_KEYS))}",
            remedy="If the model ignores these fields, delete them from a copy of config.json.",
        )


def agreed(given: dict[str, Any], place: str, default: float) -> float:
    """The one positive number that all places give, or `default` where none does. Raises InputError otherwise."""
    values = {name: value for name, value in given.items() if value is not None}
    for name, value in values.items():
        if not fits(value, float):
            raise InputError(
                f"{place}: {name}", got=f"got {value!r}", expected="a positive number", remedy="Correct the value."
            )
    if len(set(values.values())) > 1:
        raise InputError(
            place,
            got=f"got {', '.join(f'{name}={value}' for name, value in values.items())}",
            expected="one value",
            remedy="Keep the one the model was trained with.",
        )
    return float(next(iter(values.values()), default))


def finish(fields: dict[str, Any], *, place: str, neutral: dict[str, tuple]) -> None:
    """Raises InputError naming every field left over that may change what the model computes.

    Args:
      neutral: the family's own additions to NEUTRAL. A field that is null counts as absent.
    """
    allowed = NEUTRAL | neutral
    left = {name: value for name, value in fields.items() if value is not None and not name.startswith("_")}
    wrong = {name: value for name, value in left.items() if name in allowed and value not in allowed[name]}
    unknown = {name: value for name, value in left.items() if name not in allowed and name not in HARMLESS}
    if not (wrong or unknown):
        return
    needed = [f"{name}={allowed[name][0] if allowed[name] else None!r}" for name in sorted(wrong)]
    raise InputError(
        place,
        got=f"got {', '.join(f'{name}={value!r}' for name, value in sorted((wrong | unknown).items()))}",
        expected=", ".join(needed + ["only fields known here"] * bool(unknown)),
        remedy="These fields may change what the model computes and are not implemented. Where they do not, or where "
        "training without them is what you want, edit a copy of config.json.",
    )
