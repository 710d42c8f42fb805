"""Log-probabilities of completion tokens, without a logits array over all tokens.

Only scored tokens meet the vocabulary matrix: they are gathered into one list, and the product is made a block of
tokens by a block of the vocabulary at a time, each small enough for a cache. The backward pass makes each block
again, but for the first ones, kept within a budget. The vocabulary runs outermost, so a block of the matrix is read
once, and its gradient written once.

    log p(target) = h . w_target - log sum_v exp(h . w_v), the sum carried from block to block as (max, sum of exp)
    d loss / d logit_v = (1[v = target] - p_v) * d loss / d log p
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dpo_jax.types import Rows


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


class _Plan(NamedTuple):
    """Everything static that the two passes go by."""

    blocks: Blocks
    soft_cap: float | None
    spread: Spread | None


def vocab_block(vocab: int, blocks: Blocks, *, parts: int = 1) -> int:
    """Vocabulary entries in a block: the most that divide the vocabulary, into `parts` or more, and keep to the budget.

    Where only small numbers divide it, the budget itself: the last block then overlaps the one before.

    >>> [vocab_block(size, CPU_BLOCKS) for size in (50304, 128256, 50257, 50261, 1000)]
    [4192, 5344, 1733, 6144, 1000]
    """
    most = max(1, min(vocab // parts, blocks.logits_bytes // (4 * blocks.tokens)))
    divisors = (size for size in range(most, most // 8, -1) if vocab % size == 0)
    return next(divisors, most)


def completion_logps(
    hidden: Float[Array, "R S D"],
    head: Float[Array, "V D"],
    rows: Rows,
    *,
    pairs: int,
    answers: int = 2,
    bias: Float[Array, "V"] | None = None,
    soft_cap: float | None = None,
    blocks: Blocks = CPU_BLOCKS,
    spread: Spread | None = None,
    total: Head | None = None,
) -> tuple[Float[Array, "P K"], dict[str, Float[Array, "P K"]], Head | None]:
    """Summed log-probability of every completion, and the sum over its tokens of the mean logit.

    Args:
      hidden: final hidden states of the rows, in the compute type.
      head: the vocabulary matrix, cast to the type of `hidden`.
      rows: where hidden states predict which tokens, of which completion.
      pairs, answers: P and K; completions that these rows do not hold get 0.
      bias: added to the logits.
      soft_cap: logits become cap * tanh(logits / cap); None: they stay as they are.
      blocks: what is computed at once.
      spread: how rows and head lie on a mesh; None: on one device.
      total: what the gradients of head and bias are added to, see `gradients`; None: they are their cotangents. One
        that it lacks is not made.
    Returns: logps in nats, float32 or wider, column 0 chosen, 1 rejected, or best first; {"logits": ...}, without
      gradient; `total`.
    """
    plan = _Plan(blocks, soft_cap, spread)
    logps, logits, total = score_tokens(hidden, Head(head, bias), total, rows.source, rows.target, rows.slot >= 0, plan)
    by_slot = functools.partial(sum_by_slot, slot=rows.slot, pairs=pairs, answers=answers)
    return by_slot(logps), {"logits": jax.lax.stop_gradient(by_slot(logits))}, total


def sum_by_slot(
    values: Float[Array, "R T"], slot: Int[Array, "R T"], pairs: int, answers: int = 2
) -> Float[Array, "P K"]:
    """Adds up the values of each completion, of which a pair has `answers`; entries with slot -1 belong to none."""
    into = jnp.where(slot >= 0, slot, answers * pairs).ravel()
    return jax.ops.segment_sum(values.ravel(), into, answers * pairs + 1)[:-1].reshape(pairs, answers)


custom_vjp: Any = jax.custom_vjp  # its own annotations say nothing of what a function returns


@functools.partial(custom_vjp, nondiff_argnums=(6,))
def score_tokens(hidden, head, total, source, target, scored, plan):
    """log softmax(hidden[source] . head^T + bias)[target] and the mean logit, [R, T] each, 0 where none is scored, and
    `total`.

    Blocks of tokens beyond the number of scored ones are neither computed nor differentiated.
    """
    plan = plan._replace(blocks=plan.blocks._replace(kept_bytes=0))
    return _forward(hidden, head, total, source, target, scored, plan)[0]


def _forward(hidden, head, total, source, target, scored, plan):
    forward = _everywhere(_forward_here, plan, "rwrrr", "rrrk")
    logps, logits, log_z, kept = forward(hidden, head, source, target, scored)
    return (logps, logits, total), (hidden, head, source, target, scored, log_z, kept)


def _backward(plan, saved, cotangents):
    cotangent, _, total = cotangents
    hidden, head, log_z = saved[0], saved[1], saved[5]
    before = jax.tree.map(lambda x: jnp.zeros(x.shape, log_z.dtype), head) if total is None else total
    to_hidden, after = _everywhere(_backward_here, plan, "rwrrrrkrw", "rw")(*saved, cotangent, before)
    grads = (jax.tree.map(lambda x, like: x.astype(like.dtype), after, head), None) if total is None else (None, after)
    return to_hidden.astype(hidden.dtype), *grads, None, None, None


score_tokens.defvjp(_forward, _backward)


def _everywhere(function, plan, takes, gives) -> Any:
    """`function` on each device's share: what is marked r lies as rows do, w as the head, k as both."""
    here = functools.partial(function, plan)
    if plan.spread is None:
        return here
    mesh, rows, vocab, width, _ = plan.spread
    of_head = Head(*cast(Any, (PartitionSpec(vocab, width), PartitionSpec(vocab))))
    specs = {"r": PartitionSpec(rows), "w": of_head, "k": PartitionSpec(vocab, rows)}
    return jax.shard_map(
        here,
        mesh=mesh,
        in_specs=tuple(specs[letter] for letter in takes),
        out_specs=tuple(specs[letter] for letter in gives),
        check_vma=False,
    )


