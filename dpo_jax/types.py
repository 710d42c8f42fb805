"""Records that pass between modules, and the one error for bad input."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int


class InputError(ValueError):
    """Something a user gave cannot be used: says where, what was there, what belongs there, and what to do."""

    def __init__(self, place: str, *, got: str, expected: str, remedy: str):
        self.place, self.got, self.expected, self.remedy = place, got, expected, remedy
        super().__init__(f"{place}: {got}; expected {expected}. {remedy}")


def check_choice(place: str, value: str, valid: Iterable[str]) -> None:
    """Raises InputError unless `value`, which stands at `place`, is one of the valid names."""
    names = list(valid)
    if value not in names:
        raise InputError(
            place, got=f"got {value!r}", expected=f"one of {', '.join(names)}", remedy="Name one of these."
        )


class Row(NamedTuple):
    """One record as it stands in a source; `place` names it in errors, such as `prefs.jsonl:17`."""

    place: str
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A preference as text: `prompt + chosen` and `prompt + rejected` are what a model reads.

    Of an unpaired example one answer is empty, the one that there is not. A ranking has further answers, best first.
    """

    place: str  # where it came from, for errors
    prompt: str
    chosen: str
    rejected: str
    others: tuple[str, ...] = ()  # of a ranking: the answers after the second best, in order
    templated: bool = False  # a chat template wrote it: special tokens are in the text, none are added
    reference: tuple[float, float] | None = None  # log-probs given with the data, in nats: chosen, rejected

    @property
    def answers(self) -> tuple[str, ...]:
        """All K answers, best first."""
        return self.chosen, self.rejected, *self.others


class Encoded(NamedTuple):
    """A preference as token ids, boundary decided, truncated, EOS in place. An answer without ids is not there."""

    prompt: Int[np.ndarray, "prompt_tokens"]
    chosen: Int[np.ndarray, "chosen_tokens"]
    rejected: Int[np.ndarray, "rejected_tokens"]
    others: tuple[Int[np.ndarray, "_"], ...] = ()  # of a ranking: the answers after the second best, in order

    @classmethod
    def of(cls, prompt: np.ndarray, *answers: np.ndarray) -> Encoded:
        """A prompt with all its answers, two and more."""
        chosen, rejected, *others = answers
        return cls(prompt, chosen, rejected, tuple(others))

    @property
    def answers(self) -> tuple[np.ndarray, ...]:
        """All K answers, best first."""
        return self.chosen, self.rejected, *self.others

    @property
    def lengths(self) -> list[int]:
        """Tokens of the prompt and of each answer."""
        return [len(ids) for ids in (self.prompt, *self.answers)]


class AnswerTokens(NamedTuple):
    """What a model says of each of an answer's n tokens, in nats, and of the C likeliest in its place, those first."""

    logps: Float[np.ndarray, "n"]
    likely: Int[np.ndarray, "n C"]
    likely_logps: Float[np.ndarray, "n C"]


@runtime_checkable
class Pairs(Protocol):
    """A set of encoded pairs, in memory or on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Encoded: ...


class Rows(NamedTuple):
    """Packed token rows and where in them completion tokens are scored. Leading axes may be added (microbatches).

    `key_start` and `key_end` bound the keys each position may attend: [key_start, key_end), never empty.
    `source` is the index whose hidden state predicts `target`; `slot` is K * pair + side (side 0 chosen, 1
    rejected; K is 2, or the most answers of a ranking), with `pair` counted within the batch; unused entries have
    slot -1. `likely` and `likely_logps` are the reference's C likeliest tokens at each entry and their log-probs in
    nats, where an objective reads them.
    """

    tokens: Int[Any, "*micro R S"]
    positions: Int[Any, "*micro R S"]
    key_start: Int[Any, "*micro R S"]
    key_end: Int[Any, "*micro R S"]
    source: Int[Any, "*micro R T"]
    target: Int[Any, "*micro R T"]
    slot: Int[Any, "*micro R T"]
    likely: Int[Any, "*micro R T C"] | None = None
    likely_logps: Float[Any, "*micro R T C"] | None = None


class Batch(NamedTuple):
    """One update's pairs: `count` of the `A` microbatches are in use, and every pair lies whole in one of them.

    `rows` may be any pytree whose leaves have the leading axis A; only the scoring function looks inside.
    """

    rows: Any
    count: Int[Any, ""]
    present: Bool[Any, "A P"]  # which pairs a microbatch holds; a pair in none of them is padding
    reference: Float[Any, "P K"]  # stored reference log-probs in nats; 0 where there are none
    lengths: Int[Any, "P K"]  # scored tokens of each completion; 0 for one that is not there, and for padding pairs
    crop: Int[Any, "A"] | None = None  # which of the step's crops each microbatch is cut to; None: none is
    reference_sums: Any = None  # {name: [P, K]}: further sums over answers under the reference, if the objective asks
    mismatched: Any = None  # a Batch of prompts with answers of others, scored without gradient, if the objective asks
