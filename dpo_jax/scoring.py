"""Scoring of whole sets of pairs, in batches: log-probs of every answer, for evaluation and the reference pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from dpo_jax import aliases
from dpo_jax.data.layout import answer_starts, collate
from dpo_jax.data.packing import Shape, unit_lengths
from dpo_jax.runtime import prefetch
from dpo_jax.types import AnswerTokens, Batch, Pairs

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Scored(NamedTuple):
    """Log-probs of n pairs of a set."""

    indices: Int[np.ndarray, "n"]  # of the pairs in the set
    logps: Float[np.ndarray, "n K"]  # nats, summed over the answer
    token_sums: dict[str, Float[np.ndarray, "n K"]]  # further sums over the answer
    forward_passes: int  # microbatches computed
    tokens: list[list[AnswerTokens]] | None = None  # for each pair and answer, if `score` returns them


def compute_dtype(name: str, platform: str) -> type:
    """Returns the type of a name in DTYPES; `auto` is float32 on CPU, which has no fast bfloat16, else bfloat16."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return DTYPES[name]


def score_pairs(
    score: Callable[[Batch], tuple[Array, dict[str, PyTree]]],
    pairs: Pairs,
    lengths: Int[np.ndarray, "N _"],
    *,
    shape: Shape,
    skip: Callable[[np.ndarray], np.ndarray] | None = None,
    reference_tokens: Sequence[PyTree] | None = None,
) -> Iterator[Scored]:
    """Scores a set of pairs, longest first, `shape.pairs` at a time; yields each part when it is done.

    Args:
      score: maps a host batch to (logps [P, K], {name: sums [P, K]}): usually a jitted score step with its parameters.
      lengths: token counts of the prompt and the answers of every pair.
      skip: maps the indices of a part to a mask of pairs that need no scoring. The parts do not depend on it: after an
        interruption, pairs are packed as they would have been, provided that whole parts were finished.
      reference_tokens: for every pair, as in `collate`, if `score` reads them.
    """
    order = np.argsort(-unit_lengths(lengths, shape.layout), kind="stable")
    parts = [order[start : start + shape.pairs] for start in range(0, len(order), shape.pairs)]
    parts = [part if skip is None else part[~skip(part)] for part in parts]
    parts = [part for part in parts if len(part)]

    def make(index: int) -> Batch:
        part = parts[index].tolist()
        tokens = None if reference_tokens is None else [reference_tokens[i] for i in part]
        return collate([pairs[i] for i in part], None, shape, tokens=tokens)

    for part, (batch, _) in zip(parts, prefetch.ahead(make, range(len(parts))), strict=True):
        logps, sums = jax.device_get(score(batch))
        count = len(part)
        token_sums = {name: values[:count] for name, values in sums.items() if name != "tokens"}
        tokens = _answer_tokens(sums["tokens"], lengths[part], shape) if "tokens" in sums else None
        yield Scored(part, logps[:count], token_sums, int(batch.count), tokens)


def _answer_tokens(entries: tuple[np.ndarray, ...], lengths: np.ndarray, shape: Shape) -> list[list[AnswerTokens]]:
    """Splits arrays of scored tokens [A, R, T, ...] by pair and answer."""

    def of_answer(start: np.ndarray, tokens: int) -> AnswerTokens:
        micro, row, first = start
        return AnswerTokens(*(array[micro, row, first : first + tokens] for array in entries))

    starts = answer_starts(lengths, shape)
    return [
        [of_answer(*answer) for answer in zip(*pair, strict=True)]
        for pair in zip(starts, lengths[:, 1:].tolist(), strict=True)
    ]


__getattr__ = aliases.forward(
    __name__,
    {"join": "dpo_jax.trees.join"}
    | {name: f"dpo_jax.parallel.{name}" for name in ("WORDS", "kernel_across", "experts_across", "of_words")}
    | {"make_logps_fn": "dpo_jax.parallel.make_logps_fn"},
)
