"""How much arithmetic a step needs, counted from its pairs and not from the shapes they were padded to.

A product of [m, k] and [k, n] is 2mkn operations. The forward pass multiplies every real token by every block matrix,
every visible (query, key) pair by a head's width twice, and every scored token by the vocabulary matrix; the backward
pass takes twice that. What is computed a second time to save memory does not count, nor do norms and softmax.
Source: Chowdhery et al. 2022 (PaLM), appendix B, where attention is counted as if every token saw all others.
"""

from __future__ import annotations

import collections

import numpy as np
from jaxtyping import Int

from dpo_jax.chips import chip_of
from dpo_jax.data.layout import unit_lengths
from dpo_jax.models.config import DecoderConfig


def train_flops(config: DecoderConfig, lengths: Int[np.ndarray, "P 3"], layout: str) -> float:
    """Operations of one update on these pairs, from their token counts of prompt, chosen and rejected."""
    return 3 * forward_flops(config, lengths, layout)


def forward_flops(config: DecoderConfig, lengths: Int[np.ndarray, "P 3"], layout: str) -> float:
    """Operations of scoring these pairs once."""
    lengths = np.asarray(lengths, np.int64)
    tokens, scored = int(unit_lengths(lengths, layout).sum()), int(lengths[:, 1:].sum())
    windows = collections.Counter(config.windows)
    seen = sum(count * visible_pairs(lengths, layout, window) for window, count in windows.items())
    return product_flops(config, tokens, scored) + 4.0 * config.heads * config.head_dim * seen


def product_flops(config: DecoderConfig, tokens: int, scored: int) -> float:
    """Operations of all matrices on so many tokens, and of the vocabulary's on so many scored ones."""
    c = config
    attention_width = c.head_dim * (c.heads + c.kv_heads) * 2  # q and o; k and v
    block = c.width * (attention_width + c.active_width * (3 if c.gated else 2) + c.experts)
    return 2.0 * (c.layers * block * tokens + c.vocab_size * c.width * scored)


def visible_pairs(lengths: Int[np.ndarray, "P 3"], layout: str, window: int | None = None) -> int:
    """(query, key) pairs that attention has to do with: each answer's token sees the prompt and its answer so far.

    Args:
      window: the most keys that a token sees; prompts are then repeated.
    """
    prompt, *answers = np.asarray(lengths, np.int64).T
    if window is not None:
        assert layout == "repeated"
        tokens = np.concatenate([(prompt + answer - 1)[answer > 0] for answer in answers])
        inside = np.minimum(tokens, window)
        return int((inside * (inside + 1) // 2 + (tokens - inside) * window).sum())
    prompts = 1 if layout == "shared" else sum(answer > 0 for answer in answers)
    triangle = prompt * (prompt + 1) // 2
    rest = [np.maximum(answer - 1, 0) for answer in answers]  # the last token is not fed back
    return int((prompts * triangle + sum(n * prompt + n * (n + 1) // 2 for n in rest)).sum())


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """The most operations a second that one device is said to do; None where that is not known."""
    chip = chip_of(device_kind) if dtype == "bfloat16" else None
    return chip.flops if chip is not None else None
