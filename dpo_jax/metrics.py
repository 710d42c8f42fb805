"""What is reported of a set of scored pairs, under the names that preference trainers share."""

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
) -> dict[str, Float[Array, ""]]:
    """Means over the present pairs, every one a global numerator over a global denominator.

    rewards = beta (policy - reference), in nats; accuracy counts margins strictly > 0, so it is 0 where policy and
    reference agree. logps are summed over an answer and averaged over answers, in nats. Of a ranking, the best answer
    is the chosen one, and margins and accuracies are of every two answers.

    Args:
      losses: one per pair, masked here, after the nonlinearity.
      rewards: None: the loss compares no answers, and neither rewards nor anything of the rejected ones is reported.
      lengths: scored tokens of each answer; 0 for one that is not there.
      token_sums: quantities summed over an answer's tokens, reported as means over all tokens of that side.
      paired: whether every pair has two answers; without, the margin is that of the means, and there is no accuracy.
    """
    there = (lengths > 0) & present[:, None]
    sides = {"chosen": slice(0, 1), "rejected": slice(1, None)}
    if rewards is None:
        del sides["rejected"]
    found = {"loss": _mean(losses, present)}
    if rewards is not None:
        of_sides = {name: _mean(rewards[:, side], there[:, side]) for name, side in sides.items()}
        found |= {f"rewards/{name}": value for name, value in of_sides.items()}
        if paired:
            better, worse = jnp.triu_indices(rewards.shape[1], 1)
            margins, both = rewards[:, better] - rewards[:, worse], there[:, better] & there[:, worse]
            found["rewards/margins"] = _mean(margins, both)
            found["rewards/accuracies"] = _mean((margins > 0).astype(policy.dtype), both)
        else:
            found["rewards/margins"] = of_sides["chosen"] - of_sides["rejected"]
    for name, side in sides.items():
        found[f"logps/{name}"] = _mean(policy[:, side], there[:, side])
        tokens = jnp.maximum(jnp.where(there, lengths, 0)[:, side].sum(), 1)
        for quantity, sums in (token_sums or {}).items():
            found[f"{quantity}/{name}"] = jnp.where(there, sums, 0)[:, side].sum() / tokens
    return found


def _mean(values, there):
    return jnp.where(there, values, 0).sum() / jnp.maximum(there.sum(), 1)
