"""Which loss takes which option, each with a value that is not its default: every case that tests of losses go through.

Written by hand, so that an option which a loss ceases to take is a failure and not one case fewer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import config, losses

OF_MARGINS = {
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "sigmoid_norm",
    "exo_pair",
    "discopop",
    "plackett_luce",
    "beta_dpo",
}
NOT_OF_PAIRS = {"aot", "aot_unpaired", "kto", "plackett_luce", "cpo", "orpo", "sft"}
SMOOTHED = {"sigmoid", "robust", "sigmoid_norm", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo"}
ALL = set(losses.LOSSES)

PENDING = {"kl_tokens"}  # read by no loss, only by what scores for tdpo1 and tdpo2
OPTIONS = [each.name for each in dataclasses.fields(config.Loss) if each.name != "name" and each.name not in PENDING]

TAKES: dict[str, set[str]] = {
    "beta": ALL - {"sft"},
    "label_smoothing": SMOOTHED,
    "average": {"ipo"},
    "tau": {"discopop"},
    "penalty": {"dpo_positive"},
    "gamma": {"simpo"},
    "kl_weight": {"tdpo2"},
    "sensitivity": {"beta_dpo"},
    "desirable_weight": {"kto"},
    "undesirable_weight": {"kto"},
    "divergence": OF_MARGINS,
    "divergence_alpha": OF_MARGINS,
    "ld_alpha": ALL - NOT_OF_PAIRS,
    "wpo": ALL - NOT_OF_PAIRS,
    "nll_weight": ALL,
    "nll_average": ALL - {"orpo"},
}
VALUES = {
    "beta": [0.37],
    "label_smoothing": [0.2],
    "average": [False],
    "tau": [0.4],
    "penalty": [3.0],
    "gamma": [0.3],
    "kl_weight": [1.7],
    "sensitivity": [0.25],
    "desirable_weight": [1.6],
    "undesirable_weight": [0.4],
    "divergence": ["forward_kl", "js_divergence", "alpha_divergence"],
    "divergence_alpha": [0.2],
    "ld_alpha": [0.3],
    "wpo": [True],
    "nll_weight": [0.7],
    "nll_average": [False],
}
# What must stand beside an option.
BESIDE = {"divergence_alpha": {"divergence": "alpha_divergence"}, "nll_average": {"nll_weight": 0.7}}


def beside(name, option):
    """The further options that a loss needs for this one to be taken."""
    return {} if (name, option) == ("cpo", "nll_average") else BESIDE.get(option, {})


TOGGLES = [
    (name, option, value)
    for name in losses.LOSSES
    for option in OPTIONS
    if name in TAKES.get(option, ())
    for value in VALUES[option]
]
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in losses.LOSSES} | {
    f"{name}-{value if option == 'divergence' else option}": (name, beside(name, option) | {option: value})
    for name, option, value in TOGGLES
}
SUMMED: dict[str, tuple[str, dict[str, Any]]] = {  # of several losses
    "sum": ("sigmoid*0.8,sft*0.2", {}),
    "sum-mpo": ("sigmoid*0.8,bco_pair*0.2,sft", {"beta": 0.3, "wpo": True}),
    "sum-baselines": ("bco_pair*0.5,beta_dpo*2", {"ld_alpha": 0.3, "nll_weight": 0.2}),
}


def random_given(needs, pairs=4, seed=0, dtype=np.float64):
    """What a loss may ask for besides: sums over answers at random, all pairs present, baselines off zero."""
    rng = np.random.default_rng(seed)
    known = {
        "present": np.ones(pairs, bool),
        "kl": np.asarray(0.31, dtype),
        "running": {
            "bco_pair": {"value": np.asarray(0.23, dtype), "sums": np.zeros(2, dtype), "counts": np.zeros(2, dtype)},
            "beta_dpo": {"value": np.asarray(-0.41, dtype)},
        },
        "shared_logps": -rng.uniform(0.5, 2.0, (pairs, 2)).astype(dtype),
        "reference_shared_logps": -rng.uniform(0.5, 2.0, (pairs, 2)).astype(dtype),
        "log_collision": -rng.uniform(0.5, 4.0, (pairs, 2)).astype(dtype),
        "sequence_kl": rng.uniform(0.0, 3.0, (pairs, 2)).astype(dtype),
    }
    return jax.tree.map(jnp.asarray, {name: known[name] for name in needs})
