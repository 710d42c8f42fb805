"""The vocabulary matrix part by part, each small enough that its logits are, wherever on a mesh it lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float


class Blocks(NamedTuple):
    """How much of the product is alive at once."""

    tokens: int  # scored tokens in a block; what their number is rounded up to
    logits_bytes: int  # of one block in float32
    kept_bytes: int  # of logits that the forward pass leaves for the backward pass


# Logits of a block stay in the cache of a core. Reading one back takes a third of the time of making it again.
CPU_BLOCKS = Blocks(96, 2 * 2**20 + 2**18, 128 * 2**20)
# Products are large enough to keep a matrix unit busy, and making them again is about as fast as reading them.
ACCELERATOR_BLOCKS = Blocks(1024, 256 * 2**20, 0)
GATHERED_PARTS = 8  # of a vocabulary whose columns lie across devices: the least that are gathered one by one


class Spread(NamedTuple):
    """Where rows and the vocabulary matrix lie on a mesh, and so what is summed across which of its axes."""

    mesh: Mesh
    rows: tuple[str, ...]  # axes that rows are spread over
    vocab: str | None  # axis of the matrix's rows: each device sums over its part of the vocabulary
    width: str | None  # axis of its columns: a block is gathered when it is used
    scatter: Callable[[Array, str, int], Array] | None = None  # sums over an axis, cut along a side; None: psum_scatter


class Head(NamedTuple):
    """What turns hidden states into logits, or sums of its gradient."""

    weights: Any  # [V, D]; of sums, None for a gradient that nobody wants
    bias: Float[Array, "V"] | None = None


def vocab_block(vocab: int, blocks: Blocks, *, parts: int = 1) -> int:
    """Vocabulary entries in a block: the most that divide the vocabulary, into `parts` or more, and keep to the budget.

    Where only small numbers divide it, the budget itself: the last block then overlaps the one before.

    >>> [vocab_block(size, CPU_BLOCKS) for size in (50304, 128256, 50257, 50261, 1000)]
    [4192, 5344, 1733, 6144, 1000]
    """
    most = max(1, min(vocab // parts, blocks.logits_bytes // (4 * blocks.tokens)))
    divisors = (size for size in range(most, most // 8, -1) if vocab % size == 0)
    return next(divisors, most)


class Vocabulary:
    """This device's share of the vocabulary matrix, part by part; the last part overlaps the one before if it must."""

    def __init__(self, head: Head, dtype: Any, blocks: Blocks, soft_cap: float | None, spread: Spread | None):
        self._head, self._dtype, self._cap, self._spread = head, dtype, soft_cap, spread
        self._here = head.weights.shape[0]
        gathered = spread is not None and spread.width
        self.length = vocab_block(self._here, blocks, parts=GATHERED_PARTS if gathered else 1)
        self.parts = -(-self._here // self.length)
        shards = spread.mesh.shape[spread.vocab] if spread is not None and spread.vocab else 1
        self.size = shards * self._here

    def _start(self, j):
        return jnp.minimum(j * self.length, self._here - self.length)

    def part(self, j) -> Head:
        """Rows of part j in the compute type, whole."""
        rows, bias = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, self._start(j), self.length), self._head)
        rows = rows.astype(self._dtype)
        if self._spread is not None and self._spread.width:
            rows = jax.lax.all_gather(rows, self._spread.width, axis=1, tiled=True)
        return Head(rows, bias)

    def logits(self, states, weights):
        """Capped logits of a block."""
        wide = jnp.promote_types(states.dtype, jnp.float32)
        logits = jnp.einsum("td,vd->tv", states, weights.weights, preferred_element_type=wide)
        if weights.bias is not None:
            logits = logits + weights.bias.astype(wide)[None]
        if self._cap is not None:
            logits = self._cap * jnp.tanh(logits / self._cap)
        return logits

    def columns(self, j):
        """Which columns of part j are real, None for all; and the token id of each."""
        column = self._start(j) + jnp.arange(self.length)
        real = None if self._here % self.length == 0 else (column >= j * self.length)[None]
        if self._spread is not None and self._spread.vocab:
            column = column + jax.lax.axis_index(self._spread.vocab) * self._here
        return real, column

    def add(self, total, grad, j):
        """`total` with the gradient of part j added, summed over the devices that hold other rows."""
        if self._spread is not None:
            to_weights, to_bias = grad
            others = tuple(axis for axis in self._spread.rows if axis != self._spread.width)
            if to_weights is not None and self._spread.width:
                to_weights = (self._spread.scatter or _scatter)(to_weights, self._spread.width, 1)
            # Without gradients these are trees without leaves.
            grad = Head(jax.lax.psum(to_weights, others), jax.lax.psum(to_bias, self._spread.rows))

        def add(total, grad):
            before = jax.lax.dynamic_slice_in_dim(total, self._start(j), self.length)
            return jax.lax.dynamic_update_slice_in_dim(total, before + grad, self._start(j), axis=0)

        return jax.tree.map(add, total, grad)


def _scatter(x, axis, side):
    return jax.lax.psum_scatter(x, axis, scatter_dimension=side, tiled=True)
