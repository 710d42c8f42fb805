"""Strict reading of a Hugging Face `config.json`: every field is used, known to change nothing, or refused.

A family takes the fields that it understands out of a copy; the fields that are left at the end must be harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpo_jax.models.config import Rope
from dpo_jax.models.rope import KINDS, frequencies
from dpo_jax.types import InputError

Fields = dict[str, Any]  # of a config.json; each function here removes the ones that it reads

REQUIRED = object()
TRAINED_LENGTH = "original_max_position_embeddings"

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
# configuration that asks for it is refused, not ignored.
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

# {transformers' name of an activation: ours}.
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


class RopeFields(NamedTuple):
    """How a family writes its rotary positions in `config.json`: names of fields, and defaults.

    theta: base of the rotary frequencies where the file has none.
    fraction: part of each head's dimensions that is rotated where the file has none.
    partial: whether the family honors a fraction below 1. transformers reads the field for every family, and most then
      rotate whole heads all the same.
    thetas, fractions: top-level names of the two fields.
    aliases: {name of a rope type in this family: name of the type that it means}.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    partial: bool = False
    thetas: tuple[str, ...] = ("rope_theta",)
    fractions: tuple[str, ...] = ("partial_rotary_factor",)
    aliases: Mapping[str, str] = {}


ROPE = RopeFields()


def begin(hf: dict, architecture: str, place: str) -> Fields:
    """Returns a copy of `hf` to take fields from.

    Raises: InputError if it describes another class than `architecture`, or quantized weights.
    """
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
            got="the weights are quantized",
            expected="plain floating-point weights",
            remedy="Train from the checkpoint this one was quantized from.",
        )
    return dict(hf)


def take(fields: Fields, name: str, kind: type, *, place: str, default: object = REQUIRED) -> Any:
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
    """Returns whether a JSON value is of `kind` and positive. Integers count as floats, booleans not as numbers."""
    if kind in (str, bool):
        return isinstance(value, kind)
    return isinstance(value, (int, kind)) and not isinstance(value, bool) and value > 0


def divide(whole: int, parts: int, place: str) -> int:
    """Returns the exact quotient. Raises InputError, naming `place`, if there is a remainder."""
    if whole % parts:
        raise InputError(
            place,
            got=f"got {whole}, which {parts} does not divide",
            expected=f"a multiple of {parts}",
            remedy="Compare the file with the one the model was published with.",
        )
    return whole // parts


def take_activation(fields: Fields, *, place: str, default: str, field: str = "hidden_act") -> Any:
    """Removes the field and returns our name for the activation. Raises InputError if it is not implemented."""
    name = take(fields, field, str, place=place, default=default)
    if name not in ACTIVATIONS:
        raise InputError(
            f"{place}: {field}",
            got=f"got {name!r}",
            expected=f"one of {', '.join(ACTIVATIONS)}",
            remedy="This activation is not implemented.",
        )
    return ACTIVATIONS[name]


