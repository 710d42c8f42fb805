"""Floating-point operations that a step needs, counted from its pairs, without padding.

A product of [m, k] and [k, n] is 2mkn operations. The forward pass multiplies every real token by every block matrix,
every visible (query, key) pair by a head's width twice, and every scored token by the vocabulary matrix. The backward
pass takes twice that: once for the gradient of a product's input, once for that of its matrix, if the matrix trains.
Recomputation to save memory does not count, nor do norms and softmax.
Source: Chowdhery et al. 2022 (PaLM), appendix B, where attention is counted as if every token saw all others.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dpo_jax.cost.chips import chip_of
from dpo_jax.data.packing import prompt_copies, unit_lengths
from dpo_jax.hf.adapters import is_factor
from dpo_jax.models.config import DecoderConfig


class Shares(NamedTuple):
    """Shares of the matrices' operations that belong to trained parameters, and the operations of adapters."""

    blocks: float = 1.0  # trained share of the operations of the block matrices, in [0, 1]
    head: float = 1.0  # trained share of the vocabulary matrix, in [0, 1]
    adapters: float = 0.0  # operations of all adapters for one token, forward; adapters always train


WHOLE = Shares()  # full training, without adapters


def shares_of(config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], trained: Callable[[str], float]) -> Shares:
    """Computes the shares of a model.

    Kernels that the checkpoint stores as one tensor share one factor A of their adapter; it is counted once, although
    it is multiplied once for each of them.

    Args:
      shapes: shapes of all leaves by path, adapters included.
      trained: maps a leaf's path to the share of it that trains, in [0, 1].
    """
    total = blocks = adapters = 0.0
    for path, shape in shapes.items():
        size = math.prod(shape)
        if is_factor(path):
            adapters += 2 * size
        elif path.startswith("blocks/") and path.endswith("/kernel"):
            if "/experts/" in path and "/router/" not in path:
                size *= config.experts_per_token / config.experts  # a token passes through these only
            total += size
            blocks += size * trained(path)
    head = trained("embed/embedding" if config.tie_embeddings else "head/embedding")
    return Shares(blocks / total, float(head), adapters)


def train_flops(
    config: DecoderConfig,
    lengths: Int[np.ndarray, "P _"],
    layout: str,
    shares: Shares = WHOLE,
    scored: int | None = None,
) -> float:
    """Operations of one update on pairs; arguments as those of `forward_flops`."""
    frozen = frozen_flops(config, *tokens_of(lengths, layout, scored), shares)
    return 3 * forward_flops(config, lengths, layout, shares, scored) - frozen


def forward_flops(
    config: DecoderConfig,
    lengths: Int[np.ndarray, "P _"],
    layout: str,
    shares: Shares = WHOLE,
    scored: int | None = None,
) -> float:
    """Operations of one forward pass over pairs with these token counts of prompt and answers.

    Args:
      scored: tokens that are scored, in all of the pairs; None: every token of an answer.
    """
    windows = collections.Counter(config.windows)
    seen = sum(count * visible_pairs(lengths, layout, window) for window, count in windows.items())
    products = product_flops(config, *tokens_of(lengths, layout, scored), shares)
    return products + 4.0 * config.heads * config.head_dim * seen


def tokens_of(lengths: Int[np.ndarray, "P _"], layout: str, scored: int | None = None) -> tuple[int, int]:
    """Counts the tokens of pairs that pass through the blocks, and those that are scored; None: all of the answers."""
    lengths = np.asarray(lengths, np.int64)
    return int(unit_lengths(lengths, layout).sum()), int(lengths[:, 1:].sum()) if scored is None else scored


def product_flops(config: DecoderConfig, tokens: int, scored: int, shares: Shares = WHOLE) -> float:
    """Operations of the block matrices on `tokens` tokens and of the vocabulary matrix on `scored` tokens, forward."""
    c = config
    attention_width = c.head_dim * (c.heads + c.kv_heads) * 2  # q and o; k and v
    block = c.width * (attention_width + c.active_width * (3 if c.gated else 2) + c.experts)
    return 2.0 * (c.layers * block * tokens + c.vocab_size * c.width * scored) + shares.adapters * tokens


def frozen_flops(config: DecoderConfig, tokens: int, scored: int, shares: Shares) -> float:
    """Operations that an update on these tokens does without: the gradients of frozen matrices."""
    blocks, head = product_flops(config, tokens, 0), product_flops(config, 0, scored)
    return (1 - shares.blocks) * blocks + (1 - shares.head) * head


def visible_pairs(lengths: Int[np.ndarray, "P _"], layout: str, window: int | None = None) -> int:
    """Counts the (query, key) pairs of attention: each answer token sees the prompt and its answer so far.

    Args:
      window: the attention window, in keys, for which the layout must repeat prompts; None: full causal.
    """
    prompt, *answers = np.asarray(lengths, np.int64).T
    if window is not None:
        assert layout == "repeated"
        tokens = np.concatenate([(prompt + answer - 1)[answer > 0] for answer in answers])
        inside = np.minimum(tokens, window)
        return int((inside * (inside + 1) // 2 + (tokens - inside) * window).sum())
    triangle = prompt * (prompt + 1) // 2
    inputs = [np.maximum(answer - 1, 0) for answer in answers]  # the last token is no input
    return int((prompt_copies(lengths, layout) * triangle + sum(n * prompt + n * (n + 1) // 2 for n in inputs)).sum())


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the peak rate of a device from its data sheet, in operations a second; None if it is not known."""
    chip = chip_of(device_kind) if dtype == "bfloat16" else None
    return chip.flops if chip is not None else None
