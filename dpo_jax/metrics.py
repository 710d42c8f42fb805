"""Metrics of a set of scored pairs, under the names that preference trainers share."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.losses.common import divisor, mean, weighted_sum


def pair_metrics(
    losses: Float[Array, "P"],
    policy: Float[Array, "P K"],
    rewards: Float[Array, "P K"] | None,
    lengths: Int[Array, "P K"],
    present: Bool[Array, "P"],
    *,
    weight: Float[Array, "P"] | None = None,
    token_sums: dict[str, Float[Array, "P K"]] | None = None,
    paired: bool = True,
    chosen_only: bool = False,
) -> dict[str, Float[Array, ""]]:
    """Computes means over the present pairs, each a global numerator over a global denominator.

    rewards = beta (policy - reference), in nats. Accuracy counts margins strictly > 0, so it is 0 where policy and
    reference agree. logps are summed over an answer and averaged over answers, in nats. In a ranking the best answer is
    the chosen one, all others are rejected, and margins and accuracies are over every two answers.

    Args:
      losses: one for each pair, masked here, after the nonlinearity.
      rewards: None for a loss that implies none: no rewards are reported.
      lengths: scored tokens of each answer; 0 for a missing one.
      present: False for padding.
      weight: as how many pairs each counts, in all means; None: 1.
      token_sums: quantities summed over an answer's tokens, reported as means over all tokens of that side.
      paired: whether every pair has two answers. If not, the margin is the difference of the mean rewards, and no
        accuracy is reported.
      chosen_only: whether the loss reads chosen answers only: no metrics of rejected answers are reported.
    Returns: loss, rewards/{chosen,rejected,margins,accuracies}, logps/{chosen,rejected} and NAME/{chosen,rejected} for
      each of `token_sums`.
    """
    scored = (lengths > 0) & present[:, None]
    sides = {"chosen": slice(0, 1), "rejected": slice(1, None)}
    if chosen_only:
        del sides["rejected"]
    metrics = {"loss": mean(losses, present, weight)}
    if rewards is not None:
        mean_rewards = {name: mean(rewards[:, side], scored[:, side], weight) for name, side in sides.items()}
        metrics |= {f"rewards/{name}": value for name, value in mean_rewards.items()}
        if paired:
            better, worse = jnp.triu_indices(rewards.shape[1], 1)
            margins, both = rewards[:, better] - rewards[:, worse], scored[:, better] & scored[:, worse]
            metrics["rewards/margins"] = mean(margins, both, weight)
            metrics["rewards/accuracies"] = mean((margins > 0).astype(policy.dtype), both, weight)
        else:
            metrics["rewards/margins"] = mean_rewards["chosen"] - mean_rewards["rejected"]
    for name, side in sides.items():
        metrics[f"logps/{name}"] = mean(policy[:, side], scored[:, side], weight)
        tokens = divisor(weighted_sum(jnp.where(scored, lengths, 0)[:, side], weight), weight)
        for quantity, sums in (token_sums or {}).items():
            metrics[f"{quantity}/{name}"] = weighted_sum(jnp.where(scored, sums, 0)[:, side], weight) / tokens
    return metrics


def without_empty_parts(row: Mapping[str, float]) -> dict[str, float]:
    """Returns a row of metrics without those of parts of a mixture that have no pairs in it."""
    empty = tuple(
        name.removesuffix("pairs")
        for name, value in row.items()
        if "by_source/" in name and name.endswith("/pairs") and not value
    )
    return {name: value for name, value in row.items() if not (empty and name.startswith(empty))}
