"""Layers of several kinds in one scan: what differs is made once for each kind, and a layer picks its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dpo_jax.models import rope
from dpo_jax.models.config import DecoderConfig


class Layers(NamedTuple):
    """What layers know besides their parameters; a tuple has an entry for each kind of layer, or one for all."""

    rotations: tuple[Any, ...]
    key_starts: tuple[Int[Array, "R S"], ...]
    key_end: Int[Array, "R S"]
    counted: Bool[Array, "R S"]  # tokens that statistics are of


def all_layers(
    config: DecoderConfig,
    positions: Int[Array, "R S"],
    key_start: Int[Array, "R S"],
    key_end: Int[Array, "R S"],
    dtype: Any,
    unfed: int,
) -> Layers:
    """How far tokens turn and which keys they see, in layers of every kind."""
    ropes = one_for_all(kind.rope for kind in config.kinds)
    windows = one_for_all(kind.window for kind in config.kinds)
    turning = next((each for each in ropes if each is not None), None)
    # Where some layers turn and others do not, these turn by nothing.
    rotations = [
        None if turning is None else rope.rotation(each, turning.dim, positions, key_start, dtype, unfed=unfed)
        for each in ropes
    ]
    index = jnp.arange(key_start.shape[1], dtype=key_start.dtype)[None]
    starts = [key_start if window is None else jnp.maximum(key_start, index - (window - 1)) for window in windows]
    # All but padding, and, which cannot be told from it, the first of each sequence.
    return Layers(tuple(rotations), tuple(starts), key_end, positions > 0)


def each_layer(config: DecoderConfig) -> tuple[Any, Any]:
    """The kind of every layer [L], None where there is one, and its number from 1 [L], None where nothing asks."""
    numbers = np.arange(1, config.layers + 1, dtype=np.int32) if config.scale_by_layer else None
    return np.array(config.pattern, np.int32) if config.pattern else None, numbers


def one_for_all(options: Iterable[Any]) -> list[Any]:
    """The options, or the one that there is if all are the same."""
    options = list(options)
    return options[:1] if len(set(options)) == 1 else options


def of_kind(options: tuple[Any, ...], kind: Array | None) -> Any:
    """That of a layer's kind, or the one that there is."""
    if kind is None or len(options) == 1:
        return options[0]
    return jax.tree.map(lambda *each: jax.lax.select_n(kind, *each), *options)


def interleaved(config: DecoderConfig) -> bool:
    """Whether the dimensions that turn together are neighbors."""
    return any(kind.rope is not None and kind.rope.interleaved for kind in config.kinds)
