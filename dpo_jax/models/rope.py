"""Rotary positions: how far each pair of dimensions turns from one position to the next, and the turning itself.

    frequency[i] = theta^(-2i / dim), and a vector at position p has its pair i turned by p * frequency[i]

Su et al. 2021, section 3.2.2. What stretches a model to longer sequences changes the frequencies, here as
transformers does: each way is a function of what its configuration gives, by the name it has there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpo_jax.models.config import Rope

Given = Mapping[str, Any]  # the parameters of a kind, checked, under transformers' names


def frequencies(theta: float, dim: int) -> Float[np.ndarray, "half"]:
    """Radians a position, of every pair."""
    return theta ** (-np.arange(0, dim, 2) / dim)


def usual(dim: int, theta: float = 10000.0, *, interleaved: bool = False) -> Rope:
    """So many dimensions, turning as in the paper."""
    return Rope(_floats(frequencies(theta, dim)), interleaved=interleaved)


def default(given: Given, plain: np.ndarray) -> Rope:
    """As the model was trained."""
    return Rope(_floats(plain))


def linear(given: Given, plain: np.ndarray) -> Rope:
    """Every position counts for less: Chen et al. 2023 (position interpolation)."""
    return Rope(_floats(plain / given["factor"]))


def dynamic(given: Given, plain: np.ndarray) -> Rope:
    """Theta grows with a sequence that is longer than the trained ones (dynamic NTK)."""
    length = given["max_position_embeddings"]
    return Rope(_floats(plain), trained_length=length, theta=given["rope_theta"], factor=given["factor"])


def llama3(given: Given, plain: np.ndarray) -> Rope:
    """Slow turns are slowed, fast ones are not, those between in part: Llama 3.1."""
    factor, low, high = given["factor"], given["low_freq_factor"], given["high_freq_factor"]
    turns = given["original_max_position_embeddings"] * plain / (2 * math.pi)  # in a sequence of the trained length
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return Rope(_floats((1 - kept) * plain / factor + kept * plain))


def yarn(given: Given, plain: np.ndarray) -> Rope:
    """Peng et al. 2023 (YaRN): as llama3, in proportion to the pair's number, and scores are scaled besides."""
    length, theta, dim = given["original_max_position_embeddings"], given["rope_theta"], 2 * len(plain)
    factor = given.get("factor", given["max_position_embeddings"] / length)

    def pair(turns: float) -> float:
        """Of which pair, as a fraction of one, a sequence of the trained length makes so many turns."""
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(given.get("beta_fast", 32)), pair(given.get("beta_slow", 1))
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    slowed = np.clip((np.arange(dim // 2) - first) / (last - first or 0.001), 0, 1)
    amplitude = given.get("attention_factor")
    if amplitude is None:
        both = "mscale" in given and "mscale_all_dim" in given
        over, under = (given["mscale"], given["mscale_all_dim"]) if both else (1.0, 0.0)
        amplitude = _yarn_scale(factor, over) / _yarn_scale(factor, under)
    return Rope(_floats(slowed * plain / factor + (1 - slowed) * plain), amplitude)


def _yarn_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


def longrope(given: Given, plain: np.ndarray) -> Rope:
    """Ding et al. 2024 (LongRoPE): a factor for every pair, others for sequences longer than the trained ones."""
    length = given["original_max_position_embeddings"]
    factor = given.get("factor", given["max_position_embeddings"] / length)
    amplitude = given.get("attention_factor")
    if amplitude is None:
        amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    short, long = (_floats(plain / np.array(given[name])) for name in ("short_factor", "long_factor"))
    return Rope(short, amplitude, trained_length=length, long_frequencies=long)


# Each with the parameters it must be given, and those it may be.
KINDS: dict[str, tuple[Callable[[Given, np.ndarray], Rope], str, str]] = {
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


def rotation(
    rope: Rope | None,
    dim: int,
    positions: Int[Array, "R S"],
    key_start: Int[Array, "R S"],
    dtype: Any,
    *,
    unfed: int,
) -> tuple[Array, Array]:
    """(cos, sin) of every position's turn, [R, S, 1, dim / 2] each.

    Args:
      rope: None: it turns by nothing.
      key_start, unfed: where each token's sequence begins, and how many of its tokens are not among these, for turns
        that depend on its length.
      dtype: the compute type. Angles are float32 at least: bfloat16 cannot tell position 257 from 258.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    at = positions[..., None, None].astype(wide)
    if rope is None:
        frequency, amplitude = jnp.zeros((1, 1, 1, dim // 2), wide), 1.0
    else:
        frequency, amplitude = turns(rope, sequence_lengths(positions, key_start) + unfed, wide), rope.amplitude
    angle = at * frequency
    return jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude


def turns(rope: Rope, length: Int[Array, "R S"], dtype: Any) -> Array:
    """Radians a position, [R, S, 1, dim / 2], from the length of each token's sequence; [1, 1, 1, dim / 2] where it is
    the same for all."""
    usual = jnp.array(rope.frequencies, dtype)[None, None, None]
    if rope.trained_length is None:
        return usual
    length = length[..., None, None]
    if rope.long_frequencies:
        return jnp.where(length > rope.trained_length, jnp.array(rope.long_frequencies, dtype)[None, None, None], usual)
    longer = jnp.maximum(length, rope.trained_length).astype(dtype) / rope.trained_length
    # theta times (factor * longer - factor + 1)^(dim / (dim - 2)); frequency i has it to the power -2i / dim.
    power = -jnp.arange(0, rope.dim, 2, dtype=dtype) / (rope.dim - 2)
    return usual * (rope.factor * longer - (rope.factor - 1)) ** power[None, None, None]


def sequence_lengths(positions: Int[Array, "R S"], key_start: Int[Array, "R S"]) -> Int[Array, "R S"]:
    """Tokens of the sequence that each token is in.

    The tokens of a sequence are those that see the same first key, as in the repeated layout.
    """
    row = jnp.arange(len(positions))[:, None]
    last = jnp.zeros_like(positions).at[row, key_start].max(positions)
    return jnp.take_along_axis(last, key_start, axis=1) + 1


def rotate(
    x: Float[Array, "R S H d"], rotation: tuple[Array, Array], *, interleaved: bool = False
) -> Float[Array, "R S H d"]:
    """Turns pairs of leading dimensions by their angles and leaves the dimensions after them alone.

    Args:
      interleaved: a pair is (x[2i], x[2i + 1]), and not (x[i], x[i + dim / 2]).
    """
    cos, sin = rotation
    half = cos.shape[-1]
    if interleaved:
        first, second = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    if interleaved:
        turned = [jnp.stack(turned, axis=-1).reshape(*x.shape[:-1], 2 * half)]
    rest = x[..., 2 * half :]
    turned = jnp.concatenate(turned, axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
