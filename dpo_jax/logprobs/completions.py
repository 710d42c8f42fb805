"""Log-probabilities of completion tokens, without a logits array over all tokens.

Only scored tokens meet the vocabulary matrix: they are gathered into one list, and the product is made a block of
tokens by a block of the vocabulary at a time, each small enough for a cache. The backward pass makes each block
again, but for the first ones, kept within a budget. The vocabulary runs outermost, so a block of the matrix is read
once, and its gradient written once.

    log p(target) = h . w_target - log sum_v exp(h . w_v), the sum carried from block to block as (max, sum of exp)
    d loss / d logit_v = (1[v = target] - p_v) * d loss / d log p

What an objective reads besides is made in the same pass: of further tokens at each entry the log-probs, with gradient;
the sum of squared probabilities; and, forward only, the likeliest tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dpo_jax.logprobs.vocabulary import CPU_BLOCKS, Blocks, Head, Spread, Vocabulary
from dpo_jax.types import Rows

SUMS = ("shared_logps", "log_collision", "sequence_kl")  # that `completion_logps` makes where they are asked for


class _Plan(NamedTuple):
    """Everything static that the two passes go by."""

    blocks: Blocks
    soft_cap: float | None
    spread: Spread | None
    collision: bool = False  # whether squared probabilities are summed
    likely: int = 0  # tokens to find at each entry, the likeliest


class _Found(NamedTuple):
    """What is read at each entry, 0 where none is scored; None for what nobody asked for."""

    logps: Any  # [R, T]
    logits: Any  # [R, T], the mean over the vocabulary
    others: Any  # [R, T, C], log-probs of further tokens
    collision: Any  # [R, T], log sum_v p_v^2
    likely: Any  # [R, T, L], tokens from the likeliest on, and their log-probs
    likely_logps: Any


def completion_logps(
    hidden: Float[Array, "R S D"],
    head: Float[Array, "V D"],
    rows: Rows,
    *,
    pairs: int,
    bias: Float[Array, "V"] | None = None,
    soft_cap: float | None = None,
    blocks: Blocks = CPU_BLOCKS,
    spread: Spread | None = None,
    total: Head | None = None,
    answers: int = 2,
    sums: Collection[str] = (),
    likely: int | None = None,
) -> tuple[Float[Array, "P K"], dict[str, Any], Head | None]:
    """Summed log-probability of every completion, and what else there is to sum over its tokens.

    Of `sums`, which are 0 where no completion is:

    - shared_logps: log p over the first n tokens, n those of the pair's shortest answer.
    - log_collision: log sum_v p_v^2, without gradient.
    - sequence_kl: KL(reference || policy) of the next token on {each of the C likely ones, any other}; no more than KL
      on the vocabulary, and equal where C = V. The probability of any other is held above the rounding of a sum that
      is 1, and its gradient goes on below.

    Args:
      hidden: final hidden states of the rows, in the compute type.
      head: the vocabulary matrix, cast to the type of `hidden`.
      rows: where hidden states predict which tokens, of which completion.
      pairs: P; completions that these rows do not hold get 0.
      bias: added to the logits.
      soft_cap: logits become cap * tanh(logits / cap); None: they stay as they are.
      blocks: what is computed at once.
      spread: how rows and head lie on a mesh; None: on one device.
      total: what the gradients of head and bias are added to, see `gradients`; None: they are their cotangents. One
        that it lacks is not made.
      answers: K.
      sums: which of SUMS to make; sequence_kl reads `rows.likely`.
      likely: how many of the likeliest tokens to find at each entry, which nothing can be differentiated through; None:
        neither they nor the entries' own log-probs are returned.
    Returns: logps in nats, float32 or wider, column 0 chosen, 1 rejected, or best first; the sums, and "logits", the
      mean logit, without gradient, all [P, K], and "tokens", where `likely` is given: (log-probs of the targets
      [R, T], the likeliest tokens [R, T, likely], and their log-probs); `total`.
    Source: shared_logps: Liu et al. 2024 (2409.06411); log_collision: Zhou et al. 2024 (2406.11827); sequence_kl: Zeng
      et al. 2024 (2404.11999).
    """
    assert set(sums) <= set(SUMS)
    plan = _Plan(blocks, soft_cap, spread, "log_collision" in sums, likely or 0)
    others = rows.likely if "sequence_kl" in sums else None
    read = score_tokens if likely is None else _read
    found, total = read(hidden, Head(head, bias), total, rows.source, rows.target, others, rows.slot >= 0, plan)
    by_slot = functools.partial(sum_by_slot, slot=rows.slot, pairs=pairs, answers=answers)
    aux: dict[str, Any] = {"logits": jax.lax.stop_gradient(by_slot(found.logits))}
    if "shared_logps" in sums:
        aux["shared_logps"] = by_slot(jnp.where(_is_shared(rows.slot, pairs, answers), found.logps, 0))
    if "log_collision" in sums:
        aux["log_collision"] = jax.lax.stop_gradient(by_slot(found.collision))
    if "sequence_kl" in sums:
        assert rows.likely is not None and rows.likely_logps is not None
        rest = rows.likely.shape[-1] < head.shape[0]
        aux["sequence_kl"] = by_slot(_kl(jax.lax.stop_gradient(rows.likely_logps), found.others, rest=rest))
    if likely is not None:
        none = jnp.zeros((*found.logps.shape, 0), jnp.int32), jnp.zeros((*found.logps.shape, 0), found.logps.dtype)
        aux["tokens"] = found.logps, *((found.likely, found.likely_logps) if likely else none)
    return by_slot(found.logps), aux, total


def sum_by_slot(
    values: Float[Array, "R T"], slot: Int[Array, "R T"], pairs: int, answers: int = 2
) -> Float[Array, "P K"]:
    """Adds up the values of each completion, of which a pair has `answers`; entries with slot -1 belong to none."""
    into = jnp.where(slot >= 0, slot, answers * pairs).ravel()
    return jax.ops.segment_sum(values.ravel(), into, answers * pairs + 1)[:-1].reshape(pairs, answers)


def _is_shared(slot, pairs, answers):
    """Which entries are no further in their answer than the shortest of their pair goes. [R, T]"""
    slots = answers * pairs
    into = jnp.where(slot >= 0, slot, slots).ravel()
    place = jnp.arange(slot.size)  # entries of an answer follow one another
    first = jax.ops.segment_min(place, into, slots + 1)
    count = jax.ops.segment_sum(jnp.ones_like(into), into, slots + 1)[:-1].reshape(pairs, answers)
    shortest = jnp.where(count > 0, count, slot.size).min(1)
    end = first + jnp.append(jnp.repeat(shortest, answers), 0)
    return (place < end[into]).reshape(slot.shape)


def _kl(reference, policy, *, rest):
    """KL(reference || policy) of log-probs [..., C], over C outcomes and, if `rest`, one of all that they lack."""
    reference = reference.astype(policy.dtype)
    given = jnp.exp(reference)
    found = jnp.where(given > 0, given * (reference - policy), 0).sum(-1)
    if not rest:
        return found
    given = jnp.maximum(1 - given.sum(-1), 0)
    left = 1 - jnp.exp(policy).sum(-1)
    held = left + jax.lax.stop_gradient(jnp.maximum(left, jnp.finfo(policy.dtype).eps) - left)
    return found + given * (jnp.log(jnp.where(given > 0, given, 1)) - jnp.log(held))


custom_vjp: Any = jax.custom_vjp  # its own annotations say nothing of what a function returns


@functools.partial(custom_vjp, nondiff_argnums=(7,))
def score_tokens(hidden, head, total, source, target, others, scored, plan):
    """Of softmax(hidden[source] . head^T + bias), at each entry: what `_Found` has, and `total`.

    Blocks of tokens beyond the number of scored ones are neither computed nor differentiated.
    """
    return _read(hidden, head, total, source, target, others, scored, plan)


def _read(hidden, head, total, source, target, others, scored, plan):
    """`score_tokens` without a backward pass, and so nothing kept for it."""
    plan = plan._replace(blocks=plan.blocks._replace(kept_bytes=0))
    return _forward(hidden, head, total, source, target, others, scored, plan)[0]


def _forward(hidden, head, total, source, target, others, scored, plan):
    forward = _everywhere(_forward_here, plan, "rwrrrr", "rrk")
    found, log_z, kept = forward(hidden, head, source, target, others, scored)
    return (found, total), (hidden, head, source, target, others, scored, log_z, kept)


def _backward(plan, saved, cotangents):
    cotangent, total = cotangents
    hidden, head, log_z = saved[0], saved[1], saved[6]
    before = jax.tree.map(lambda x: jnp.zeros(x.shape, log_z.dtype), head) if total is None else total
    backward = _everywhere(_backward_here, plan, "rwrrrrrkrrw", "rw")
    to_hidden, after = backward(*saved, cotangent.logps, cotangent.others, before)
    grads = (jax.tree.map(lambda x, like: x.astype(like.dtype), after, head), None) if total is None else (None, after)
    return to_hidden.astype(hidden.dtype), *grads, None, None, None, None


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
    others: Int[Array, "N C"] | None
    blocks: Int[Array, ""]  # that hold a scored token


def _tokens(hidden, source, target, others, scored, size) -> _Tokens:
    rows, length, _ = hidden.shape
    entries = scored.size
    listed = -(-entries // size) * size
    place = jnp.nonzero(scored.ravel(), size=listed, fill_value=entries)[0]
    index = source + length * jnp.arange(rows)[:, None]
    take = functools.partial(_take, place=place)
    used = (jnp.sum(scored, dtype=jnp.int32) + size - 1) // size
    return _Tokens(place, take(index), take(target), None if others is None else take(others), used)


def _take(values, place):
    """Values [R, T, ...] of listed tokens."""
    return jnp.take(values.reshape(-1, *values.shape[2:]), place, axis=0, mode="fill", fill_value=0)


class _Sums(NamedTuple):
    """What the forward pass carries from block to block of the vocabulary; None for what nobody asked for."""

    most: Any  # [N], the largest logit
    exp_sum: Any  # [N], of exp(logit - most)
    square_sum: Any  # [N], of its square
    picked: Any  # [N], the target's logit
    others: Any  # [N, C], those of further tokens
    logit_sum: Any  # [N]
    likely: Any  # [N, L], the largest logits, from the first on, and whose they are
    likely_ids: Any
    kept: Any  # blocks of logits for the backward pass


def _forward_here(plan, hidden, head, source, target, others, scored):
    size, spread = plan.blocks.tokens, plan.spread
    tokens = _tokens(hidden, source, target, others, scored, size)
    h = hidden.reshape(-1, hidden.shape[2])[tokens.index]
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    vocab = Vocabulary(head, hidden.dtype, plan.blocks, plan.soft_cap, plan.spread)

    kept_blocks = _kept_blocks(plan, vocab, len(tokens.index))

    def one_part(j, sums):
        weights = vocab.part(j)

        def one_block(i, sums):
            logits, kept = vocab.logits(_block(h, i, size), weights), sums.kept
            if kept_blocks:  # the place after the last is for all that is not kept
                kept = kept.at[j, jnp.minimum(i, kept_blocks)].set(logits)
            without, read = sums._replace(kept=None), functools.partial(_block, i=i, size=size)
            ids = read(tokens.target), None if tokens.others is None else read(tokens.others)
            block = _further(plan, jax.tree.map(read, without), logits, *vocab.columns(j), *ids)
            return jax.tree.map(lambda x, new: _put(x, new, i, size), without, block)._replace(kept=kept)

        return jax.lax.fori_loop(0, tokens.blocks, one_block, sums)

    zeros = jnp.zeros(tokens.index.shape, wide)
    start = _Sums(
        most=jnp.full_like(zeros, jnp.finfo(wide).min),
        exp_sum=zeros,
        square_sum=zeros if plan.collision else None,
        picked=zeros,
        others=None if tokens.others is None else jnp.zeros(tokens.others.shape, wide),
        logit_sum=zeros,
        likely=jnp.full((len(zeros), plan.likely), -jnp.inf, wide) if plan.likely else None,
        likely_ids=jnp.zeros((len(zeros), plan.likely), jnp.int32) if plan.likely else None,
        kept=jnp.zeros((vocab.parts, kept_blocks + 1 if kept_blocks else 0, size, vocab.length), wide),
    )
    sums = jax.lax.fori_loop(0, vocab.parts, one_part, start)
    if spread is not None and spread.vocab:
        sums = _over_parts(sums, spread.vocab)
    log_z = sums.most + jnp.log(sums.exp_sum)

    def entries(values):
        empty = jnp.zeros((scored.size, *values.shape[1:]), values.dtype)
        return empty.at[tokens.place].set(values, mode="drop").reshape(*scored.shape, *values.shape[1:])

    found = _Found(
        logps=sums.picked - log_z,
        logits=sums.logit_sum / vocab.size,
        others=None if sums.others is None else sums.others - log_z[:, None],
        collision=None if sums.square_sum is None else jnp.log(sums.square_sum) - 2 * jnp.log(sums.exp_sum),
        likely=sums.likely_ids,
        likely_logps=None if sums.likely is None else sums.likely - log_z[:, None],
    )
    return jax.tree.map(entries, found), entries(log_z), sums.kept


def _further(plan, sums, logits, real, column, target, others):
    """The sums of a block of tokens with those of a part of the vocabulary added."""
    masked = logits if real is None else jnp.where(real, logits, -jnp.inf)
    most = jnp.maximum(sums.most, masked.max(-1))
    shrunk, exp = jnp.exp(sums.most - most), jnp.exp(masked - most[:, None])
    found = sums._replace(
        most=most,
        exp_sum=sums.exp_sum * shrunk + exp.sum(-1),
        picked=sums.picked + _picked(logits, real, column, target[:, None])[:, 0],
        logit_sum=sums.logit_sum + (logits if real is None else jnp.where(real, logits, 0)).sum(-1),
    )
    if plan.collision:
        found = found._replace(square_sum=sums.square_sum * jnp.square(shrunk) + jnp.square(exp).sum(-1))
    if others is not None:
        found = found._replace(others=sums.others + _picked(logits, real, column, others))
    if plan.likely:
        here, at = jax.lax.top_k(masked, min(plan.likely, len(column)))
        # Those found before stand first: of equals, the first in the vocabulary is taken.
        likely, ids = jnp.concatenate([sums.likely, here], 1), jnp.concatenate([sums.likely_ids, column[at]], 1)
        found = found._replace(**_likeliest(likely, ids, plan.likely))
    return found


def _picked(logits, real, column, ids):
    """Of each token's logits, those of some ids [n, m], and 0 for what no real column of the part holds."""
    at = ids - column[0]
    inside = jnp.clip(at, 0, len(column) - 1)
    there = (at >= 0) & (at < len(column)) & (True if real is None else real[0, inside])
    return jnp.where(there, jnp.take_along_axis(logits, inside, axis=1), 0)


