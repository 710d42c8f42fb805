"""From the fields of `config.loss` to one function: losses chosen by name, weighed, and what combines with them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.losses import batchwise, modifiers, pairwise
from dpo_jax.losses.batchwise import BASELINES, Running
from dpo_jax.losses.common import nll, token_counts
from dpo_jax.losses.reference_free import cpo, orpo, sft, simpo
from dpo_jax.types import InputError, check_choice

Loss = Callable[..., Array]

LOSSES: dict[str, Loss] = {
    "sigmoid": pairwise.sigmoid,
    "robust": pairwise.robust,
    "hinge": pairwise.hinge,
    "ipo": pairwise.ipo,
    "sigmoid_norm": pairwise.sigmoid_norm,
    "exo_pair": pairwise.exo_pair,
    "nca_pair": pairwise.nca_pair,
    "sppo_hard": pairwise.sppo_hard,
    "apo_zero": pairwise.apo_zero,
    "apo_down": pairwise.apo_down,
    "discopop": pairwise.discopop,
    "dpo_positive": pairwise.dpo_positive,
    "tdpo1": pairwise.tdpo1,
    "tdpo2": pairwise.tdpo2,
    "plackett_luce": pairwise.plackett_luce,
    "bco_pair": batchwise.bco_pair,
    "beta_dpo": batchwise.beta_dpo,
    "aot": batchwise.aot,
    "aot_unpaired": batchwise.aot_unpaired,
    "kto": batchwise.kto,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "sft": sft,
}
REFERENCE_FREE = frozenset({"simpo", "cpo", "orpo", "sft"})
UNPAIRED = frozenset({"kto", "bco_pair", "apo_zero"})  # a term for each answer: they take examples of one
RANKED = frozenset({"plackett_luce", "sft"})  # take any number of answers
LIKELIHOOD = frozenset({"sft"})  # compare no answers
LENGTH_NORMALISED = frozenset({"simpo", "orpo"})  # their reward is of log-probs per token
# Of the margin alone, in which the constant of an f-divergence cancels.
OF_MARGINS = frozenset("sigmoid robust hinge ipo sigmoid_norm exo_pair discopop plackett_luce beta_dpo".split())
# Each loss belongs to its pair, so that the pair can be weighed, and its answers have a length in common.
OF_PAIRS = frozenset(LOSSES) - {"aot", "aot_unpaired", "kto", "plackett_luce", "cpo", "orpo", "sft"}

# Sums over an answer's tokens that scoring makes where an objective asks for them.
SUMS = ("shared_logps", "log_collision", "sequence_kl")
# What a training step passes on to losses that have arguments of these names, besides `lengths`.
GIVEN = ("present", "running", "baseline", "kl", *SUMS, "reference_shared_logps")


class Term(NamedTuple):
    """One of the losses of a weighted sum, its options bound."""

    weight: float
    name: str
    loss: Loss


@dataclasses.dataclass(frozen=True)
class Objective:
    """A weighted sum of losses and what combines with them, called as a loss is; made by `make_loss`."""

    terms: tuple[Term, ...]
    options: Mapping[str, Any]  # every option with the value that it has, given or by default
    divergence: str = "reverse_kl"
    divergence_alpha: float = 0.5
    ld_alpha: float | None = None
    wpo: bool = False
    nll_weight: float = 0.0  # of the chosen answers' negative log-likelihood, where no loss has such a term itself
    nll_average: bool = True
    kl_tokens: int = 32  # likely tokens that the divergence along an answer is taken over, the rest being one more

    def __call__(
        self,
        policy: Float[Array, "P K"],
        reference: Float[Array, "P K"],
        *,
        lengths: Int[Array, "P K"],
        **given: Any,
    ) -> Float[Array, "P"]:
        """The losses of all pairs, not averaged.

        Args:
          policy, reference: log-probs summed over answer tokens, in nats; no gradient flows into `reference`.
          lengths: scored tokens of each answer; 0 for one that is not there.
          given: all that `needs` names.
        """
        compared, held = policy, jax.lax.stop_gradient(reference)
        if self.ld_alpha is not None:
            compared = modifiers.desensitized(policy, given["shared_logps"], ld_alpha=self.ld_alpha)
            if not self.reference_free:
                shared = jax.lax.stop_gradient(given["reference_shared_logps"])
                held = modifiers.desensitized(held, shared, ld_alpha=self.ld_alpha)
        if self.divergence != "reverse_kl":
            compared = modifiers.f_scores(
                compared - held, divergence=self.divergence, divergence_alpha=self.divergence_alpha
            )
            held = jnp.zeros_like(compared)
        total = jnp.zeros(len(policy), policy.dtype)
        for term in self.terms:
            known = {name: given[name] for name in given if name in arguments(term.loss)}
            if term.name in BASELINES:
                known["baseline"] = given["running"][term.name]["value"]
            of_pairs = policy if term.name in LIKELIHOOD else compared
            losses = term.loss(of_pairs, held, lengths=lengths, **known)
            if self.wpo and term.name in OF_PAIRS:
                losses = losses * modifiers.wpo_weights(policy, given["log_collision"], lengths)
            total += term.weight * losses
        return total + self.nll_weight * nll(policy, lengths, self.nll_average) if self.nll_weight else total

    @property
    def names(self) -> frozenset[str]:
        """Of its losses."""
        return frozenset(term.name for term in self.terms)

    @property
    def needs(self) -> frozenset[str]:
        """Of GIVEN, what it must be called with."""
        found = {name for term in self.terms for name in arguments(term.loss) if name in GIVEN}
        if "baseline" in found:
            found = found - {"baseline"} | {"running", "present"}
        if self.ld_alpha is not None:
            found |= {"shared_logps"} | (set() if self.reference_free else {"reference_shared_logps"})
        return frozenset(found | ({"log_collision"} if self.wpo else set()))

    @property
    def sums(self) -> frozenset[str]:
        """Of SUMS, what it reads."""
        return self.needs & frozenset(SUMS)

    @property
    def reference_tokens(self) -> int | None:
        """How many likely tokens it reads of the reference at every token; 0: the token itself, None: sums alone."""
        if "sequence_kl" in self.needs:
            return self.kl_tokens
        return 0 if "reference_shared_logps" in self.needs else None

    @property
    def reference_free(self) -> bool:
        """Whether it reads no reference."""
        return self.names <= REFERENCE_FREE

    @property
    def answers_read(self) -> str:
        """Which answers it reads: "all", or "chosen" where every loss reads chosen answers only."""
        return "chosen" if self.names <= LIKELIHOOD else "all"

    @property
    def lead(self) -> Term | None:
        """The first loss that compares answers, whose rewards are reported."""
        return next((term for term in self.terms if options_of(term.loss).get("beta") is not None), None)

    @property
    def beta(self) -> float | None:
        """Which turns log-ratios into rewards; None for one that compares no answers and so has none."""
        return None if self.lead is None else options_of(self.lead.loss)["beta"]

    @property
    def kinds(self) -> frozenset[str]:
        """Of "paired", "unpaired" and "ranked", the data that it can be trained on."""
        ranked = {"ranked"} if self.names <= RANKED else set()
        by_answer = self.names <= UNPAIRED | LIKELIHOOD and self.ld_alpha is None and not self.wpo
        unpaired = {"unpaired"} if by_answer else set()
        return frozenset({"paired"} | ranked | unpaired)

    def rewards(
        self, policy: Float[Array, "P K"], reference: Float[Array, "P K"], lengths: Int[Array, "P K"]
    ) -> Float[Array, "P K"] | None:
        """beta (policy - reference) of the first loss that compares answers, without the reference if it reads none and
        per token if it is of those; None if there is no such loss."""
        lead = self.lead
        if lead is None:
            return None
        ratios = policy if lead.name in REFERENCE_FREE else policy - reference
        ratios = ratios / token_counts(lengths, policy) if lead.name in LENGTH_NORMALISED else ratios
        return options_of(lead.loss)["beta"] * ratios

    def start(self) -> Running:
        """The baselines before the first update."""
        return {term.name: BASELINES[term.name].start() for term in self.terms if term.name in BASELINES}

    def follow(
        self,
        running: Running,
        policy: Float[Array, "P K"],
        reference: Float[Array, "P K"],
        *,
        lengths: Int[Array, "P K"],
        present: Bool[Array, "P"],
    ) -> Running:
        """The baselines with a whole batch's log-probs taken in, without gradient."""
        policy = jax.lax.stop_gradient(policy)
        return {
            name: BASELINES[name].follow(
                before, policy, reference, lengths=lengths, present=present, beta=options_of(self._loss(name))["beta"]
            )
            for name, before in running.items()
        }

    def _loss(self, name: str) -> Loss:
        return next(term.loss for term in self.terms if term.name == name)


