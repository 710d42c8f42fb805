"""How much arithmetic a step needs, counted from its pairs and not from the shapes they were padded to.

A product of [m, k] and [k, n] is 2mkn operations. The forward pass multiplies every real token by every block matrix,
every visible (query, key) pair by a head's width twice, and every scored token by the vocabulary matrix; the backward
pass takes twice that. What is computed a second time to save memory does not count, nor do norms and softmax.
Source: Chowdhery et al. 2022 (PaLM), appendix B, where attention is counted as if every token saw all others.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from dpo_jax.data.layout import unit_lengths
from dpo_jax.models.config import DecoderConfig

# Dense bfloat16 peaks of one device in operations a second, by a part of its `device_kind`; from makers' data sheets.
PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def train_flops(config: DecoderConfig, lengths: Int[np.ndarray, "P 3"], layout: str) -> float:
    """Operations of one update on these pairs, from their token counts of prompt, chosen and rejected."""
    return 3 * forward_flops(config, lengths, layout)


def forward_flops(config: DecoderConfig, lengths: Int[np.ndarray, "P 3"], layout: str) -> float:
    """Operations of scoring these pairs once."""
    c, lengths = config, np.asarray(lengths, np.int64)
    attention_width = c.head_dim * (c.heads + c.kv_heads) * 2  # q and o; k and v
    block = c.width * attention_width + c.width * c.mlp_width * (3 if c.gated else 2)
    tokens = int(unit_lengths(lengths, layout).sum())
    scored = int(lengths[:, 1:].sum())
    seen = 2 * c.heads * c.head_dim * visible_pairs(lengths, layout)
    return 2.0 * (c.layers * (block * tokens + seen) + c.vocab_size * c.width * scored)


def visible_pairs(lengths: Int[np.ndarray, "P 3"], layout: str) -> int:
    """(query, key) pairs that attention has to do with: each answer's token sees the prompt and its answer so far."""
    prompt, *answers = np.asarray(lengths, np.int64).T
    prompts = 1 if layout == "shared" else sum(answer > 0 for answer in answers)
    triangle = prompt * (prompt + 1) // 2
    rest = [np.maximum(answer - 1, 0) for answer in answers]  # the last token is not fed back
    return int((prompts * triangle + sum(n * prompt + n * (n + 1) // 2 for n in rest)).sum())


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """The most operations a second that one device is said to do; None where that is not known."""
    if dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAKS.items() if name in device_kind), None)
