"""Pieces that several losses share: log-ratios, smoothed logistic losses, and the ranges of options."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from dpo_jax.types import InputError, shown

Number = float | Float[Array, ""]  # an option's: of Python, or a scalar, traced ones included


def log_ratios(
    policy: Float[Array, "P K"], reference: Float[Array, "P K"]
) -> tuple[Float[Array, "P"], Float[Array, "P"]]:
    """Returns a and b, the log-ratios [P] of the first two answers; no gradient flows into the reference."""
    ratios = policy - jax.lax.stop_gradient(reference)
    return ratios[:, 0], ratios[:, 1]


def token_counts(lengths: Int[Array, "P K"], like: Array) -> Float[Array, "P K"]:
    """Returns the scored tokens of each answer as divisors, in the dtype of `like`; 1 where there are none."""
    return jnp.maximum(lengths, 1).astype(like.dtype)


def smoothed(z: Float[Array, "P"], label_smoothing: Number) -> Float[Array, "P"]:
    """Returns -(1-e) log S(z) - e log S(-z), with e the label smoothing and S the sigmoid."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


def offset(z: Float[Array, "P"], margin: Float[Array, "P"] | None) -> Float[Array, "P"]:
    """Returns reward margins less the margins that the data ask for, as in DPO with an offset (ODPO).

    z - Delta: the chosen answer's reward should exceed the rejected one's by Delta. It may be below 0, where the data
    hold the two to be nearly equal or the label to be doubtful, such as the logarithm of a difference of scores.

    Args:
      z: beta times what the loss compares; the logit of the chosen answer being preferred.
      margin: Delta, any finite numbers; None: 0.
    Source: Amini et al. 2024 (2402.10571), where DPO's loss becomes -log S(beta h - Delta).

    >>> print(f"{smoothed(offset(jnp.array([0.3]), jnp.array([0.5])), 0.0)[0]:.4f}")  # log(1 + exp(0.2))
    0.7981
    """
    return z if margin is None else z - margin


def weighted_sum(values: Shaped[Array, "P *K"], weight: Float[Array, "P"] | None) -> Num[Array, ""]:
    """Returns the sum of `values`, each as often as its pair counts; values of pairs of weight 0 are not read.

    Args:
      weight: >= 0; None: 1 for every pair.
    """
    if weight is None:
        return values.sum()
    each = weight.reshape(-1, *(1,) * (values.ndim - 1))
    return (jnp.where(each > 0, values, 0) * each).sum()


def divisor(count: Num[Array, "*n"], weight: Float[Array, "P"] | None) -> Num[Array, "*n"]:
    """Returns a `weighted_sum` of counts as a divisor: 1 where nothing counts."""
    # Counts are whole numbers; a sum of weights may be any number, and its scale must cancel.
    return jnp.maximum(count, 1) if weight is None else jnp.where(count > 0, count, 1)


def mean(
    values: Float[Array, "P *K"], mask: Bool[Array, "P *K"], weight: Float[Array, "P"] | None = None
) -> Float[Array, ""]:
    """Returns the mean of `values` where `mask` is true, each as often as its pair counts; 0 where nothing does.

    >>> print(mean(jnp.array([1.0, 4.0, 9.0]), jnp.array([True, True, False]), jnp.array([2.0, 1.0, 5.0])))
    2.0
    """
    return weighted_sum(jnp.where(mask, values, 0), weight) / divisor(weighted_sum(mask, weight), weight)


def nll(policy: Float[Array, "P K"], lengths: Int[Array, "P K"], average: bool) -> Float[Array, "P"]:
    """Returns the negative log-likelihood of the chosen answers: in nats per token, or summed if not `average`."""
    check_switch("nll_average", average)
    return -policy[:, 0] / (token_counts(lengths, policy)[:, 0] if average else 1)


def zero_where_missing(losses: Float[Array, "P K"], lengths: Int[Array, "P K"]) -> Float[Array, "P K"]:
    """Returns `losses` with 0 in place of answers of length 0, which are missing."""
    return jnp.where(lengths > 0, losses, 0)


# --- ranges of options -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval of numbers. An end is part of it unless it is open; nan is in none."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        """Returns whether `value` is in the interval; infinity never is."""
        above = self.low < value if self.low_open else self.low <= value
        return above and (value < self.high if self.high_open else value <= self.high) and value < math.inf

    def __str__(self) -> str:
        """Returns the interval as documentation writes it: "> 0", ">= 1", "(0, 1]"."""
        if self.high == math.inf:
            return f"{'>' if self.low_open else '>='} {self.low:g}"
        left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"

    @property
    def expected(self) -> str:
        """Completes "expected ..." in an error."""
        return f"a number {'' if self.high == math.inf else 'in '}{self}"


POSITIVE = Range(0, low_open=True)
NOT_NEGATIVE = Range(0)
AT_LEAST_ONE = Range(1)
FRACTION = Range(0, 1)
INNER_FRACTION = Range(0, 1, low_open=True, high_open=True)
SHARE = Range(0, 1, low_open=True)
FLIP_RATE = Range(0, 0.5, high_open=True)
POSITIVE_FLIP_RATE = Range(0, 0.5, low_open=True, high_open=True)


def is_traced(value: object) -> bool:
    """Returns whether a value stands for one that only the compiled program has."""
    return isinstance(value, Tracer)


def refusal_of_number(value: object, valid: Range) -> str | None:
    """Returns what was expected if `value` is no number of the range, else None. A traced scalar is not refused."""
    if np.shape(value) != ():  # type: ignore[arg-type]
        return f"{valid.expected}, not an array"
    if is_traced(value):
        return None
    number = np.asarray(value)  # a concrete JAX array becomes a number even within a trace
    valid_type = jnp.issubdtype(number.dtype, jnp.floating) or jnp.issubdtype(number.dtype, jnp.integer)
    return None if valid_type and valid.holds(number.item()) else valid.expected


def refusal_of_switch(value: object) -> str | None:
    """Returns what was expected if `value` is not True or False, which choose code, else None."""
    return None if isinstance(value, bool) else "true or false" + (NOT_TRACED if is_traced(value) else "")


NOT_TRACED = " of Python, not a traced value, because it chooses code"


def check(option: str, value: object, valid: Range) -> None:
    """Raises InputError unless the value of the option is a number in the range. Traced numbers are not compared."""
    raise_refusal(option, value, refusal_of_number(value, valid))


def check_switch(option: str, value: object) -> None:
    """Raises InputError unless the value of the option is True or False."""
    raise_refusal(option, value, refusal_of_switch(value))


def raise_refusal(option: str, value: object, expected: str | None) -> None:
    """Raises InputError for a refused value of an option, unless `expected` is None."""
    if expected is not None:
        got = f"a traced {jax.typeof(value)}" if is_traced(value) else shown(value)
        raise InputError(option, got=f"got {got}", expected=expected, remedy="Change it, or leave it out.")
