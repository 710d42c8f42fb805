"""From the fields of `config.loss` to one function: a weighted sum of losses and the options that combine with them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.losses.batchwise import Baseline, Running
from dpo_jax.losses.common import nll, token_counts
from dpo_jax.losses.modifiers import desensitized, f_scores, wpo_weights
from dpo_jax.losses.registry import (
    COLUMNS,
    EVERY_KIND,
    GIVEN,
    LOSSES,
    MODIFIERS,
    OPTIONS,
    REGISTRY,
    SUMS,
    Entry,
    Loss,
    Value,
    arguments,
    defaults_of,
)
from dpo_jax.types import InputError, check_choice, listed

NAME = "config.loss.name"


def _unset(option: str) -> Any:
    """Returns the value of an option that combines with losses where it is not set."""
    return MODIFIERS[option].unset


class Term(NamedTuple):
    """One of the losses of a weighted sum, its options bound."""

    weight: float
    entry: Entry
    loss: Loss

    @property
    def name(self) -> str:
        """The loss's name."""
        return self.entry.name


@dataclasses.dataclass(frozen=True)
class Objective:
    """A weighted sum of losses with the options that combine with them; called as a loss is, made by `make_loss`."""

    terms: tuple[Term, ...]
    options: Mapping[str, Value]  # every option with its value, given or by default
    divergence: str = _unset("divergence")
    divergence_alpha: float = _unset("divergence_alpha")
    ld_alpha: float | None = _unset("ld_alpha")
    wpo: bool = _unset("wpo")
    nll_weight: float = _unset("nll_weight")  # for losses that have no such term themselves
    nll_average: bool = _unset("nll_average")
    kl_tokens: int = _unset("kl_tokens")  # the divergence along an answer counts these one by one, all others as one

    def __call__(
        self,
        policy: Float[Array, "P K"],
        reference: Float[Array, "P K"],
        *,
        lengths: Int[Array, "P K"],
        **given: Any,
    ) -> Float[Array, "P"]:
        """Returns the loss of each pair, not averaged.

        Args:
          policy, reference: log-probs of whole answers, in nats; no gradient flows into `reference`.
          lengths: scored tokens of each answer; 0 for a missing one.
          given: the inputs that `needs` names, and those that `columns` names where the data have them.
        """
        compared, held = self._compared(policy, reference, given)
        total = jnp.zeros(len(policy), policy.dtype)
        for weight, entry, loss in self.terms:
            inputs = {name: given[name] for name in given if name in arguments(loss)}
            if entry.baseline is not None:
                inputs["baseline"] = given["running"][entry.name]["value"]
            logps = policy if entry.answers_read == "chosen" else compared
            losses = loss(logps, held, lengths=lengths, **inputs)
            if self.wpo and entry.of_pairs:
                losses = losses * wpo_weights(policy, given["log_collision"], lengths)
            total += weight * losses
        return total + self.nll_weight * nll(policy, lengths, self.nll_average) if self.nll_weight else total

    def _compared(self, policy: Array, reference: Array, given: Mapping[str, Any]) -> tuple[Array, Array]:
        """Returns what losses compare in place of `policy` and `reference` under `ld_alpha` and `divergence`."""
        compared, held = policy, jax.lax.stop_gradient(reference)
        if self.ld_alpha is not None:
            compared = desensitized(policy, given["shared_logps"], ld_alpha=self.ld_alpha)
            if not self.reference_free:
                shared = jax.lax.stop_gradient(given["reference_shared_logps"])
                held = desensitized(held, shared, ld_alpha=self.ld_alpha)
        if self.divergence != "reverse_kl":
            compared = f_scores(compared - held, divergence=self.divergence, divergence_alpha=self.divergence_alpha)
            held = jnp.zeros_like(compared)
        return compared, held

    @property
    def names(self) -> frozenset[str]:
        """Names of its losses."""
        return frozenset(term.name for term in self.terms)

    @property
    def needs(self) -> frozenset[str]:
        """Names of the keyword inputs it must be called with, out of GIVEN."""
        needed = {name for term in self.terms for name in arguments(term.loss) if name in GIVEN}
        if "baseline" in needed:
            needed = needed - {"baseline"} | {"running", "present"}
        if self.ld_alpha is not None:
            needed |= {"shared_logps"} | (set() if self.reference_free else {"reference_shared_logps"})
        return frozenset(needed | ({"log_collision"} if self.wpo else set()))

    @property
    def columns(self) -> frozenset[str]:
        """Names of the data's columns that it reads, out of COLUMNS."""
        return frozenset(name for term in self.terms for name in arguments(term.loss) if name in COLUMNS)

    @property
    def sums(self) -> frozenset[str]:
        """Names of the sums over an answer's tokens that it reads, out of SUMS."""
        return self.needs & frozenset(SUMS)

    @property
    def reference_tokens(self) -> int | None:
        """Number of likely tokens that it reads of the reference at every token; 0: the token itself; None: sums."""
        if "sequence_kl" in self.needs:
            return self.kl_tokens
        return 0 if "reference_shared_logps" in self.needs else None

    @property
    def reference_free(self) -> bool:
        """Whether it reads no reference."""
        return not any(term.entry.reads_reference for term in self.terms)

    @property
    def answers_read(self) -> str:
        """Which answers it reads: "all", or "chosen" where each of its losses reads chosen answers only."""
        return "chosen" if all(term.entry.answers_read == "chosen" for term in self.terms) else "all"

    @property
    def lead(self) -> Term | None:
        """The first loss that has a beta, whose rewards are reported."""
        return next((term for term in self.terms if options_of(term.loss).get("beta") is not None), None)

    @property
    def beta(self) -> float | None:
        """Factor from log-ratios to rewards, the beta of `lead`; None where no loss has one."""
        return None if self.lead is None else options_of(self.lead.loss)["beta"]

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of data that it can be trained on, out of "paired", "unpaired" and "ranked"."""
        compares_two = self.ld_alpha is not None or self.wpo
        kinds = EVERY_KIND - {"unpaired"} if compares_two else EVERY_KIND
        return kinds.intersection(*(term.entry.kinds for term in self.terms))

    @property
    def takes_weights(self) -> bool:
        """Whether its pairs may have weights: each of its losses takes them."""
        return all(term.entry.takes_weights for term in self.terms)

    @property
    def takes_margins(self) -> bool:
        """Whether its pairs may have margins: each of its losses that compare answers reads them."""
        return all(term.entry.takes_margins for term in self.terms if term.entry.answers_read == "all")

    def rewards(
        self, policy: Float[Array, "P K"], reference: Float[Array, "P K"], lengths: Int[Array, "P K"]
    ) -> Float[Array, "P K"] | None:
        """Returns the rewards that `lead` implies: beta (policy - reference), or None where there is no lead.

        The reference is left out where the loss reads none. Some losses divide by the tokens of the answer.
        """
        lead = self.lead
        if lead is None:
            return None
        ratios = policy - reference if lead.entry.reads_reference else policy
        ratios = ratios / token_counts(lengths, policy) if lead.entry.reward_per_token else ratios
        return options_of(lead.loss)["beta"] * ratios

    def start(self) -> Running:
        """Returns the baselines before the first update, by name of the loss."""
        return {name: baseline.start() for name, (baseline, _) in self._baselines.items()}

    def follow(
        self,
        running: Running,
        policy: Float[Array, "P K"],
        reference: Float[Array, "P K"],
        *,
        lengths: Int[Array, "P K"],
        present: Bool[Array, "P"],
        weight: Float[Array, "P"] | None = None,
    ) -> Running:
        """Returns the baselines after a whole batch, without gradient.

        Args:
          weight: as how many pairs each counts; None: 1.
        """
        batch = {"lengths": lengths, "present": present, "weight": weight}
        policy = jax.lax.stop_gradient(policy)
        return {
            name: baseline.follow(running[name], policy, reference, beta=beta, **batch)
            for name, (baseline, beta) in self._baselines.items()
        }

    @property
    def _baselines(self) -> dict[str, tuple[Baseline, float]]:
        """Each baseline and the beta of its loss, by name of the loss."""
        terms = [(term.name, term.entry.baseline, term.loss) for term in self.terms]
        return {name: (each, options_of(loss)["beta"]) for name, each, loss in terms if each is not None}


# --- of any loss, an Objective or a function of the caller's own ------------------------------------------------------


def needs_of(loss: Loss) -> frozenset[str]:
    """Returns the names of the keyword inputs that a loss must be called with: its parameters named in GIVEN."""
    return loss.needs if isinstance(loss, Objective) else frozenset(arguments(loss)) & frozenset(GIVEN) - {"baseline"}


def columns_of(loss: Loss) -> frozenset[str]:
    """Returns the names of the data's columns that a loss reads: its parameters named in COLUMNS."""
    return loss.columns if isinstance(loss, Objective) else frozenset(arguments(loss)) & frozenset(COLUMNS)


