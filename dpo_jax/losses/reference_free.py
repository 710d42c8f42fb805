"""Losses that read no reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.losses.common import check, check_beta, check_smoothing, nll, smoothed, token_counts

Logps = Float[Array, "P 2"]
Lengths = Int[Array, "P 2"]
Losses = Float[Array, "P"]


def simpo(
    policy: Logps,
    reference: Logps | None = None,
    *,
    lengths: Lengths,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> Losses:
    """Logistic loss on log-probabilities per token, with a margin to reach: SimPO.

    -log S(beta (logp_w / n_w - logp_l / n_l) - gamma).

    Args:
      reference: not read.
      lengths: scored tokens n_w, n_l of each answer.
      beta: inverse temperature, > 0.
      gamma: the margin, >= 0.
      label_smoothing: as of `sigmoid`.
    Returns: losses.
    Raises: InputError if an option is out of range.
    Source: Meng et al. 2024 (2405.14734), Eq. 6.
    """
    check_beta(beta)
    check("gamma", gamma, gamma >= 0, "a number >= 0")
    check_smoothing(label_smoothing)
    each = policy / token_counts(lengths, policy)
    return smoothed(beta * (each[:, 0] - each[:, 1]) - gamma, label_smoothing)


def cpo(
    policy: Logps,
    reference: Logps | None = None,
    *,
    lengths: Lengths,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
    nll_average: bool = True,
) -> Losses:
    """Contrastive preference optimization: DPO under a uniform reference, held to the chosen answers.

    -log S(beta (logp_w - logp_l)) - alpha logp_w / n_w.

    Args:
      reference: not read.
      lengths: scored tokens of each answer.
      beta: inverse temperature, > 0.
      label_smoothing: as of `sigmoid`.
      nll_weight: alpha, >= 0.
      nll_average: the second term per token (as peers train it) or summed (as the paper writes it).
    Returns: losses.
    Raises: InputError if an option is out of range.
    Source: Xu et al. 2024 (2401.08417).
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    check("nll_weight", nll_weight, nll_weight >= 0, "a number >= 0")
    return smoothed(beta * (policy[:, 0] - policy[:, 1]), label_smoothing) + nll_weight * nll(
        policy, lengths, nll_average
    )


def orpo(
    policy: Logps,
    reference: Logps | None = None,
    *,
    lengths: Lengths,
    beta: float = 0.1,
    nll_weight: float = 1.0,
) -> Losses:
    """Odds-ratio preference optimization: likelihood of the chosen answer, and the odds against the rejected one.

    -alpha logp_w / n_w - beta log S(log odds_w - log odds_l), with odds = p / (1 - p) of p = exp(logp / n).

    Args:
      reference: not read.
      lengths: scored tokens of each answer.
      beta: the paper's lambda, > 0: the weight of the odds ratio.
      nll_weight: alpha, >= 0; 1 in the paper.
    Returns: losses.
    Raises: InputError if an option is out of range.
    Source: Hong et al. 2024 (2403.07691).
    """
    check_beta(beta)
    check("nll_weight", nll_weight, nll_weight >= 0, "a number >= 0")
    # A probability of 1 has no odds.
    each = jnp.minimum(policy / token_counts(lengths, policy), -jnp.finfo(policy.dtype).eps)
    odds = each - jnp.log(-jnp.expm1(each))
    return nll_weight * nll(policy, lengths, True) - beta * jax.nn.log_sigmoid(odds[:, 0] - odds[:, 1])


def sft(
    policy: Float[Array, "P K"], reference: Float[Array, "P K"] | None = None, *, lengths: Int[Array, "P K"]
) -> Losses:
    """Negative log-likelihood of the chosen answers, the stage before preference training.

    -logp_w * P / sum(n_w), so that the mean over the P pairs is the mean over the tokens of chosen answers.

    Args:
      reference: not read; the loss is reference-free.
      lengths: scored tokens of each answer of the whole batch; 0 for padding pairs.
    Returns: losses in nats per token.
    """
    tokens = lengths[:, 0].astype(policy.dtype)
    pairs = jnp.sum((lengths > 0).any(1))  # those without a chosen answer too: the mean is over all
    return -policy[:, 0] * pairs / jnp.maximum(jnp.sum(tokens), 1)
