"""Losses that read no reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.losses.common import (
    FLIP_RATE,
    NOT_NEGATIVE,
    POSITIVE,
    Number,
    check,
    divisor,
    nll,
    offset,
    smoothed,
    token_counts,
    weighted_sum,
)

Logps = Float[Array, "P 2"]
Lengths = Int[Array, "P 2"]
Losses = Float[Array, "P"]
Margin = Float[Array, "P"]


def simpo(
    policy: Logps,
    reference: Logps | None = None,
    *,
    lengths: Lengths,
    margin: Margin | None = None,
    beta: Number = 2.0,
    gamma: Number = 1.0,
    label_smoothing: Number = 0.0,
) -> Losses:
    """Logistic loss on log-probs per token, with a margin to reach (SimPO).

    -log S(beta (logp_w / n_w - logp_l / n_l) - gamma), smoothed as in `sigmoid`

    Args:
      policy: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected.
      reference: not read.
      lengths: scored tokens n_w, n_l of each answer; 0 only in padding pairs.
      margin: Delta, subtracted from the logit besides gamma, see `common.offset`; None: 0.
      beta: inverse temperature, > 0.
      gamma: the margin, >= 0.
      label_smoothing: the assumed rate of flipped labels, in [0, 0.5).
    Returns: losses [P].
    Raises: InputError if an option is out of range.
    Source: Meng et al. 2024 (2405.14734), Eq. 6.

    >>> print(f"{simpo(jnp.array([[-10.0, -30.0]]), lengths=jnp.array([[10, 20]]))[0]:.4f}")
    0.6931
    """
    check("beta", beta, POSITIVE)
    check("gamma", gamma, NOT_NEGATIVE)
    check("label_smoothing", label_smoothing, FLIP_RATE)
    each = policy / token_counts(lengths, policy)
    return smoothed(offset(beta * (each[:, 0] - each[:, 1]) - gamma, margin), label_smoothing)


def cpo(
    policy: Logps,
    reference: Logps | None = None,
    *,
    lengths: Lengths,
    margin: Margin | None = None,
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
    nll_weight: Number = 1.0,
    nll_average: bool = True,
) -> Losses:
    """Contrastive preference optimization: DPO under a uniform reference, plus the chosen answers' likelihood.

    -log S(beta (logp_w - logp_l)) - alpha logp_w / n_w, the first term smoothed as in `sigmoid`

    Args:
      policy: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected.
      reference: not read.
      lengths: scored tokens n_w, n_l of each answer; 0 only in padding pairs.
      margin: Delta, subtracted from the logit, see `common.offset`; None: 0.
      beta: inverse temperature, > 0.
      label_smoothing: the assumed rate of flipped labels, in [0, 0.5).
      nll_weight: alpha, >= 0.
      nll_average: the second term per token, as other trainers have it, or summed, as the paper has it.
    Returns: losses [P].
    Raises: InputError if an option is out of range.
    Source: Xu et al. 2024 (2401.08417).

    >>> print(f"{cpo(jnp.array([[-10.0, -30.0]]), lengths=jnp.array([[10, 20]]))[0]:.4f}")
    1.1269
    """
    check("beta", beta, POSITIVE)
    check("label_smoothing", label_smoothing, FLIP_RATE)
    check("nll_weight", nll_weight, NOT_NEGATIVE)
    return smoothed(offset(beta * (policy[:, 0] - policy[:, 1]), margin), label_smoothing) + nll_weight * nll(
        policy, lengths, nll_average
    )


def orpo(
    policy: Logps,
    reference: Logps | None = None,
    *,
    lengths: Lengths,
    beta: Number = 0.1,
    nll_weight: Number = 1.0,
) -> Losses:
    """Odds-ratio preference optimization: likelihood of the chosen answer, and the odds against the rejected one.

    -alpha logp_w / n_w - beta log S(log odds_w - log odds_l), with odds = p / (1 - p) of p = exp(logp / n)

    Args:
      policy: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected.
      reference: not read.
      lengths: scored tokens n_w, n_l of each answer; 0 only in padding pairs.
      beta: the paper's lambda, > 0: the weight of the odds ratio.
      nll_weight: alpha, >= 0; 1 in the paper.
    Returns: losses [P].
    Raises: InputError if an option is out of range.
    Source: Hong et al. 2024 (2403.07691).

    >>> print(f"{orpo(jnp.array([[-10.0, -30.0]]), lengths=jnp.array([[10, 20]]))[0]:.4f}")
    1.0401
    """
    check("beta", beta, POSITIVE)
    check("nll_weight", nll_weight, NOT_NEGATIVE)
    # A probability of 1 has no odds.
    each = jnp.minimum(policy / token_counts(lengths, policy), -jnp.finfo(policy.dtype).eps)
    odds = each - jnp.log(-jnp.expm1(each))
    return nll_weight * nll(policy, lengths, True) - beta * jax.nn.log_sigmoid(odds[:, 0] - odds[:, 1])


def sft(
    policy: Float[Array, "P K"],
    reference: Float[Array, "P K"] | None = None,
    *,
    lengths: Int[Array, "P K"],
    weight: Float[Array, "P"] | None = None,
) -> Losses:
    """Negative log-likelihood of the chosen answers: supervised fine-tuning.

    -logp_w * P / sum(n_w), so that the mean over the P pairs is the mean over the tokens of chosen answers

    Args:
      policy: log-probs of whole answers, in nats; column 0 chosen. The others are not read.
      reference: not read.
      lengths: scored tokens of each answer of the whole batch; 0 in padding pairs.
      weight: as how many pairs each counts in P and in the sum; None: 1.
    Returns: losses [P], in nats per token.

    >>> print(sft(jnp.array([[-10.0, -30.0], [-2.0, -5.0]]), lengths=jnp.array([[10, 20], [2, 5]])).round(4))
    [1.6667 0.3333]
    """
    tokens = lengths[:, 0].astype(policy.dtype)
    # Pairs without a chosen answer count too: the mean is over all of them.
    pairs = weighted_sum((lengths > 0).any(1), weight)
    return -policy[:, 0] * pairs / divisor(weighted_sum(tokens, weight), weight)
