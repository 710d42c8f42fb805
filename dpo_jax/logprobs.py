"""Log-probabilities of completion tokens, without a logits array over all tokens.

Only scored tokens meet the vocabulary matrix, a chunk of them at a time; the backward pass recomputes each chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.types import Rows

LOGITS_BYTES = 64 * 2**20  # what one chunk of float32 logits may take


def chunk_size(rows: int, tokens: int, vocab: int, *, logits_bytes: int = LOGITS_BYTES) -> int:
    """Scored tokens of each row in a chunk: a power of two within the byte budget, at least 8, dividing `tokens`.

    >>> chunk_size(rows=1, tokens=1024, vocab=50304)
    256
    >>> chunk_size(rows=64, tokens=1024, vocab=128256)
    8
    """
    size = 8
    while 2 * size * rows * vocab * 4 <= logits_bytes and tokens % (2 * size) == 0:
        size *= 2
    return size if tokens % size == 0 else tokens


def completion_logps(
    hidden: Float[Array, "R S D"], head: Float[Array, "V D"], rows: Rows, *, pairs: int
) -> tuple[Float[Array, "P 2"], dict[str, Float[Array, "P 2"]]]:
    """Summed log-probability of every completion, and the sum over its tokens of the mean logit.

    Args:
      hidden: final hidden states of the rows, in the compute type.
      head: the vocabulary matrix, cast to the type of `hidden`.
      rows: where hidden states predict which tokens, of which completion.
      pairs: P; completions that these rows do not hold get 0.
    Returns: logps in nats, float32 or wider, column 0 chosen, 1 rejected; and {"logits": ...}, without gradient.
    """
    gathered = jnp.take_along_axis(hidden, rows.source[:, :, None], axis=1)
    head = head.astype(hidden.dtype)
    token_logps = score_tokens(gathered, head, rows.target, rows.slot >= 0)
    # The mean over the vocabulary of h . w_v is h . mean(w): no logits needed.
    wide = token_logps.dtype
    mean_row = jnp.mean(head, axis=0, dtype=wide)
    mean_logits = jax.lax.stop_gradient(jnp.einsum("rtd,d->rt", gathered, mean_row, preferred_element_type=wide))
    total = functools.partial(sum_by_slot, slot=rows.slot, pairs=pairs)
    return total(token_logps), {"logits": total(mean_logits)}


def sum_by_slot(values: Float[Array, "R T"], slot: Int[Array, "R T"], pairs: int) -> Float[Array, "P 2"]:
    """Adds up the values of each completion; entries with slot -1 belong to none."""
    into = jnp.where(slot >= 0, slot, 2 * pairs).ravel()
    return jax.ops.segment_sum(values.ravel(), into, 2 * pairs + 1)[:-1].reshape(pairs, 2)


def score_tokens(
    hidden: Float[Array, "R T D"], head: Float[Array, "V D"], target: Int[Array, "R T"], scored: Any
) -> Float[Array, "R T"]:
    """log softmax(hidden . head^T)[target] of the scored entries, which come first in each row; 0 after the last chunk.

    Chunks without a scored entry in any row are neither computed nor differentiated.
    """
    used = jnp.max(jnp.sum(scored, axis=-1, dtype=jnp.int32))
    size = chunk_size(hidden.shape[0], hidden.shape[1], head.shape[0])
    return _score(hidden, head, target, (used + size - 1) // size, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _score(hidden, head, target, chunks, size):
    return _score_forward(hidden, head, target, chunks, size)[0]


def _chunk(array, i, size):
    return jax.lax.dynamic_slice_in_dim(array, i * size, size, axis=1)


def _put_chunk(array, chunk, i, size):
    return jax.lax.dynamic_update_slice_in_dim(array, chunk, i * size, axis=1)


def _logits(hidden, head):
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("rtd,vd->rtv", hidden, head, preferred_element_type=wide)


def _score_forward(hidden, head, target, chunks, size):
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    zeros = jnp.zeros(target.shape, wide)

    def one_chunk(i, carry):
        logps, normaliser = carry
        logits = _logits(_chunk(hidden, i, size), head)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, _chunk(target, i, size)[..., None], axis=-1)[..., 0]
        return _put_chunk(logps, picked - log_z, i, size), _put_chunk(normaliser, log_z, i, size)

    # The number of chunks is data: a loop with a dynamic bound, hence the hand-written backward pass.
    logps, normaliser = jax.lax.fori_loop(0, chunks, one_chunk, (zeros, zeros))
    return logps, (hidden, head, target, chunks, normaliser)


def _score_backward(size, saved, cotangent):
    hidden, head, target, chunks, normaliser = saved
    wide = normaliser.dtype
    vocabulary = jnp.arange(head.shape[0])[None, None, :]

    def one_chunk(i, carry):
        hidden_grad, head_grad = carry
        h = _chunk(hidden, i, size)
        probability = jnp.exp(_logits(h, head) - _chunk(normaliser, i, size)[..., None])
        hit = vocabulary == _chunk(target, i, size)[..., None]
        logits_grad = (jnp.where(hit, 1.0, 0.0) - probability) * _chunk(cotangent, i, size)[..., None]
        logits_grad = logits_grad.astype(hidden.dtype)
        h_grad = jnp.einsum("rtv,vd->rtd", logits_grad, head, preferred_element_type=wide)
        head_grad = head_grad + jnp.einsum("rtv,rtd->vd", logits_grad, h, preferred_element_type=wide)
        return _put_chunk(hidden_grad, h_grad.astype(hidden.dtype), i, size), head_grad

    start = jnp.zeros_like(hidden), jnp.zeros(head.shape, wide)
    hidden_grad, head_grad = jax.lax.fori_loop(0, chunks, one_chunk, start)
    return hidden_grad, head_grad.astype(head.dtype), None, None


_score.defvjp(_score_forward, _score_backward)
