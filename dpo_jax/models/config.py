"""The shape of a decoder: every choice a family makes, and nothing about how it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Rope:
    """How far each pair of a head's dimensions turns from one position to the next; `rope` makes them.

    Most models turn alike whatever the sequence. Where `trained_length` is set, a longer sequence turns otherwise, by
    its own length: at `long_frequencies` (LongRoPE), or with theta raised (dynamic NTK).
    """

    frequencies: tuple[float, ...]  # radians a position
    amplitude: float = 1.0  # of cosine and sine
    interleaved: bool = False  # dimensions 2i and 2i + 1 are a pair, and not i and i + half
    trained_length: int | None = None
    long_frequencies: tuple[float, ...] = ()
    theta: float = 0.0  # dynamic NTK: the base, and
    factor: float = 1.0  # how much longer sequences may become

    @property
    def dim(self) -> int:
        """Leading dimensions of each head that turn."""
        return 2 * len(self.frequencies)


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer."""

    rope: Rope | None = None  # None: nothing turns
    window: int | None = None  # keys a token sees at most, itself among them; None: all before it


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a causal decoder. A family file fills it from a Hugging Face `config.json`.

    Parameters are a nested dict, block leaves stacked on a leading layer axis L:

        embed/embedding               [V, D]
        positions/embedding           [max_positions, D]   (only if learned_positions)
        blocks/attention_norm/scale   [L, D]        (+ bias for layernorm; absent if norms are "after")
        blocks/attention/{q,k,v}/kernel  [L, D, H or K, head_dim]   (+ bias [L, H or K, head_dim] if qkv_bias)
        blocks/attention/{q,k}_norm/scale  [L, head_dim or H * head_dim or K * head_dim]   (only if qk_norm)
        blocks/attention/o/kernel     [L, H, head_dim, D]           (+ bias [L, D] if output_bias)
        blocks/attention_post_norm/scale  [L, D]    (only if norms are "after" or "both")
        blocks/mlp_norm/scale         [L, D]        (+ bias for layernorm; absent if norms are "after" or shared_norm)
        blocks/mlp/gate/kernel        [L, D, F]     (only if gated; + bias [L, F] if mlp_bias)
        blocks/mlp/up/kernel          [L, D, F]     (+ bias [L, F] if mlp_bias)
        blocks/mlp/down/kernel        [L, F, D]     (+ bias [L, D] if mlp_bias)
        blocks/experts/router/kernel  [L, D, E]     (blocks/experts instead of blocks/mlp, if there are experts)
        blocks/experts/{gate,up}/kernel  [L, E, D, F]
        blocks/experts/down/kernel    [L, E, F, D]
        blocks/mlp_post_norm/scale    [L, D]        (only if norms are "after" or "both")
        final_norm/scale              [D]           (+ bias for layernorm)
        head/embedding                [V, D]        (absent if tie_embeddings)
        logits/bias                   [V]           (only if head_bias)
    """

    vocab_size: int
    width: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # K, divides H
    head_dim: int
    mlp_width: int  # F
    max_positions: int  # positions the checkpoint was trained for
    kinds: tuple[LayerKind, ...] = (LayerKind(),)
    pattern: tuple[int, ...] = ()  # of each layer, which kind; empty: all are of the one there is
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to every scale
    norms: Literal["before", "after", "both"] = "before"  # where, of attention and of the feed-forward block
    shared_norm: bool = False  # with parallel_residual: the feed-forward block reads what attention reads
    qk_norm: Literal["", "head", "all"] = ""  # of queries and keys: none, over each head, over all heads at once
    qkv_clip: float | None = None  # queries, keys and values are cut to this magnitude
    query_scale: float | None = None  # of scores; None: head_dim^-0.5
    scale_by_layer: bool = False  # the scores of layer l, from 1, are divided by l
    attention_soft_cap: float | None = None  # scores become cap * tanh(scores / cap)
    logit_soft_cap: float | None = None
    embedding_scale: float = 1.0  # of embedded tokens
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True  # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    experts: int = 0  # E, feed-forward blocks of which each token goes through a few; 0: all through the one there is
    experts_per_token: int = 0
    normalize_router: bool = False  # the weights of a token's experts add up to 1
    parallel_residual: bool = False  # x + attention(norm(x)) + mlp(norm(x))
    learned_positions: bool = False  # a vector for each position is added to the embedded token
    qkv_bias: bool = False
    output_bias: bool = False  # bias of the attention's output projection
    mlp_bias: bool = False
    head_bias: bool = False
    tie_embeddings: bool = False

    def for_length(self, longest: int) -> DecoderConfig:
        """The same for sequences of at most so many tokens: windows and turns that they do not reach are left out."""
        kinds = [_within(kind, longest) for kind in self.kinds]
        return dataclasses.replace(self, **by_layer([kinds[i] for i in self.pattern] or kinds))

    @property
    def active_width(self) -> int:
        """F of all the feed-forward blocks that one token goes through."""
        return self.mlp_width * (self.experts_per_token or 1)

    @property
    def windows(self) -> list[int | None]:
        """That of every layer."""
        return [self.kinds[i].window for i in self.pattern or (0,) * self.layers]

    @property
    def stacks(self) -> dict[str, int]:
        """Sizes of the leading axes that leaves are stacked by."""
        return {"layer": self.layers, "expert": self.experts}

    @property
    def needs_whole_sequences(self) -> bool:
        """Whether what a token sees depends on its own sequence alone being there, so no prompt can be shared."""
        return any(k.window is not None or (k.rope is not None and k.rope.trained_length) for k in self.kinds)


def by_layer(kinds: Sequence[LayerKind]) -> dict[str, Any]:
    """`kinds` and `pattern` of a DecoderConfig, from the kind of every layer."""
    distinct = tuple(dict.fromkeys(kinds))
    return {"kinds": distinct, "pattern": tuple(map(distinct.index, kinds)) if len(distinct) > 1 else ()}


def _within(kind: LayerKind, longest: int) -> LayerKind:
    window, rope = kind.window, kind.rope
    if window is not None and longest <= window:
        window = None
    if rope is not None and rope.trained_length is not None and longest <= rope.trained_length:
        rope = Rope(rope.frequencies, rope.amplitude, rope.interleaved)
    return LayerKind(rope, window)
