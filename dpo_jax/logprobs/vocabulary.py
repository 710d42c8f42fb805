"""The vocabulary matrix in parts, each so small that a block of its logits fits the budget, on one device or a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Blocks(NamedTuple):
    """Sizes of the blocks that the product of hidden states and vocabulary matrix is computed in."""

    tokens: int  # scored tokens in a block; their number is rounded up to a multiple of it
    logits_bytes: int  # most bytes of one block's logits, in float32
    saved_bytes: int  # most bytes of logits that the forward pass saves for the backward pass


# Logits of a block stay in the cache of a core. Reading a saved block takes a third of the time of recomputing it.
CPU_BLOCKS = Blocks(96, 2 * 2**20 + 2**18, 128 * 2**20)
# Products are large enough to keep a matrix unit busy, and recomputing them is about as fast as reading them.
ACCELERATOR_BLOCKS = Blocks(1024, 256 * 2**20, 0)
GATHERED_PARTS = 8  # least number of parts if columns are sharded: the parts are gathered one at a time


class HeadSharding(NamedTuple):
    """Mesh axes over which rows and the vocabulary matrix [V, D] are sharded."""

    mesh: Mesh
    rows: tuple[str, ...]
    vocab: str | None  # axis of V: each device sums over its part of the vocabulary; None: replicated
    width: str | None  # axis of D: each part is gathered when it is used; None: replicated
    scatter: Callable[[Array, str, int], Array] | None = (
        None  # (x, axis, dimension): reduce-scatter; None: psum_scatter
    )


class Head(NamedTuple):
    """Vocabulary matrix and bias of the logits, or the running sums of their gradients."""

    weights: Float[Array, "V D"] | None  # None only in sums: no gradient is computed
    bias: Float[Array, "V"] | None = None


def vocab_block(vocab: int, blocks: Blocks, *, parts: int = 1) -> int:
    """Vocabulary entries in a block: the largest divisor of `vocab` within the budget that gives `parts` or more.

    If only small numbers divide it, the budget itself; the last block then overlaps the one before.

    >>> [vocab_block(size, CPU_BLOCKS) for size in (50304, 128256, 50257, 50261, 1000)]
    [4192, 5344, 1733, 6144, 1000]
    """
    most = max(1, min(vocab // parts, blocks.logits_bytes // (4 * blocks.tokens)))
    divisors = (size for size in range(most, most // 8, -1) if vocab % size == 0)
    return next(divisors, most)


class Vocabulary:
    """This device's shard of the vocabulary matrix, in `parts` of `length` entries; the last two may overlap."""

    def __init__(
        self, head: Head, dtype: DTypeLike, blocks: Blocks, soft_cap: float | None, sharding: HeadSharding | None
    ):
        assert head.weights is not None
        self._head, self._dtype, self._cap, self._sharding = head, dtype, soft_cap, sharding
        self._local = head.weights.shape[0]
        gathered = sharding is not None and sharding.width
        self.length = vocab_block(self._local, blocks, parts=GATHERED_PARTS if gathered else 1)
        self.parts = -(-self._local // self.length)
        shards = sharding.mesh.shape[sharding.vocab] if sharding is not None and sharding.vocab else 1
        self.size = shards * self._local

    def _start(self, j):
        return jnp.minimum(j * self.length, self._local - self.length)

    def part(self, j) -> Head:
        """Returns matrix [length, D] and bias [length] of part j; the matrix gathered, in the compute type."""
        rows, bias = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, self._start(j), self.length), self._head)
        rows = rows.astype(self._dtype)
        if self._sharding is not None and self._sharding.width:
            rows = jax.lax.all_gather(rows, self._sharding.width, axis=1, tiled=True)
        return Head(rows, bias)

    def logits(self, states, weights):
        """Computes the capped logits [t, length] of states [t, D] with a part."""
        wide = jnp.promote_types(states.dtype, jnp.float32)
        logits = jnp.einsum("td,vd->tv", states, weights.weights, preferred_element_type=wide)
        if weights.bias is not None:
            logits = logits + weights.bias.astype(wide)[None]
        if self._cap is not None:
            logits = self._cap * jnp.tanh(logits / self._cap)
        return logits

    def columns(self, j):
        """Returns whether columns of part j are new [1, length], None: all are; and the token id of each [length]."""
        column = self._start(j) + jnp.arange(self.length)
        real = None if self._local % self.length == 0 else (column >= j * self.length)[None]
        if self._sharding is not None and self._sharding.vocab:
            column = column + jax.lax.axis_index(self._sharding.vocab) * self._local
        return real, column

    def add(self, total, grad, j):
        """Adds the gradient of part j, reduced over the devices that have other rows, to the running sum `total`."""
        if self._sharding is not None:
            to_weights, to_bias = grad  # [length, D] and [length], of this device's rows
            unscattered = tuple(axis for axis in self._sharding.rows if axis != self._sharding.width)
            if to_weights is not None and self._sharding.width:
                to_weights = (self._sharding.scatter or _scatter)(to_weights, self._sharding.width, 1)
            # psum of None is None: a gradient that is not computed is not reduced.
            grad = Head(jax.lax.psum(to_weights, unscattered), jax.lax.psum(to_bias, self._sharding.rows))

        def add(total, grad):
            before = jax.lax.dynamic_slice_in_dim(total, self._start(j), self.length)
            return jax.lax.dynamic_update_slice_in_dim(total, before + grad, self._start(j), axis=0)

        return jax.tree.map(add, total, grad)


def _scatter(x, axis, side):
    return jax.lax.psum_scatter(x, axis, scatter_dimension=side, tiled=True)
