"""Preference objectives: pure functions of log-probabilities, one loss per pair.

Every loss is called as `loss(policy, reference, *, lengths, **options)`. `policy` and `reference` are log-probs [P, 2]
summed over answer tokens, in nats, column 0 chosen and column 1 rejected. It returns [P], not averaged. In formulas, a
and b are the log-ratios (policy less reference) of the chosen and the rejected answer, h = a - b is the margin, S the
sigmoid, n_w and n_l are the answers' tokens. A loss that reads more, such as `present`, `kl` or `sequence_kl`, names it
as a parameter, and a training step passes it: `weight` and `margin`, which need a default, only where the data have
them. `make_loss` combines losses, weights and modifiers into an `Objective`, which is called in the same way.
`registry` lists all losses; examples/own_loss.py is one of one's own.
"""

import warnings

from dpo_jax.losses.batchwise import aot, aot_unpaired, bco_pair, beta_dpo, estimate_kl, kto
from dpo_jax.losses.combine import combine, errors_at, make_loss
from dpo_jax.losses.modifiers import desensitized, f_scores, wpo_weights
from dpo_jax.losses.objective import (
    Numbers,
    Objective,
    answers_read_by,
    columns_of,
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
from dpo_jax.losses.registry import COLUMNS, GIVEN, LOSSES, REFERENCE_FREE, REGISTRY, SUMS, Loss

__all__ = [
    "COLUMNS",
    "GIVEN",
    "LOSSES",
    "REFERENCE_FREE",
    "REGISTRY",
    "SUMS",
    "Loss",
    "Numbers",
    "Objective",
    "answers_read_by",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "beta_dpo",
    "columns_of",
    "combine",
    "cpo",
    "desensitized",
    "discopop",
    "dpo_positive",
    "errors_at",
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


def __getattr__(name: str) -> object:  # losses that are not imported above, and names that were respelled
    if name in LOSSES:
        return LOSSES[name]
    if name != "desensitised":
        raise AttributeError(f"module 'dpo_jax.losses' has no attribute {name!r}")
    warnings.warn("dpo_jax.losses.desensitised is now dpo_jax.losses.desensitized", DeprecationWarning, stacklevel=2)
    return desensitized
