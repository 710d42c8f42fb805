"""Prompts with the answers of other prompts, which carry no preference: what a policy's divergence is estimated by.

Source: Ethayarajh et al. 2024 (KTO, 2402.01306), where the estimate is z_0.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import xxhash
from jaxtyping import Float64, Int, Int32, UInt64

from dpo_jax.data.keys import content_key
from dpo_jax.types import Encoded, InputError, Pairs


@dataclasses.dataclass(frozen=True, eq=False)
class MismatchedPairs:
    """As many pairs as another set has: the i-th is its i-th prompt with the answers of `partner[i]`, cut to the limit.

    An answer for which the prompt leaves no token is not there.
    """

    pairs: Pairs
    partner: Int[np.ndarray, " N"]
    lengths: Int32[np.ndarray, "N _"]  # tokens of prompt and answers

    def __len__(self) -> int:
        return len(self.partner)

    def __getitem__(self, i: int) -> Encoded:
        answers = self.pairs[int(self.partner[i])].answers
        cut = (ids[:most] for ids, most in zip(answers, self.lengths[i, 1:], strict=False))
        return Encoded.of(self.pairs[i].prompt, *cut)

    @functools.cached_property
    def keys(self) -> UInt64[np.ndarray, "N 2"]:
        """Digest of each pair's token ids. Reads all of them."""
        return np.array([content_key(self[i]) for i in range(len(self))], np.uint64)

    @property
    def reference(self) -> Float64[np.ndarray, "N K"]:
        """Log-probabilities given with the data: nan, for there are none."""
        return np.full((len(self), self.lengths.shape[1] - 1), np.nan)


def mismatched(pairs: Pairs, lengths: Int[np.ndarray, "N _"], *, max_length: int) -> MismatchedPairs:
    """The prompts of a set with answers of its other prompts, the same ones at each call.

    Args:
      lengths: token counts of prompt and answers of every pair.
      max_length: tokens of prompt and answer together that answers are cut to.
    Raises: InputError if all prompts are the same.
    """
    partner = _partners([xxhash.xxh3_64_intdigest(pairs[i].prompt.tobytes()) for i in range(len(pairs))])
    room = np.maximum(max_length - lengths[:, :1], 0)
    answers = np.minimum(lengths[partner, 1:], room)
    return MismatchedPairs(pairs, partner, np.concatenate([lengths[:, :1], answers], 1).astype(np.int32))


def _partners(prompts: list[int]) -> Int[np.ndarray, " N"]:
    """A permutation without a fixed point that gives every pair one of another prompt, or as many as there can be.

    In an order in which equal prompts follow one another, at random otherwise, each pair's partner stands as many
    places on as the commonest prompt has: beyond all of its own, unless that is the prompt of more than half of them.
    """
    rng = np.random.default_rng(0)
    _, group, sizes = np.unique(np.array(prompts, np.uint64), return_inverse=True, return_counts=True)
    if len(sizes) == 1:
        raise InputError(
            "data.train",
            got=f"the prompt is the same in all of the {len(prompts)} examples",
            expected="two prompts or more, for answers that belong to another one",
            remedy="Give more data, or take a loss that needs no such estimate.",
        )
    shuffled = rng.permutation(len(prompts))
    order = shuffled[np.argsort(rng.permutation(len(sizes))[group[shuffled]], kind="stable")]
    partner = np.empty(len(prompts), np.int64)
    partner[order] = np.roll(order, -sizes.max())
    return partner
