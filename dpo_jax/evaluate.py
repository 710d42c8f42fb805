"""Evaluation: the metrics of training, over a whole set of pairs at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dpo_jax.data.layout import Shape
from dpo_jax.losses import reward_scale
from dpo_jax.metrics import pair_metrics
from dpo_jax.scoring import score_pairs
from dpo_jax.types import Batch, Pairs


def make_summary(loss_fn: Callable[..., jax.Array]) -> Callable[..., dict[str, jax.Array]]:
    """Returns `summary(policy, reference, lengths, token_sums)`, the metrics of a whole set as one small program."""

    @jax.jit
    def summary(policy: Any, reference: Any, lengths: Any, token_sums: Any) -> dict[str, jax.Array]:
        return pair_metrics(
            loss_fn(policy, reference, lengths=lengths),
            policy,
            reference,
            lengths,
            jnp.ones(len(policy), bool),
            beta=reward_scale(loss_fn),
            token_sums=token_sums,
        )

    return summary


def evaluate(
    score: Callable[[Batch], tuple[Any, dict[str, Any]]],
    summary: Callable[..., dict[str, jax.Array]],
    pairs: Pairs,
    lengths: Int[np.ndarray, "N 3"],
    reference: Float[np.ndarray, "N 2"],
    *,
    shape: Shape,
    layout: str,
) -> dict[str, float]:
    """Metrics of `pair_metrics` over all pairs, named `eval/...`, with `eval/pairs` and `eval_time_s`.

    Every mean is over the set as a whole, so batching does not change it.

    Args:
      score: a host batch to (logps [P, 2], token sums), such as a jitted score step with its parameters bound.
      summary: of `make_summary`.
      lengths: token counts of prompt, chosen and rejected.
      reference: stored log-probs in nats; not read by reference-free losses.
    """
    started = time.perf_counter()
    logps = np.zeros((len(lengths), 2), np.float32)
    sums: dict[str, np.ndarray] = {}
    for part in score_pairs(score, pairs, lengths, shape=shape, layout=layout):
        logps[part.indices] = part.logps
        for name, values in part.token_sums.items():
            sums.setdefault(name, np.zeros_like(logps))[part.indices] = values
    found = summary(logps, np.asarray(reference, np.float32), np.asarray(lengths[:, 1:]), sums)
    named = {f"eval/{name}": float(value) for name, value in found.items()}
    return named | {"eval/pairs": len(lengths), "eval_time_s": time.perf_counter() - started}
