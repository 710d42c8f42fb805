"""Strict reading of a Hugging Face `config.json`: every field is used, changes nothing, or is refused.

A family takes the fields that it understands out of a copy; the fields that are left at the end must change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpo_jax.hf import transformers_source
from dpo_jax.models.config import Rope
from dpo_jax.models.rope import KINDS, frequencies
from dpo_jax.types import InputError, listed, shown

KIND_NAMES = {str: "text", bool: "true or false", int: "a positive whole number", float: "a positive number"}
Fields = dict[str, Any]  # of a config.json; each function here removes the ones that it reads

COMPARE = "Compare the file with the one the model was published with."
REQUIRED = object()
TRAINED_LENGTH = "original_max_position_embeddings"

# Fields that transformers reads for other purposes than a causal decoder's forward pass. Names that begin with an
# underscore are private to transformers and count as harmless too.
HARMLESS = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype use_cache initializer_range name_or_path
    bos_token_id eos_token_id pad_token_id sep_token_id prefix max_length top_k
    id2label label2id num_labels problem_type classifier_dropout
    return_dict output_hidden_states output_attentions is_decoder gradient_checkpointing
    attn_implementation experts_implementation
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
    named = named if isinstance(named, list) else [named]
    # In any case: the first conversions of LLaMA have LLaMAForCausalLM.
    if architecture.lower() not in (str(each).lower() for each in named):
        raise InputError(
            f"{place}: architectures",
            got=f"got {listed([*map(str, named)])}",
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
            got="missing" if value is None else f"got {shown(value)}",
            expected=KIND_NAMES[kind],
            remedy=COMPARE,
        )
    return kind(value)


def fits(value: Any, kind: type) -> bool:
    """Returns whether a JSON value is of `kind` and positive. Integers count as floats, booleans not as numbers."""
    if kind in (str, bool):
        return isinstance(value, kind)
    return isinstance(value, (int, kind)) and not isinstance(value, bool) and value > 0


def join_aliases(fields: Fields, aliases: Mapping[str, str], *, place: str) -> None:
    """Moves fields from other names that transformers reads to the family's own, {other: own}.

    Raises: InputError if both stand in the file and differ.
    """
    for other, own in aliases.items():
        if other in fields:
            fields[own] = agreed({name: fields.pop(name, None) for name in (other, own)}, place)


def divide(whole: int, parts: int, place: str) -> int:
    """Returns the exact quotient. Raises InputError, naming `place`, if there is a remainder."""
    if whole % parts:
        raise InputError(
            place,
            got=f"got {whole}, which {parts} does not divide",
            expected=f"a multiple of {parts}",
            remedy=COMPARE,
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
    check_rope(kind, values, place, fields.get("model_type"))
    dim = int(head_dim * values.pop("partial_rotary_factor", family.fraction))
    if dim % 2 or not 2 <= dim <= head_dim or (dim < head_dim and not family.partial):
        raise InputError(
            f"{place}: {family.fractions[0] if dim < head_dim else 'head_dim'}",
            got=f"{dim} of a head's {head_dim} dimensions would be rotated",
            expected=f"an even number from 2 to {head_dim}" if family.partial else "all of them, an even number",
            remedy=COMPARE,
        )
    lengths = {TRAINED_LENGTH: max_positions, "max_position_embeddings": max_positions}
    complete: Fields = {"rope_theta": family.theta} | lengths | values
    for name in ("short_factor", "long_factor"):
        if len(complete.get(name, ())) not in (0, dim // 2):
            raise InputError(
                f"{place}: {name}",
                got=f"{len(complete[name])} numbers",
                expected=f"{dim // 2}, half of the rotated dimensions",
                remedy=COMPARE,
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
            raise InputError(f"{place}: {source}", got=f"got {shown(rope)}", expected="an object", remedy=COMPARE)
        for key, value in rope.items():
            stated.setdefault("rope_type" if key == "type" else key, {})[f"{source}.{key}"] = value
    values = {key: value for key, by_place in stated.items() if (value := agreed(by_place, place)) is not None}
    kind = str(values.pop("rope_type", "default"))
    return family.aliases.get(kind, kind), values


def check_rope(kind: str, values: Fields, place: str, model_type: object) -> None:
    """Raises InputError unless a rope type is known, and has all parameters it needs and no others that are read."""
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
            remedy=COMPARE,
        )
    # Phi-3 has the trained length beside every type.
    usual = {"rope_theta", "partial_rotary_factor", TRAINED_LENGTH}
    known = usual | {*needed, *optional}
    if unknown := sorted(name for name in values.keys() - known if why_read(model_type, name)):
        raise InputError(
            f"{place}: rope_parameters",
            got=f"got {listed([f'{key}={values[key]!r:.100}' for key in unknown])}",
            expected=f"for type {kind} only {', '.join(sorted(known))}",
            remedy="If the model was trained without, remove it from a copy of config.json.",
        )
    for name, value in values.items():
        if name not in known:
            continue
        kind_of_value = (
            "true or false" if name == "truncate" else "positive numbers" if "_factor" in name else "a number"
        )
        numbers = value if name in ("short_factor", "long_factor") and isinstance(value, list) else [value]
        good = isinstance(value, bool) if name == "truncate" else numbers and all(fits(each, float) for each in numbers)
        if not good:
            raise InputError(f"{place}: {name}", got=f"got {shown(value)}", expected=kind_of_value, remedy=COMPARE)


def agreed(stated: Fields, place: str) -> Any:
    """Returns the one value among {place: value}, None if all are None. Raises InputError if two differ."""
    values = {name: value for name, value in stated.items() if value is not None}
    distinct = [value for i, value in enumerate(values.values()) if value not in list(values.values())[:i]]
    if len(distinct) > 1:
        raise InputError(
            place,
            got=f"got {', '.join(f'{name}={shown(value)}' for name, value in values.items())}",
            expected="one value, since these fields have the same meaning",
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
            remedy=COMPARE,
        )
    return [name == kinds[1] for name in names]


def finish(fields: Fields, *, place: str, neutral: Mapping[str, tuple]) -> None:
    """Raises InputError naming every remaining field that may change what the model computes.

    A field changes nothing if it is null or in HARMLESS, if it has a value of `neutral` or NEUTRAL or its class's
    default, or if the installed transformers does not read it.

    Args:
      neutral: the family's additions to NEUTRAL, for fields that count whether transformers reads them or not.
    """
    allowed = NEUTRAL | dict(neutral)
    kind = fields.get("model_type")
    wrong = {}
    for name, value in sorted(fields.items()):
        if value is None or name.startswith("_") or name in HARMLESS or value in allowed.get(name, ()):
            continue
        if name in neutral:
            wrong[name] = f"{name}={value!r}"
        elif not is_default(kind, name, value) and (why := why_read(kind, name)):
            wrong[name] = f"{name}={value!r:.100} ({why})"
    if not wrong:
        return
    needed = [f"{name}={allowed[name][0]!r}" for name in wrong if allowed.get(name)]
    raise InputError(
        place,
        got=f"got {listed([*wrong.values()])}",
        expected=listed(needed + [f"no {name}" for name in wrong if not allowed.get(name)]),
        remedy="It may change what the model computes, and is not implemented. Remove it from a copy of config.json "
        "only if the model is right without it.",
    )


def why_read(model_type: object, name: str) -> str | None:
    """Returns why a field may change what models of a type compute; None if transformers does not read it."""
    code = transformers_source.source(str(model_type))
    if not code.own:
        return f"{transformers_source.version()} has no such model_type to tell what it does"
    return f"read by {transformers_source.version()} in {file}" if (file := code.reader(name)) else None


def is_default(model_type: object, name: str, value: Any) -> bool:
    """Returns whether transformers gives a field this value where a file of the type lacks it."""
    return transformers_source.source(str(model_type)).is_default(name, value)
