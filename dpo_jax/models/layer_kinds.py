"""Layers of several kinds in one scan: rotary tables and bounds are computed once a kind, and each layer selects its
own."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from dpo_jax.models import rope
from dpo_jax.models.config import DecoderConfig

Kind = TypeVar("Kind", bound=Hashable)
Tree = TypeVar("Tree")


class LayerInputs(NamedTuple):
    """Inputs that all layers share; a tuple has one entry for each kind of layer, or a single one for all kinds."""

    rotary_tables: tuple[rope.RotaryTables | None, ...]
    key_starts: tuple[Int[Array, "R S"], ...]
    key_end: Int[Array, "R S"]
    counted: Bool[Array, "R S"]  # tokens that router statistics count


class LayerIndex(NamedTuple):
    """Position of a layer, or of all of them along a leading axis [L]; None where no layer needs it."""

    kind: Int[Array, ""] | Int[np.ndarray, "L"] | None
    number: Int[Array, ""] | Int[np.ndarray, "L"] | None  # from 1


def layer_inputs(
    config: DecoderConfig,
    positions: Int[Array, "R S"],
    key_start: Int[Array, "R S"],
    key_end: Int[Array, "R S"],
    dtype: DTypeLike,
    dropped_tokens: int,
) -> LayerInputs:
    """Computes rotary tables and attention bounds for layers of every kind; see `decoder.hidden_states`."""
    ropes = unique_or_all(kind.rope for kind in config.kinds)
    windows = unique_or_all(kind.window for kind in config.kinds)
    rotary = next((each for each in ropes if each is not None), None)
    # If only some kinds have rotary positions, the others get angles of 0, so that every kind has tables to select.
    tables = [
        None
        if rotary is None
        else rope.rotary_tables(each, rotary.dim, positions, key_start, dtype, dropped_tokens=dropped_tokens)
        for each in ropes
    ]
    index = jnp.arange(key_start.shape[1], dtype=key_start.dtype)[None]
    starts = [key_start if window is None else jnp.maximum(key_start, index - (window - 1)) for window in windows]
    # Excludes padding, and with it the first token of each sequence, which also has position 0.
    return LayerInputs(tuple(tables), tuple(starts), key_end, positions > 0)


def layer_index(config: DecoderConfig) -> LayerIndex:
    """Returns kind [L] and number [L] of all layers; None if there is one kind, or nothing reads numbers."""
    numbers = np.arange(1, config.layers + 1, dtype=np.int32) if config.scale_by_layer else None
    return LayerIndex(np.array(config.pattern, np.int32) if config.pattern else None, numbers)


def unique_or_all(options: Iterable[Kind]) -> list[Kind]:
    """Returns a single option if all are equal, otherwise all of them."""
    options = list(options)
    return options[:1] if len(set(options)) == 1 else options


def select(options: Sequence[Tree], kind: Array | np.ndarray | None) -> Tree:
    """Returns the option of a layer's kind; a single option serves all kinds."""
    if kind is None or len(options) == 1:
        return options[0]
    return jax.tree.map(lambda *each: jax.lax.select_n(kind, *each), *options)


def interleaved(config: DecoderConfig) -> bool:
    """Whether the two dimensions of a rotary pair are neighbors."""
    return any(kind.rope is not None and kind.rope.interleaved for kind in config.kinds)
