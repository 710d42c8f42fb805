"""Mismatched pairs: prompts with the answers of other prompts, from which the policy's KL divergence is estimated.

Source: Ethayarajh et al. 2024 (KTO, 2402.01306), where the estimate is z_0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import xxhash
from jaxtyping import Float64, Int, Int32, UInt64

from dpo_jax.data.keys import content_key
from dpo_jax.data.marks import count_scored
from dpo_jax.runtime.terminal import passes
from dpo_jax.types import Encoded, InputError, Pairs

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class MismatchedPairs:
    """Mismatched prompts and answers: item i is prompt i of a set with the answers of its pair `answers_of[i]`.

    Answers are truncated to the length limit; an answer for which the prompt leaves no token is missing.
    """

    pairs: Pairs
    answers_of: Int[np.ndarray, " N"]  # index of the pair whose answers each prompt gets
    lengths: Int32[np.ndarray, "N _"]  # tokens of prompt and answers

    def __len__(self) -> int:
        return len(self.answers_of)

    def __getitem__(self, i: int) -> Encoded:
        answers = self.pairs[int(self.answers_of[i])].answers
        truncated = (ids[:size] for ids, size in zip(answers, self.lengths[i, 1:], strict=False))
        return Encoded.of(self.pairs[i].prompt, *truncated)

    @functools.cached_property
    def keys(self) -> UInt64[np.ndarray, "N 2"]:
        """Digest of each pair's token ids. The first access reads all tokens."""
        return np.array(_of_each(self, content_key), np.uint64)

    @functools.cached_property
    def scored(self) -> Int32[np.ndarray, "N K"]:
        """Scored tokens of each answer. The first access reads all tokens."""
        return np.array(_of_each(self, lambda pair: [count_scored(ids) for ids in pair.answers]), np.int32)

    @property
    def reference(self) -> Float64[np.ndarray, "N K"]:
        """Reference log-probs given with the data: nan, none."""
        return np.full((len(self), self.lengths.shape[1] - 1), np.nan)


def mismatched(
    pairs: Pairs, lengths: Int[np.ndarray, "N _"], *, max_length: int, place: str = "pairs"
) -> MismatchedPairs:
    """Returns the prompts of a set with the answers of other prompts of it; every call assigns the same ones.

    Args:
      lengths: token counts of prompt and answers of every pair.
      max_length: tokens of prompt and answer together, to which answers are truncated.
      place: the set, for errors.
    Raises: InputError if all prompts are the same.
    """
    answers_of = _assign(_of_each(pairs, lambda pair: xxhash.xxh3_64_intdigest(pair.prompt.tobytes())), place)
    room = np.maximum(max_length - lengths[:, :1], 0)
    answers = np.minimum(lengths[answers_of, 1:], room)
    return MismatchedPairs(pairs, answers_of, np.concatenate([lengths[:, :1], answers], 1).astype(np.int32))


def _of_each(pairs: Pairs, function: Callable[[Encoded], T]) -> list[T]:
    """Returns what a function returns for each pair, and shows its progress."""
    results = []
    with passes(len(pairs), "mismatched pairs", unit="pairs") as progress:
        for i in range(len(pairs)):
            results.append(function(pairs[i]))
            progress.update(i + 1)
    return results


def _assign(prompts: list[int], place: str) -> Int[np.ndarray, " N"]:
    """Random permutation that assigns to each pair a pair with another prompt, to as many pairs as possible.

    Pairs are put in random order with equal prompts next to each other. Each pair is assigned the one n places later,
    n being the number of pairs with the most frequent prompt. So their prompts differ, unless more than half of all
    pairs share one. No pair is assigned to itself.

    Args:
      prompts: a digest of the prompt of each pair.
    """
    rng = np.random.default_rng(0)
    _, group, sizes = np.unique(np.array(prompts, np.uint64), return_inverse=True, return_counts=True)
    if len(sizes) == 1:
        raise InputError(
            place,
            got=f"all {len(prompts)} examples have the same prompt",
            expected="at least two prompts: this loss estimates a KL divergence from answers to other prompts",
            remedy="Give more data or another --config.loss.name; docs/objectives.md says which need no such estimate.",
        )
    shuffled = rng.permutation(len(prompts))
    order = shuffled[np.argsort(rng.permutation(len(sizes))[group[shuffled]], kind="stable")]
    answers_of = np.empty(len(prompts), np.int64)
    answers_of[order] = np.roll(order, -sizes.max())
    return answers_of
