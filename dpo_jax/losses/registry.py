"""Every loss by name, with what the rest of the package must know of it, and every field of `config.loss`.

A loss is its function in a module of this folder, its entry in REGISTRY below (and a row in OPTIONS if it brings an
option that no other loss has), and its section in docs/objectives.md; docs/architecture.md lists the steps. The
configuration, its checks, the model card and the tables of the documentation derive from it; `python -m docs.tables`
writes the tables.
"""

from __future__ import annotations

import collections
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from jaxtyping import Array

from dpo_jax.losses.batchwise import MEAN_MARGIN, REWARD_SHIFT, Baseline, aot, aot_unpaired, bco_pair, beta_dpo, kto
from dpo_jax.losses.common import (
    AT_LEAST_ONE,
    FLIP_RATE,
    FRACTION,
    INNER_FRACTION,
    NOT_NEGATIVE,
    NOT_TRACED,
    POSITIVE,
    POSITIVE_FLIP_RATE,
    SHARE,
    Number,
    Range,
    is_traced,
    refusal_of_number,
    refusal_of_switch,
)
from dpo_jax.losses.modifiers import DIVERGENCES
from dpo_jax.losses.pairwise import (
    apo_down,
    apo_zero,
    discopop,
    dpo_positive,
    exo_pair,
    hinge,
    ipo,
    nca_pair,
    plackett_luce,
    robust,
    sigmoid,
    sigmoid_norm,
    sppo_hard,
    tdpo1,
    tdpo2,
)
from dpo_jax.losses.reference_free import cpo, orpo, sft, simpo

Loss = Callable[..., Array]
Options: TypeAlias = Mapping[str, Any]  # by name; values as in Value, or what an error will refuse
Value = Number | bool | str | None  # of an option

# Sums over an answer's tokens that scoring makes where an objective reads them.
SUMS = ("shared_logps", "log_collision", "sequence_kl")
# Inputs that a training step makes. A parameter of a loss that is named here is passed to it as a keyword, besides
# `lengths`. SUMS and any other auxiliary output of the model are read in the same way, see `inputs_of`.
GIVEN = ("present", "running", "baseline", "kl", *SUMS, "reference_shared_logps")
# The same of parameters that have a default, which they keep where the data lack the column.
COLUMNS = ("weight", "margin")

# Kinds of data.
PAIRED = frozenset({"paired"})
ANSWERS = PAIRED | {"unpaired"}  # single answers too, each labeled good or bad
RANKINGS = PAIRED | {"ranked"}  # any number of answers too
EVERY_KIND = ANSWERS | RANKINGS


def arguments(loss: Loss) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a loss by name."""
    return inspect.signature(loss).parameters


def inputs_of(loss: Loss) -> frozenset[str]:
    """Returns the names of a loss's inputs besides policy, reference, lengths and COLUMNS.

    They are its parameters named in GIVEN, and those without a default: auxiliary outputs of the model.
    """
    named = list(arguments(loss).items())[2:]  # own losses may name policy and reference otherwise
    return frozenset(
        name
        for name, each in named
        if name in GIVEN or (each.default is each.empty and name not in ("lengths", *COLUMNS))
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    )


def defaults_of(loss: Loss) -> dict[str, Value]:
    """Returns every option of a function with its default, or with the value that `functools.partial` bound."""
    inputs = ("policy", "reference", "lengths", *GIVEN, *COLUMNS)
    return {
        name: each.default
        for name, each in arguments(loss).items()
        if name not in inputs and each.default is not each.empty  # own losses may name policy and reference otherwise
    }


# --- options: the fields of `config.loss`, besides its name -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """A set of names."""

    names: tuple[str, ...]

    def holds(self, value: Value) -> bool:
        """Returns whether `value` is one of the names."""
        return value in self.names

    def __str__(self) -> str:
        """Returns the names as documentation writes them."""
        return " | ".join(self.names)

    @property
    def expected(self) -> str:
        """Completes "expected ..." in an error."""
        return "one of " + ", ".join(map(repr, self.names))


@dataclasses.dataclass(frozen=True)
class Modifier:
    """Marks an option that combines with losses instead of belonging to some of them."""

    unset: Value  # the value it has where it is not set
    combines: Callable[[Entry], bool] | None = None  # whether it combines with a loss; None: with every one
    beside: tuple[str, Value] | None = None  # an option that must be set too, and to what; None: to anything
    reads: str = ""  # one of GIVEN, which at least one of the losses must read


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of `config.loss`. Unset, it has the default of each loss, which is that of the function's parameter."""

    name: str
    type: type
    meaning: str
    valid: Range | Choice | None = None  # which values of the type; None: all
    modifier: Modifier | None = None

    @property
    def default(self) -> str:
        """The field's default, as text."""
        return "unset"

    @property
    def help(self) -> str:
        """One line for tables of fields: losses if they are few, meaning, range, and the value where it is unset."""
        unset = {name: entry.options[self.name] for name, entry in REGISTRY.items() if self.name in entry.options}
        few = 0 < len(unset) <= 3 and self.modifier is None
        valid = "" if self.valid is None else f": {self.valid}" if isinstance(self.valid, Choice) else f", {self.valid}"
        if self.modifier is not None:
            usual = as_text(self.modifier.unset)
        else:
            usual = collections.Counter(map(as_text, unset.values())).most_common(1)[0][0]
        others = ", ".join(f"{name} {as_text(value)}" for name, value in unset.items() if as_text(value) != usual)
        text = f"{', '.join(unset)}: {self.meaning}" if few else self.meaning
        if self.modifier is not None and self.modifier.unset is None:
            return text + valid
        return f"{text}{valid}; unset: {usual}" + (f" ({others})" if others else "")

    def refusal(self, value: Any) -> str | None:
        """Returns what was expected if `value` is not valid, else None. Only a number may be traced."""
        if self.type is bool:
            return refusal_of_switch(value)
        if self.type is float and isinstance(self.valid, Range):
            return refusal_of_number(value, self.valid)
        expected = "" if self.valid is None else self.valid.expected
        if is_traced(value):
            return expected + NOT_TRACED
        return None if self.valid is None or self.valid.holds(value) else expected


