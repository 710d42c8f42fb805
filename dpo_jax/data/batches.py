"""Makes batches from indices of pairs: their token ids laid out, with the stored reference log-probs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int32, UInt64

from dpo_jax.data.dataset import PairSet
from dpo_jax.data.layout import LikelyTokens, collate
from dpo_jax.data.mismatched import MismatchedPairs
from dpo_jax.data.packing import Shape
from dpo_jax.types import AnswerTokens, Batch, Encoded, Pairs


class ReferenceValues(NamedTuple):
    """Stored reference log-probs for n of a dataset's N pairs."""

    place: Int[np.ndarray, "N"]  # index of each pair among the n; -1: it has no stored values
    logps: Float[np.ndarray, "n K"]  # nats, summed over answers
    sums: dict[str, Float[np.ndarray, "n K"]]  # further sums over answers, named in `losses.SUMS`
    tokens: TokenValues | None = None  # log-probs of likely tokens
    mismatched: Float[np.ndarray, "n K"] | None = None  # like `logps`, of the answers of mismatched prompts

    def of(self, chosen: Int[np.ndarray, "P"]) -> ReferenceValues:
        """Selects the values of some pairs, in the order of their indices."""
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
    """Pairs of a set selected by index, to be scored."""

    pairs: PairSet | MismatchedPairs
    indices: Int[np.ndarray, "n"]
    provided: bool  # whether reference log-probs that came with the data are used

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Encoded:
        return self.pairs[int(self.indices[index])]

    @property
    def lengths(self) -> Int32[np.ndarray, "n _"]:
        """Token counts of prompt and answers, [n, 1 + K]."""
        return self.pairs.lengths[self.indices]

    @property
    def scored(self) -> Int32[np.ndarray, "n K"]:
        """Scored tokens of each answer."""
        return self.pairs.scored[self.indices]

    @property
    def keys(self) -> UInt64[np.ndarray, "n 2"]:
        """Digests of the pairs' token ids."""
        return self.pairs.keys[self.indices]

    @property
    def reference(self) -> Float64[np.ndarray, "n K"]:
        """Reference log-probs given with the data; nan: none, or not used."""
        given = self.pairs.reference[self.indices]
        return given if self.provided else np.full_like(given, np.nan)


def make_batch(
    chosen: Int[np.ndarray, "P"],
    pairs: Pairs,
    reference: ReferenceValues | None,
    shape: Shape,
    *,
    mismatched: Pairs | None = None,
    weights: Float32[np.ndarray, "N"] | None = None,
    margins: Float32[np.ndarray, "N"] | None = None,
    parts: Int32[np.ndarray, "N"] | None = None,
) -> Batch:
    """Makes the batch of the pairs with these indices, in this order.

    Args:
      reference: stored reference log-probs; None: the objective reads none.
      mismatched: the same prompts with answers of other prompts, if the objective reads them.
      weights, margins, parts: of all pairs of the set; None: the batch has none.
    """
    values = None if reference is None else reference.of(chosen)
    if values is None:
        batch = _lay_out(chosen, pairs, shape, None)
    else:
        tokens = None if values.tokens is None else [values.tokens[i] for i in range(len(chosen))]
        batch = _lay_out(chosen, pairs, shape, values.logps, values.sums or None, tokens)
        if mismatched is not None:
            batch = batch._replace(mismatched=_lay_out(chosen, mismatched, shape, values.mismatched))

    def padded(all_values: np.ndarray | None) -> np.ndarray | None:
        return None if all_values is None else np.pad(all_values[chosen], (0, shape.pairs - len(chosen)))

    return batch._replace(weight=padded(weights), margin=padded(margins), part=padded(parts))


def _lay_out(
    chosen: np.ndarray,
    pairs: Pairs,
    shape: Shape,
    reference: np.ndarray | None,
    sums: Mapping[str, np.ndarray] | None = None,
    tokens: Sequence[LikelyTokens] | None = None,
) -> Batch:
    """Reads the pairs with these indices and packs them into a batch; arguments as those of `layout.collate`."""
    encoded = [pairs[i] for i in chosen.tolist()]
    return collate(encoded, reference, shape, reference_sums=sums, tokens=tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenValues:
    """Reference log-probs of all M answer tokens of N pairs, and of the C likeliest tokens in place of each.

    4 + 8C bytes per token; selections made by `of` share the arrays. Item i holds, for each answer of pair i, likely
    tokens and their log-probs, as `layout.collate` reads them.
    """

    bounds: Int[np.ndarray, "N K1"]  # the tokens of answer k of a pair are bounds[k] to bounds[k + 1] of the M
    logps: Float32[np.ndarray, "M"]  # nats
    likely: Int32[np.ndarray, "M C"]  # the likeliest first
    likely_logps: Float32[np.ndarray, "M C"]

    @classmethod
    def empty(cls, lengths: Int[np.ndarray, "N K"], likely: int) -> TokenValues:
        """Zeros for pairs with answers of these lengths, to be filled by `write`.

        Args:
          likely: C, likely tokens in place of each token.
        """
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
        """Selects the values of some pairs, in the order of their indices."""
        return dataclasses.replace(self, bounds=self.bounds[chosen])

    def write(self, pair: int, answers: Sequence[AnswerTokens]) -> None:
        """Writes the values of a pair.

        Raises: ValueError if the number of values differs from the number of tokens of an answer.
        """
        for (a, b), answer in zip(itertools.pairwise(self.bounds[pair].tolist()), answers, strict=False):
            if len(answer.logps) != b - a:
                raise ValueError(f"{len(answer.logps)} values of {b - a} tokens")
            self.logps[a:b], self.likely[a:b], self.likely_logps[a:b] = answer

    def shared_logps(self) -> Float64[np.ndarray, "N K"]:
        """Log-probs of each answer summed over its first n tokens, n being the shortest answer of the pair.

        Missing answers do not count as the shortest.
        """
        counts = np.diff(self.bounds, axis=1)
        shortest = np.where(counts > 0, counts, np.iinfo(np.int64).max).min(1, keepdims=True)
        sums = np.concatenate([[0.0], np.cumsum(self.logps, dtype=np.float64)])
        starts = self.bounds[:, :-1]
        return sums[starts + np.minimum(counts, shortest)] - sums[starts]
