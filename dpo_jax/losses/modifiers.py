"""Changes that combine with losses: other divergences than the KL, weights of tokens (LD-DPO) and of pairs (WPO)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.losses.common import Number, token_counts
from dpo_jax.types import check_choice

STEEPEST = 30.0  # nats; beyond, exponentials continue as straight lines, so that float32 holds them and their squares
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def f_scores(
    log_ratios: Float[Array, "P K"], *, divergence: str = "reverse_kl", divergence_alpha: Number = 0.5
) -> Float[Array, "P K"]:
    """Returns f'(u) of u = exp(log-ratio), which replaces the log-ratio under another f-divergence.

    reverse_kl: log u. forward_kl: 1 - 1/u. js_divergence: log(2u / (1+u)). alpha_divergence: (1 - u^-alpha) / alpha,
    which is between the first (alpha to 0) and the second (alpha to 1). A constant that all answers share cancels.

    Args:
      log_ratios: policy less reference, in nats.
      divergence: one of DIVERGENCES.
      divergence_alpha: alpha, in (0, 1); read with alpha_divergence only.
    Raises: InputError for an unknown divergence.
    Source: Wang et al. 2023 (2309.16240), table 1.

    >>> print(f_scores(jnp.array([[0.0, 1.0]]), divergence="forward_kl").round(4))
    [[0.     0.6321]]
    """
    check_choice("divergence", divergence, DIVERGENCES)
    if divergence == "forward_kl":
        return 1 - _exp(-log_ratios)
    if divergence == "js_divergence":
        return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratios)
    if divergence == "alpha_divergence":
        return (1 - _exp(-divergence_alpha * log_ratios)) / divergence_alpha
    return log_ratios


def _exp(x: Float[Array, "P K"]) -> Float[Array, "P K"]:
    """Returns exp(x), continued above STEEPEST by its tangent."""
    return jnp.exp(jnp.minimum(x, STEEPEST)) * (1 + jnp.maximum(x - STEEPEST, 0))


def desensitized(
    logps: Float[Array, "P 2"], shared_logps: Float[Array, "P 2"], *, ld_alpha: Number
) -> Float[Array, "P 2"]:
    """Returns log-probs in which tokens beyond the shorter answer's length count alpha times (LD-DPO).

    Args:
      logps: log-probs of whole answers, in nats.
      shared_logps: log-probs of each answer's first tokens, as many as the shorter answer has.
      ld_alpha: alpha, in [0, 1]; 1 changes nothing.
    Source: Liu et al. 2024 (2409.06411).

    >>> print(desensitized(jnp.array([[-10.0, -14.0]]), jnp.array([[-10.0, -8.0]]), ld_alpha=0.5))
    [[-10. -11.]]
    """
    return shared_logps + ld_alpha * (logps - shared_logps)


def wpo_weights(
    policy: Float[Array, "P 2"], log_collision: Float[Array, "P 2"], lengths: Int[Array, "P 2"]
) -> Float[Array, "P"]:
    """Returns the weight of each pair: how likely the policy would have written its answers (WPO); without gradient.

    w(y_w) w(y_l), w(y) = exp( 1/|y| sum_t [log p(y_t) - log sum_v p(v)^2] )

    Args:
      policy: log-probs of whole answers, in nats.
      log_collision: log sum_v p(v)^2, summed over the tokens of each answer.
      lengths: scored tokens of each answer.
    Source: Zhou et al. 2024 (2406.11827), Eq. 2, with sampled alignment.

    >>> print(f"{wpo_weights(jnp.array([[-3.0, -8.0]]), jnp.array([[-2.0, -4.0]]), jnp.array([[2, 4]]))[0]:.4f}")
    0.2231
    """
    each = (policy - log_collision) / token_counts(lengths, policy)
    return jax.lax.stop_gradient(jnp.exp(each.sum(1)))
