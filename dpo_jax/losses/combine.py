"""Builds an objective from names and options, and checks that they go together."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.losses import synonyms
from dpo_jax.losses.common import raise_refusal
from dpo_jax.losses.objective import Objective, Term, options_of
from dpo_jax.losses.registry import (
    COLUMNS,
    GIVEN,
    MODIFIERS,
    OPTIONS,
    REGISTRY,
    Entry,
    Loss,
    Options,
    arguments,
)
from dpo_jax.types import InputError, listed, shown


def make_loss(name: str | Loss, options: Options | None = None, **more_options: Any) -> Objective:
    """Returns the named objective, or that of a function, with its options bound.

    Args:
      name: one of LOSSES; several with weights, as "sigmoid*0.8,bco_pair*0.2"; or a function of the caller's own, such
        as those of LOSSES, itself or as "package.module:function". Its parameters without a default are its inputs: of
        GIVEN, and auxiliary outputs of the model that are named so.
      options: by name; each goes to all losses that have it. The options of MODIFIERS combine with losses that do not
        have them.
      more_options: further options, as keywords. Numbers may be traced: scalars within `jit`, `vmap` or `grad`.
    Raises: InputError for an unknown name, an option that none of the losses has, or a value out of range.

    >>> objective = make_loss("sigmoid*0.8,sft*0.2", beta=0.3)
    >>> objective.beta, sorted(objective.names), objective.reference_free
    (0.3, ['sft', 'sigmoid'], False)
    """
    with errors_at("make_loss({}=...)"):
        return combine(name, {**(options or {}), **more_options})


@contextlib.contextmanager
def errors_at(spelling: str) -> Iterator[None]:
    """Has errors that name an option name it as the caller spelled it: `spelling`, with the name in place of {}."""
    try:
        yield
    except InputError as error:
        if not error.place.isidentifier():
            raise
        parts = {"got": error.got, "expected": error.expected, "remedy": error.remedy}
        raise InputError(spelling.format(error.place), **parts) from error.__cause__


def combine(name: str | Loss, options: Options) -> Objective:
    """Makes the objective of `make_loss`. Its errors name the option alone; `errors_at` says where it stands."""
    if isinstance(name, str):
        weighted = [_weighted(part.strip()) for part in name.split(",")]
        names = [each for _, each in weighted]
        if len(set(names)) < len(names):
            raise InputError("name", got=f"{name!r}", expected="each loss once", remedy="Add the weights up.")
        terms = [_term(weight, _entry_of(each), options) for weight, each in weighted]
    else:
        terms = [_term(1.0, _entry_of_function(name), options)]
        name = terms[0].name
    bound = {option: value for term in reversed(terms) for option, value in options_of(term.loss).items()}
    modifiers = {option: value for option, value in options.items() if option in MODIFIERS and option not in bound}
    for option in options.keys() - bound.keys() - modifiers.keys():
        raise InputError(
            option,
            got=f"is set, and loss {name!r} has no such option",
            expected=f"one of {', '.join(sorted(bound.keys() | MODIFIERS.keys()))}",
            remedy="Unset it or choose a loss that has it.",
        )
    for option, value in modifiers.items():
        _check_modifier(option, value, terms, modifiers, bound)
    objective = Objective(tuple(terms), {**bound, **modifiers}, **modifiers)
    _check_sum(name, objective, modifiers)
    _trace(objective)
    return objective


def _weighted(part: str) -> tuple[float, str]:
    """Splits `name*weight` into weight and name; the weight is 1 where it is left off."""
    name, star, text = part.partition("*")
    try:
        weight = float(text) if star else 1.0
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(
            "name",
            got=f"weight {text!r}",
            expected="a number above 0 after '*', such as sigmoid*0.8",
            remedy="Correct the weight or leave it off.",
        )
    return weight, name.strip()


def _term(weight: float, entry: Entry, options: Options) -> Term:
    """Binds the options that a loss has: its parameters that are no inputs."""
    parameters, inputs = arguments(entry.function), ("lengths", *GIVEN, *COLUMNS)
    own = {each: options[each] for each in [*parameters][2:] if each in options and each not in inputs}
    return Term(weight, entry, functools.partial(entry.function, **own))


def _entry_of(name: str) -> Entry:
    """Returns the entry of a loss of ours, or makes one for a user's own function, named "module:function"."""
    module, colon, function = name.partition(":")
    if not colon:
        if name not in REGISTRY:
            expected, remedy = f"one of {', '.join(REGISTRY)}", synonyms.remedy(name, REGISTRY)
            raise InputError("name", got=f"got {shown(name)}", expected=expected, remedy=remedy)
        return REGISTRY[name]
    try:
        loss = getattr(importlib.import_module(module), function)
        arguments(loss)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            "name",
            got=f"{name!r} cannot be imported ({error})",
            expected="module:function, in a module that Python finds from here",
            remedy="Correct it, or name a loss of docs/objectives.md.",
        ) from error
    return _own_entry(name, loss)


