"""Losses of a pair that read more than the pair: statistics of the batch, of batches before, of other answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.losses.common import check, check_beta, check_smoothing, log_ratios, of_answers_there, smoothed

Logps = Float[Array, "P 2"]
Lengths = Int[Array, "P 2"]
Present = Bool[Array, "P"]
Losses = Float[Array, "P"]
Scalar = float | Float[Array, ""]

MOMENTUM = 0.9  # of beta-DPO's mean margin, as in the paper
LEAST_BETA = 1e-3  # that beta-DPO goes down to, as in the authors' code


def kto(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths,
    kl: Scalar,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Losses:
    """Kahneman-Tversky optimization: each answer against the policy's mean reward, gains and losses apart.

    w_d (1 - S(beta (a - z))) for a desirable answer, w_u (1 - S(beta (z - b))) for an undesirable one; of a pair, the
    mean of both.

    Args:
      lengths: scored tokens of each answer; 0 for one that is not there.
      kl: z, see `estimate_kl`; it carries no gradient.
      beta: inverse temperature, > 0.
      desirable_weight, undesirable_weight: w_d and w_u, > 0. The paper advises w_d n_d / (w_u n_u) in [1, 3/2] for
        n_d desirable and n_u undesirable examples.
    Returns: losses, in (0, w).
    Raises: InputError if an option is out of range.
    Source: Ethayarajh et al. 2024 (2402.01306), Eq. 7.
    """
    check_beta(beta)
    for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        check(name, value, value > 0, "a number > 0")
    a, b = log_ratios(policy, reference)
    z = jax.lax.stop_gradient(kl)
    chosen = desirable_weight * jax.nn.sigmoid(-beta * (a - z))
    rejected = undesirable_weight * jax.nn.sigmoid(-beta * (z - b))
    answers = jnp.maximum((lengths > 0).sum(1), 1)
    return of_answers_there(jnp.stack([chosen, rejected], axis=1), lengths).sum(1) / answers


def estimate_kl(
    policy: Float[Array, "P K"], reference: Float[Array, "P K"], lengths: Int[Array, "P K"], present: Present
) -> Float[Array, ""]:
    """KL(policy || reference) as KTO has it: max(0, mean log-ratio) of answers y' that belong to other prompts.

    Biased, and cheaper than sampling from the policy. Answers that belong would say more of the preference than of
    the divergence.

    Args:
      policy, reference: log-probs of mismatched answers, in nats.
      lengths: their scored tokens; 0 for those that are not there.
      present: which rows are no padding.
    Returns: nats, >= 0, without gradient.
    Source: Ethayarajh et al. 2024 (2402.01306), where it is z_0.
    """
    there = (lengths > 0) & present[:, None]
    mean = jnp.where(there, policy - reference, 0).sum() / jnp.maximum(there.sum(), 1)
    return jax.lax.stop_gradient(jax.nn.relu(mean))


def bco_pair(policy: Logps, reference: Logps, *, lengths: Lengths, baseline: Scalar = 0.0, beta: float = 0.1) -> Losses:
    """Binary classifier optimization: a logistic classifier of good and bad answers, its logit the shifted reward.

    -log S(beta a - d) - log S(-(beta b - d)); of an unpaired example the term of its one answer.

    Args:
      lengths: scored tokens of each answer; 0 for one that is not there.
      baseline: d, the mean reward so far (see `follow_rewards`) or 0; it carries no gradient.
      beta: inverse temperature, > 0.
    Returns: losses; 2 log 2 where policy equals reference and d is 0.
    Raises: InputError if beta is out of range.
    Source: Jung et al. 2024 (2404.04656), with its reward shift.
    """
    check_beta(beta)
    a, b = log_ratios(policy, reference)
    d = jax.lax.stop_gradient(baseline)
    sides = jnp.stack([-jax.nn.log_sigmoid(beta * a - d), -jax.nn.log_sigmoid(d - beta * b)], axis=1)
    return of_answers_there(sides, lengths).sum(1)


def beta_dpo(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    present: Present | None = None,
    baseline: Scalar = 0.0,
    beta: float = 0.1,
    sensitivity: float = 0.6,
) -> Losses:
    """DPO whose beta follows the batch: larger where margins are above their running mean, smaller below.

    -log S(beta' h), beta' = max(0.001, beta (1 + alpha (mean h - M))), h in nats as in the authors' code. The paper's
    filter of pairs is no part of it.

    Args:
      present: which pairs are no padding; None: all.
      baseline: M, the running mean of h (see `follow_margins`).
      beta: beta_0, > 0. The beta' of a batch carries no gradient.
      sensitivity: alpha, >= 0; 0 is `sigmoid`.
    Returns: losses; log 2 where policy equals reference.
    Raises: InputError if an option is out of range.
    Source: Wu et al. 2024 (2407.08639).
    """
    check_beta(beta)
    check("sensitivity", sensitivity, sensitivity >= 0, "a number >= 0")
    a, b = log_ratios(policy, reference)
    h = a - b
    there = jnp.ones(h.shape, bool) if present is None else present
    ahead = _mean(jax.lax.stop_gradient(h), there) - jax.lax.stop_gradient(baseline)
    return -jax.nn.log_sigmoid(jnp.maximum(LEAST_BETA, beta * (1 + sensitivity * ahead)) * h)


def aot(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    present: Present | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Losses:
    """Alignment by optimal transport: the policy's margins should dominate the reference's as a distribution.

    DPO's loss, with smoothing, on h_(k) = sorted(logp_w - logp_l)_k - sorted(ref_w - ref_l)_k over the whole batch.

    Args:
      present: which pairs are no padding; None: all.
      beta: inverse temperature, > 0.
      label_smoothing: as of `sigmoid`.
    Returns: losses, of the k-th smallest margins at the k-th pair that is present.
    Raises: InputError if an option is out of range.
    Source: Melnyk et al. 2024 (2406.05882), the paired form.
    """
    margins = policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]
    return _of_quantiles(margins[0], jax.lax.stop_gradient(margins[1]), present, beta, label_smoothing)


def aot_unpaired(
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths | None = None,
    present: Present | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Losses:
    """Alignment by optimal transport: log-ratios of chosen answers should dominate those of rejected ones.

    DPO's loss, with smoothing, on h_(k) = sorted(a)_k - sorted(b)_k over the whole batch: which answers make a pair
    does not matter.

    Args, returns, errors: as of `aot`.
    Source: Melnyk et al. 2024 (2406.05882), the unpaired form.
    """
    return _of_quantiles(*log_ratios(policy, reference), present, beta, label_smoothing)


def _of_quantiles(better, worse, present, beta, label_smoothing):
    check_beta(beta)
    check_smoothing(label_smoothing)
    there = jnp.ones(better.shape, bool) if present is None else present
    h = _sorted(better, there) - _sorted(worse, there)
    places = jnp.argsort(~there, stable=True)  # of the pairs that are present, before all others
    return jnp.zeros_like(h).at[places].set(smoothed(beta * h, label_smoothing))


def _sorted(values, there):
    """Values of pairs that are present in ascending order, then the others."""
    return values[jnp.lexsort((values, ~there))]


def _mean(values, there):
    return jnp.where(there, values, 0).sum() / jnp.maximum(there.sum(), 1)


# --- what is carried from one update to the next -------------------------------------------------------------------


class Baseline(NamedTuple):
    """A number that a loss reads as `baseline`, carried from update to update as the `value` of a dict of arrays."""

    start: Callable[[], dict[str, Array]]
    follow: Callable[..., dict[str, Array]]  # (before, policy, reference, *, lengths, present, beta), this batch's too


def follow_rewards(
    before: dict[str, Array],
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths,
    present: Present,
    beta: float,
) -> dict[str, Array]:
    """BCO's reward shift: halfway between the mean rewards of all chosen and of all rejected answers so far."""
    there = ((lengths > 0) & present[:, None]).astype(policy.dtype)
    sums = before["sums"] + (beta * (policy - reference) * there).sum(0)
    counts = before["counts"] + there.sum(0)
    return {"value": (sums / jnp.maximum(counts, 1)).mean(), "sums": sums, "counts": counts}


def follow_margins(
    before: dict[str, Array],
    policy: Logps,
    reference: Logps,
    *,
    lengths: Lengths,
    present: Present,
    beta: float,
) -> dict[str, Array]:
    """beta-DPO's mean margin: M <- 0.9 M + 0.1 mean h."""
    a, b = log_ratios(policy, reference)
    return {"value": MOMENTUM * before["value"] + (1 - MOMENTUM) * _mean(a - b, present)}


BASELINES: dict[str, Baseline] = {
    "bco_pair": Baseline(
        lambda: {"value": jnp.zeros(()), "sums": jnp.zeros(2), "counts": jnp.zeros(2)}, follow_rewards
    ),
    "beta_dpo": Baseline(lambda: {"value": jnp.zeros(())}, follow_margins),
}
Running = dict[str, dict[str, Any]]  # of a sum of losses: each baseline by its loss's name
