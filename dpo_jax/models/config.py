"""Architecture of a decoder: every choice that a model family makes, and nothing about how it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypedDict


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary frequencies of a model, one for each pair of a head's dimensions; the functions of `rope` make them.

    Most models have the same frequencies for every sequence. If `trained_length` is set, a sequence longer than that
    has others: `long_frequencies` (LongRoPE), or those of a theta that grows with its length (dynamic NTK).
    """

    frequencies: tuple[float, ...]  # radians per position
    amplitude: float = 1.0  # of cosine and sine
    interleaved: bool = False  # a pair is dimensions 2i and 2i + 1, instead of i and i + half
    trained_length: int | None = None  # tokens; None: frequencies do not depend on the sequence
    long_frequencies: tuple[float, ...] = ()  # LongRoPE: radians per position, for longer sequences
    theta: float = 0.0  # dynamic NTK: the base of the frequencies
    factor: float = 1.0  # dynamic NTK: longest sequence over trained_length

    @property
    def dim(self) -> int:
        """Number of leading dimensions of each head that are rotated."""
        return 2 * len(self.frequencies)


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """Attributes that may differ from layer to layer."""

    rope: Rope | None = None  # None: no rotary positions
    window: int | None = None  # most keys a token attends to, itself included; None: full causal


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
    pattern: tuple[int, ...] = ()  # index into kinds of each layer; empty: there is one kind
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to every scale
    norms: Literal["before", "after", "both"] = "before"  # of attention and of the feed-forward block
    shared_norm: bool = False  # with parallel_residual: both blocks read the same normalized input
    qk_norm: Literal["", "head", "all"] = ""  # RMSNorm of queries and keys: none, over each head, over all heads
    qkv_clip: float | None = None  # queries, keys and values are clipped to this magnitude
    query_scale: float | None = None  # factor of attention scores; None: head_dim^-0.5
    scale_by_layer: bool = False  # attention scores of layer l, from 1, are divided by l
    attention_soft_cap: float | None = None  # scores become cap * tanh(scores / cap)
    logit_soft_cap: float | None = None  # logits become cap * tanh(logits / cap)
    embedding_scale: float = 1.0  # factor of embedded tokens
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True  # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    experts: int = 0  # E, feed-forward blocks that a router chooses from; 0: a single dense one
    experts_per_token: int = 0
    normalize_router: bool = False  # the weights of a token's experts sum to 1
    parallel_residual: bool = False  # x + attention(norm(x)) + mlp(norm(x))
    learned_positions: bool = False  # absolute position embeddings are added to the tokens'
    qkv_bias: bool = False
    output_bias: bool = False  # bias of the attention's output projection
    mlp_bias: bool = False
    head_bias: bool = False
    tie_embeddings: bool = False

    def for_length(self, longest: int) -> DecoderConfig:
        """Returns the equivalent configuration for sequences of at most `longest` tokens: it drops windows and
        length-dependent frequencies that no such sequence reaches."""
        kinds = [_simplify(kind, longest) for kind in self.kinds]
        return dataclasses.replace(self, **by_layer([kinds[i] for i in self.pattern] or kinds))

    @property
    def active_width(self) -> int:
        """Total F of the feed-forward blocks that one token passes through."""
        return self.mlp_width * (self.experts_per_token or 1)

    @property
    def windows(self) -> list[int | None]:
        """Attention window of each layer, in keys; None: full causal."""
        return [self.kinds[i].window for i in self.pattern or (0,) * self.layers]

    @property
    def stacks(self) -> dict[str, int]:
        """Sizes of the leading axes that parameters are stacked along."""
        return {"layer": self.layers, "expert": self.experts}

    @property
    def needs_whole_sequences(self) -> bool:
        """Whether each answer needs its own copy of the prompt: windows and lengths count a whole sequence."""
        return any(k.window is not None or (k.rope is not None and k.rope.trained_length) for k in self.kinds)


class KindFields(TypedDict):
    """Fields of a DecoderConfig that `by_layer` returns."""

    kinds: tuple[LayerKind, ...]
    pattern: tuple[int, ...]


def by_layer(kinds: Sequence[LayerKind]) -> KindFields:
    """Returns `kinds` and `pattern` of a DecoderConfig, from the kind of every layer."""
    distinct = tuple(dict.fromkeys(kinds))
    return {"kinds": distinct, "pattern": tuple(map(distinct.index, kinds)) if len(distinct) > 1 else ()}


def _simplify(kind: LayerKind, longest: int) -> LayerKind:
    window, rope = kind.window, kind.rope
    if window is not None and longest <= window:
        window = None
    if rope is not None and rope.trained_length is not None and longest <= rope.trained_length:
        rope = Rope(rope.frequencies, rope.amplitude, rope.interleaved)
    return LayerKind(rope, window)
