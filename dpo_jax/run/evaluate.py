"""Evaluation: the metrics of training, over a whole set of pairs at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dpo_jax import losses
from dpo_jax.data.batches import ReferenceValues
from dpo_jax.data.packing import Shape
from dpo_jax.scoring import score_pairs
from dpo_jax.steps import Scores, loss_metrics, pair_losses
from dpo_jax.types import Batch, Pairs


def make_summary(loss_fn: losses.Loss, *, paired: bool = True) -> Callable[..., dict[str, jax.Array]]:
    """Returns `summary(found, reference, reference_sums, lengths, mismatched, running)`, the metrics of a whole set as
    one small program.

    `found` is log-probs and sums over answers, `mismatched` (log-probs under policy and reference, lengths) or None.
    """

    @jax.jit
    def summary(
        found: Any, reference: Any, reference_sums: Any, lengths: Any, mismatched: Any, running: Any
    ) -> dict[str, jax.Array]:
        present = jnp.ones(len(lengths), bool)
        kl = None
        if mismatched is not None:
            logps, under_reference, counts = mismatched
            kl = losses.estimate_kl(logps, under_reference, counts, present)
        logps, sums = found
        scores = Scores(logps, sums, reference, lengths, present, reference_sums)
        each, _ = pair_losses(loss_fn, scores, running, kl=kl, update_baselines=False)
        metrics = loss_metrics(loss_fn, each, scores, paired=paired)
        return metrics | ({} if kl is None else {"kl": kl})

    return summary


def evaluate(
    score: Callable[[Batch], tuple[Any, dict[str, Any]]],
    summary: Callable[..., dict[str, jax.Array]],
    pairs: Pairs,
    lengths: Int[np.ndarray, "N K1"],
    known: ReferenceValues | None,
    *,
    shape: Shape,
    layout: str,
    running: Any = MappingProxyType({}),
    mismatched: Any = None,
) -> dict[str, float]:
    """Metrics of `pair_metrics` over all pairs, named `eval/...`, with `eval/pairs` and `eval_time_s`.

    Every mean is over the set as a whole, so batching does not change it; and so is what a loss reads of a batch.

    Args:
      score: a host batch to (logps [P, K], sums over answers), such as a jitted score step with its parameters bound.
      summary: of `make_summary`.
      lengths: token counts of prompt and answers.
      known: what the reference says of the pairs; None for reference-free losses.
      running: what the objective carries on, as it is after the last update.
      mismatched: the set of the same prompts with other answers, with its `lengths`, if the objective asks.
    """
    started = time.perf_counter()

    def scored(pairs: Pairs, lengths: np.ndarray, tokens: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        logps = np.zeros((len(lengths), lengths.shape[1] - 1), np.float32)
        sums: dict[str, np.ndarray] = {}
        for part in score_pairs(score, pairs, lengths, shape=shape, layout=layout, reference_tokens=tokens):
            logps[part.indices] = part.logps
            for name, values in part.token_sums.items():
                sums.setdefault(name, np.zeros_like(logps))[part.indices] = values
        return logps, sums

    stored = None if known is None else known.of(np.arange(len(lengths)))
    found = scored(pairs, lengths, None if stored is None else stored.tokens)
    reference = np.zeros_like(found[0]) if stored is None else np.asarray(stored.logps, np.float32)
    sums = {} if stored is None else {name: np.asarray(each, np.float32) for name, each in stored.sums.items()}
    others = None
    if mismatched is not None and stored is not None and stored.mismatched is not None:
        logps = scored(mismatched, mismatched.lengths, None)[0]
        others = logps, np.asarray(stored.mismatched, np.float32), np.asarray(mismatched.lengths[:, 1:])
    values = summary(found, reference, sums, np.asarray(lengths[:, 1:]), others, dict(running))
    named = {f"eval/{name}": float(value) for name, value in values.items()}
    return named | {"eval/pairs": len(lengths), "eval_time_s": time.perf_counter() - started}