def rewards_of(loss: Loss, policy: Array, reference: Array, lengths: Array) -> Array | None:
    """Returns the rewards that a loss implies, [P, K] in nats, by its `beta`; None if it has none."""
    if isinstance(loss, Objective):
        return loss.rewards(policy, reference, lengths)
    beta = defaults_of(loss).get("beta")
    return None if beta is None else beta * (policy - reference)  # type: ignore[operator]


def answers_read_by(loss: Loss) -> str:
    """Returns which answers a loss reads: "all", or "chosen"; a function that is no entry of the registry reads all."""
    if isinstance(loss, Objective):
        return loss.answers_read
    function = loss.func if isinstance(loss, functools.partial) else loss
    return next((entry.answers_read for entry in REGISTRY.values() if entry.function is function), "all")


def start_of(loss: Loss) -> Running:
    """Returns what a loss carries from update to update, before the first."""
    return loss.start() if isinstance(loss, Objective) else {}


def options_of(loss: Loss) -> dict[str, Any]:
    """Returns every option of a loss with its value, bound or by default."""
    return dict(loss.options) if isinstance(loss, Objective) else defaults_of(loss)


# --- by name ---------------------------------------------------------------------------------------------------------


def make_loss(name: str, options: Mapping[str, Any]) -> Objective:
    """Returns the named objective with its options bound.

    Args:
      name: one of LOSSES; several with weights, as "sigmoid*0.8,bco_pair*0.2"; or "package.module:function", a
        function of the caller's own.
      options: by name; each goes to all losses that have it. The options of MODIFIERS combine with losses that do not
        have them.
    Raises: InputError for an unknown name, an option that none of the losses has, or a value out of range.

    >>> objective = make_loss("sigmoid*0.8,sft*0.2", {"beta": 0.3})
    >>> objective.beta, sorted(objective.names), objective.reference_free
    (0.3, ['sft', 'sigmoid'], False)
    """
    weighted = [_weighted(part.strip()) for part in name.split(",")]
    names = [each for _, each in weighted]
    if len(set(names)) < len(names):
        raise InputError(NAME, got=f"{name!r}", expected="each loss once", remedy="Add the weights up.")
    terms = [_term(weight, _entry_of(each), options) for weight, each in weighted]
    bound = {option: value for term in reversed(terms) for option, value in options_of(term.loss).items()}
    modifiers = {option: value for option, value in options.items() if option in MODIFIERS and option not in bound}
    for option in options.keys() - bound.keys() - modifiers.keys():
        raise InputError(
            f"config.loss.{option}",
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
            NAME,
            got=f"weight {text!r}",
            expected="a number above 0 after '*', such as sigmoid*0.8",
            remedy="Correct the weight or leave it off.",
        )
    return weight, name.strip()


