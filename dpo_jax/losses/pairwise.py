"""Losses of a pair's two log-ratios."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.losses.common import (
    check,
    check_beta,
    check_smoothing,
    log_ratios,
    of_answers_there,
    smoothed,
    token_counts,
)

Logps = Float[Array, "P 2"]
Lengths = Int[Array, "P 2"]
Losses = Float[Array, "P"]


def sigmoid(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Losses:
    """Logistic preference loss, the DPO objective; with smoothing, conservative DPO.

    -(1-e) log S(beta h) - e log S(-beta h), with S the sigmoid.

    Args:
      beta: inverse temperature, > 0; larger stays nearer the reference.
      label_smoothing: e, the assumed rate of flipped labels, in [0, 0.5).
    Returns: losses; log 2 where policy equals reference. No gradient flows into `reference`.
    Raises: InputError if an option is out of range.
    Source: Rafailov et al. 2023 (2305.18290), Eq. 7; smoothing: Mitchell 2023 (cDPO), Eq. 3.

    >>> zeros = jnp.zeros((1, 2))
    >>> print(sigmoid(zeros, zeros).round(6))
    [0.693147]
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    a, b = log_ratios(policy, reference)
    return smoothed(beta * (a - b), label_smoothing)


def robust(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Losses:
    """Logistic loss whose mean over flipped labels is that of DPO over the true ones.

    [-(1-e) log S(beta h) + e log S(-beta h)] / (1 - 2e).

    Args:
      beta: inverse temperature, > 0.
      label_smoothing: e, the rate of flipped labels, in [0, 0.5); 0 is `sigmoid`.
    Returns: losses, below 0 for some margins; log 2 where policy equals reference.
    Raises: InputError if an option is out of range.
    Source: Chowdhury et al. 2024 (2403.00409).
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    a, b = log_ratios(policy, reference)
    return smoothed(beta * (a - b), -label_smoothing / (1 - 2 * label_smoothing))


def hinge(policy: Logps, reference: Logps, *, lengths: Lengths | None = None, beta: float = 0.1) -> Losses:
    """Hinge preference loss, max(0, 1 - beta h).

    Args:
      beta: slope, the reciprocal of the margin gamma in SLiC, > 0.
    Returns: losses; 1 where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: Zhao et al. 2023 (2305.10425), Eq. 7, on log-ratios as in Liu et al. 2023 (2309.06657).
    """
    check_beta(beta)
    a, b = log_ratios(policy, reference)
    return jax.nn.relu(1 - beta * (a - b))


def ipo(policy: Logps, reference: Logps, *, lengths: Lengths, beta: float = 0.1, average: bool = True) -> Losses:
    """Squared preference loss, (a/n_w - b/n_l - 1/(2 beta))^2, or without the divisions by the answers' lengths.

    Args:
      lengths: scored tokens n_w, n_l of each answer; 0 only for padding pairs.
      beta: the paper's tau, > 0.
      average: log-ratios per token (as peers train it) or summed (as the paper writes it).
    Returns: losses; 1/(4 beta^2) where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: Azar et al. 2023 (2310.12036), Eq. 17.
    """
    check_beta(beta)
    a, b = log_ratios(policy, reference)
    if average:
        tokens = token_counts(lengths, policy)
        a, b = a / tokens[:, 0], b / tokens[:, 1]
    return jnp.square(a - b - 1 / (2 * beta))


def sigmoid_norm(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths,
    beta: float = 5.0,
    label_smoothing: float = 0.0,
) -> Losses:
    """Logistic preference loss on log-ratios per token, -log S(beta (a/n_w - b/n_l)).

    Args:
      lengths: scored tokens n_w, n_l of each answer.
      beta: inverse temperature, > 0; larger than for sums, by about the length of an answer.
      label_smoothing: as of `sigmoid`.
    Returns: losses; log 2 where policy equals reference.
    Raises: InputError if an option is out of range.
    Source: Lambert et al. 2024 (Tulu 3, 2411.15124).
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    a, b = log_ratios(policy, reference)
    tokens = token_counts(lengths, policy)
    return smoothed(beta * (a / tokens[:, 0] - b / tokens[:, 1]), label_smoothing)


def exo_pair(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Losses:
    """Reverse KL divergence between the policy's preference and the smoothed label.

    S(beta h) [log S(beta h) - log(1-e)] + S(-beta h) [log S(-beta h) - log e].

    Args:
      beta: inverse temperature, > 0.
      label_smoothing: e, in (0, 0.5).
    Returns: losses, >= 0.
    Raises: InputError if an option is out of range.
    Source: Ji et al. 2024 (EXO, 2402.00856), Eq. 16.
    """
    check_beta(beta)
    e = label_smoothing
    check("label_smoothing", e, 0 < e < 0.5, "a number in (0, 0.5)")
    a, b = log_ratios(policy, reference)
    z = beta * (a - b)
    chosen = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - jnp.log1p(-e))
    return chosen + jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - jnp.log(e))