def as_text(value: Value) -> str:
    """Returns a value as documentation writes it: "0.1", "true", "unset"."""
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else f"{value:g}"


OPTIONS: Mapping[str, Option] = MappingProxyType(
    {
        option.name: option
        for option in (
            Option("beta", float, "inverse temperature", POSITIVE),
            Option("label_smoothing", float, "assumed rate of flipped labels", FLIP_RATE),
            Option("average", bool, "log-ratios per token (true) or summed (false)"),
            Option("tau", float, "temperature of the blend", SHARE),
            Option("penalty", float, "weight of the fall of a chosen answer's log-prob", NOT_NEGATIVE),
            Option("gamma", float, "margin to reach", NOT_NEGATIVE),
            Option("kl_weight", float, "weight of the divergences' difference", NOT_NEGATIVE),
            Option(
                "kl_tokens",
                int,
                "TDPO: likely tokens whose reference log-probs are stored",
                AT_LEAST_ONE,
                Modifier(32, reads="sequence_kl"),
            ),
            Option("sensitivity", float, "how much beta follows the batch's margins", NOT_NEGATIVE),
            Option("desirable_weight", float, "weight of desirable answers", POSITIVE),
            Option("undesirable_weight", float, "weight of undesirable answers", POSITIVE),
            Option(
                "divergence",
                str,
                "divergence from the reference",
                Choice(DIVERGENCES),
                Modifier("reverse_kl", lambda entry: entry.of_margins),
            ),
            Option(
                "divergence_alpha",
                float,
                "alpha_divergence: between reverse KL (0) and forward KL (1)",
                INNER_FRACTION,
                Modifier(0.5, lambda entry: entry.of_margins, beside=("divergence", "alpha_divergence")),
            ),
            Option(
                "ld_alpha",
                float,
                "LD-DPO: weight of tokens beyond the shorter answer's length, where 1 changes nothing",
                FRACTION,
                Modifier(None, lambda entry: entry.of_pairs),
            ),
            Option(
                "wpo",
                bool,
                "WPO: weight pairs by how likely the policy would write them",
                None,
                Modifier(False, lambda entry: entry.of_pairs),
            ),
            Option(
                "nll_weight",
                float,
                "RPO: weight of the chosen answers' negative log-likelihood",
                NOT_NEGATIVE,
                Modifier(0.0),
            ),
            Option(
                "nll_average",
                bool,
                "that likelihood per token (true) or summed (false)",
                None,
                Modifier(True, beside=("nll_weight", None)),
            ),
        )
    }
)
MODIFIERS: dict[str, Modifier] = {name: each.modifier for name, each in OPTIONS.items() if each.modifier is not None}


