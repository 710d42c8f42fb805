"""What losses are made of: log-ratios, checks of options, and the pieces that several of them share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.types import InputError


def log_ratios(policy: Float[Array, "P K"], reference: Float[Array, "P K"]) -> tuple[Array, Array]:
    """a and b, the log-ratios [P] of chosen and rejected answers; no gradient flows into the reference."""
    ratios = policy - jax.lax.stop_gradient(reference)
    return ratios[:, 0], ratios[:, 1]


def token_counts(lengths: Int[Array, "P K"], like: Array) -> Float[Array, "P K"]:
    """Scored tokens of each answer, 1 where there are none, to divide by."""
    return jnp.maximum(lengths, 1).astype(like.dtype)


def smoothed(z: Float[Array, "P"], label_smoothing: float) -> Float[Array, "P"]:
    """-(1-e) log S(z) - e log S(-z)."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


def nll(policy: Float[Array, "P K"], lengths: Int[Array, "P K"], average: bool) -> Float[Array, "P"]:
    """Negative log-likelihood of chosen answers, in nats a token or, not averaged, in nats."""
    return -policy[:, 0] / (token_counts(lengths, policy)[:, 0] if average else 1)


def of_answers_there(losses: Float[Array, "P K"], lengths: Int[Array, "P K"]) -> Float[Array, "P K"]:
    """Zero for answers that are not there."""
    return jnp.where(lengths > 0, losses, 0)


def check(option: str, value: float, ok: bool, expected: str) -> None:
    """Raises InputError for the value of an option that is out of range."""
    if not ok:
        raise InputError(f"config.loss.{option}", got=f"got {value}", expected=expected, remedy="Change it.")


def check_beta(beta: float) -> None:
    """Raises InputError unless beta is above 0."""
    check("beta", beta, beta > 0, "a number > 0")


def check_smoothing(label_smoothing: float) -> None:
    """Raises InputError unless the rate of flipped labels is in [0, 0.5)."""
    check("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "a number in [0, 0.5)")
