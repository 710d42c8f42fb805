"""Reads the weight and the margin of a row, which belong to the loss of its pairs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from dpo_jax.data.columns import DROP, is_given, number
from dpo_jax.types import InputError, Pair, Row, shown

_LARGEST = float(np.finfo(np.float32).max)  # losses are computed in float32


def weighed(row: Row, pairs: list[Pair], *, instead: str = "") -> list[Pair]:
    """Returns the pairs of a row with the numbers in its columns `weight` and `margin`; empty ones are 1 and 0.

    Every pair of a ranking has the row's weight. A weight of 0 leaves the pair out of every mean. A margin may be below
    0: where it is the logarithm of a difference of scores, as in ODPO (Amini et al. 2024, 2402.10571), it is for close
    answers.

    Args:
      instead: what the row holds that is no pair of two answers and so has no margin, for errors; empty: it is a pair.
    Raises: InputError for a weight below 0, for anything that is no finite number, and for a margin beside `instead`.
    """
    weight = _value(row, "weight", 1.0, low=0.0, expected="a number, 0 or more")
    margin = _value(row, "margin", 0.0, low=-math.inf, expected="a number")
    if margin and instead:
        raise InputError(
            row.place,
            got=f"'margin' beside {instead}",
            expected="margins only in rows with a chosen and a rejected answer",
            remedy='Leave the column out with --config.data.columns="margin=", or write the row as pairs.',
        )
    if (weight, margin) == (1.0, 0.0):
        return pairs
    return [dataclasses.replace(pair, weight=weight, margin=margin) for pair in pairs]


def _value(row: Row, name: str, default: float, *, low: float, expected: str) -> float:
    """Number of an optional column."""
    value = row.fields.get(name)
    if not is_given(value):
        return default
    converted = number(value)
    if converted is None or converted < low or abs(converted) > _LARGEST:
        expected = f"{expected}, or nothing, which is {default:g}"
        raise InputError(row.place, got=f"{name!r} is {shown(value)}", expected=expected, remedy=DROP)
    return converted