def _entry_of_function(loss: Loss) -> Entry:
    """Returns the entry of a function of ours, or makes one for a user's own."""
    ours = next((entry for entry in REGISTRY.values() if entry.function is loss), None)
    if ours is not None:
        return ours
    try:
        arguments(loss)
    except (TypeError, ValueError) as error:
        expected = "the name of a loss, or a function (policy, reference, *, lengths, ...)"
        raise InputError("name", got=f"got {shown(loss)}", expected=expected, remedy="Give one of them.") from error
    function = loss.func if isinstance(loss, functools.partial) else loss
    return _own_entry(getattr(function, "__name__", type(function).__name__), loss)


def _own_entry(name: str, loss: Loss) -> Entry:
    """Makes the entry of a user's own function. Raises: InputError if it does not take what a step passes."""
    parameters = arguments(loss)
    required = [each for each in COLUMNS if each in parameters and parameters[each].default is parameters[each].empty]
    if len(parameters) < 3 or "lengths" not in parameters or required or "baseline" in parameters:
        raise InputError(
            "name",
            got=f"{name} takes {listed([*parameters]) or 'nothing'}",
            expected="parameters (policy, reference, *, lengths, ...); further ones are options, which have a default; "
            f"columns, with the default None: {', '.join(COLUMNS)}; and inputs, which have none: "
            f"{', '.join(each for each in GIVEN if each not in ('baseline', 'running'))}",
            remedy="Change its parameters.",
        )
    return Entry(name, loss, f"`{name}`", of_pairs=False)


def _check_modifier(option: str, value: object, terms: list[Term], modifiers: Options, bound: Options) -> None:
    """Raises InputError for a value out of range, and for an option that does not combine with all of the losses.

    Args:
      modifiers: options that combine with the losses, as they are set.
      bound: options that the losses have themselves.
    """
    place, modifier = option, MODIFIERS[option]
    raise_refusal(option, value, OPTIONS[option].refusal(value))
    if modifier.combines is not None:
        comparing = [term.entry for term in terms if term.entry.answers_read == "all"]
        failing = [each.name for each in comparing or [term.entry for term in terms] if not modifier.combines(each)]
        if failing:
            valid = ", ".join(sorted(name for name, each in REGISTRY.items() if modifier.combines(each)))
            got, expected = (
                f"is set, and does not combine with {', '.join(sorted(failing))}",
                f"a loss that it combines with: {valid}",
            )
            raise InputError(place, got=got, expected=expected, remedy="Unset it or change the loss.")
    if modifier.beside is None:
        return
    other, needed = modifier.beside
    if other in bound:
        names = ", ".join(sorted(term.name for term in terms))
        expected = f"losses without a {other} of their own"
        raise InputError(place, got=f"is set, and {names} has one, per token", expected=expected, remedy="Unset it.")
    if other not in modifiers or (needed is not None and modifiers[other] != needed):
        expected = f"{other}{'' if needed is None else f'={needed!r}'} beside it"
        raise InputError(place, got="is set alone", expected=expected, remedy="Set that too, or unset it.")


def _check_sum(name: str, objective: Objective, modifiers: Options) -> None:
    """Raises InputError for losses that cannot be added up, and for an option of an input that none of them reads."""
    entries = [term.entry for term in objective.terms]
    ranking = any("ranked" in entry.kinds and entry.answers_read == "all" for entry in entries)
    if ranking and not all("ranked" in entry.kinds for entry in entries):
        ranked = ", ".join(sorted(entry.name for entry in REGISTRY.values() if "ranked" in entry.kinds))
        remedy = "Leave the losses of pairs out."
        raise InputError("name", got=f"{name!r}", expected=f"only losses that take rankings: {ranked}", remedy=remedy)
    for option in modifiers:
        needed = MODIFIERS[option].reads
        if needed and needed not in objective.needs:
            readers = ", ".join(name for name, entry in REGISTRY.items() if needed in arguments(entry.function))
            expected = f"a loss that reads it: {readers}"
            raise InputError(option, got="is set", expected=expected, remedy="Unset it.")
    if objective.needs >= {"kl", "sequence_kl"}:
        raise InputError(
            "name",
            got=f"{name!r}, of which one estimates the KL divergence from mismatched answers, another token by token",
            expected="losses that read one of the two estimates",
            remedy="Leave one of the losses out.",
        )


def _trace(objective: Objective) -> None:
    """Traces the objective on one pair, without running it, so that a value or a shape it refuses is an error now."""
    logps, counts = jax.ShapeDtypeStruct((1, 2), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    scalar, present = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.bool_)
    inputs = {"present": present, "kl": scalar, "running": jax.eval_shape(objective.start)}
    given = {name: inputs.get(name, logps) for name in objective.needs}
    losses = jax.eval_shape(lambda x, n, given: objective(x, x, lengths=n, **given), logps, counts, given)
    if losses.shape != (1,):
        raise InputError(
            "name",
            got=f"{', '.join(sorted(objective.names))}: losses of shape {losses.shape} for a batch of one pair",
            expected="the shape [1], a loss for each pair",
            remedy="Do not average over pairs in the function.",
        )
