"""Rotary positions: the frequencies of a model, the tables of cosines and sines, and the rotation itself.

    frequency[i] = theta^(-2i / dim); at position p, dimension pair i is rotated by the angle p * frequency[i]

Su et al. 2021, section 3.2.2. Methods that extend a model to longer sequences change the frequencies, here exactly as
transformers does. Each is a function of the parameters in the model's `config.json`, under its name there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dpo_jax.models.config import Rope

Parameters = Mapping[str, Any]  # rope parameters from config.json, checked, under transformers' names
Frequencies = Float[np.ndarray, "half"]


class RotaryTables(NamedTuple):
    """Cosine and sine of every position's angles; the axis of 1 is that of the heads."""

    cos: Float[Array, "R S 1 half"]
    sin: Float[Array, "R S 1 half"]


def frequencies(theta: float, dim: int) -> Frequencies:
    """Frequency of every rotary pair, theta^(-2i / dim), in radians per position."""
    return theta ** (-np.arange(0, dim, 2) / dim)


def usual(dim: int, theta: float = 10000.0, *, interleaved: bool = False) -> Rope:
    """Rotary positions of the paper, for the first `dim` dimensions of each head."""
    return Rope(_floats(frequencies(theta, dim)), interleaved=interleaved)


def default(parameters: Parameters, base: Frequencies) -> Rope:
    """Unchanged frequencies."""
    return Rope(_floats(base))


def linear(parameters: Parameters, base: Frequencies) -> Rope:
    """Position interpolation: all frequencies divided by a factor. Source: Chen et al. 2023."""
    return Rope(_floats(base / parameters["factor"]))


def dynamic(parameters: Parameters, base: Frequencies) -> Rope:
    """Dynamic NTK: theta grows with the length of a sequence that is longer than the training length."""
    length = parameters["max_position_embeddings"]
    return Rope(_floats(base), trained_length=length, theta=parameters["rope_theta"], factor=parameters["factor"])


def llama3(parameters: Parameters, base: Frequencies) -> Rope:
    """Llama 3.1: divides low frequencies by a factor, keeps high ones, and interpolates in between."""
    factor, low, high = parameters["factor"], parameters["low_freq_factor"], parameters["high_freq_factor"]
    # Full rotations of each pair over the training length.
    rotations = parameters["original_max_position_embeddings"] * base / (2 * math.pi)
    unchanged = np.clip((rotations - low) / (high - low), 0, 1)
    return Rope(_floats((1 - unchanged) * base / factor + unchanged * base))


