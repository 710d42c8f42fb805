"""What combines with losses: divergences other than the KL, lengths and likelihoods that weigh in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.losses.common import token_counts

STEEPEST = 30.0  # nats; beyond, exponentials go on as straight lines, so that float32 holds them and their squares
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def f_scores(
    log_ratios: Float[Array, "P K"], *, divergence: str = "reverse_kl", divergence_alpha: float = 0.5
) -> Float[Array, "P K"]:
    """f'(u) of u = exp(log-ratio), which takes the log-ratio's place where the divergence is not the reverse KL.

    reverse_kl: log u. forward_kl: 1 - 1/u. js_divergence: log(2u / (1+u)). alpha_divergence: (1 - u^-alpha) / alpha,
    which lies between the first (alpha to 0) and the second (alpha to 1). A constant that all answers share cancels.

    Args:
      divergence: one of DIVERGENCES.
      divergence_alpha: alpha, in (0, 1).
    Source: Wang et al. 2023 (2309.16240), table 1.

    >>> print(f_scores(jnp.array([[0.0, 1.0]]), divergence="forward_kl").round(4))
    [[0.     0.6321]]
    """
    if divergence == "forward_kl":
        return 1 - _exp(-log_ratios)
    if divergence == "js_divergence":
        return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratios)
    if divergence == "alpha_divergence":
        return (1 - _exp(-divergence_alpha * log_ratios)) / divergence_alpha
    return log_ratios


def _exp(x):
    """exp(x), from STEEPEST on its tangent."""
    return jnp.exp(jnp.minimum(x, STEEPEST)) * (1 + jnp.maximum(x - STEEPEST, 0))


def desensitized(
    logps: Float[Array, "P 2"], shared_logps: Float[Array, "P 2"], *, ld_alpha: float
) -> Float[Array, "P 2"]:
    """Log-probs in which tokens beyond the shorter answer's length count alpha times (LD-DPO).

    Args:
      logps: of whole answers, in nats.
      shared_logps: of as many of their first tokens as the shorter one has.
      ld_alpha: alpha, in [0, 1]; 1 changes nothing.
    Source: Liu et al. 2024 (2409.06411).
    """
    return shared_logps + ld_alpha * (logps - shared_logps)


def wpo_weights(
    policy: Float[Array, "P 2"], log_collision: Float[Array, "P 2"], lengths: Int[Array, "P 2"]
) -> Float[Array, "P"]:
    """Weight of each pair by how likely the policy would have written it; without gradient.

    w(y_w) w(y_l), w(y) = exp( 1/|y| sum_t [log p(y_t) - log sum_v p(v)^2] ).

    Args:
      policy: log-probs of answers, in nats.
      log_collision: sums over their tokens of log sum_v p(v)^2.
    Source: Zhou et al. 2024 (WPO, 2406.11827), Eq. 2, with sampled alignment.
    """
    each = (policy - log_collision) / token_counts(lengths, policy)
    return jax.lax.stop_gradient(jnp.exp(each.sum(1)))