# --- losses ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """A loss and what combining, checking and documenting it takes."""

    name: str
    function: Loss
    title: str  # as the model card calls it
    paper: str = ""  # arXiv id
    kinds: frozenset[str] = PAIRED  # data that it takes
    reads_reference: bool = True
    answers_read: str = "all"  # all | chosen: a loss of chosen answers alone compares nothing
    reward_per_token: bool = False
    of_pairs: bool = True  # each loss belongs to one pair of answers, so the pair can be weighed (WPO, LD-DPO)
    of_margins: bool = False  # reads a - b alone, in which the constant of an f-divergence cancels
    baseline: Baseline | None = None
    ranges: Mapping[str, Range] = dataclasses.field(default_factory=dict)  # of options, where narrower than the field's

    @property
    def options(self) -> dict[str, Value]:
        """The loss's own options with their defaults, from the function's signature."""
        return defaults_of(self.function)

    def range_of(self, option: str) -> Range | Choice | None:
        """Returns the valid values of one of its options; None: all of the option's type."""
        return self.ranges.get(option, OPTIONS[option].valid)

    @property
    def reads_batch(self) -> bool:
        """Whether it reads the whole batch at once, so that microbatches cannot be made one by one."""
        return bool(arguments(self.function).keys() & {"present", "baseline"})

    @property
    def takes_weights(self) -> bool:
        """Whether a pair of weight n is the same to it as the pair n times.

        A loss of single pairs is multiplied from outside. One that reads the whole batch must read the weights too.
        """
        return not arguments(self.function).keys() & {"present"} or "weight" in arguments(self.function)

    @property
    def takes_margins(self) -> bool:
        """Whether it reads the margins of the data."""
        return "margin" in arguments(self.function)


_ENTRIES = (
    Entry("sigmoid", sigmoid, "Direct Preference Optimization", "2305.18290", of_margins=True),
    Entry("robust", robust, "robust DPO", "2403.00409", of_margins=True),
    Entry("hinge", hinge, "a hinge loss on preferences", "2309.06657", of_margins=True),
    Entry("ipo", ipo, "Identity Preference Optimization", "2310.12036", of_margins=True),
    Entry("sigmoid_norm", sigmoid_norm, "length-normalized DPO", "2411.15124", of_margins=True),
    Entry(
        "exo_pair",
        exo_pair,
        "Efficient Exact Optimization",
        "2402.00856",
        of_margins=True,
        ranges={"label_smoothing": POSITIVE_FLIP_RATE},
    ),
    Entry("nca_pair", nca_pair, "Noise Contrastive Alignment", "2402.05369"),
    Entry("sppo_hard", sppo_hard, "Self-Play Preference Optimization", "2405.00675"),
    Entry("apo_zero", apo_zero, "Anchored Preference Optimization (zero)", "2408.06266", ANSWERS),
    Entry("apo_down", apo_down, "Anchored Preference Optimization (down)", "2408.06266"),
    Entry("discopop", discopop, "DiscoPOP", "2406.08414", of_margins=True),
    Entry("dpo_positive", dpo_positive, "DPO-Positive", "2402.13228"),
    Entry("tdpo1", tdpo1, "Token-level DPO (TDPO1)", "2404.11999"),
    Entry("tdpo2", tdpo2, "Token-level DPO (TDPO2)", "2404.11999"),
    Entry(
        "plackett_luce",
        plackett_luce,
        "DPO on whole rankings (Plackett-Luce)",
        "2305.18290",
        RANKINGS,
        of_pairs=False,
        of_margins=True,
    ),
    Entry("bco_pair", bco_pair, "Binary Classifier Optimization", "2404.04656", ANSWERS, baseline=REWARD_SHIFT),
    Entry("beta_dpo", beta_dpo, "beta-DPO", "2407.08639", of_margins=True, baseline=MEAN_MARGIN),
    Entry("aot", aot, "Alignment via Optimal Transport", "2406.05882", of_pairs=False),
    Entry("aot_unpaired", aot_unpaired, "Alignment via Optimal Transport (unpaired)", "2406.05882", of_pairs=False),
    Entry("kto", kto, "Kahneman-Tversky Optimization", "2402.01306", ANSWERS, of_pairs=False),
    Entry("simpo", simpo, "SimPO", "2405.14734", reads_reference=False, reward_per_token=True),
    Entry("cpo", cpo, "Contrastive Preference Optimization", "2401.08417", reads_reference=False, of_pairs=False),
    Entry(
        "orpo",
        orpo,
        "Odds Ratio Preference Optimization",
        "2403.07691",
        reads_reference=False,
        reward_per_token=True,
        of_pairs=False,
    ),
    Entry(
        "sft",
        sft,
        "supervised fine-tuning on the chosen answers",
        kinds=EVERY_KIND,
        reads_reference=False,
        answers_read="chosen",
        of_pairs=False,
    ),
)
REGISTRY: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
LOSSES: dict[str, Loss] = {name: entry.function for name, entry in REGISTRY.items()}
REFERENCE_FREE = frozenset(name for name, entry in REGISTRY.items() if not entry.reads_reference)