def _likeliest(logits, ids, count):
    most, at = jax.lax.top_k(logits, count)
    return dict(likely=most, likely_ids=jnp.take_along_axis(ids, at, axis=1))


def _over_parts(sums, axis):
    """Sums over the whole vocabulary, of which each device along an axis has those of its part."""
    most = jax.lax.pmax(sums.most, axis)
    shrunk = jnp.exp(sums.most - most)
    squares = None if sums.square_sum is None else sums.square_sum * jnp.square(shrunk)
    added = sums.exp_sum * shrunk, squares, sums.picked, sums.others, sums.logit_sum
    exp_sum, squares, picked, others, logit_sum = jax.lax.psum(added, axis)
    sums = sums._replace(
        most=most, exp_sum=exp_sum, square_sum=squares, picked=picked, others=others, logit_sum=logit_sum
    )
    if sums.likely is None:
        return sums
    likely, ids = (jax.lax.all_gather(each, axis, axis=1, tiled=True) for each in (sums.likely, sums.likely_ids))
    return sums._replace(**_likeliest(likely, ids, sums.likely.shape[1]))


def _kept_blocks(plan, vocab, tokens) -> int:
    """Blocks of tokens whose logits of the whole vocabulary fit the budget."""
    of_one = 4 * plan.blocks.tokens * vocab.parts * vocab.length
    return min(tokens // plan.blocks.tokens, plan.blocks.kept_bytes // of_one)


def _backward_here(plan, hidden, head, source, target, others, scored, log_z, kept, cotangent, to_others, total):
    size, spread = plan.blocks.tokens, plan.spread
    tokens = _tokens(hidden, source, target, others, scored, size)
    flat = hidden.reshape(-1, hidden.shape[2])
    h = flat[tokens.index]
    wide = log_z.dtype
    vocab = Vocabulary(head, hidden.dtype, plan.blocks, plan.soft_cap, plan.spread)
    log_z, cotangent, to_others = jax.tree.map(lambda x: _take(x, tokens.place), (log_z, cotangent, to_others))

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
            probs = jnp.exp(logits - _block(log_z, i, size)[:, None])
            slope = (jnp.where(hit, 1.0, 0.0) - probs) * _block(cotangent, i, size)[:, None]
            if tokens.others is not None:
                pull = _block(to_others, i, size)
                slope = _added(slope, column, _block(tokens.others, i, size), pull) - probs * pull.sum(-1)[:, None]
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


def _added(slope, column, ids, values):
    """A part's [n, V] with values [n, m] added at some ids."""
    at = ids - column[0]
    at = jnp.where((at >= 0) & (at < len(column)), at, len(column))  # out of bounds: dropped
    return slope.at[jnp.arange(len(at))[:, None], at].add(values, mode="drop")


def _block(array, i, size):
    return jax.lax.dynamic_slice_in_dim(array, i * size, size)


def _put(array, block, i, size):
    return jax.lax.dynamic_update_slice_in_dim(array, block, i * size, axis=0)
