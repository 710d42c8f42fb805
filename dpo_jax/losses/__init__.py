"""Preference objectives: pure functions of log-probabilities, one loss per pair.

Every loss is called as `loss(policy, reference, *, lengths, **options)` with log-probabilities [P, 2] summed over
answer tokens, in nats, column 0 chosen and column 1 rejected, and returns [P], not averaged. In their formulas a and b
are the log-ratios (policy less reference) of the chosen and the rejected answer, and h = a - b. What a loss reads
besides, such as `present`, `kl` or `sequence_kl`, are arguments of their own, which a training step gives to every loss
that names them. `make_loss` combines losses, weights and modifiers into an `Objective`, called in the same way.
"""

from dpo_jax.losses.batchwise import aot, aot_unpaired, bco_pair, beta_dpo, estimate_kl, kto
from dpo_jax.losses.modifiers import desensitized, f_scores, wpo_weights
from dpo_jax.losses.objective import (
    LOSSES,
    REFERENCE_FREE,
    SUMS,
    Loss,
    Objective,
    make_loss,
    needs_of,
    options_of,
    rewards_of,
    start_of,
)
from dpo_jax.losses.pairwise import (
    apo_down,
    apo_zero,
    discopop,
    dpo_positive,
    exo_pair,
    hinge,
    ipo,
    nca_pair,
    plackett_luce,
    robust,
    sigmoid,
    sigmoid_norm,
    sppo_hard,
    tdpo1,
    tdpo2,
)
from dpo_jax.losses.reference_free import cpo, orpo, sft, simpo

__all__ = [
    "LOSSES",
    "REFERENCE_FREE",
    "SUMS",
    "Loss",
    "Objective",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "beta_dpo",
    "cpo",
    "desensitized",
    "discopop",
    "dpo_positive",
    "estimate_kl",
    "exo_pair",
    "f_scores",
    "hinge",
    "ipo",
    "kto",
    "make_loss",
    "nca_pair",
    "needs_of",
    "options_of",
    "orpo",
    "plackett_luce",
    "rewards_of",
    "robust",
    "sft",
    "sigmoid",
    "sigmoid_norm",
    "simpo",
    "sppo_hard",
    "start_of",
    "tdpo1",
    "tdpo2",
    "wpo_weights",
]
