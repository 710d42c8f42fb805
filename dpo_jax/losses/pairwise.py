"""Losses that are functions of a pair's two log-ratios."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.losses.common import (
    FLIP_RATE,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_FLIP_RATE,
    SHARE,
    Number,
    check,
    check_switch,
    log_ratios,
    offset,
    smoothed,
    token_counts,
    zero_where_missing,
)

Logps = Float[Array, "P 2"]
Lengths = Int[Array, "P 2"]
Losses = Float[Array, "P"]
Margin = Float[Array, "P"]


def sigmoid(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    margin: Margin | None = None,
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
) -> Losses:
    """Logistic preference loss: DPO, and with label smoothing conservative DPO.

    -(1-e) log S(beta h - Delta) - e log S(Delta - beta h)

    Delta is 0 without `margin`; with it, this is DPO with an offset (ODPO).

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: not read; every loss takes it.
      margin: Delta, subtracted from the logit, see `common.offset`; None: 0.
      beta: inverse temperature, > 0; larger stays nearer the reference.
      label_smoothing: e, the assumed rate of flipped labels, in [0, 0.5).
    Returns: losses [P]; log 2 where policy equals reference.
    Raises: InputError if an option is out of range.
    Source: Rafailov et al. 2023 (2305.18290), Eq. 7; smoothing: Mitchell 2023 (cDPO), Eq. 3;
      margin: Amini et al. 2024 (2402.10571).

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{sigmoid(policy, reference, beta=0.1)[0]:.4f}")
    0.5544
    """
    check("beta", beta, POSITIVE)
    check("label_smoothing", label_smoothing, FLIP_RATE)
    a, b = log_ratios(policy, reference)
    return smoothed(offset(beta * (a - b), margin), label_smoothing)


def robust(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    margin: Margin | None = None,
    beta: Number = 0.1,
    label_smoothing: Number = 0.1,
) -> Losses:
    """Logistic preference loss for flipped labels: its mean over the flips is DPO's loss of the true labels.

    [-(1-e) log S(beta h) + e log S(-beta h)] / (1 - 2e)

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: not read; every loss takes it.
      margin: Delta, subtracted from the logit, see `common.offset`; None: 0.
      beta: inverse temperature, > 0.
      label_smoothing: e, the known rate of flipped labels, in [0, 0.5); 0 gives `sigmoid`.
    Returns: losses [P], below 0 for large margins; log 2 where policy equals reference.
    Raises: InputError if an option is out of range.
    Source: Chowdhury et al. 2024 (2403.00409).

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{robust(policy, reference)[0]:.4f}")
    0.5169
    """
    check("beta", beta, POSITIVE)
    check("label_smoothing", label_smoothing, FLIP_RATE)
    a, b = log_ratios(policy, reference)
    return smoothed(offset(beta * (a - b), margin), -label_smoothing / (1 - 2 * label_smoothing))


def hinge(
    policy: Logps, reference: Logps, *, lengths: Lengths | None = None, margin: Margin | None = None, beta: Number = 0.1
) -> Losses:
    """Hinge preference loss: a pair whose margin has reached 1/beta no longer trains.

    max(0, 1 - beta h)

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: not read; every loss takes it.
      margin: Delta, subtracted from the logit, see `common.offset`; None: 0.
      beta: slope, > 0; the reciprocal of the margin gamma in SLiC.
    Returns: losses [P]; 1 where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: Zhao et al. 2023 (2305.10425), Eq. 7, on log-ratios as in Liu et al. 2023 (2309.06657).

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{hinge(policy, reference)[0]:.4f}")
    0.7000
    """
    check("beta", beta, POSITIVE)
    a, b = log_ratios(policy, reference)
    return jax.nn.relu(1 - offset(beta * (a - b), margin))


def ipo(policy: Logps, reference: Logps, *, lengths: Lengths, beta: Number = 0.1, average: bool = True) -> Losses:
    """Squared preference loss: brings the margin to 1/(2 beta) and no further (IPO).

    (a/n_w - b/n_l - 1/(2 beta))^2, or (a - b - 1/(2 beta))^2 where `average` is false

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: scored tokens n_w, n_l of each answer; 0 only in padding pairs.
      beta: the paper's tau, > 0.
      average: log-ratios per token, as other trainers have it, or summed, as the paper has it.
    Returns: losses [P]; 1/(4 beta^2) where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: Azar et al. 2023 (2310.12036), Eq. 17.

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{ipo(policy, reference, lengths=jnp.array([[2, 4]]))[0]:.4f}")
    16.0000
    >>> print(f"{ipo(policy, reference, lengths=jnp.array([[2, 4]]), average=False)[0]:.4f}")
    4.0000
    """
    check("beta", beta, POSITIVE)
    check_switch("average", average)
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
    margin: Margin | None = None,
    beta: Number = 5.0,
    label_smoothing: Number = 0.0,
) -> Losses:
    """Logistic preference loss on log-ratios per token, so that long answers weigh no more.

    -log S(beta (a/n_w - b/n_l)), smoothed as in `sigmoid`

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: scored tokens n_w, n_l of each answer; 0 only in padding pairs.
      margin: Delta, subtracted from the logit, see `common.offset`; None: 0.
      beta: inverse temperature, > 0; larger than for sums, by about the length of an answer.
      label_smoothing: the assumed rate of flipped labels, in [0, 0.5).
    Returns: losses [P]; log 2 where policy equals reference.
    Raises: InputError if an option is out of range.
    Source: Lambert et al. 2024 (Tulu 3, 2411.15124).

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{sigmoid_norm(policy, reference, lengths=jnp.array([[2, 4]]))[0]:.4f}")
    0.0067
    """
    check("beta", beta, POSITIVE)
    check("label_smoothing", label_smoothing, FLIP_RATE)
    a, b = log_ratios(policy, reference)
    tokens = token_counts(lengths, policy)
    return smoothed(offset(beta * (a / tokens[:, 0] - b / tokens[:, 1]), margin), label_smoothing)


def exo_pair(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    beta: Number = 0.1,
    label_smoothing: Number = 1e-3,
) -> Losses:
    """Reverse KL divergence between the policy's preference and the smoothed label (EXO).

    S(beta h) [log S(beta h) - log(1-e)] + S(-beta h) [log S(-beta h) - log e]

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: not read; every loss takes it.
      beta: inverse temperature, > 0.
      label_smoothing: e, the assumed rate of flipped labels, in (0, 0.5).
    Returns: losses [P], >= 0.
    Raises: InputError if an option is out of range.
    Source: Ji et al. 2024 (2402.00856), Eq. 16.

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{exo_pair(policy, reference)[0]:.4f}")
    2.2582
    """
    check("beta", beta, POSITIVE)
    e = label_smoothing
    check("label_smoothing", e, POSITIVE_FLIP_RATE)
    a, b = log_ratios(policy, reference)
    z = beta * (a - b)
    chosen = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - jnp.log1p(-e))
    return chosen + jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - jnp.log(e))


def nca_pair(policy: Logps, reference: Logps, *, lengths: Lengths | None = None, beta: Number = 0.1) -> Losses:
    """Noise contrastive alignment: raises the chosen answer's own reward, not only its margin.

    -log S(beta a) - log S(-beta a) / 2 - log S(-beta b) / 2

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: not read; every loss takes it.
      beta: inverse temperature, > 0.
    Returns: losses [P]; 2 log 2 where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: Chen et al. 2024 (2402.05369), with two answers.

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{nca_pair(policy, reference)[0]:.4f}")
    1.3157
    """
    check("beta", beta, POSITIVE)
    a, b = log_ratios(policy, reference)
    chosen, rejected = beta * a, beta * b
    against = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * against


def sppo_hard(policy: Logps, reference: Logps, *, lengths: Lengths | None = None, beta: Number = 1e-3) -> Losses:
    """Self-play preference optimization with win rates of 1 and 0.

    (a - 1/(2 beta))^2 + (b + 1/(2 beta))^2

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: not read; every loss takes it.
      beta: the reciprocal of the paper's eta, > 0.
    Returns: losses [P]; 1/(2 beta^2) where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: Wu et al. 2024 (2405.00675), Eq. 4.7.

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{sppo_hard(policy, reference, beta=0.1)[0]:.4f}")
    25.0000
    """
    check("beta", beta, POSITIVE)
    a, b = log_ratios(policy, reference)
    return jnp.square(a - 1 / (2 * beta)) + jnp.square(b + 1 / (2 * beta))


def apo_zero(policy: Logps, reference: Logps, *, lengths: Lengths, beta: Number = 0.1) -> Losses:
    """Anchored preference loss that makes chosen answers likelier and rejected ones less likely.

    1 - S(beta a) + S(beta b); an unpaired example has the term of its one answer

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: scored tokens of each answer; 0 for a missing one.
      beta: inverse temperature, > 0.
    Returns: losses [P], in (0, 2); 1 where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: D'Oosterlinck et al. 2024 (2408.06266), Eq. 7.

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{apo_zero(policy, reference, lengths=jnp.array([[2, 4]]))[0]:.4f}")
    0.9252
    >>> print(f"{apo_zero(policy, reference, lengths=jnp.array([[2, 0]]))[0]:.4f}")  # the rejected answer is missing
    0.4750
    """
    check("beta", beta, POSITIVE)
    a, b = log_ratios(policy, reference)
    sides = jnp.stack([jax.nn.sigmoid(-beta * a), jax.nn.sigmoid(beta * b)], axis=1)
    return zero_where_missing(sides, lengths).sum(1)


def apo_down(policy: Logps, reference: Logps, *, lengths: Lengths | None = None, beta: Number = 0.1) -> Losses:
    """Anchored preference loss that makes both answers less likely, the rejected one more so.

    S(beta a) + 1 - S(beta h), for answers that are all worse than the policy's own

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: not read; every loss takes it.
      beta: inverse temperature, > 0.
    Returns: losses [P], in (0, 2); 1 where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: D'Oosterlinck et al. 2024 (2408.06266), Eq. 8.

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{apo_down(policy, reference)[0]:.4f}")
    0.9505
    """
    check("beta", beta, POSITIVE)
    a, b = log_ratios(policy, reference)
    return jax.nn.sigmoid(beta * a) + jax.nn.sigmoid(-beta * (a - b))


def discopop(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    beta: Number = 0.1,
    tau: Number = 0.05,
) -> Losses:
    """Logistic and exponential losses blended by the margin; the blend was found by a language model (DiscoPOP).

    (1-m)(-log S(beta h)) + m exp(-beta h), with m = S(beta h / tau)

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: not read; every loss takes it.
      beta: inverse temperature, > 0.
      tau: temperature of the blend, in (0, 1]; above 1 the exponential would win where margins are far below 0.
    Returns: losses [P]; (log 2 + 1) / 2 where policy equals reference.
    Raises: InputError if an option is out of range.
    Source: Lu et al. 2024 (2406.08414), Eq. 5.

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{discopop(policy, reference)[0]:.4f}")
    0.7404
    """
    check("beta", beta, POSITIVE)
    check("tau", tau, SHARE)
    a, b = log_ratios(policy, reference)
    z = beta * (a - b)
    # m exp(-z) as one exponential: the factors alone overflow where z is far below 0.
    return jax.nn.sigmoid(-z / tau) * -jax.nn.log_sigmoid(z) + jnp.exp(jax.nn.log_sigmoid(z / tau) - z)


def dpo_positive(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    margin: Margin | None = None,
    beta: Number = 0.1,
    penalty: Number = 50.0,
) -> Losses:
    """Logistic preference loss that penalizes chosen answers which become less likely (DPOP).

    -log S(beta (h - lambda max(0, -a)))

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: not read; every loss takes it.
      margin: Delta, subtracted from the logit, see `common.offset`; None: 0.
      beta: inverse temperature, > 0.
      penalty: lambda, >= 0; 0 gives `sigmoid`.
    Returns: losses [P]; log 2 where policy equals reference.
    Raises: InputError if an option is out of range.
    Source: Pal et al. 2024 (2402.13228), Eq. 3.

    >>> policy, reference = jnp.array([[-11.1, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{dpo_positive(policy, reference)[0]:.4f}")  # the penalty: 50 * 0.1 nats
    0.8601
    """
    check("beta", beta, POSITIVE)
    check("penalty", penalty, NOT_NEGATIVE)
    a, b = log_ratios(policy, reference)
    return -jax.nn.log_sigmoid(offset(beta * (a - b - penalty * jax.nn.relu(-a)), margin))


def tdpo1(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    sequence_kl: Float[Array, "P 2"],
    margin: Margin | None = None,
    beta: Number = 0.1,
) -> Losses:
    """Token-level DPO: the margin less the difference of the answers' sequential KL divergences.

    -log S(beta (h - (D_l - D_w))), with D = sum_t KL(reference || policy) of the next token along an answer

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: not read; every loss takes it.
      sequence_kl: D of each answer, in nats, with gradient; column 0 chosen, column 1 rejected.
      margin: Delta, subtracted from the logit, see `common.offset`; None: 0.
      beta: inverse temperature, > 0.
    Returns: losses [P]; log 2 where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: Zeng et al. 2024 (2404.11999).

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{tdpo1(policy, reference, sequence_kl=jnp.array([[1.0, 2.0]]))[0]:.4f}")
    0.5981
    """
    check("beta", beta, POSITIVE)
    a, b = log_ratios(policy, reference)
    return -jax.nn.log_sigmoid(offset(beta * (a - b - (sequence_kl[:, 1] - sequence_kl[:, 0])), margin))


def tdpo2(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    sequence_kl: Float[Array, "P 2"],
    margin: Margin | None = None,
    beta: Number = 0.1,
    kl_weight: Number = 0.5,
) -> Losses:
    """Token-level DPO that lowers the rejected answers' divergence to that of the chosen ones, not the reverse.

    -log S(beta (h - alpha (D_l - sg(D_w)))), with D as in `tdpo1` and sg(.) without gradient

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: not read; every loss takes it.
      sequence_kl: D of each answer, in nats, with gradient; column 0 chosen, column 1 rejected.
      margin: Delta, subtracted from the logit, see `common.offset`; None: 0.
      beta: inverse temperature, > 0.
      kl_weight: alpha, >= 0; 0 gives `sigmoid`.
    Returns: losses [P]; log 2 where policy equals reference.
    Raises: InputError if an option is out of range.
    Source: Zeng et al. 2024 (2404.11999).

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{tdpo2(policy, reference, sequence_kl=jnp.array([[1.0, 2.0]]))[0]:.4f}")
    0.5759
    """
    check("beta", beta, POSITIVE)
    check("kl_weight", kl_weight, NOT_NEGATIVE)
    a, b = log_ratios(policy, reference)
    excess = sequence_kl[:, 1] - jax.lax.stop_gradient(sequence_kl[:, 0])
    return -jax.nn.log_sigmoid(offset(beta * (a - b - kl_weight * excess), margin))


def plackett_luce(
    policy: Float[Array, "P K"],
    reference: Float[Array, "P K"],
    *,
    lengths: Int[Array, "P K"],
    beta: Number = 0.1,
) -> Losses:
    """Negative log-likelihood of a whole ranking; with two answers it is `sigmoid`.

    -sum_k log( exp(beta r_k) / sum_{j >= k} exp(beta r_j) ), with r_k the log-ratio of the k-th best answer

    Args:
      policy, reference: log-probs of whole answers, in nats; column k holds the k-th best answer. No gradient flows
        into `reference`.
      lengths: scored tokens of each answer; 0 for a missing one.
      beta: inverse temperature, > 0.
    Returns: losses [P]; log K! where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: Rafailov et al. 2023 (2305.18290), appendix A.3.

    >>> zeros = jnp.zeros((1, 3))
    >>> print(f"{plackett_luce(zeros, zeros, lengths=jnp.array([[2, 4, 3]]))[0]:.4f}")
    1.7918
    """
    check("beta", beta, POSITIVE)
    exists = lengths > 0
    rewards = beta * (policy - jax.lax.stop_gradient(reference))
    low = jnp.finfo(rewards.dtype).min
    # Column k: the log of the sum of exp(reward) over answer k and all that are ranked below it.
    log_sums = jax.lax.associative_scan(jnp.logaddexp, jnp.where(exists, rewards, low), reverse=True, axis=1)
    return jnp.where(exists, log_sums - rewards, 0).sum(1)
