"""What is reported of a set of scored pairs, under the names that preference trainers share."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def pair_metrics(
    losses: Float[Array, "P"],
    policy: Float[Array, "P 2"],
    reference: Float[Array, "P 2"],
    lengths: Int[Array, "P 2"],
    present: Bool[Array, "P"],
    *,
    beta: float | None,
    token_sums: dict[str, Float[Array, "P 2"]] | None = None,
) -> dict[str, Float[Array, ""]]:
    """Means over the present pairs, every one a global numerator over a global denominator.

    rewards = beta (policy - reference), in nats; accuracy counts margins strictly > 0, so it is 0 where policy and
    reference agree. logps are summed over an answer and averaged over pairs, in nats.

    Args:
      losses: one per pair, masked here, after the nonlinearity.
      beta: scale of the rewards; None: the loss compares no answers, and neither rewards nor anything of the rejected
        ones is reported.
      token_sums: quantities summed over an answer's tokens, reported as means over all tokens of that side.
    """
    weight = present.astype(policy.dtype)
    total = jnp.maximum(weight.sum(), 1)

    def mean(values):
        return jnp.where(present, values, 0).sum() / total

    found = {"loss": mean(losses)}
    if beta is not None:
        rewards = beta * (policy - reference)
        margins = rewards[:, 0] - rewards[:, 1]
        found |= {
            "rewards/chosen": mean(rewards[:, 0]),
            "rewards/rejected": mean(rewards[:, 1]),
            "rewards/margins": mean(margins),
            "rewards/accuracies": mean((margins > 0).astype(policy.dtype)),
        }
    tokens = jnp.maximum(jnp.where(present[:, None], lengths, 0).sum(0), 1)
    for side, name in enumerate(("chosen", "rejected") if beta is not None else ("chosen",)):
        found[f"logps/{name}"] = mean(policy[:, side])
        for quantity, sums in (token_sums or {}).items():
            found[f"{quantity}/{name}"] = jnp.where(present, sums[:, side], 0).sum() / tokens[side]
    return found
