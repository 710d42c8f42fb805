"""From the indices of pairs to a batch: their ids laid out, with what is known of the reference."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int32

from dpo_jax.data.layout import collate
from dpo_jax.data.packing import Shape
from dpo_jax.types import AnswerTokens, Batch, Encoded, Pairs


class ReferenceValues(NamedTuple):
    """What the reference says of some of a set of N pairs, n of them."""

    place: Int[np.ndarray, "N"]  # of each pair among the n; -1: nothing is known of it
    logps: Float[np.ndarray, "n K"]  # nats, summed over answers
    sums: dict[str, Float[np.ndarray, "n K"]]  # further sums over answers, of `losses.SUMS`
    tokens: TokenValues | None = None  # likely tokens' log-probs
    mismatched: Float[np.ndarray, "n K"] | None = None  # as `logps`, of answers that belong to other prompts

    def of(self, chosen: Int[np.ndarray, "P"]) -> ReferenceValues:
        """The same of these pairs alone, in this order."""
        at = self.place[chosen]
        assert (at >= 0).all(), "a pair that the reference has not scored"
        return ReferenceValues(
            np.arange(len(chosen)),
            self.logps[at],
            {name: values[at] for name, values in self.sums.items()},
            None if self.tokens is None else self.tokens.of(at),
            None if self.mismatched is None else self.mismatched[at],
        )


@dataclasses.dataclass(frozen=True, eq=False)
class PairSubset:
    """Some of a set of pairs, as a set, none with reference values of its own."""

    pairs: Any  # as `types.Pairs`, with `lengths` and `keys`
    indices: Int[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Encoded:
        return self.pairs[int(self.indices[index])]

    @property
    def lengths(self) -> np.ndarray:
        return self.pairs.lengths[self.indices]

    @property
    def keys(self) -> np.ndarray:
        return self.pairs.keys[self.indices]

    @property
    def reference(self) -> np.ndarray:
        return np.full((len(self), 2), np.nan)


def make_batch(
    chosen: Int[np.ndarray, "P"],
    pairs: Pairs,
    known: ReferenceValues | None,
    shape: Shape,
    *,
    mismatched: Pairs | None = None,
) -> Batch:
    """The batch of these pairs, in this order.

    Args:
      known: None: nothing is read of the reference.
      mismatched: the set of the same prompts with other answers, if the objective asks for them.
    """
    found = None if known is None else known.of(chosen)

    def lay_out(pairs: Pairs, **stored: Any) -> Batch:
        return collate([pairs[i] for i in chosen.tolist()], shape=shape, **stored)

    if found is None:
        return lay_out(pairs, reference=None)
    batch = lay_out(pairs, reference=found.logps, reference_sums=found.sums or None, tokens=found.tokens)
    if mismatched is None:
        return batch
    return batch._replace(mismatched=lay_out(mismatched, reference=found.mismatched))


@dataclasses.dataclass(frozen=True, eq=False)
class TokenValues:
    """What the reference says of every token of the answers of N pairs, and of the C likeliest tokens in its place.

    4 + 8C bytes a token; pairs that are taken `of` others have the same arrays. A sequence: of each pair, for every
    answer, the likely tokens and their log-probs, as `layout.collate` reads them.
    """

    bounds: Int[np.ndarray, "N K1"]  # of the M tokens, those of answer k are from [k] up to [k + 1]
    logps: Float32[np.ndarray, "M"]  # nats
    likely: Int32[np.ndarray, "M C"]  # the likeliest first
    likely_logps: Float32[np.ndarray, "M C"]

    @classmethod
    def empty(cls, lengths: Int[np.ndarray, "N K"], likely: int) -> TokenValues:
        """Room for pairs with answers of these lengths."""
        ends = np.concatenate([[0], np.cumsum(lengths.ravel(), dtype=np.int64)])
        firsts = np.arange(len(lengths))[:, None] * lengths.shape[1]
        shape = int(ends[-1]), likely
        arrays = np.zeros(shape[0], np.float32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        return cls(ends[firsts + np.arange(lengths.shape[1] + 1)], *arrays)

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, pair: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(self.likely[a:b], self.likely_logps[a:b]) for a, b in itertools.pairwise(self.bounds[pair].tolist())]

    def of(self, chosen: Int[np.ndarray, "P"]) -> TokenValues:
        """The same of these pairs alone, in this order."""
        return dataclasses.replace(self, bounds=self.bounds[chosen])

    def write(self, pair: int, answers: Sequence[AnswerTokens]) -> None:
        """Fills in a pair's values. Raises: ValueError if there are more or fewer of an answer's than tokens."""
        for (a, b), answer in zip(itertools.pairwise(self.bounds[pair].tolist()), answers, strict=False):
            if len(answer.logps) != b - a:
                raise ValueError(f"{len(answer.logps)} values of {b - a} tokens")
            self.logps[a:b], self.likely[a:b], self.likely_logps[a:b] = answer

    def shared_logps(self) -> Float64[np.ndarray, "N K"]:
        """Each answer's log-probs summed up to the length of the shortest of its pair that is there."""
        counts = np.diff(self.bounds, axis=1)
        shortest = np.where(counts > 0, counts, np.iinfo(np.int64).max).min(1, keepdims=True)
        sums = np.concatenate([[0.0], np.cumsum(self.logps, dtype=np.float64)])
        starts = self.bounds[:, :-1]
        return sums[starts + np.minimum(counts, shortest)] - sums[starts]
