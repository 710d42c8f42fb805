"""Order of pairs: the pairs of a step are a pure function of seed and step, so resuming seeks instead of replaying."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

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
    source of weight w appears floor(w) times per epoch; the fractional part of w is drawn anew each epoch.

    Args:
      source: index of the source of each pair.
      weights: weight of each source, > 0.
      shuffle: whether each epoch has a new random order; if not, pairs come in file order, and the fractional part of a
        weight takes the first ones.
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


def reached(order: Callable[[int], Int[np.ndarray, "P"]], steps: Iterable[int], pairs: int) -> Int[np.ndarray, "n"]:
    """Returns the indices of the pairs that some steps read, in increasing order.

    Args:
      order: of `make_order`.
      pairs: number of pairs in the set.
    """
    read = np.zeros(pairs, bool)
    for step in steps:
        read[order(step)] = True
        if step % 100 == 0 and read.all():
            break
    return np.flatnonzero(read)


def share(pairs: int, weight: float) -> int:
    """Pairs that a source of this many pairs and this weight contributes to one epoch."""
    return int(round(weight * pairs))


def _draw(pairs: np.ndarray, weight: float, rng: np.random.Generator | None) -> np.ndarray:
    """Pairs of one source in one epoch: each as often as the integer part of the weight, and a subset once more."""
    repeats, remainder = divmod(share(len(pairs), weight), max(1, len(pairs)))
    part = pairs[:remainder] if rng is None else rng.permutation(pairs)[:remainder]
    return np.concatenate([np.tile(pairs, repeats), part])