# --- of any loss, an Objective or a function of the caller's own ------------------------------------------------------


def needs_of(loss: Loss) -> frozenset[str]:
    """Of GIVEN, what a loss must be called with: the arguments that it names."""
    return loss.needs if isinstance(loss, Objective) else frozenset(arguments(loss)) & frozenset(GIVEN) - {"baseline"}


def rewards_of(loss: Loss, policy: Array, reference: Array, lengths: Array) -> Array | None:
    """The rewards that a loss implies, [P, K] in nats, by its `beta`; None if it has none."""
    if isinstance(loss, Objective):
        return loss.rewards(policy, reference, lengths)
    beta = options_of(loss).get("beta")
    return None if beta is None else beta * (policy - reference)


def start_of(loss: Loss) -> Running:
    """What a loss carries from update to update, before the first."""
    return loss.start() if isinstance(loss, Objective) else {}


def arguments(loss: Loss) -> Mapping[str, inspect.Parameter]:
    """The parameters of a loss by name."""
    return inspect.signature(loss).parameters


def options_of(loss: Loss) -> dict[str, Any]:
    """Every option of a loss with the value that it has, bound or by default."""
    if isinstance(loss, Objective):
        return dict(loss.options)
    fixed = ("policy", "reference", "lengths", *GIVEN)
    return {name: each.default for name, each in arguments(loss).items() if name not in fixed}


