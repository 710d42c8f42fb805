"""Log-probabilities of completion tokens, without a logits array over all tokens.

Only scored tokens are multiplied by the vocabulary matrix: they are gathered into one list, and the product is computed
a block of tokens by a part of the vocabulary at a time, each small enough for a cache. The backward pass recomputes the
blocks, except for the first ones, which are saved within a budget. The loop over the vocabulary is outermost, so each
part of the matrix is read once, and its gradient written once.

    log p(target) = h . w_target - log sum_v exp(h . w_v), the sum accumulated over parts as (max, sum of exp)
    dL/dlogit_v = (1[v = target] - p_v) * dL/dlog p

Extra outputs of an objective come from the same pass: log-probs of candidate tokens at each entry, with gradient; the
sum of squared probabilities; and, forward only, the likeliest tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.logprobs.vocabulary import CPU_BLOCKS, Blocks, Head, HeadSharding, Vocabulary
from dpo_jax.types import Rows

SUMS = ("shared_logps", "log_collision", "sequence_kl")  # extra outputs that `completion_logps` can compute


class _Options(NamedTuple):
    """Static options of both passes."""

    blocks: Blocks
    soft_cap: float | None
    sharding: HeadSharding | None
    collision: bool = False  # whether to sum squared probabilities
    likely: int = 0  # L, how many of the likeliest tokens to return at each entry


class TokenValues(NamedTuple):
    """Outputs at each entry [R, T], 0 where no token is scored; optional ones are None unless requested."""

    logps: Float[Array, "R T"]  # log-probs of the targets
    logits: Float[Array, "R T"]  # mean over the vocabulary
    candidates: Float[Array, "R T C"] | None  # log-probs of the candidate tokens
    collision: Float[Array, "R T"] | None  # log sum_v p_v^2
    likely: Int[Array, "R T L"] | None  # the likeliest tokens, in descending order
    likely_logps: Float[Array, "R T L"] | None


def completion_logps(
    hidden: Float[Array, "R S D"],
    head: Float[Array, "V D"],
    rows: Rows,
    *,
    pairs: int,
    bias: Float[Array, "V"] | None = None,
    soft_cap: float | None = None,
    blocks: Blocks = CPU_BLOCKS,
    sharding: HeadSharding | None = None,
    total: Head | None = None,
    answers: int = 2,
    sums: Collection[str] = (),
    likely: int | None = None,
) -> tuple[Float[Array, "P K"], dict[str, Any], Head | None]:
    """Log-probability of every completion, summed over its tokens, and extra outputs summed over the same tokens.

    Extra outputs that `sums` may name, 0 for a missing completion:

    - shared_logps: log p over the first n tokens, n the length of the pair's shortest answer.
    - log_collision: log sum_v p_v^2, without gradient.
    - sequence_kl: KL(reference || policy) of the next token over C + 1 outcomes, the C likely tokens and any other; at
      most the KL over the vocabulary, and equal if C = V. The probability of any other token is clamped from below at
      the rounding error of a sum of 1; its gradient passes through the clamp.

    Args:
      hidden: final hidden states of the rows, in the compute type.
      head: the vocabulary matrix, cast to the type of `hidden`.
      rows: which hidden states predict which tokens, of which completion.
      pairs: P; completions that these rows do not hold get 0.
      bias: added to the logits.
      soft_cap: logits become cap * tanh(logits / cap); None: no cap.
      blocks: sizes of the blocks that are computed at once.
      sharding: how rows and head are sharded over a mesh; None: on one device.
      total: running sums that the gradients of head and bias are added to, see `accumulate`; a sum that is None is not
        computed. None: the gradients are the cotangents of head and bias.
      answers: K.
      sums: which of SUMS to compute; sequence_kl reads `rows.likely`.
      likely: how many of the likeliest tokens to return at each entry; the result cannot be differentiated. None: no
        "tokens" are returned.
    Returns: logps in nats, float32 or wider, column 0 chosen, 1 rejected, or best first; a dict of the sums and of
      "logits", the mean logit, without gradient, all [P, K], and, if `likely` is given, "tokens": (log-probs of the
      targets [R, T], the likeliest tokens [R, T, likely], and their log-probs); and `total`.
    Source: shared_logps: Liu et al. 2024 (2409.06411); log_collision: Zhou et al. 2024 (2406.11827); sequence_kl: Zeng
      et al. 2024 (2404.11999).
    """
    assert set(sums) <= set(SUMS)
    options = _Options(blocks, soft_cap, sharding, "log_collision" in sums, likely or 0)
    candidates = rows.likely if "sequence_kl" in sums else None
    score = score_tokens if likely is None else _score_forward_only
    scored = rows.slot >= 0
    values, total = score(hidden, Head(head, bias), total, rows.source, rows.target, candidates, scored, options)
    by_slot = functools.partial(sum_by_slot, slot=rows.slot, pairs=pairs, answers=answers)
    aux: dict[str, Any] = {"logits": jax.lax.stop_gradient(by_slot(values.logits))}
    if "shared_logps" in sums:
        aux["shared_logps"] = by_slot(jnp.where(_is_shared(rows.slot, pairs, answers), values.logps, 0))
    if "log_collision" in sums:
        aux["log_collision"] = jax.lax.stop_gradient(by_slot(values.collision))
    if "sequence_kl" in sums:
        assert rows.likely is not None and rows.likely_logps is not None
        any_other = rows.likely.shape[-1] < head.shape[0]
        reference = jax.lax.stop_gradient(rows.likely_logps)
        aux["sequence_kl"] = by_slot(_kl(reference, values.candidates, any_other=any_other))
    if likely is not None:
        logps = values.logps
        empty = jnp.zeros((*logps.shape, 0), jnp.int32), jnp.zeros((*logps.shape, 0), logps.dtype)
        aux["tokens"] = logps, *((values.likely, values.likely_logps) if likely else empty)
    return by_slot(values.logps), aux, total


def sum_by_slot(
    values: Float[Array, "R T"], slot: Int[Array, "R T"], pairs: int, answers: int = 2
) -> Float[Array, "P K"]:
    """Sums values over the tokens of each completion, `answers` = K to a pair; entries with slot -1 belong to none.

    A float32 sum of hundreds of nats would be rounded by some 1e-5 at every token. Multiples of 2^-10 add up without
    rounding as long as the sum is below 2^14, so these are summed first and the small remainders of the values apart.
    """
    into = jnp.where(slot >= 0, slot, answers * pairs).ravel()
    coarse = jnp.round(values * 1024) / 1024  # without gradient
    sums = [jax.ops.segment_sum(part.ravel(), into, answers * pairs + 1) for part in (coarse, values - coarse)]
    return (sums[0] + sums[1])[:-1].reshape(pairs, answers)


def _is_shared(slot, pairs, answers):
    """Whether each entry is among the first n of its answer, n the length of the pair's shortest answer [R, T]."""
    slots = answers * pairs
    into = jnp.where(slot >= 0, slot, slots).ravel()
    place = jnp.arange(slot.size)  # entries of an answer follow one another
    first = jax.ops.segment_min(place, into, slots + 1)
    count = jax.ops.segment_sum(jnp.ones_like(into), into, slots + 1)[:-1].reshape(pairs, answers)
    shortest = jnp.where(count > 0, count, slot.size).min(1)
    end = first + jnp.append(jnp.repeat(shortest, answers), 0)
    return (place < end[into]).reshape(slot.shape)


