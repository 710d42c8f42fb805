"""Metrics of a set of scored pairs, under the names that preference trainers share."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def pair_metrics(
    losses: Float[Array, "P"],
    policy: Float[Array, "P K"],
    rewards: Float[Array, "P K"] | None,
    lengths: Int[Array, "P K"],
    present: Bool[Array, "P"],
    *,
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
    metrics = {"loss": _mean(losses, present)}
    if rewards is not None:
        mean_rewards = {name: _mean(rewards[:, side], scored[:, side]) for name, side in sides.items()}
        metrics |= {f"rewards/{name}": value for name, value in mean_rewards.items()}
        if paired:
            better, worse = jnp.triu_indices(rewards.shape[1], 1)
            margins, both = rewards[:, better] - rewards[:, worse], scored[:, better] & scored[:, worse]
            metrics["rewards/margins"] = _mean(margins, both)
            metrics["rewards/accuracies"] = _mean((margins > 0).astype(policy.dtype), both)
        else:
            metrics["rewards/margins"] = mean_rewards["chosen"] - mean_rewards["rejected"]
    for name, side in sides.items():
        metrics[f"logps/{name}"] = _mean(policy[:, side], scored[:, side])
        tokens = jnp.maximum(jnp.where(scored, lengths, 0)[:, side].sum(), 1)
        for quantity, sums in (token_sums or {}).items():
            metrics[f"{quantity}/{name}"] = jnp.where(scored, sums, 0)[:, side].sum() / tokens
    return metrics


def _mean(values, mask):
    return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1)
