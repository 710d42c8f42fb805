"""Preference objectives: pure functions of log-probabilities, one loss per pair.

Every loss is called as `loss(policy, reference, *, lengths, **options)` with log-probabilities [P, 2] summed over
answer tokens, in nats, column 0 chosen and column 1 rejected, and returns [P], not averaged. Below, a and b are the
log-ratios (policy less reference) of the chosen and the rejected answer, and h = a - b.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.types import InputError, check_choice

Loss = Callable[..., Array]


def sigmoid(
    policy: Float[Array, "P 2"],
    reference: Float[Array, "P 2"],
    *,
    lengths: Int[Array, "P 2"] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Float[Array, "P"]:
    """Logistic preference loss, the DPO objective.

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
    _check("beta", beta, beta > 0, "a number > 0")
    _check("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "a number in [0, 0.5)")
    a, b = _log_ratios(policy, reference)
    z = beta * (a - b)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


def hinge(
    policy: Float[Array, "P 2"],
    reference: Float[Array, "P 2"],
    *,
    lengths: Int[Array, "P 2"] | None = None,
    beta: float = 0.1,
) -> Float[Array, "P"]:
    """Hinge preference loss, max(0, 1 - beta h).

    Args:
      beta: slope, the reciprocal of the margin gamma in SLiC, > 0.
    Returns: losses; 1 where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: Zhao et al. 2023 (2305.10425), Eq. 7, on log-ratios as in Liu et al. 2023 (2309.06657).
    """
    _check("beta", beta, beta > 0, "a number > 0")
    a, b = _log_ratios(policy, reference)
    return jax.nn.relu(1 - beta * (a - b))


def ipo(
    policy: Float[Array, "P 2"],
    reference: Float[Array, "P 2"],
    *,
    lengths: Int[Array, "P 2"],
    beta: float = 0.1,
    average: bool = True,
) -> Float[Array, "P"]:
    """Squared preference loss, (a/n_w - b/n_l - 1/(2 beta))^2, or without the divisions by the answers' lengths.

    Args:
      lengths: scored tokens n_w, n_l of each answer; 0 only for padding pairs.
      beta: the paper's tau, > 0.
      average: log-ratios per token (as peers train it) or summed (as the paper writes it).
    Returns: losses; 1/(4 beta^2) where policy equals reference.
    Raises: InputError if beta is out of range.
    Source: Azar et al. 2023 (2310.12036), Eq. 17.
    """
    _check("beta", beta, beta > 0, "a number > 0")
    a, b = _log_ratios(policy, reference)
    if average:
        tokens = jnp.maximum(lengths, 1).astype(policy.dtype)
        a, b = a / tokens[:, 0], b / tokens[:, 1]
    return jnp.square(a - b - 1 / (2 * beta))


def sft(
    policy: Float[Array, "P 2"], reference: Float[Array, "P 2"] | None = None, *, lengths: Int[Array, "P 2"]
) -> Float[Array, "P"]:
    """Negative log-likelihood of the chosen answers, the stage before preference training.

    -logp_w * P / sum(n_w), so that the mean over the P pairs is the mean over the batch's answer tokens.

    Args:
      reference: not read; the loss is reference-free.
      lengths: scored tokens of each answer of the whole batch; 0 for padding pairs.
    Returns: losses in nats per token.
    """
    tokens = lengths[:, 0].astype(policy.dtype)
    pairs = jnp.sum(lengths[:, 0] > 0)
    return -policy[:, 0] * pairs / jnp.maximum(jnp.sum(tokens), 1)


LOSSES: dict[str, Loss] = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo, "sft": sft}
REFERENCE_FREE = frozenset({"sft"})


def make_loss(name: str, options: dict[str, Any]) -> Loss:
    """The named loss with its options bound, each checked against the function and its range.

    Raises: InputError for an unknown name, an option the loss does not have, or a value out of range.
    """
    check_choice("config.loss.name", name, LOSSES)
    known = options_of(LOSSES[name])
    for option in options:
        if option not in known:
            raise InputError(
                f"config.loss.{option}",
                got=f"is set, and loss {name!r} has no such option",
                expected=f"one of {', '.join(sorted(known))}" if known else "no options",
                remedy="Unset it or choose a loss that has it.",
            )
    loss = functools.partial(LOSSES[name], **options)
    jax.eval_shape(lambda x, n: loss(x, x, lengths=n), *_ONE_PAIR)  # traced, not run: raises for values out of range
    return loss


_ONE_PAIR = (jax.ShapeDtypeStruct((1, 2), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32))


def options_of(loss: Loss) -> dict[str, Any]:
    """Every option of a loss with the value that it has, bound or by default."""
    parameters = inspect.signature(loss).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("policy", "reference", "lengths")}


def reward_scale(loss: Loss) -> float | None:
    """beta, which turns log-ratios into rewards; None for a loss that compares no answers and so has none."""
    return options_of(loss).get("beta")


def _log_ratios(policy, reference):
    ratios = policy - jax.lax.stop_gradient(reference)
    return ratios[:, 0], ratios[:, 1]


def _check(option: str, value: float, ok: bool, expected: str) -> None:
    if not ok:
        raise InputError(f"config.loss.{option}", got=f"got {value}", expected=expected, remedy="Change it.")
