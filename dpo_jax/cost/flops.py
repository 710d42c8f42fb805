"""How much arithmetic a step needs, counted from its pairs and not from the shapes they were padded to.

A product of [m, k] and [k, n] is 2mkn operations. The forward pass multiplies every real token by every block matrix,
every visible (query, key) pair by a head's width twice, and every scored token by the vocabulary matrix; the backward
pass takes twice that, once for the gradient of what a matrix multiplies and once for that of the matrix, if it trains.
What is computed a second time to save memory does not count, nor do norms and softmax.
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
    """What trains of the matrices, and what adapters add to them."""

    blocks: float = 1.0  # of the operations of the blocks' matrices, the share of those that train
    head: float = 1.0  # the same of the vocabulary's
    adapters: float = 0.0  # operations of all adapters, which do train, on a token, forward


WHOLE = Shares()  # all that there is trains


def shares_of(config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], trained: Callable[[str], float]) -> Shares:
    """The shares of a model.

    Maps that the checkpoint stores as one have one A, counted once, though it is multiplied beside each of them.

    Args:
      shapes: of all leaves, by path, adapters among them.
      trained: of a leaf's path, the share of it that trains.
    """
    every = blocks = adapters = 0.0
    for path, shape in shapes.items():
        size = math.prod(shape)
        if is_factor(path):
            adapters += 2 * size
        elif path.startswith("blocks/") and path.endswith("/kernel"):
            if "/experts/" in path and "/router/" not in path:
                size *= config.experts_per_token / config.experts  # a token meets these alone
            every += size
            blocks += size * trained(path)
    head = trained("embed/embedding" if config.tie_embeddings else "head/embedding")
    return Shares(blocks / every, float(head), adapters)


def train_flops(config: DecoderConfig, lengths: Int[np.ndarray, "P _"], layout: str, shares: Shares = WHOLE) -> float:
    """Operations of one update on these pairs, from their token counts of prompt and answers."""
    return 3 * forward_flops(config, lengths, layout, shares) - unmade_flops(
        config, *tokens_of(lengths, layout), shares
    )


def forward_flops(config: DecoderConfig, lengths: Int[np.ndarray, "P _"], layout: str, shares: Shares = WHOLE) -> float:
    """Operations of scoring these pairs once."""
    windows = collections.Counter(config.windows)
    seen = sum(count * visible_pairs(lengths, layout, window) for window, count in windows.items())
    products = product_flops(config, *tokens_of(lengths, layout), shares)
    return products + 4.0 * config.heads * config.head_dim * seen


def tokens_of(lengths: Int[np.ndarray, "P _"], layout: str) -> tuple[int, int]:
    """How many tokens pairs have that go through the blocks, and how many are scored."""
    lengths = np.asarray(lengths, np.int64)
    return int(unit_lengths(lengths, layout).sum()), int(lengths[:, 1:].sum())


def product_flops(config: DecoderConfig, tokens: int, scored: int, shares: Shares = WHOLE) -> float:
    """Operations of all matrices on so many tokens, and of the vocabulary's on so many scored ones."""
    c = config
    attention_width = c.head_dim * (c.heads + c.kv_heads) * 2  # q and o; k and v
    block = c.width * (attention_width + c.active_width * (3 if c.gated else 2) + c.experts)
    return 2.0 * (c.layers * block * tokens + c.vocab_size * c.width * scored) + shares.adapters * tokens


def unmade_flops(config: DecoderConfig, tokens: int, scored: int, shares: Shares) -> float:
    """What an update of so many tokens spares: the gradients of matrices that do not train."""
    blocks, head = product_flops(config, tokens, 0), product_flops(config, 0, scored)
    return (1 - shares.blocks) * blocks + (1 - shares.head) * head


def visible_pairs(lengths: Int[np.ndarray, "P _"], layout: str, window: int | None = None) -> int:
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
    triangle = prompt * (prompt + 1) // 2
    rest = [np.maximum(answer - 1, 0) for answer in answers]  # the last token is not fed back
    return int((prompt_copies(lengths, layout) * triangle + sum(n * prompt + n * (n + 1) // 2 for n in rest)).sum())


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """The most operations a second that one device is said to do; None where that is not known."""
    chip = chip_of(device_kind) if dtype == "bfloat16" else None
    return chip.flops if chip is not None else None
