"""Which pairs form which step: a pure function of the seed and the step, so resuming seeks instead of replaying."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int


def epoch_size(source: Int[np.ndarray, "N"], weights: Sequence[float]) -> int:
    """Pairs in one epoch: each source's pairs times its weight, rounded."""
    return sum(share(int(np.sum(source == s)), w) for s, w in enumerate(weights))


def make_order(
    source: Int[np.ndarray, "N"], weights: Sequence[float], *, batch_pairs: int, seed: int, shuffle: bool
) -> Callable[[int], Int[np.ndarray, "P"]]:
    """Returns `indices(step)`, the pairs of that step.

    Steps run through epoch after epoch without a break, so every batch is full and one may span two epochs. A
    source of weight w appears floor(w) times an epoch, and a part of it drawn anew each epoch once more.

    Args:
      source: which source each pair came from.
      weights: of each source, > 0.
      shuffle: a new order each epoch; without, pairs come in file order and a fractional weight takes the first ones.
    """
    members = [np.flatnonzero(source == s) for s in range(len(weights))]
    size = epoch_size(source, weights)

    @functools.lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> np.ndarray:
        rng = np.random.default_rng((seed, epoch))
        drawn = [_draw(pairs, weight, rng if shuffle else None) for pairs, weight in zip(members, weights, strict=True)]
        order = np.concatenate(drawn)
        return rng.permutation(order) if shuffle else order

    def indices(step: int) -> np.ndarray:
        at = np.arange(step * batch_pairs, (step + 1) * batch_pairs)
        return np.array([epoch_order(int(epoch))[place] for epoch, place in zip(at // size, at % size, strict=True)])

    return indices


def share(pairs: int, weight: float) -> int:
    """Times that pairs of a source with this weight stand in one epoch, all together."""
    return int(round(weight * pairs))


def _draw(pairs: np.ndarray, weight: float, rng: np.random.Generator | None) -> np.ndarray:
    whole, rest = divmod(share(len(pairs), weight), max(1, len(pairs)))
    part = pairs[:rest] if rng is None else rng.permutation(pairs)[:rest]
    return np.concatenate([np.tile(pairs, whole), part])