def take_rope(fields: Fields, *, place: str, head_dim: int, max_positions: int, family: RopeFields = ROPE) -> Rope:
    """Removes every rotary field and returns the rotary frequencies they describe.

    Since transformers 5 the values stand in `rope_parameters`; before, they stood at the top level beside
    `rope_scaling`. Wherever the same value stands more than once, all must agree.

    Raises: InputError for a type or parameter that is not known, one that is missing, or places that disagree.
    """
    kind, values = rope_values(fields, family, place)
    check_rope(kind, values, place)
    dim = int(head_dim * values.pop("partial_rotary_factor", family.fraction))
    if dim % 2 or not 2 <= dim <= head_dim or (dim < head_dim and not family.partial):
        raise InputError(
            f"{place}: {family.fractions[0]}",
            got=f"{dim} of a head's {head_dim} dimensions would be rotated",
            expected=f"an even number from 2 to {head_dim}" if family.partial else "all of them, an even number",
            remedy="Compare the file with the one the model was published with.",
        )
    lengths = {TRAINED_LENGTH: max_positions, "max_position_embeddings": max_positions}
    complete: Fields = {"rope_theta": family.theta} | lengths | values
    for name in ("short_factor", "long_factor"):
        if len(complete.get(name, ())) not in (0, dim // 2):
            raise InputError(
                f"{place}: {name}", got=f"{len(complete[name])} numbers", expected=f"{dim // 2}", remedy="Correct it."
            )
    return KINDS[kind][0](complete, frequencies(complete["rope_theta"], dim))


def rope_values(fields: Fields, family: RopeFields, place: str) -> tuple[str, Fields]:
    """Removes every rotary field and returns the type, and its parameters by transformers' names.

    Raises: InputError if two places disagree.
    """
    # {parameter: {place in the file: value}}
    stated: dict[str, Fields] = {
        "rope_theta": {name: fields.pop(name, None) for name in family.thetas},
        "partial_rotary_factor": {name: fields.pop(name, None) for name in family.fractions},
        TRAINED_LENGTH: {TRAINED_LENGTH: fields.pop(TRAINED_LENGTH, None)},
    }
    for source in ("rope_parameters", "rope_scaling"):
        rope = fields.pop(source, None) or {}
        if not isinstance(rope, dict):
            raise InputError(
                f"{place}: {source}", got=repr(rope), expected="an object", remedy="Take it from the original."
            )
        for key, value in rope.items():
            stated.setdefault("rope_type" if key == "type" else key, {})[f"{source}.{key}"] = value
    values = {key: value for key, by_place in stated.items() if (value := agreed(by_place, place)) is not None}
    kind = str(values.pop("rope_type", "default"))
    return family.aliases.get(kind, kind), values


def check_rope(kind: str, values: Fields, place: str) -> None:
    """Raises InputError unless a rope type is known, and has all parameters it needs and no others."""
    if kind not in KINDS:
        raise InputError(
            f"{place}: rope_type",
            got=f"got {kind!r}",
            expected=f"one of {', '.join(KINDS)}",
            remedy="It is not implemented, and leaving it out would change every log-prob.",
        )
    needed, optional = (names.split() for names in KINDS[kind][1:])
    if missing := [name for name in needed if name not in values]:
        raise InputError(
            f"{place}: rope_parameters",
            got=f"type {kind} without {', '.join(missing)}",
            expected=", ".join(needed),
            remedy="Compare the file with the one the model was published with.",
        )
    # Phi-3 has the trained length beside every type.
    usual = {"rope_theta", "partial_rotary_factor", TRAINED_LENGTH}
    if unknown := sorted(values.keys() - usual - {*needed, *optional}):
        raise InputError(
            f"{place}: rope_parameters",
            got=f"got {', '.join(f'{key}={values[key]!r}' for key in unknown)}",
            expected=f"for type {kind} only {', '.join(sorted(usual | {*needed, *optional}))}",
            remedy="If the model ignores these fields, delete them from a copy of config.json.",
        )
    for name, value in values.items():
        kind_of_value = (
            "true or false" if name == "truncate" else "positive numbers" if "_factor" in name else "a number"
        )
        listed = value if name in ("short_factor", "long_factor") and isinstance(value, list) else [value]
        good = isinstance(value, bool) if name == "truncate" else listed and all(fits(each, float) for each in listed)
        if not good:
            raise InputError(
                f"{place}: {name}", got=f"got {value!r}", expected=kind_of_value, remedy="Correct the value."
            )


def agreed(stated: Fields, place: str) -> Any:
    """Returns the one value among {place: value}, None if all are None. Raises InputError if two differ."""
    values = {name: value for name, value in stated.items() if value is not None}
    distinct = [value for i, value in enumerate(values.values()) if value not in list(values.values())[:i]]
    if len(distinct) > 1:
        raise InputError(
            place,
            got=f"got {', '.join(f'{name}={value}' for name, value in values.items())}",
            expected="one value",
            remedy="Keep the one the model was trained with.",
        )
    return distinct[0] if distinct else None


def take_window(fields: Fields, *, place: str, absent: int | None = None) -> int | None:
    """Removes `sliding_window` and returns it: None if it is null, `absent` if it is missing."""
    if "sliding_window" not in fields:
        return absent
    return take(fields, "sliding_window", int, place=place, default=None)


def take_sliding(fields: Fields, *, place: str, window: int | None, default: Callable[[int], bool]) -> list[bool]:
    """Removes `layer_types` and returns, for each layer, whether it has sliding-window attention.

    Args:
      window: width of the window; None: none, and InputError is raised if a layer has one.
      default: the same for a layer, counted from 0, where the field is absent.
    """
    layers = take(dict(fields), "num_hidden_layers", int, place=place)
    names = fields.pop("layer_types", None)
    if names is None:
        return [default(layer) for layer in range(layers)]
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(names, list) or len(names) != layers or not set(names) <= set(kinds):
        raise InputError(
            f"{place}: layer_types",
            got=f"got {names!r:.200}",
            expected=f"{layers} of {' and '.join(kinds)}",
            remedy="Other kinds of attention are not implemented.",
        )
    if kinds[1] in names and window is None:
        raise InputError(
            f"{place}: layer_types",
            got=f"{kinds[1]} without a sliding_window",
            expected="the window",
            remedy="Compare the file with the one the model was published with.",
        )
    return [name == kinds[1] for name in names]


def finish(fields: Fields, *, place: str, neutral: dict[str, tuple]) -> None:
    """Raises InputError naming every remaining field that may change what the model computes.

    Args:
      neutral: the family's additions to NEUTRAL. A field that is null counts as absent.
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
        "training without them is intended, edit a copy of config.json.",
    )