def _kl(reference, policy, *, any_other):
    """KL(reference || policy) of log-probs [..., C], over C outcomes and, if `any_other`, one more for all others."""
    reference = reference.astype(policy.dtype)
    probs = jnp.exp(reference)
    kl = jnp.where(probs > 0, probs * (reference - policy), 0).sum(-1)
    if not any_other:
        return kl
    reference_other = jnp.maximum(1 - probs.sum(-1), 0)
    policy_other = 1 - jnp.exp(policy).sum(-1)
    # Clamped forward only: the gradient is that of the unclamped probability.
    eps = jnp.finfo(policy.dtype).eps
    clamped = policy_other + jax.lax.stop_gradient(jnp.maximum(policy_other, eps) - policy_other)
    return kl + reference_other * (jnp.log(jnp.where(reference_other > 0, reference_other, 1)) - jnp.log(clamped))


custom_vjp: Any = jax.custom_vjp  # its own annotations lose the return type


@functools.partial(custom_vjp, nondiff_argnums=(7,))
def score_tokens(hidden, head, total, source, target, candidates, scored, options):
    """Computes `TokenValues` of softmax(hidden[source] . head^T + bias) at each entry, and passes on `total`.

    Blocks of tokens beyond the number of scored ones are neither computed nor differentiated.

    Args:
      hidden [R, S, D], head, total: see `completion_logps`.
      source, target: index of the hidden state that predicts each entry's token, and the token [R, T].
      candidates: tokens [R, T, C] whose log-probs are computed too, or None.
      scored: whether each entry has a token [R, T].
    """
    return _score_forward_only(hidden, head, total, source, target, candidates, scored, options)