def yarn(parameters: Parameters, base: Frequencies) -> Rope:
    """YaRN: interpolates as llama3 does, but linearly in the index of the pair, and scales attention scores.

    Source: Peng et al. 2023.
    """
    length, theta, dim = parameters["original_max_position_embeddings"], parameters["rope_theta"], 2 * len(base)
    factor = parameters.get("factor", parameters["max_position_embeddings"] / length)

    def pair_index(rotations: float) -> float:
        """Index (fractional) of the rotary pair that completes so many `rotations` over the training length."""
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_index(parameters.get("beta_fast", 32)), pair_index(parameters.get("beta_slow", 1))
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    slowed = np.clip((np.arange(dim // 2) - first) / (last - first or 0.001), 0, 1)
    amplitude = parameters.get("attention_factor")
    if amplitude is None:
        both = "mscale" in parameters and "mscale_all_dim" in parameters
        over, under = (parameters["mscale"], parameters["mscale_all_dim"]) if both else (1.0, 0.0)
        amplitude = _yarn_scale(factor, over) / _yarn_scale(factor, under)
    return Rope(_floats(slowed * base / factor + (1 - slowed) * base), amplitude)


def _yarn_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


def longrope(parameters: Parameters, base: Frequencies) -> Rope:
    """LongRoPE: one factor for each pair, and a second set for sequences longer than the training length.

    Source: Ding et al. 2024.
    """
    length = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor", parameters["max_position_embeddings"] / length)
    amplitude = parameters.get("attention_factor")
    if amplitude is None:
        amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    short, long = (_floats(base / np.array(parameters[name])) for name in ("short_factor", "long_factor"))
    return Rope(short, amplitude, trained_length=length, long_frequencies=long)


# rope_type -> (function, names of its required parameters, names of its optional ones).
KINDS: dict[str, tuple[Callable[[Parameters, Frequencies], Rope], str, str]] = {
    "default": (default, "", ""),
    "linear": (linear, "factor", ""),
    "dynamic": (dynamic, "factor", ""),
    "llama3": (llama3, "factor low_freq_factor high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        yarn,
        "",
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow truncate mscale mscale_all_dim",
    ),
    "longrope": (longrope, "short_factor long_factor", "original_max_position_embeddings attention_factor factor"),
}


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.tolist())


def rotary_tables(
    rope: Rope | None,
    dim: int,
    positions: Int[Array, "R S"],
    key_start: Int[Array, "R S"],
    dtype: DTypeLike,
    *,
    dropped_tokens: int,
) -> RotaryTables:
    """Computes cosine and sine of every position's angles, [R, S, 1, dim / 2] each.

    Args:
      rope: None: all angles are 0.
      key_start: index of the first token of each token's sequence, for frequencies that depend on its length.
      dropped_tokens: trailing tokens of each sequence that the rows leave out; its length includes them.
      dtype: the compute type. Angles are float32 at least: bfloat16 cannot distinguish positions 257 and 258.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    at = positions[..., None, None].astype(wide)
    if rope is None:
        frequency, amplitude = jnp.zeros((1, 1, 1, dim // 2), wide), 1.0
    else:
        lengths = sequence_lengths(positions, key_start) + dropped_tokens
        frequency, amplitude = rotary_frequencies(rope, lengths, wide), rope.amplitude
    angle = at * frequency
    return RotaryTables(jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude)


def rotary_frequencies(rope: Rope, length: Int[Array, "R S"], dtype: DTypeLike) -> Float[Array, "#R #S 1 half"]:
    """Frequencies in radians per position, from the length of each token's sequence; R and S are 1 if all are equal."""
    base = jnp.array(rope.frequencies, dtype)[None, None, None]
    if rope.trained_length is None:
        return base
    length = length[..., None, None]
    if rope.long_frequencies:
        return jnp.where(length > rope.trained_length, jnp.array(rope.long_frequencies, dtype)[None, None, None], base)
    longer = jnp.maximum(length, rope.trained_length).astype(dtype) / rope.trained_length
    # theta times (factor * longer - factor + 1)^(dim / (dim - 2)); frequency i has it to the power -2i / dim.
    power = -jnp.arange(0, rope.dim, 2, dtype=dtype) / (rope.dim - 2)
    return base * (rope.factor * longer - (rope.factor - 1)) ** power[None, None, None]


def sequence_lengths(positions: Int[Array, "R S"], key_start: Int[Array, "R S"]) -> Int[Array, "R S"]:
    """Number of tokens in each token's sequence.

    Tokens are of one sequence if they have the same `key_start`, which holds in the repeated layout.
    """
    row = jnp.arange(len(positions))[:, None]
    last = jnp.zeros_like(positions).at[row, key_start].max(positions)
    return jnp.take_along_axis(last, key_start, axis=1) + 1


def rotate(x: Float[Array, "R S H d"], tables: RotaryTables, *, interleaved: bool = False) -> Float[Array, "R S H d"]:
    """Rotates pairs among the leading dimensions by their angles; the dimensions after them pass unchanged.

    Args:
      interleaved: a pair is (x[2i], x[2i + 1]) instead of (x[i], x[i + dim / 2]).
    """
    cos, sin = tables
    half = cos.shape[-1]
    if interleaved:
        first, second = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    pairs = [first * cos - second * sin, second * cos + first * sin]
    if interleaved:
        pairs = [jnp.stack(pairs, axis=-1).reshape(*x.shape[:-1], 2 * half)]
    unrotated = x[..., 2 * half :]
    rotated = jnp.concatenate(pairs, axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, unrotated], axis=-1) if unrotated.shape[-1] else rotated
