"""The chunked head against a dense log-softmax, in values, gradients and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import logprobs
from dpo_jax.types import Rows

R, S, T, D, V, P = 2, 24, 24, 8, 31, 3


def problem(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    slot = np.full((R, T), -1)
    slot[0, :13] = np.repeat([0, 1, 4], [5, 4, 4])
    slot[1, :21] = np.repeat([2, 3, 5], [10, 1, 10])
    zeros = np.zeros((R, S), int)
    rows = Rows(zeros, zeros, zeros, zeros + 1, rng.integers(0, S, (R, T)), rng.integers(0, V, (R, T)), slot)
    hidden, head = rng.normal(size=(R, S, D)).astype(dtype), rng.normal(size=(V, D)).astype(dtype)
    return jnp.asarray(hidden), jnp.asarray(head), jax.tree.map(jnp.asarray, rows)


def dense(hidden, head, rows):
    logits = jnp.take_along_axis(hidden, rows.source[..., None], axis=1) @ head.T
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits), rows.target[..., None], axis=-1)[..., 0]
    hit = rows.slot[..., None] == jnp.arange(2 * P)[None, None]
    total = lambda x: jnp.sum(jnp.where(hit, x[..., None], 0), axis=(0, 1)).reshape(P, 2)
    return total(logps), total(logits.mean(-1))


@pytest.fixture(params=[8, 24])
def chunk(request, monkeypatch):
    monkeypatch.setattr(logprobs, "chunk_size", lambda *_: request.param)


def test_completion_logps_equal_dense_log_softmax(chunk):
    hidden, head, rows = problem()
    logps, aux = logprobs.completion_logps(hidden, head, rows, pairs=P)
    expected, mean_logits = dense(hidden, head, rows)
    np.testing.assert_allclose(logps, expected, rtol=2e-6)
    np.testing.assert_allclose(aux["logits"], mean_logits, rtol=1e-4, atol=1e-6)


def test_gradients_equal_those_of_dense_log_softmax(chunk):
    hidden, head, rows = problem()
    weight = jnp.arange(2.0 * P).reshape(P, 2) - 2
    ours = jax.grad(lambda h, w: (logprobs.completion_logps(h, w, rows, pairs=P)[0] * weight).sum(), (0, 1))
    theirs = jax.grad(lambda h, w: (dense(h, w, rows)[0] * weight).sum(), (0, 1))
    for a, b in zip(ours(hidden, head), theirs(hidden, head), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_chunks_without_a_scored_token_are_not_computed(monkeypatch):
    # NaN in the head's rows would reach any chunk that is computed: only the two with scored tokens may see it.
    monkeypatch.setattr(logprobs, "chunk_size", lambda *_: 8)
    hidden, head, rows = problem()
    scored = jnp.arange(T)[None] < jnp.array([[13], [3]])
    logps = logprobs.score_tokens(hidden, head.at[0].set(jnp.nan), rows.target, scored)
    assert np.isnan(logps[:, :16]).all() and not np.any(logps[:, 16:])


def test_log_softmax_is_float32_whatever_the_compute_type():
    # bfloat16 logits of a 512-token answer lose half a nat and more when the softmax is taken in bfloat16.
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, 512, 64)), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(1000, 64)) / 4, jnp.bfloat16)
    target = jnp.asarray(rng.integers(0, 1000, (1, 512)))
    ours = logprobs.score_tokens(hidden, head, target, jnp.ones((1, 512), bool)).sum()
    exact = jax.nn.log_softmax(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T)
    exact = jnp.take_along_axis(exact, target[..., None], axis=-1).sum()
    careless = jax.nn.log_softmax(hidden @ head.T).astype(jnp.float32)
    careless = jnp.take_along_axis(careless, target[..., None], axis=-1).sum()
    assert ours.dtype == jnp.float32
    assert abs(ours - exact) < 0.01 < abs(careless - exact)


def peak_bytes(tokens, vocab):
    width = 16
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, tokens, width), (vocab, width))]
    rows = Rows(*(jax.ShapeDtypeStruct((1, tokens), jnp.int32) for _ in Rows._fields))
    grad = jax.grad(lambda h, w, rows: logprobs.completion_logps(h, w, rows, pairs=2)[0].sum(), (0, 1))
    memory = jax.jit(grad).lower(*args, rows).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes - 6 * 4 * vocab * width  # less copies of the head and of its gradient


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary():
    # Sixteen times the logits: 2 GiB of them in float32 at the larger size, against a budget of 64 MiB a chunk.
    small, large = peak_bytes(2048, 16_384), peak_bytes(8192, 65_536)
    assert large < 4 * logprobs.LOGITS_BYTES < 8192 * 65_536 * 4 / 4
    assert large < small + 2 * logprobs.LOGITS_BYTES


def test_chunk_size_keeps_within_the_budget():
    for rows, tokens, vocab in [(1, 1024, 50_304), (16, 1024, 50_304), (4, 4096, 128_256), (1, 128, 1024)]:
        size = logprobs.chunk_size(rows, tokens, vocab)
        assert tokens % size == 0 and (size == 8 or size * rows * vocab * 4 <= logprobs.LOGITS_BYTES)