def _score_forward_only(hidden, head, total, source, target, candidates, scored, options):
    """`score_tokens` without a backward pass, so that no logits are saved for it."""
    options = options._replace(blocks=options.blocks._replace(saved_bytes=0))
    return _forward(hidden, head, total, source, target, candidates, scored, options)[0]


class _Saved(NamedTuple):
    """Arrays that the forward pass saves for the backward pass."""

    hidden: Float[Array, "R S D"]
    head: Head
    source: Int[Array, "R T"]
    target: Int[Array, "R T"]
    candidates: Int[Array, "R T C"] | None
    scored: Bool[Array, "R T"]
    log_z: Float[Array, "R T"]  # log sum_v exp(logit_v)
    logits: Float[Array, "parts blocks t length"]  # of the first blocks of tokens, and one place for all others


def _forward(hidden, head, total, source, target, candidates, scored, options):
    forward = _on_each_device(_forward_local, options, "rwrrrr", "rrk")
    values, log_z, logits = forward(hidden, head, source, target, candidates, scored)
    return (values, total), _Saved(hidden, head, source, target, candidates, scored, log_z, logits)


def _backward(options, saved, cotangents):
    to_values, total = cotangents  # dL/dlog p [R, T] and [R, T, C]; running sums [V, D] and [V], or None
    head = saved.head
    before = jax.tree.map(lambda x: jnp.zeros(x.shape, saved.log_z.dtype), head) if total is None else total
    backward = _on_each_device(_backward_local, options, (_Saved._make("rwrrrrrk"), "r", "r", "w"), "rw")
    to_hidden, after = backward(saved, to_values.logps, to_values.candidates, before)
    # [V, D] and [V]: dL/dhead as its cotangent, or the running sums + dL/dhead as theirs
    grads = (jax.tree.map(lambda x, like: x.astype(like.dtype), after, head), None) if total is None else (None, after)
    return to_hidden.astype(saved.hidden.dtype), *grads, None, None, None, None  # [R, S, D] dL/dhidden


score_tokens.defvjp(_forward, _backward)


def _on_each_device(function, options, inputs, outputs) -> Callable:
    """Runs `function` on each device's shard of inputs and outputs, whose letters name their sharding:
    r: as rows; w: as the head; k: vocabulary and rows."""
    local = functools.partial(function, options)
    if options.sharding is None:
        return local
    mesh, rows, vocab, width, _ = options.sharding
    head = Head(*cast(Any, (PartitionSpec(vocab, width), PartitionSpec(vocab))))
    specs = {"r": PartitionSpec(rows), "w": head, "k": PartitionSpec(vocab, rows)}
    in_specs, out_specs = jax.tree.map(specs.__getitem__, (tuple(inputs), tuple(outputs)))
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


class _Tokens(NamedTuple):
    """List of the scored tokens of a device's rows, padded at its end to whole blocks."""

    place: Int[Array, "N"]  # of the token among the R * T entries; out of bounds for padding
    index: Int[Array, "N"]  # of the hidden state that predicts it among the R * S
    target: Int[Array, "N"]
    candidates: Int[Array, "N C"] | None
    blocks: Int[Array, ""]  # number of blocks that hold a scored token