def _term(weight: float, entry: Entry, options: Mapping[str, Any]) -> Term:
    own = {option: value for option, value in options.items() if option in entry.options}
    return Term(weight, entry, functools.partial(entry.function, **own))


def _entry_of(name: str) -> Entry:
    """Returns the entry of a loss of ours, or makes one for a user's own function, named "module:function"."""
    module, colon, function = name.partition(":")
    if not colon:
        check_choice(NAME, name, LOSSES)
        return REGISTRY[name]
    try:
        loss = getattr(importlib.import_module(module), function)
        parameters = arguments(loss)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            NAME,
            got=f"{name!r} cannot be imported ({error})",
            expected="module:function, in a module that Python finds from here",
            remedy="Correct it, or name a loss of docs/objectives.md.",
        ) from error
    unset = [
        each
        for each, parameter in list(parameters.items())[2:]
        if parameter.default is parameter.empty and each not in ("lengths", *GIVEN)
    ]
    if len(parameters) < 3 or "lengths" not in parameters or unset or "baseline" in parameters:
        raise InputError(
            NAME,
            got=f"{name} takes {listed([*parameters]) or 'nothing'}",
            expected="parameters (policy, reference, *, lengths, ...); further ones have a default or are one of "
            f"{', '.join(each for each in GIVEN if each not in ('baseline', 'running'))}",
            remedy="Change its parameters.",
        )
    return Entry(name, loss, f"`{name}`", of_pairs=False)