def nca_pair(policy: Logps, reference: Logps, *, lengths: Lengths | None = None, beta: float = 0.1) -> Losses:
    """Noise contrastive alignment: raises the chosen answer's own reward and not only its lead.

    -log S(beta a) - log S(-beta a) / 2 - log S(-beta b) / 2.

    Args:
      beta: inverse temperature, > 0.
    Returns: losses; 2 log 2 where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: Chen et al. 2024 (2402.05369), with two answers.
    """
    check_beta(beta)
    a, b = log_ratios(policy, reference)
    chosen, rejected = beta * a, beta * b
    against = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * against


def sppo_hard(policy: Logps, reference: Logps, *, lengths: Lengths | None = None, beta: float = 1e-3) -> Losses:
    """Self-play preference optimization with win rates of 1 and 0, (a - 1/(2 beta))^2 + (b + 1/(2 beta))^2.

    Args:
      beta: the reciprocal of the paper's eta, > 0.
    Returns: losses; 1/(2 beta^2) where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: Wu et al. 2024 (2405.00675), Eq. 4.7.
    """
    check_beta(beta)
    a, b = log_ratios(policy, reference)
    return jnp.square(a - 1 / (2 * beta)) + jnp.square(b + 1 / (2 * beta))


def apo_zero(policy: Logps, reference: Logps, *, lengths: Lengths, beta: float = 0.1) -> Losses:
    """Anchored preference loss that makes chosen answers likelier and rejected ones less so.

    1 - S(beta a) + S(beta b); of an unpaired example the term of its one answer.

    Args:
      lengths: scored tokens of each answer; 0 for one that is not there.
      beta: inverse temperature, > 0.
    Returns: losses, in (0, 2); 1 where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: D'Oosterlinck et al. 2024 (2408.06266), Eq. 7.
    """
    check_beta(beta)
    a, b = log_ratios(policy, reference)
    sides = jnp.stack([jax.nn.sigmoid(-beta * a), jax.nn.sigmoid(beta * b)], axis=1)
    return of_answers_there(sides, lengths).sum(1)


def apo_down(policy: Logps, reference: Logps, *, lengths: Lengths | None = None, beta: float = 0.1) -> Losses:
    """Anchored preference loss that makes both answers less likely, the rejected one more so.

    S(beta a) + 1 - S(beta h): for answers that are all worse than the policy's own.

    Args:
      beta: inverse temperature, > 0.
    Returns: losses, in (0, 2); 1 where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: D'Oosterlinck et al. 2024 (2408.06266), Eq. 8.
    """
    check_beta(beta)
    a, b = log_ratios(policy, reference)
    return jax.nn.sigmoid(beta * a) + jax.nn.sigmoid(-beta * (a - b))


def discopop(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    beta: float = 0.1,
    tau: float = 0.05,
) -> Losses:
    """The loss that a language model discovered: logistic and exponential ones, blended by the margin.

    (1-m)(-log S(beta h)) + m exp(-beta h), with m = S(beta h / tau).

    Args:
      beta: inverse temperature, > 0.
      tau: temperature of the blend, in (0, 1]: above 1 the exponential would win where margins are far below 0.
    Returns: losses; (log 2 + 1) / 2 where policy equals reference.
    Raises: InputError if an option is out of range.
    Source: Lu et al. 2024 (2406.08414), Eq. 5.
    """
    check_beta(beta)
    check("tau", tau, 0 < tau <= 1, "a number in (0, 1]")
    a, b = log_ratios(policy, reference)
    z = beta * (a - b)
    # m exp(-z) as one exponential: the factors alone overflow where z is far below 0.
    return jax.nn.sigmoid(-z / tau) * -jax.nn.log_sigmoid(z) + jnp.exp(jax.nn.log_sigmoid(z / tau) - z)


