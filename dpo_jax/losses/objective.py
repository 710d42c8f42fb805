"""Objective: a weighted sum of losses with the options that combine with them, and what any loss says of itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.losses.batchwise import Baseline, Running
from dpo_jax.losses.common import Number, is_traced, nll, token_counts
from dpo_jax.losses.modifiers import desensitized, f_scores, wpo_weights
from dpo_jax.losses.registry import (
    COLUMNS,
    EVERY_KIND,
    MODIFIERS,
    OPTIONS,
    REGISTRY,
    SUMS,
    Entry,
    Loss,
    Value,
    arguments,
    defaults_of,
    inputs_of,
)

Numbers = dict[str, dict[str, Any]]  # of an objective: {loss name: {option, or "weight": its value}}
OF_ALL = ""  # in place of a loss's name: options that combine with all losses


def _unset(option: str) -> Any:
    """Returns the value of an option that combines with losses where it is not set."""
    return MODIFIERS[option].unset


class Term(NamedTuple):
    """One of the losses of a weighted sum, its options bound."""

    weight: Number
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
    divergence_alpha: Number = _unset("divergence_alpha")
    ld_alpha: Number | None = _unset("ld_alpha")
    wpo: bool = _unset("wpo")
    nll_weight: Number = _unset("nll_weight")  # for losses that have no such term themselves
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
          given: the inputs that `needs` names, and those that `columns` names where the data have them. Others are
            not read.
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
        if not is_traced(self.nll_weight) and self.nll_weight == 0:
            return total
        return total + self.nll_weight * nll(policy, lengths, self.nll_average)

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
        """Names of the keyword inputs it must be called with: of GIVEN, and other auxiliary outputs of the model."""
        needed = set().union(*(inputs_of(term.loss) for term in self.terms))
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
    def beta(self) -> Number | None:
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

    @property
    def numbers(self) -> Numbers:
        """Weights and numeric options that may be replaced in a compiled program, see `with_numbers`.

        Numbers that choose code are not among them: `kl_tokens`, an `nll_weight` of 0, and options that are not set.
        Neither are those of functions of the caller's own, which may branch on them.
        """
        numbers: Numbers = {term.name: {"weight": term.weight} for term in self.terms}
        for term in self.terms:
            if REGISTRY.get(term.name) is term.entry:
                bound = options_of(term.loss)
                numbers[term.name] |= {
                    option: value for option, value in bound.items() if OPTIONS[option].type is float
                }
        used = {option: getattr(self, option) for option in MODIFIERS if self._reads_number(option)}
        return numbers | {OF_ALL: used}

    def _reads_number(self, option: str) -> bool:
        """Whether an option of MODIFIERS is a number that is set, beside what it needs."""
        value, beside = getattr(self, option), MODIFIERS[option].beside
        alone = beside is not None and getattr(self, beside[0]) != beside[1]
        return OPTIONS[option].type is float and not alone and value is not None and (is_traced(value) or value != 0)

    def with_numbers(self, numbers: Numbers) -> Objective:
        """Returns the objective with other `numbers`, which may be traced: their ranges are not checked then."""
        terms = []
        for term in self.terms:
            options = {option: value for option, value in numbers[term.name].items() if option != "weight"}
            loss = functools.partial(term.loss, **options) if options else term.loss
            terms.append(Term(numbers[term.name]["weight"], term.entry, loss))
        return dataclasses.replace(self, terms=tuple(terms), **numbers[OF_ALL])

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
    def _baselines(self) -> dict[str, tuple[Baseline, Number]]:
        """Each baseline and the beta of its loss, by name of the loss."""
        terms = [(term.name, term.entry.baseline, term.loss) for term in self.terms]
        return {name: (each, options_of(loss)["beta"]) for name, each, loss in terms if each is not None}


# --- of any loss, an Objective or a function of the caller's own ------------------------------------------------------


def needs_of(loss: Loss) -> frozenset[str]:
    """Returns the names of the keyword inputs that a loss must be called with, see `inputs_of`."""
    return loss.needs if isinstance(loss, Objective) else inputs_of(loss) - {"baseline"}


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