# --- by name ---------------------------------------------------------------------------------------------------------


def make_loss(name: str, options: Mapping[str, Any]) -> Objective:
    """The named objective with its options bound, each checked against the losses that it is for, and its range.

    Args:
      name: one of LOSSES; several with weights, as "sigmoid*0.8,bco_pair*0.2"; or "package.module:function" of the
        caller's own, called as those are.
      options: those of the losses by name, each for all losses that have it, and `divergence`, `divergence_alpha`,
        `ld_alpha`, `wpo`, `nll_weight`, `nll_average`, which combine with them.
    Raises: InputError for an unknown name, an option that none of the losses has, or a value out of range.
    """
    chosen = [_weighed(part.strip()) for part in name.split(",")]
    names = [each for _, each in chosen]
    if len(set(names)) < len(names):
        raise InputError("config.loss.name", got=f"{name!r}", expected="each loss once", remedy="Add the weights up.")
    losses = {each: _loss_of(each) for each in names}
    known = {each: options_of(loss) for each, loss in losses.items()}
    own = {option for found in known.values() for option in found}
    around = {option: value for option, value in options.items() if option in AROUND and option not in own}
    for option in options.keys() - own - around.keys():
        raise InputError(
            f"config.loss.{option}",
            got=f"is set, and loss {name!r} has no such option",
            expected=f"one of {', '.join(sorted(own | AROUND.keys()))}",
            remedy="Unset it or choose a loss that has it.",
        )
    terms = [
        Term(weight, each, functools.partial(losses[each], **{k: v for k, v in options.items() if k in known[each]}))
        for weight, each in chosen
    ]
    bound = {option: value for term in reversed(terms) for option, value in options_of(term.loss).items()}
    _check_around(frozenset(names), own, around)
    objective = Objective(tuple(terms), {**bound, **around}, **around)
    if objective.names & {"plackett_luce"} and not objective.names <= RANKED:
        expected = f"with none but {', '.join(sorted(RANKED))}"
        raise InputError(
            "config.loss.name", got=f"{name!r}", expected=expected, remedy="Leave the losses of pairs out."
        )
    if "kl_tokens" in around and "sequence_kl" not in objective.needs:
        expected = "a loss that reads divergences, such as tdpo2"
        raise InputError("config.loss.kl_tokens", got="is set", expected=expected, remedy="Unset it.")
    if objective.needs >= {"kl", "sequence_kl"}:
        raise InputError(
            "config.loss.name",
            got=f"{name!r}, which reads mismatched answers and divergences along the pair's own",
            expected="one of the two",
            remedy="Leave one of the losses out.",
        )
    _trace(objective)
    return objective


def _weighed(part: str) -> tuple[float, str]:
    """`name*weight` in its two parts."""
    name, star, text = part.partition("*")
    try:
        weight = float(text) if star else 1.0
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(
            "config.loss.name",
            got=f"weight {text!r}",
            expected="a number above 0 after '*', such as sigmoid*0.8",
            remedy="Correct the weight or leave it off.",
        )
    return weight, name.strip()


