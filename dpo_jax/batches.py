"""From the indices of pairs to a batch: their ids laid out, with what is known of the reference."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dpo_jax.data.layout import collate
from dpo_jax.data.packing import Shape
from dpo_jax.reference import TokenValues
from dpo_jax.types import Batch, Encoded, Pairs


class Known(NamedTuple):
    """What the reference says of some of a set of N pairs, n of them."""

    place: Int[np.ndarray, "N"]  # of each pair among the n; -1: nothing is known of it
    logps: Float[np.ndarray, "n K"]  # nats, summed over answers
    sums: dict[str, Float[np.ndarray, "n K"]]  # further sums over answers, of `losses.SUMS`
    tokens: TokenValues | None = None  # likely tokens' log-probs
    unrelated: Float[np.ndarray, "n K"] | None = None  # as `logps`, of answers that belong to other prompts

    def of(self, chosen: Int[np.ndarray, "P"]) -> Known:
        """The same of these pairs alone, in this order."""
        at = self.place[chosen]
        assert (at >= 0).all(), "a pair that the reference has not scored"
        return Known(
            np.arange(len(chosen)),
            self.logps[at],
            {name: values[at] for name, values in self.sums.items()},
            None if self.tokens is None else self.tokens.of(at),
            None if self.unrelated is None else self.unrelated[at],
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Some:
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
    known: Known | None,
    shape: Shape,
    *,
    layout: str,
    unrelated: Pairs | None = None,
) -> Batch:
    """The batch of these pairs, in this order.

    Args:
      known: None: nothing is read of the reference.
      unrelated: the set of the same prompts with other answers, if the objective asks for them.
    """
    found = None if known is None else known.of(chosen)

    def lay_out(pairs: Pairs, **stored: Any) -> Batch:
        return collate([pairs[i] for i in chosen.tolist()], shape=shape, layout=layout, **stored)

    if found is None:
        return lay_out(pairs, reference=None)
    batch = lay_out(pairs, reference=found.logps, reference_sums=found.sums or None, tokens=found.tokens)
    if unrelated is None:
        return batch
    return batch._replace(unrelated=lay_out(unrelated, reference=found.unrelated))