def dpo_positive(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    beta: float = 0.1,
    penalty: float = 50.0,
) -> Losses:
    """Logistic preference loss that penalizes chosen answers which become less likely (DPOP).

    -log S(beta (h - lambda max(0, -a))).

    Args:
      beta: inverse temperature, > 0.
      penalty: lambda, >= 0; 0 is `sigmoid`.
    Returns: losses; log 2 where policy equals reference.
    Raises: InputError if an option is out of range.
    Source: Pal et al. 2024 (2402.13228), Eq. 3.
    """
    check_beta(beta)
    check("penalty", penalty, penalty >= 0, "a number >= 0")
    a, b = log_ratios(policy, reference)
    return -jax.nn.log_sigmoid(beta * (a - b - penalty * jax.nn.relu(-a)))


def tdpo1(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    sequence_kl: Float[Array, "P 2"],
    beta: float = 0.1,
) -> Losses:
    """Token-level DPO: the margin less the difference of the answers' sequential KL divergences.

    -log S(beta (h - (D_l - D_w))), with D = sum_t KL(reference || policy) of the next token along an answer.

    Args:
      sequence_kl: D of each answer, in nats, with gradient; column 0 chosen, 1 rejected.
      beta: inverse temperature, > 0.
    Returns: losses; log 2 where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: Zeng et al. 2024 (2404.11999).
    """
    check_beta(beta)
    a, b = log_ratios(policy, reference)
    return -jax.nn.log_sigmoid(beta * (a - b - (sequence_kl[:, 1] - sequence_kl[:, 0])))


def tdpo2(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    sequence_kl: Float[Array, "P 2"],
    beta: float = 0.1,
    kl_weight: float = 0.5,
) -> Losses:
    """Token-level DPO that draws only rejected answers' divergence down to the chosen ones'.

    -log S(beta (h - alpha (D_l - sg(D_w)))), with D as in `tdpo1` and sg(.) without gradient.

    Args:
      sequence_kl: D of each answer, in nats, with gradient; column 0 chosen, 1 rejected.
      beta: inverse temperature, > 0.
      kl_weight: alpha, >= 0; 0 is `sigmoid`.
    Returns: losses; log 2 where policy equals reference.
    Raises: InputError if an option is out of range.
    Source: Zeng et al. 2024 (2404.11999).
    """
    check_beta(beta)
    check("kl_weight", kl_weight, kl_weight >= 0, "a number >= 0")
    a, b = log_ratios(policy, reference)
    ahead = sequence_kl[:, 1] - jax.lax.stop_gradient(sequence_kl[:, 0])
    return -jax.nn.log_sigmoid(beta * (a - b - kl_weight * ahead))


def plackett_luce(
    policy: Float[Array, "P K"],
    reference: Float[Array, "P K"],
    *,
    lengths: Int[Array, "P K"],
    beta: float = 0.1,
) -> Losses:
    """Negative log-likelihood of a whole ranking; of two answers, `sigmoid`.

    -sum_k log( exp(beta r_k) / sum_{j >= k} exp(beta r_j) ), with r_k the log-ratio of the k-th best answer.

    Args:
      policy, reference: column k holds the k-th best answer.
      lengths: scored tokens of each answer; 0 for one that is not there.
      beta: inverse temperature, > 0.
    Returns: losses; log K! where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: Rafailov et al. 2023 (2305.18290), appendix A.3.
    """
    check_beta(beta)
    there = lengths > 0
    rewards = beta * (policy - jax.lax.stop_gradient(reference))
    low = jnp.finfo(rewards.dtype).min
    # From the last answer on: the log of the sum over those that are no better.
    ahead = jax.lax.associative_scan(jnp.logaddexp, jnp.where(there, rewards, low), reverse=True, axis=1)
    return jnp.where(there, ahead - rewards, 0).sum(1)