def _tokens(hidden, source, target, candidates, scored, size) -> _Tokens:
    rows, length, _ = hidden.shape
    entries = scored.size
    listed = -(-entries // size) * size
    place = jnp.nonzero(scored.ravel(), size=listed, fill_value=entries)[0]
    index = source + length * jnp.arange(rows)[:, None]
    take = functools.partial(_take, place=place)
    used = (jnp.sum(scored, dtype=jnp.int32) + size - 1) // size
    return _Tokens(place, take(index), take(target), None if candidates is None else take(candidates), used)


def _take(values, place):
    """Selects values [R, T, ...] of the listed tokens [N, ...]; 0 for padding."""
    return jnp.take(values.reshape(-1, *values.shape[2:]), place, axis=0, mode="fill", fill_value=0)


class _Sums(NamedTuple):
    """Running statistics over the parts of the vocabulary, for n tokens; optional ones are None unless requested."""

    max_logit: Float[Array, "n"]
    exp_sum: Float[Array, "n"]  # sum_v exp(logit - max_logit)
    square_sum: Float[Array, "n"] | None  # sum_v exp(logit - max_logit)^2
    target: Float[Array, "n"]  # the target's logit
    candidates: Float[Array, "n C"] | None  # logits of the candidate tokens
    logit_sum: Float[Array, "n"]
    likely: Float[Array, "n L"] | None  # the largest logits, in descending order
    likely_ids: Int[Array, "n L"] | None  # their tokens
    saved: Float[Array, "parts blocks t length"] | None  # logits for the backward pass


def _forward_local(options, hidden, head, source, target, candidates, scored):
    size, sharding = options.blocks.tokens, options.sharding
    tokens = _tokens(hidden, source, target, candidates, scored, size)
    h = hidden.reshape(-1, hidden.shape[2])[tokens.index]
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    vocab = Vocabulary(head, hidden.dtype, options.blocks, options.soft_cap, options.sharding)

    saved_blocks = _saved_blocks(options, vocab, len(tokens.index))

    def one_part(j, sums):
        weights = vocab.part(j)

        def one_block(i, sums):
            logits, saved = vocab.logits(_block(h, i, size), weights), sums.saved
            if saved_blocks:  # all other blocks overwrite one another in the last place
                saved = saved.at[j, jnp.minimum(i, saved_blocks)].set(logits)
            statistics, read = sums._replace(saved=None), functools.partial(_block, i=i, size=size)
            ids = read(tokens.target), None if tokens.candidates is None else read(tokens.candidates)
            block = _accumulate(options, jax.tree.map(read, statistics), logits, *vocab.columns(j), *ids)
            return jax.tree.map(lambda x, new: _put(x, new, i, size), statistics, block)._replace(saved=saved)

        return jax.lax.fori_loop(0, tokens.blocks, one_block, sums)

    zeros = jnp.zeros(tokens.index.shape, wide)
    start = _Sums(
        max_logit=jnp.full_like(zeros, jnp.finfo(wide).min),
        exp_sum=zeros,
        square_sum=zeros if options.collision else None,
        target=zeros,
        candidates=None if tokens.candidates is None else jnp.zeros(tokens.candidates.shape, wide),
        logit_sum=zeros,
        likely=jnp.full((len(zeros), options.likely), -jnp.inf, wide) if options.likely else None,
        likely_ids=jnp.zeros((len(zeros), options.likely), jnp.int32) if options.likely else None,
        saved=jnp.zeros((vocab.parts, saved_blocks + 1 if saved_blocks else 0, size, vocab.length), wide),
    )
    sums = jax.lax.fori_loop(0, vocab.parts, one_part, start)
    if sharding is not None and sharding.vocab:
        sums = _combine_shards(sums, sharding.vocab)
    return _token_values(sums, tokens, scored, vocab.size)


def _token_values(sums, tokens, scored, vocab_size):
    """Returns `TokenValues`, log Z and the saved logits, from the statistics over the whole vocabulary."""
    log_z = sums.max_logit + jnp.log(sums.exp_sum)

    def entries(values):
        empty = jnp.zeros((scored.size, *values.shape[1:]), values.dtype)
        return empty.at[tokens.place].set(values, mode="drop").reshape(*scored.shape, *values.shape[1:])

    values = TokenValues(
        logps=sums.target - log_z,
        logits=sums.logit_sum / vocab_size,
        candidates=None if sums.candidates is None else sums.candidates - log_z[:, None],
        collision=None if sums.square_sum is None else jnp.log(sums.square_sum) - 2 * jnp.log(sums.exp_sum),
        likely=sums.likely_ids,
        likely_logps=None if sums.likely is None else sums.likely - log_z[:, None],
    )
    return jax.tree.map(entries, values), entries(log_z), sums.saved


def _accumulate(options, sums, logits, real, column, target, candidates):
    """Adds the logits [n, length] of a part of the vocabulary to the running statistics of a block of tokens."""
    masked = logits if real is None else jnp.where(real, logits, -jnp.inf)
    max_logit = jnp.maximum(sums.max_logit, masked.max(-1))
    rescale, exp = jnp.exp(sums.max_logit - max_logit), jnp.exp(masked - max_logit[:, None])
    updated = sums._replace(
        max_logit=max_logit,
        exp_sum=sums.exp_sum * rescale + exp.sum(-1),
        target=sums.target + _logits_of(logits, real, column, target[:, None])[:, 0],
        logit_sum=sums.logit_sum + (logits if real is None else jnp.where(real, logits, 0)).sum(-1),
    )
    if options.collision:
        updated = updated._replace(square_sum=sums.square_sum * jnp.square(rescale) + jnp.square(exp).sum(-1))
    if candidates is not None:
        updated = updated._replace(candidates=sums.candidates + _logits_of(logits, real, column, candidates))
    if options.likely:
        part, at = jax.lax.top_k(masked, min(options.likely, len(column)))
        # Earlier parts stand first, so that among equal logits the first in the vocabulary is taken.
        likely, ids = jnp.concatenate([sums.likely, part], 1), jnp.concatenate([sums.likely_ids, column[at]], 1)
        updated = updated._replace(**_likeliest(likely, ids, options.likely))
    return updated


def _logits_of(logits, real, column, ids):
    """Selects the logits of tokens `ids` [n, m]; 0 for tokens that are not in the part, or in its overlap."""
    at = ids - column[0]
    index = jnp.clip(at, 0, len(column) - 1)
    present = (at >= 0) & (at < len(column)) & (True if real is None else real[0, index])
    return jnp.where(present, jnp.take_along_axis(logits, index, axis=1), 0)


def _likeliest(logits, ids, count):
    largest, at = jax.lax.top_k(logits, count)
    return dict(likely=largest, likely_ids=jnp.take_along_axis(ids, at, axis=1))


def _combine_shards(sums, axis):
    """Reduces the statistics of each device's part of the vocabulary along a mesh axis to those of the whole."""
    max_logit = jax.lax.pmax(sums.max_logit, axis)
    rescale = jnp.exp(sums.max_logit - max_logit)
    squares = None if sums.square_sum is None else sums.square_sum * jnp.square(rescale)
    local = sums.exp_sum * rescale, squares, sums.target, sums.candidates, sums.logit_sum
    exp_sum, squares, target, candidates, logit_sum = jax.lax.psum(local, axis)
    sums = sums._replace(
        max_logit=max_logit,
        exp_sum=exp_sum,
        square_sum=squares,
        target=target,
        candidates=candidates,
        logit_sum=logit_sum,
    )
    if sums.likely is None:
        return sums
    likely, ids = (jax.lax.all_gather(each, axis, axis=1, tiled=True) for each in (sums.likely, sums.likely_ids))
    return sums._replace(**_likeliest(likely, ids, sums.likely.shape[1]))


def _saved_blocks(options, vocab, tokens) -> int:
    """Number of blocks of tokens whose logits over the whole vocabulary fit the budget."""
    bytes_per_block = 4 * options.blocks.tokens * vocab.parts * vocab.length
    return min(tokens // options.blocks.tokens, options.blocks.saved_bytes // bytes_per_block)


def _backward_local(options, saved, to_logps, to_candidates, total):
    hidden, head, source, target, candidates, scored, log_z, saved_logits = saved
    size, sharding = options.blocks.tokens, options.sharding
    tokens = _tokens(hidden, source, target, candidates, scored, size)
    flat = hidden.reshape(-1, hidden.shape[2])  # [R S, D]
    h = flat[tokens.index]  # [N, D]
    wide = log_z.dtype
    vocab = Vocabulary(head, hidden.dtype, options.blocks, options.soft_cap, options.sharding)
    # [N] log Z, [N] dL/dlog p, [N, C] dL/dlog p of the candidates
    by_token = jax.tree.map(lambda x: _take(x, tokens.place), (log_z, to_logps, to_candidates))

    saved_blocks = _saved_blocks(options, vocab, len(tokens.index))

    def logits_of(states, weights, i, j):
        if not saved_blocks:
            return vocab.logits(states, weights)
        read, recompute = lambda: saved_logits[j, jnp.minimum(i, saved_blocks)], lambda: vocab.logits(states, weights)
        return jax.lax.cond(i < saved_blocks, read, recompute)

    def one_part(j, carry):
        hidden_grad, total = carry
        weights = vocab.part(j)

        def one_block(i, carry):
            hidden_grad, part_grad = carry
            states = _block(h, i, size)  # [t, D]
            columns = vocab.columns(j)
            logits = logits_of(states, weights, i, j)
            read = functools.partial(_block, i=i, size=size)
            to_logits = _to_logits(options, logits, *columns, read, tokens, by_token)
            to_bias = None if total.bias is None else to_logits.sum(0)  # [v] dL/dbias = sum_t dL/dlogit
            to_logits = to_logits.astype(hidden.dtype)
            # [t, D] this part's share of dL/dh = sum_v dL/dlogit w_v
            to_states = jnp.einsum("tv,vd->td", to_logits, weights.weights, preferred_element_type=wide)
            hidden_grad = _put(hidden_grad, _block(hidden_grad, i, size) + to_states, i, size)
            to_weights = None
            if total.weights is not None:  # [v, D] dL/dw = sum_t dL/dlogit h_t
                to_weights = jnp.einsum("tv,td->vd", to_logits, states, preferred_element_type=wide)
            return hidden_grad, jax.tree.map(jnp.add, part_grad, Head(to_weights, to_bias))

        sums_and_parts = zip(total, cast(Any, weights), strict=True)
        zeros = Head(*(None if sum_of is None else jnp.zeros_like(part, wide) for sum_of, part in sums_and_parts))
        hidden_grad, part_grad = jax.lax.fori_loop(0, tokens.blocks, one_block, (hidden_grad, zeros))
        return hidden_grad, vocab.add(total, part_grad, j)

    hidden_grad, total = jax.lax.fori_loop(0, vocab.parts, one_part, (jnp.zeros(h.shape, wide), total))
    if sharding is not None and sharding.vocab:
        hidden_grad = jax.lax.psum(hidden_grad, sharding.vocab)  # [N, D] dL/dh, over all parts of the vocabulary
    # [R, S, D] dL/dhidden = sum over the tokens that read it. Padding has gradient 0, so its index does not matter.
    hidden_grad = jnp.zeros(flat.shape, wide).at[tokens.index].add(hidden_grad).reshape(hidden.shape)
    return hidden_grad, total


def _to_logits(options, logits, real, column, read, tokens, by_token):
    """Computes dL/dlogit [t, v] of a block of tokens with a part of the vocabulary.

    Args:
      read: selects the block [t, ...] of an array over all tokens [N, ...].
      by_token: log Z [N], dL/dlog p [N], and dL/dlog p of the candidates [N, C].
    """
    log_z, to_logps, to_candidates = by_token
    is_target = column[None] == read(tokens.target)[:, None]
    probs = jnp.exp(logits - read(log_z)[:, None])  # [t, v] p
    # [t, v] dL/dlogit = (1[v = target] - p) dL/dlog p
    to_logits = (jnp.where(is_target, 1.0, 0.0) - probs) * read(to_logps)[:, None]
    if tokens.candidates is not None:  # [t, v] the same of each candidate c: sum_c (1[v = c] - p) dL/dlog p_c
        grad = read(to_candidates)
        to_logits = _scatter_add(to_logits, column, read(tokens.candidates), grad) - probs * grad.sum(-1)[:, None]
    if options.soft_cap is not None:
        to_logits = to_logits * (1 - jnp.square(logits / options.soft_cap))  # [t, v] times d cap tanh(z / cap) / dz
    return to_logits if real is None else jnp.where(real, to_logits, 0)  # 0 where the part overlaps the one before


def _scatter_add(to_logits, column, ids, values):
    """Adds values [n, m] to the columns of tokens `ids` in a part's gradient [n, length]."""
    at = ids - column[0]
    at = jnp.where((at >= 0) & (at < len(column)), at, len(column))  # out of bounds: dropped
    return to_logits.at[jnp.arange(len(at))[:, None], at].add(values, mode="drop")


def _block(array, i, size):
    return jax.lax.dynamic_slice_in_dim(array, i * size, size)


def _put(array, block, i, size):
    return jax.lax.dynamic_update_slice_in_dim(array, block, i * size, axis=0)
