"""The shape of a decoder: every choice a family makes, and nothing about how it runs."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a causal decoder. A family file fills it from a Hugging Face `config.json`.

    Parameters are a nested dict, block leaves stacked on a leading layer axis L:

        embed/embedding               [V, D]
        blocks/attention_norm/scale   [L, D]        (+ bias for layernorm)
        blocks/attention/{q,k,v}/kernel  [L, D, H or K, head_dim]   (+ bias [L, H or K, head_dim] if qkv_bias)
        blocks/attention/o/kernel     [L, H, head_dim, D]           (+ bias [L, D] if output_bias)
        blocks/mlp_norm/scale         [L, D]        (+ bias for layernorm)
        blocks/mlp/gate/kernel        [L, D, F]     (only if gated; + bias [L, F] if mlp_bias)
        blocks/mlp/up/kernel          [L, D, F]     (+ bias [L, F] if mlp_bias)
        blocks/mlp/down/kernel        [L, F, D]     (+ bias [L, D] if mlp_bias)
        final_norm/scale              [D]           (+ bias for layernorm)
        head/embedding                [V, D]        (absent if tie_embeddings)
    """

    vocab_size: int
    width: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # K, divides H
    head_dim: int
    mlp_width: int  # F
    max_positions: int  # positions the checkpoint was trained for
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True  # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    parallel_residual: bool = False  # x + attention(norm(x)) + mlp(norm(x))
    rotary_dim: int = 0  # leading dimensions of each head that rotate; even
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    output_bias: bool = False  # bias of the attention's output projection
    mlp_bias: bool = False
    tie_embeddings: bool = False
