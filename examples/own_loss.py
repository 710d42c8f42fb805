"""A loss of your own: DPO as a focal loss, in which pairs that the policy already ranks correctly count less.

    dpo-jax train --config=configs/quickstart.py --config.loss.name=examples.own_loss:focal --workdir=runs/focal

Run it from the repository's root, because `examples.own_loss` is imported from where the command runs. Its options are
the fields of `config.loss` that are parameters of the function: here `--config.loss.beta` and `--config.loss.gamma`. It
adds up with other losses, as in `--config.loss.name="examples.own_loss:focal*0.8,sft*0.2"`.
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
    """Focal preference loss: the further p is from 1, the more a pair counts.

    -sg((1 - p)^gamma) log p, with p = S(beta h), h the margin and sg(.) without gradient

    Args:
      policy, reference: log-probs summed over answer tokens, in nats; column 0 chosen, 1 rejected.
      lengths: scored tokens of each answer; not read, but passed to every loss.
      beta: inverse temperature, > 0.
      gamma: how much less a pair counts that is ranked correctly, >= 0; 0 gives `sigmoid`.
    Returns: losses [P], not averaged: a training step leaves out padding and takes the mean.
    Source: Lin et al. 2017 (1708.02002), Eq. 4, with the p of DPO. Unlike there, the weight carries no gradient.

    >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    >>> print(f"{focal(policy, reference, lengths=jnp.array([[2, 4]]))[0]:.4f}")
    0.2359
    """
    ratios = policy - jax.lax.stop_gradient(reference)
    margin = beta * (ratios[:, 0] - ratios[:, 1])
    weight = jax.lax.stop_gradient(jnp.exp(gamma * jax.nn.log_sigmoid(-margin)))
    return -weight * jax.nn.log_sigmoid(margin)