class _Tokens(NamedTuple):
    """The scored tokens of a device's rows, first in a list; the entries after them count for nothing."""

    place: Int[Array, "N"]  # of the token among the R * T entries; out of bounds after the last
    index: Int[Array, "N"]  # of the hidden state that predicts it among the R * S
    target: Int[Array, "N"]
    blocks: Int[Array, ""]  # that hold a scored token


def _tokens(hidden, source, target, scored, size) -> _Tokens:
    rows, length, _ = hidden.shape
    entries = scored.size
    listed = -(-entries // size) * size
    place = jnp.nonzero(scored.ravel(), size=listed, fill_value=entries)[0]
    index = (source + length * jnp.arange(rows)[:, None]).ravel()
    take = functools.partial(jnp.take, indices=place, mode="fill", fill_value=0)
    return _Tokens(place, take(index), take(target.ravel()), (jnp.sum(scored, dtype=jnp.int32) + size - 1) // size)


def _forward_here(plan, hidden, head, source, target, scored):
    size, spread = plan.blocks.tokens, plan.spread
    tokens = _tokens(hidden, source, target, scored, size)
    h = hidden.reshape(-1, hidden.shape[2])[tokens.index]
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    vocab = _Vocabulary(plan, head, hidden.dtype)

    kept_blocks = _kept_blocks(plan, vocab, len(tokens.index))

    def one_part(j, carry):
        weights = vocab.part(j)

        def one_block(i, carry):
            most, exp_sum, picked, logit_sum, kept = carry
            real, column = vocab.columns(j)
            logits = vocab.logits(_block(h, i, size), weights)
            if kept_blocks:  # the place after the last is for all that is not kept
                kept = kept.at[j, jnp.minimum(i, kept_blocks)].set(logits)
            masked = logits if real is None else jnp.where(real, logits, -jnp.inf)
            before = _block(most, i, size)
            now = jnp.maximum(before, masked.max(-1))
            total = _block(exp_sum, i, size) * jnp.exp(before - now) + jnp.exp(masked - now[:, None]).sum(-1)
            at = _block(tokens.target, i, size) - column[0]
            there = (
                (at >= 0) & (at < len(column)) & (True if real is None else real[0, jnp.clip(at, 0, len(column) - 1)])
            )
            hit = jnp.take_along_axis(logits, jnp.clip(at, 0, len(column) - 1)[:, None], axis=1)[:, 0]
            picked = _put(picked, _block(picked, i, size) + jnp.where(there, hit, 0), i, size)
            summed = (logits if real is None else jnp.where(real, logits, 0)).sum(-1)
            logit_sum = _put(logit_sum, _block(logit_sum, i, size) + summed, i, size)
            return _put(most, now, i, size), _put(exp_sum, total, i, size), picked, logit_sum, kept

        return jax.lax.fori_loop(0, tokens.blocks, one_block, carry)

    zeros = jnp.zeros(tokens.index.shape, wide)
    kept = jnp.zeros((vocab.parts, kept_blocks + 1 if kept_blocks else 0, size, vocab.length), wide)
    start = jnp.full_like(zeros, jnp.finfo(wide).min), zeros, zeros, zeros, kept
    most, exp_sum, picked, logit_sum, kept = jax.lax.fori_loop(0, vocab.parts, one_part, start)
    if spread is not None and spread.vocab:
        here, most = most, jax.lax.pmax(most, spread.vocab)
        exp_sum, picked, logit_sum = jax.lax.psum((exp_sum * jnp.exp(here - most), picked, logit_sum), spread.vocab)
    log_z = most + jnp.log(exp_sum)

    def entries(values):
        empty = jnp.zeros(scored.size, wide)
        return empty.at[tokens.place].set(values, mode="drop").reshape(scored.shape)

    return entries(picked - log_z), entries(logit_sum / vocab.size), entries(log_z), kept


def _kept_blocks(plan, vocab, tokens) -> int:
    """Blocks of tokens whose logits of the whole vocabulary fit the budget."""
    of_one = 4 * plan.blocks.tokens * vocab.parts * vocab.length
    return min(tokens // plan.blocks.tokens, plan.blocks.kept_bytes // of_one)


def _backward_here(plan, hidden, head, source, target, scored, log_z, kept, cotangent, total):
    size, spread = plan.blocks.tokens, plan.spread
    tokens = _tokens(hidden, source, target, scored, size)
    flat = hidden.reshape(-1, hidden.shape[2])
    h = flat[tokens.index]
    wide = log_z.dtype
    vocab = _Vocabulary(plan, head, hidden.dtype)
    take = functools.partial(jnp.take, indices=tokens.place, mode="fill", fill_value=0)
    log_z, cotangent = take(log_z.ravel()), take(cotangent.ravel())

    kept_blocks = _kept_blocks(plan, vocab, len(tokens.index))

    def logits_of(states, weights, i, j):
        if not kept_blocks:
            return vocab.logits(states, weights)
        read, make = lambda: kept[j, jnp.minimum(i, kept_blocks)], lambda: vocab.logits(states, weights)
        return jax.lax.cond(i < kept_blocks, read, make)

    def one_part(j, carry):
        hidden_grad, total = carry
        weights = vocab.part(j)

        def one_block(i, carry):
            hidden_grad, part_grad = carry
            states = _block(h, i, size)
            real, column = vocab.columns(j)
            logits = logits_of(states, weights, i, j)
            hit = column[None] == _block(tokens.target, i, size)[:, None]
            slope = jnp.where(hit, 1.0, 0.0) - jnp.exp(logits - _block(log_z, i, size)[:, None])
            slope = slope * _block(cotangent, i, size)[:, None]
            if plan.soft_cap is not None:
                slope = slope * (1 - jnp.square(logits / plan.soft_cap))
            if real is not None:
                slope = jnp.where(real, slope, 0)
            to_bias = None if total.bias is None else slope.sum(0)
            slope = slope.astype(hidden.dtype)
            pulled = jnp.einsum("tv,vd->td", slope, weights.weights, preferred_element_type=wide)
            hidden_grad = _put(hidden_grad, _block(hidden_grad, i, size) + pulled, i, size)
            to_weights = None
            if total.weights is not None:
                to_weights = jnp.einsum("tv,td->vd", slope, states, preferred_element_type=wide)
            return hidden_grad, jax.tree.map(jnp.add, part_grad, Head(to_weights, to_bias))

        whole = zip(total, cast(Any, weights), strict=True)
        none = Head(*(None if sum_of is None else jnp.zeros_like(each, wide) for sum_of, each in whole))
        hidden_grad, part_grad = jax.lax.fori_loop(0, tokens.blocks, one_block, (hidden_grad, none))
        return hidden_grad, vocab.add(total, part_grad, j)

    hidden_grad, total = jax.lax.fori_loop(0, vocab.parts, one_part, (jnp.zeros(h.shape, wide), total))
    if spread is not None and spread.vocab:
        hidden_grad = jax.lax.psum(hidden_grad, spread.vocab)
    # Entries after the last scored token have cotangent 0, so where they are added does not matter.
    hidden_grad = jnp.zeros(flat.shape, wide).at[tokens.index].add(hidden_grad).reshape(hidden.shape)
    return hidden_grad, total


class _Vocabulary:
    """This device's share of the vocabulary matrix, part by part; the last part overlaps the one before if it must."""

    def __init__(self, plan: _Plan, head: Head, dtype: Any):
        self._head, self._dtype, self._cap, self._spread = head, dtype, plan.soft_cap, plan.spread
        self._here = head.weights.shape[0]
        gathered = plan.spread is not None and plan.spread.width
        self.length = vocab_block(self._here, plan.blocks, parts=GATHERED_PARTS if gathered else 1)
        self.parts = -(-self._here // self.length)
        shards = plan.spread.mesh.shape[plan.spread.vocab] if plan.spread is not None and plan.spread.vocab else 1
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


def _block(array, i, size):
    return jax.lax.dynamic_slice_in_dim(array, i * size, size)


def _put(array, block, i, size):
    return jax.lax.dynamic_update_slice_in_dim(array, block, i * size, axis=0)
