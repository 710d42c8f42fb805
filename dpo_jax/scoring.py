"""From parameters and packed rows to the log-probability of every completion: the one function that the update,
the evaluation and the reference pass share, so that at step 0 the policy is the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dpo_jax.data.layout import answer_starts, collate
from dpo_jax.data.packing import Shape, unit_lengths
from dpo_jax.runtime import prefetch
from dpo_jax.types import AnswerTokens, Batch, Pairs

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Scored(NamedTuple):
    """Log-probs of some of a set of pairs, and what it took."""

    indices: Int[np.ndarray, "n"]
    logps: Float[np.ndarray, "n K"]  # nats, summed over the answer
    token_sums: dict[str, Float[np.ndarray, "n K"]]
    forward_passes: int
    tokens: list[list[AnswerTokens]] | None = None  # of each pair's answers, if the score has them


def compute_dtype(name: str, platform: str) -> Any:
    """The type a name stands for; `auto` is float32 on CPU, which has no fast bfloat16, and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return DTYPES[name]


def score_pairs(
    score: Callable[[Batch], tuple[Any, dict[str, Any]]],
    pairs: Pairs,
    lengths: Int[np.ndarray, "N _"],
    *,
    shape: Shape,
    layout: str,
    skip: Callable[[np.ndarray], np.ndarray] | None = None,
    reference_tokens: Any = None,
) -> Iterator[Scored]:
    """Scores a set of pairs, longest first, `shape.pairs` at a time; yields each part as it is done.

    Args:
      score: a host batch to (logps [P, K], token sums), such as a jitted score step with its parameters bound.
      lengths: token counts of prompt and answers of every pair.
      skip: given a part's indices, which of them need no scoring. The parts do not depend on it, so what is scored
        after an interruption is packed just as it would have been, as long as whole parts were finished.
      reference_tokens: of every pair, as `collate` has them, if the score reads them.
    """
    order = np.argsort(-unit_lengths(lengths, layout), kind="stable")
    parts = [order[at : at + shape.pairs] for at in range(0, len(order), shape.pairs)]
    parts = [part if skip is None else part[~skip(part)] for part in parts]
    parts = [part for part in parts if len(part)]

    def make(at: int) -> Batch:
        part = parts[at].tolist()
        tokens = None if reference_tokens is None else [reference_tokens[i] for i in part]
        return collate([pairs[i] for i in part], None, shape, layout=layout, tokens=tokens)

    for part, (batch, _) in zip(parts, prefetch.ahead(make, range(len(parts))), strict=True):
        logps, sums = jax.device_get(score(batch))
        kept = len(part)
        by_answer = {name: values[:kept] for name, values in sums.items() if name != "tokens"}
        tokens = _by_answer(sums["tokens"], lengths[part], shape, layout) if "tokens" in sums else None
        yield Scored(part, logps[:kept], by_answer, int(batch.count), tokens)


def _by_answer(
    entries: tuple[np.ndarray, ...], lengths: np.ndarray, shape: Shape, layout: str
) -> list[list[AnswerTokens]]:
    """Of arrays [A, R, T, ...], what belongs to the tokens of each answer of each pair."""

    def taken(at: np.ndarray, tokens: int) -> AnswerTokens:
        micro, row, first = at
        return AnswerTokens(*(array[micro, row, first : first + tokens] for array in entries))

    starts = answer_starts(lengths, shape, layout)
    return [
        [taken(*each) for each in zip(*pair, strict=True)] for pair in zip(starts, lengths[:, 1:].tolist(), strict=True)
    ]