def _loss_of(name: str) -> Loss:
    """A loss by its name, or by the place of a function of the user's own."""
    module, colon, function = name.partition(":")
    if not colon:
        check_choice("config.loss.name", name, LOSSES)
        return LOSSES[name]
    try:
        found = getattr(importlib.import_module(module), function)
        parameters = arguments(found)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            "config.loss.name",
            got=f"{name!r} cannot be imported ({error})",
            expected="module:function, of a module that Python finds from here",
            remedy="Correct it, or name one of dpo_jax.losses.LOSSES.",
        ) from error
    unset = [
        each
        for each, parameter in list(parameters.items())[2:]
        if parameter.default is parameter.empty and each not in ("lengths", *GIVEN)
    ]
    if len(parameters) < 3 or "lengths" not in parameters or unset or "baseline" in parameters:
        raise InputError(
            "config.loss.name",
            got=f"{name} takes {', '.join(parameters) or 'nothing'}",
            expected="(policy, reference, *, lengths, ...), the others with a default or of what a step gives "
            f"({', '.join(each for each in GIVEN if each not in ('baseline', 'running'))})",
            remedy="Change its parameters.",
        )
    return found


def _fraction(value: Any) -> bool:
    return 0 <= value <= 1


# Options that combine with losses: with which ones, and which values will do.
AROUND: dict[str, tuple[frozenset[str] | None, Callable[[Any], bool], str]] = {
    "divergence": (OF_MARGINS, lambda value: value in modifiers.DIVERGENCES, f"one of {modifiers.DIVERGENCES}"),
    "divergence_alpha": (OF_MARGINS, lambda value: 0 < value < 1, "a number in (0, 1)"),
    "ld_alpha": (OF_PAIRS, _fraction, "a number in [0, 1]"),
    "wpo": (OF_PAIRS, lambda value: isinstance(value, bool), "true or false"),
    "nll_weight": (None, lambda value: value >= 0, "a number >= 0"),
    "nll_average": (None, lambda value: isinstance(value, bool), "true or false"),
    "kl_tokens": (None, lambda value: value >= 1, "a number >= 1"),
}
# Options that say how another one, which must be set as well, is meant.
OF_ANOTHER = {"divergence_alpha": ("divergence", "alpha_divergence"), "nll_average": ("nll_weight", None)}


def _check_around(names: frozenset[str], own: set[str], around: Mapping[str, Any]) -> None:
    """Raises InputError for an option that combines with none of the losses, or a value out of range.

    Args:
      own: options that the losses have themselves.
    """
    for option, value in around.items():
        combines, will_do, expected = AROUND[option]
        others = frozenset() if combines is None else names - LIKELIHOOD - combines
        place, got = f"config.loss.{option}", f"got {value!r}"
        if not will_do(value):
            raise InputError(place, got=got, expected=expected, remedy="Change it.")
        if combines is not None and (others or names <= LIKELIHOOD):
            expected = f"losses that it combines with: {', '.join(sorted(combines))}"
            got = f"is set, and does not combine with {', '.join(sorted(others or names))}"
            raise InputError(place, got=got, expected=expected, remedy="Unset it or change loss.name.")
        whose, at = OF_ANOTHER.get(option, (None, None))
        if whose in own:
            expected = f"losses without a {whose} of their own"
            got = f"is set, and {', '.join(sorted(names))} has one, per token"
            raise InputError(place, got=got, expected=expected, remedy="Unset it.")
        if whose is not None and (whose not in around or (at is not None and around[whose] != at)):
            expected = f"config.loss.{whose}{'' if at is None else f'={at!r}'} beside it"
            raise InputError(place, got="is set alone", expected=expected, remedy="Set that too, or unset it.")


def _trace(objective: Objective) -> None:
    """Traced on one pair, not run: raises for values out of range, and for what a user's own function does not take."""
    logps, counts = jax.ShapeDtypeStruct((1, 2), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    scalar, present = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.bool_)
    known = {"present": present, "kl": scalar, "running": jax.eval_shape(objective.start)}
    given = {name: known.get(name, logps) for name in objective.needs}
    found = jax.eval_shape(lambda x, n, given: objective(x, x, lengths=n, **given), logps, counts, given)
    if found.shape != (1,):
        raise InputError(
            "config.loss.name",
            got=f"losses of shape {found.shape} for one pair",
            expected="one loss a pair, [P]",
            remedy="Do not average in the function.",
        )
