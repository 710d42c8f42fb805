"""Losses that read more than one pair: statistics of the batch, of earlier batches, or of mismatched answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.losses.common import (
    FLIP_RATE,
    NOT_NEGATIVE,
    POSITIVE,
    Number,
    check,
    divisor,
    log_ratios,
    mean,
    offset,
    smoothed,
    zero_where_missing,
)

Logps = Float[Array, "P 2"]
Lengths = Int[Array, "P 2"]
Present = Bool[Array, "P"]
Weight = Float[Array, "P"]
Margin = Float[Array, "P"]
Losses = Float[Array, "P"]
Scalar = float | Float[Array, ""]

MOMENTUM = 0.9  # of beta-DPO's running mean margin, as in the paper
LEAST_BETA = 1e-3  # beta-DPO's floor of beta', as in the authors' code


def kto(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths,
    kl: Scalar,
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
) -> Losses:
    """Kahneman-Tversky optimization: compares each answer with the policy's mean reward, gains and losses apart.

    w_d (1 - S(beta (a - z))) for a desirable answer, w_u (1 - S(beta (z - b))) for an undesirable one; the mean of both
    for a pair

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: scored tokens of each answer; 0 for a missing one.
      kl: z, in nats, see `estimate_kl`; it carries no gradient.
      beta: inverse temperature, > 0.
      desirable_weight, undesirable_weight: w_d and w_u, > 0. The paper advises w_d n_d / (w_u n_u) in [1, 3/2] for
        n_d desirable and n_u undesirable examples.
    Returns: losses [P], in (0, max(w_d, w_u)).
    Raises: InputError if an option is out of range.
    Source: Ethayarajh et al. 2024 (2402.01306), Eq. 7.

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{kto(policy, reference, lengths=jnp.array([[2, 4]]), kl=0.5)[0]:.4f}")
    0.4627
    >>> print(f"{kto(policy, reference, lengths=jnp.array([[2, 0]]), kl=0.5)[0]:.4f}")  # a desirable answer alone
    0.4875
    """
    check("beta", beta, POSITIVE)
    for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        check(name, value, POSITIVE)
    a, b = log_ratios(policy, reference)
    z = jax.lax.stop_gradient(kl)
    chosen = desirable_weight * jax.nn.sigmoid(-beta * (a - z))
    rejected = undesirable_weight * jax.nn.sigmoid(-beta * (z - b))
    answers = jnp.maximum((lengths > 0).sum(1), 1)
    return zero_where_missing(jnp.stack([chosen, rejected], axis=1), lengths).sum(1) / answers


def estimate_kl(
    policy: Float[Array, "P K"],
    reference: Float[Array, "P K"],
    lengths: Int[Array, "P K"],
    present: Present,
    weight: Weight | None = None,
) -> Float[Array, ""]:
    """Estimates KL(policy || reference) for KTO: max(0, mean log-ratio) of mismatched answers.

    A mismatched answer belongs to another prompt. The estimate is biased, and cheaper than sampling from the policy.
    Answers to their own prompts would measure the preference rather than the divergence.

    Args:
      policy, reference: log-probs of mismatched answers, in nats.
      lengths: their scored tokens; 0 for a missing one.
      present: which rows are real, not padding.
      weight: as how many pairs each counts, that of the prompt's pair; None: 1.
    Returns: nats, >= 0, without gradient.
    Source: Ethayarajh et al. 2024 (2402.01306), where it is z_0.

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -14.0]])
    >>> print(estimate_kl(policy, reference, jnp.array([[2, 4]]), jnp.array([True])))
    0.5
    """
    exists = (lengths > 0) & present[:, None]
    return jax.lax.stop_gradient(jax.nn.relu(mean(policy - reference, exists, weight)))


def bco_pair(
    policy: Logps, reference: Logps, *, lengths: Lengths, baseline: Scalar = 0.0, beta: Number = 0.1
) -> Losses:
    """Binary classifier optimization: classifies answers as good or bad, with the shifted reward as logit.

    -log S(beta a - d) - log S(-(beta b - d)); an unpaired example has the term of its one answer

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: scored tokens of each answer; 0 for a missing one.
      baseline: d, the mean reward so far (see `follow_rewards`) or 0; it carries no gradient.
      beta: inverse temperature, > 0.
    Returns: losses [P]; 2 log 2 where policy equals reference and d is 0.
    Raises: InputError if beta is out of range.
    Source: Jung et al. 2024 (2404.04656), with its reward shift.

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{bco_pair(policy, reference, lengths=jnp.array([[2, 4]]))[0]:.4f}")
    1.2425
    """
    check("beta", beta, POSITIVE)
    a, b = log_ratios(policy, reference)
    d = jax.lax.stop_gradient(baseline)
    sides = jnp.stack([-jax.nn.log_sigmoid(beta * a - d), -jax.nn.log_sigmoid(d - beta * b)], axis=1)
    return zero_where_missing(sides, lengths).sum(1)


def beta_dpo(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    present: Present | None = None,
    weight: Weight | None = None,
    margin: Margin | None = None,
    baseline: Scalar = 0.0,
    beta: Number = 0.1,
    sensitivity: Number = 0.6,
) -> Losses:
    """DPO with a beta per batch: larger where margins are above their running mean, smaller below.

    -log S(beta' h), beta' = max(0.001, beta (1 + alpha (mean h - M))), h in nats as in the authors' code

    The paper's filter of pairs is left out.

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: not read; every loss takes it.
      present: which pairs are real, not padding; None: all.
      weight: as how many pairs each counts in mean h; None: 1.
      margin: Delta, subtracted from beta' h, see `common.offset`; None: 0. mean h and M are without it.
      baseline: M, the running mean of h, in nats (see `follow_margins`).
      beta: beta_0, > 0. The beta' of a batch carries no gradient.
      sensitivity: alpha, >= 0; 0 gives `sigmoid`.
    Returns: losses [P]; log 2 where policy equals reference.
    Raises: InputError if an option is out of range.
    Source: Wu et al. 2024 (2407.08639).

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{beta_dpo(policy, reference)[0]:.4f}")  # beta' = 0.1 * (1 + 0.6 * 3)
    0.3589
    """
    check("beta", beta, POSITIVE)
    check("sensitivity", sensitivity, NOT_NEGATIVE)
    a, b = log_ratios(policy, reference)
    h = a - b
    real = jnp.ones(h.shape, bool) if present is None else present
    excess = mean(jax.lax.stop_gradient(h), real, weight) - jax.lax.stop_gradient(baseline)
    return -jax.nn.log_sigmoid(offset(jnp.maximum(LEAST_BETA, beta * (1 + sensitivity * excess)) * h, margin))


def aot(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    present: Present | None = None,
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
) -> Losses:
    """Alignment by optimal transport: the policy's margins should dominate the reference's as a distribution.

    DPO's loss, with smoothing, of h_(k) = sorted(logp_w - logp_l)_k - sorted(ref_w - ref_l)_k over the whole batch

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: not read; every loss takes it.
      present: which pairs are real, not padding; None: all.
      beta: inverse temperature, > 0.
      label_smoothing: the assumed rate of flipped labels, in [0, 0.5).
    Returns: losses [P]; the loss of the k-th smallest margins stands at the k-th pair that is present.
    Raises: InputError if an option is out of range.
    Source: Melnyk et al. 2024 (2406.05882), the paired form.

    >>> policy, reference = jnp.array([[-10.0, -14.0], [-9.0, -8.0]]), jnp.array([[-11.0, -12.0], [-9.0, -9.0]])
    >>> print(aot(policy, reference).round(4))
    [0.74439996 0.55439997]
    """
    margins = policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]
    return _compare_quantiles(margins[0], jax.lax.stop_gradient(margins[1]), present, beta, label_smoothing)


def aot_unpaired(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    present: Present | None = None,
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
) -> Losses:
    """Alignment by optimal transport: log-ratios of chosen answers should dominate those of rejected ones.

    DPO's loss, with smoothing, of h_(k) = sorted(a)_k - sorted(b)_k over the whole batch

    Which answers make a pair does not matter.

    Args:
      policy, reference: log-probs of whole answers, in nats; column 0 chosen, column 1 rejected. No gradient flows
        into `reference`.
      lengths: not read; every loss takes it.
      present: which pairs are real, not padding; None: all.
      beta: inverse temperature, > 0.
      label_smoothing: the assumed rate of flipped labels, in [0, 0.5).
    Returns: losses [P]; the loss of the k-th smallest log-ratios stands at the k-th pair that is present.
    Raises: InputError if an option is out of range.
    Source: Melnyk et al. 2024 (2406.05882), the unpaired form.

    >>> policy, reference = jnp.array([[-10.0, -14.0], [-9.0, -8.0]]), jnp.array([[-11.0, -12.0], [-9.0, -9.0]])
    >>> print(aot_unpaired(policy, reference).round(4))
    [0.5981 0.6931]
    """
    return _compare_quantiles(*log_ratios(policy, reference), present, beta, label_smoothing)


def _compare_quantiles(
    better: Float[Array, "P"],
    worse: Float[Array, "P"],
    present: Present | None,
    beta: Number,
    label_smoothing: Number,
) -> Losses:
    """Returns the smoothed logistic loss of sorted `better` less sorted `worse`, at the pairs that are present."""
    check("beta", beta, POSITIVE)
    check("label_smoothing", label_smoothing, FLIP_RATE)
    real = jnp.ones(better.shape, bool) if present is None else present
    h = _sorted(better, real) - _sorted(worse, real)
    places = jnp.argsort(~real, stable=True)  # indices of the pairs that are present, then of padding
    return jnp.zeros_like(h).at[places].set(smoothed(beta * h, label_smoothing))


def _sorted(values: Float[Array, "P"], present: Present) -> Float[Array, "P"]:
    """Returns the values of pairs that are present in ascending order, then those of padding."""
    return values[jnp.lexsort((values, ~present))]


# --- baselines, which are carried from one update to the next --------------------------------------------------------

Statistics = dict[str, Array]  # of one baseline: `value`, which the loss reads, and what it is computed from
Running = dict[str, Statistics]  # by name of the loss, for all losses of a sum that have a baseline


class Baseline(NamedTuple):
    """A number that a loss reads as its argument `baseline` and that is updated after every batch."""

    start: Callable[[], Statistics]
    follow: Callable[..., Statistics]  # called as `follow_rewards` is


def follow_rewards(
    before: Statistics,
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths,
    present: Present,
    beta: Number,
    weight: Weight | None = None,
) -> Statistics:
    """Updates BCO's reward shift: the mean of two means, of all chosen and of all rejected answers' rewards so far."""
    exists = ((lengths > 0) & present[:, None]).astype(policy.dtype)
    if weight is not None:
        exists = exists * weight[:, None]
    sums = before["sums"] + (beta * (policy - reference) * exists).sum(0)
    counts = before["counts"] + exists.sum(0)
    return {"value": (sums / divisor(counts, weight)).mean(), "sums": sums, "counts": counts}


def follow_margins(
    before: Statistics,
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths,
    present: Present,
    beta: Number,
    weight: Weight | None = None,
) -> Statistics:
    """Updates beta-DPO's mean margin: M <- 0.9 M + 0.1 mean h."""
    a, b = log_ratios(policy, reference)
    return {"value": MOMENTUM * before["value"] + (1 - MOMENTUM) * mean(a - b, present, weight)}


REWARD_SHIFT = Baseline(lambda: {"value": jnp.zeros(()), "sums": jnp.zeros(2), "counts": jnp.zeros(2)}, follow_rewards)
MEAN_MARGIN = Baseline(lambda: {"value": jnp.zeros(())}, follow_margins)
