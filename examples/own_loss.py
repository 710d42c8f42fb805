"""A loss of one's own: DPO as a focal loss, which leaves pairs alone that the policy already gets right.

    dpo-jax train --config=configs/quickstart.py --config.loss.name=examples.own_loss:focal --workdir=runs/focal

Run from the repository's root, for `examples.own_loss` is imported from where the command runs. Options are
the fields of `config.loss` that the function names: here `--config.loss.beta` and `--config.loss.gamma`. It combines as
the losses of dpo_jax do, for instance `--config.loss.name="examples.own_loss:focal*0.8,sft*0.2"`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def focal(
    policy: Float[Array, "P 2"],
    reference: Float[Array, "P 2"],
    *,
    lengths: Int[Array, "P 2"],
    beta: float = 0.1,
    gamma: float = 1.0,
) -> Float[Array, "P"]:
    """-sg((1 - p)^gamma) log p with p = S(beta h): the further p is from 1, the more a pair counts.

    Args:
      policy, reference: log-probs summed over answer tokens, in nats; column 0 chosen, 1 rejected.
      lengths: scored tokens of each answer; not read here, and given to every loss.
      beta: inverse temperature, > 0.
      gamma: how much less a pair counts that is right, >= 0; 0 is `sigmoid`.
    Returns: one loss per pair, not averaged: a training step leaves padding out and takes the mean.
    Source: Lin et al. 2017 (1708.02002), Eq. 4, with p of DPO. The weight is held constant here, so that only its size
      and not its slope trains.
    """
    ratios = policy - jax.lax.stop_gradient(reference)
    margin = beta * (ratios[:, 0] - ratios[:, 1])
    weight = jax.lax.stop_gradient(jnp.exp(gamma * jax.nn.log_sigmoid(-margin)))
    return -weight * jax.nn.log_sigmoid(margin)
