"""Records that pass between modules, and the one error for bad input."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, PyTree

AnyArray: TypeAlias = Any  # numpy, JAX, or the shape of one; this module does not import jax

Value: TypeAlias = Any  # of a column of a row: text, number, truth value, list, mapping or None


# Characters that terminals act on, but for tabs and line breaks: control characters and those that reverse text. And
# halves of surrogate pairs, which cannot be printed.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Returns the text with an escape such as `\\x1b` for each character that a terminal would act on."""
    return _UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


class InputError(ValueError):
    """Input from a user that cannot be used: the place, what was found there, what was expected, and the remedy.

    All four may quote a file; they are made `printable`.
    """

    def __init__(self, place: str, *, got: str, expected: str, remedy: str):
        self.place, self.got, self.expected, self.remedy = map(printable, (place, got, expected, remedy))
        super().__init__(f"{self.place}: {self.got}; expected {self.expected}. {self.remedy}")


def listed(names: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Joins names for a message: at most `most`, and the number of the others."""
    more = len(names) - most
    return separator.join(names[:most]) + (f" and {more} more" if more > 0 else "")


def shown(value: object, most: int = 60) -> str:
    """Returns a value for a message, in at most `most` characters; null, true and false are written as in JSON."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def counted(count: int, things: str) -> str:
    """Returns a number of things, such as `1 pair` and `1,000 pairs`; `things` is a plural in s."""
    return f"{count:,} {things[:-1] if count == 1 else things}"


def check_choice(place: str, value: str, valid: Iterable[str]) -> None:
    """Raises InputError unless `value`, found at `place`, is one of the valid names."""
    names = list(valid)
    if value not in names:
        raise InputError(
            place, got=f"got {shown(value)}", expected=f"one of {', '.join(names)}", remedy="Name one of these."
        )


class Row(NamedTuple):
    """A record as read from a source; `place` names it in errors, such as `prefs.jsonl:17`."""

    place: str
    fields: dict[str, Any]


Spans: TypeAlias = tuple[tuple[int, int], ...]  # ranges of characters in a text, [begin, end)


class Omission(NamedTuple):
    """Text of a row that a chat template did not write."""

    part: str  # the kind of text, such as "reasoning" or "a tool call"
    answer: int  # index of the answer in the row; -1: the prompt
    text: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """A preference as text: a model reads `prompt + chosen` and `prompt + rejected`.

    An unpaired example has one answer; the other is empty. A ranking has more than two, best first.
    """

    place: str  # the source and row, for errors
    prompt: str
    chosen: str
    rejected: str
    others: tuple[str, ...] = ()  # of a ranking: the answers after the second best, in order
    templated: bool = False  # written by a chat template: special tokens are in the text, none are added
    reference: tuple[float, float] | None = None  # reference log-probs from the data, in nats: chosen, rejected
    scored: tuple[Spans, ...] = ()  # for each answer, the parts of its text that are scored; empty: all answers, whole
    omissions: tuple[Omission, ...] = ()  # what the template left out of the row
    unread: tuple[str, ...] = ()  # keys of its messages that nothing reads
    droppable: int = 0  # exchanges at the start of the prompt that can be dropped, see `templates.drop_oldest`
    weight: float = 1.0  # factor of its loss, and the number of pairs that it counts as; >= 0
    margin: float = 0.0  # by how much the chosen answer's reward should exceed the rejected one's, beyond 0

    @property
    def answers(self) -> tuple[str, ...]:
        """All K answers, best first."""
        return self.chosen, self.rejected, *self.others


class Encoded(NamedTuple):
    """A preference as token ids, truncated and with EOS. A missing answer has no ids.

    Answer tokens that are read but not scored are stored as ~id, see `data.marks`.
    """

    prompt: Int[np.ndarray, "prompt_tokens"]
    chosen: Int[np.ndarray, "chosen_tokens"]
    rejected: Int[np.ndarray, "rejected_tokens"]
    others: tuple[Int[np.ndarray, "_"], ...] = ()  # of a ranking: the answers after the second best, in order

    @classmethod
    def of(cls, prompt: np.ndarray, *answers: np.ndarray) -> Encoded:
        """Builds the record of a prompt and its two or more answers, best first."""
        chosen, rejected, *others = answers
        return cls(prompt, chosen, rejected, tuple(others))

    @property
    def answers(self) -> tuple[np.ndarray, ...]:
        """All K answers, best first."""
        return self.chosen, self.rejected, *self.others

    @property
    def lengths(self) -> list[int]:
        """Token counts of the prompt and of each answer."""
        return [len(ids) for ids in (self.prompt, *self.answers)]


class AnswerTokens(NamedTuple):
    """Log-probs under one model of an answer's n tokens, and of the C likeliest tokens in each place. In nats."""

    logps: Float[np.ndarray, "n"]
    likely: Int[np.ndarray, "n C"]  # token ids, the likeliest first
    likely_logps: Float[np.ndarray, "n C"]


@runtime_checkable
class Pairs(Protocol):
    """A set of encoded pairs, in memory or on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Encoded: ...


class Rows(NamedTuple):
    """Packed token rows, and where in them answer tokens are scored. Microbatches are stacked on a leading axis A.

    R rows of S positions each have room for T scored tokens.
    """

    tokens: Int[AnyArray, "*micro R S"]
    positions: Int[AnyArray, "*micro R S"]  # within the sequence, for position encodings; never the index in the row
    key_start: Int[AnyArray, "*micro R S"]  # each position attends to the keys [key_start, key_end), never none
    key_end: Int[AnyArray, "*micro R S"]
    source: Int[AnyArray, "*micro R T"]  # index in the row whose hidden state predicts `target`
    target: Int[AnyArray, "*micro R T"]  # token ids
    # K * pair + side: the pair within the batch, and its answer (0 chosen, 1 rejected; K is 2, or the most answers of a
    # ranking). Unused entries have -1.
    slot: Int[AnyArray, "*micro R T"]
    likely: Int[AnyArray, "*micro R T C"] | None = (
        None  # the reference's C likeliest tokens, if the objective reads them
    )
    likely_logps: Float[AnyArray, "*micro R T C"] | None = None  # their reference log-probs, in nats


class Batch(NamedTuple):
    """The P pairs of one update, split into A microbatches; all answers of a pair are in the same microbatch."""

    rows: PyTree  # usually Rows; any tree of arrays [A, ...] that the scoring function reads
    count: Int[AnyArray, ""]  # microbatches in use, the first ones
    present: Bool[AnyArray, "A P"]  # which pairs a microbatch holds; a pair in none of them is padding
    reference: Float[AnyArray, "P K"]  # reference log-probs in nats, summed over answer tokens; 0 without a reference
    lengths: Int[AnyArray, "P K"]  # scored tokens of each answer; 0 for a missing one, and for padding
    crop: Int[AnyArray, "A"] | None = None  # index of the crop applied to each microbatch; None: not cropped
    reference_sums: dict[str, AnyArray] | None = None  # {name: [P, K]}, further sums under the reference, in nats
    mismatched: Batch | None = None  # the same prompts with answers to others, scored without gradient, to estimate KL
    # Factor of each pair's loss, >= 0; every mean of the batch counts the pair as so many pairs. None: 1 for each.
    weight: Float[AnyArray, "P"] | None = None
    # Offset of each pair's reward margin, for losses that have a parameter `margin`. None: 0 for each.
    margin: Float[AnyArray, "P"] | None = None
    part: Int[AnyArray, "P"] | None = None  # index of the part of a mixture that each pair is of; None: there is one