def _check_modifier(
    option: str, value: Value, terms: list[Term], modifiers: Mapping[str, Value], bound: Mapping[str, Value]
) -> None:
    """Raises InputError for a value out of range, and for an option that does not combine with all of the losses.

    Args:
      modifiers: options that combine with the losses, as they are set.
      bound: options that the losses have themselves.
    """
    place, modifier = f"config.loss.{option}", MODIFIERS[option]
    expected = OPTIONS[option].refusal(value)
    if expected is not None:
        raise InputError(
            place, got=f"got {value!r}", expected=expected, remedy=f"Give --{place}=VALUE, or leave it out."
        )
    if modifier.combines is not None:
        comparing = [term.entry for term in terms if term.entry.answers_read == "all"]
        failing = [each.name for each in comparing or [term.entry for term in terms] if not modifier.combines(each)]
        if failing:
            valid = ", ".join(sorted(name for name, each in REGISTRY.items() if modifier.combines(each)))
            got, expected = (
                f"is set, and does not combine with {', '.join(sorted(failing))}",
                f"a loss that it combines with: {valid}",
            )
            raise InputError(place, got=got, expected=expected, remedy="Unset it or change loss.name.")
    if modifier.beside is None:
        return
    other, needed = modifier.beside
    if other in bound:
        names = ", ".join(sorted(term.name for term in terms))
        expected = f"losses without a {other} of their own"
        raise InputError(place, got=f"is set, and {names} has one, per token", expected=expected, remedy="Unset it.")
    if other not in modifiers or (needed is not None and modifiers[other] != needed):
        expected = f"config.loss.{other}{'' if needed is None else f'={needed!r}'} beside it"
        raise InputError(place, got="is set alone", expected=expected, remedy="Set that too, or unset it.")


def _check_sum(name: str, objective: Objective, modifiers: Mapping[str, Value]) -> None:
    """Raises InputError for losses that cannot be added up, and for an option of an input that none of them reads."""
    entries = [term.entry for term in objective.terms]
    ranking = any("ranked" in entry.kinds and entry.answers_read == "all" for entry in entries)
    if ranking and not all("ranked" in entry.kinds for entry in entries):
        ranked = ", ".join(sorted(entry.name for entry in REGISTRY.values() if "ranked" in entry.kinds))
        remedy = "Leave the losses of pairs out."
        raise InputError(NAME, got=f"{name!r}", expected=f"only losses that take rankings: {ranked}", remedy=remedy)
    for option in modifiers:
        needed = MODIFIERS[option].reads
        if needed and needed not in objective.needs:
            readers = ", ".join(name for name, entry in REGISTRY.items() if needed in arguments(entry.function))
            expected = f"a loss that reads it: {readers}"
            raise InputError(f"config.loss.{option}", got="is set", expected=expected, remedy="Unset it.")
    if objective.needs >= {"kl", "sequence_kl"}:
        raise InputError(
            NAME,
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
            NAME,
            got=f"{', '.join(sorted(objective.names))}: losses of shape {losses.shape} for a batch of one pair",
            expected="the shape [1], a loss for each pair",
            remedy="Do not average over pairs in the function.",
        )
