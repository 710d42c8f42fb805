"""The head in blocks against a dense log-softmax, in values, gradients and memory, on one device and across a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import logprobs, sharding, vocabulary
from dpo_jax.types import Rows
from dpo_jax.vocabulary import Blocks, Head

R, S, T, D, V, P = 2, 24, 24, 8, 31, 3


def problem(seed=0, dtype=np.float32, rows=R, vocab=V):
    rng = np.random.default_rng(seed)
    slot = np.full((rows, T), -1)
    slot[0, :13] = np.repeat([0, 1, 4], [5, 4, 4])
    slot[1, :21] = np.repeat([2, 3, 5], [10, 1, 10])
    zeros = np.zeros((rows, S), int)
    source, target = rng.integers(0, S, (rows, T)), rng.integers(0, vocab, (rows, T))
    batch = Rows(zeros, zeros, zeros, zeros + 1, source, target, slot)
    hidden, head = rng.normal(size=(rows, S, D)).astype(dtype), rng.normal(size=(vocab, D)).astype(dtype)
    return jnp.asarray(hidden), jnp.asarray(head), jax.tree.map(jnp.asarray, batch)


def dense(hidden, head, rows, soft_cap=None):
    logits = jnp.take_along_axis(hidden, rows.source[..., None], axis=1) @ head.T
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits), rows.target[..., None], axis=-1)[..., 0]
    hit = rows.slot[..., None] == jnp.arange(2 * P)[None, None]
    total = lambda x: jnp.sum(jnp.where(hit, x[..., None], 0), axis=(0, 1)).reshape(P, 2)
    return total(logps), total(logits.mean(-1))


# One block; blocks that divide tokens and vocabulary; blocks that divide neither, so that the last ones overlap.
BLOCKS = [
    Blocks(64, 2**20, 2**20),
    Blocks(8, 4 * 8 * V, 0),
    Blocks(8, 4 * 8 * 9, 3 * 4 * 8 * 36),  # keeps some of them
    Blocks(5, 4 * 5 * 4, 0),
]


def assert_equals_dense(ours, theirs, problem):
    hidden, head, rows = problem
    (logps, aux, _), (expected, mean_logits) = ours(hidden, head, rows), theirs(hidden, head, rows)
    np.testing.assert_allclose(logps, expected, rtol=4e-6, atol=1e-6)
    np.testing.assert_allclose(aux["logits"], mean_logits, rtol=1e-4, atol=1e-5)
    weight = jnp.arange(2.0 * P).reshape(P, 2) - 2
    grads = [jax.grad(lambda h, w, f=f: (f(h, w, rows)[0] * weight).sum(), (0, 1)) for f in (ours, theirs)]
    for a, b in zip(*(jax.jit(grad)(hidden, head) for grad in grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("blocks", "soft_cap"), [*((each, None) for each in BLOCKS), (BLOCKS[2], 3.0)], ids=str)
def test_completion_logps_and_gradients_equal_dense_log_softmax(blocks, soft_cap):
    ours = functools.partial(logprobs.completion_logps, pairs=P, blocks=blocks, soft_cap=soft_cap)
    assert_equals_dense(jax.jit(ours), functools.partial(dense, soft_cap=soft_cap), problem())


@pytest.mark.parametrize(
    ("sizes", "vocab"), [((1, 8, 1), 64), ((1, 1, 8), 64), ((2, 2, 2), 64), ((2, 2, 2), 31)], ids=str
)
def test_head_cut_across_a_mesh_equals_the_whole_one(sizes, vocab):
    mesh = sharding.make_mesh(*sizes)
    axes = sharding.partition("head/embedding", (vocab, D), mesh.shape)
    spread = vocabulary.Spread(mesh, sharding.ROW_AXES, *axes)
    ours = functools.partial(logprobs.completion_logps, pairs=P, blocks=Blocks(8, 4 * 8 * 5, 2**20), spread=spread)
    assert_equals_dense(jax.jit(ours), dense, problem(rows=8, vocab=vocab))


def test_no_logits_and_no_whole_head_travel_between_devices():
    # Of the vocabulary matrix, blocks of columns are gathered; no array of tokens times vocabulary crosses at all.
    mesh = sharding.make_mesh(1, 2, 4)
    spread = vocabulary.Spread(mesh, sharding.ROW_AXES, "tensor", "fsdp")
    hidden, head, rows = problem(rows=8, vocab=1024)
    place = jax.sharding.NamedSharding(mesh, sharding.partition("head/embedding", head.shape, mesh.shape))
    blocks = Blocks(8, 4 * 8 * 64, 0)
    grad = jax.grad(
        lambda h, w: logprobs.completion_logps(h, w, rows, pairs=P, blocks=blocks, spread=spread)[0].sum(), (0, 1)
    )
    text = jax.jit(grad).lower(hidden, jax.device_put(head, place)).compile().as_text()
    assert text is not None
    moved = [line.split(" = ")[1].split(" ")[0] for line in text.splitlines() if "all-gather(" in line]
    part = 1024 // 4 // vocabulary.GATHERED_PARTS
    assert moved and all(shape.startswith(f"f32[{part},{D}]") for shape in moved), moved


def test_blocks_without_a_scored_token_are_not_computed():
    # NaN in the head's rows would reach any block that is computed: only the two with scored tokens may see it.
    hidden, head, rows = problem()
    plan = logprobs._Plan(Blocks(8, 2**20, 0), None, None)
    few = (jnp.arange(T) < 12)[None] & (jnp.arange(R) == 0)[:, None]
    logps = logprobs.score_tokens(
        hidden, Head(head.at[0].set(jnp.nan)), None, rows.source, rows.target, None, few, plan
    )[0].logps
    assert np.isnan(logps[0, :12]).all() and not np.any(logps[0, 12:]) and not np.any(logps[1])
    tokens = logprobs._tokens(hidden, rows.source, rows.target, None, few, 8)
    assert int(tokens.blocks) == 2 and len(tokens.index) == R * T


def test_log_softmax_is_float32_whatever_the_compute_type():
    # bfloat16 logits of a 512-token answer lose half a nat and more when the softmax is taken in bfloat16.
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, 512, 64)), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(1000, 64)) / 4, jnp.bfloat16)
    target = jnp.asarray(rng.integers(0, 1000, (1, 512)))
    plan = logprobs._Plan(Blocks(64, 2**16, 0), None, None)
    source = jnp.arange(512)[None]
    ours = logprobs.score_tokens(hidden, Head(head), None, source, target, None, jnp.ones((1, 512), bool), plan)[
        0
    ].logps.sum()
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
    return memory.temp_size_in_bytes


def test_peak_memory_grows_with_tokens_and_vocabulary_and_not_with_their_product():
    # Sixteen times the logits: 2 GiB of them in float32 at the larger size.
    small, large = peak_bytes(2048, 16_384), peak_bytes(8192, 65_536)
    copies = 4 * 4 * 16 * (8192 + 65_536)
    budget = vocabulary.CPU_BLOCKS.kept_bytes + 4 * vocabulary.CPU_BLOCKS.logits_bytes
    assert large < small + copies + budget < 8192 * 65_536 * 4 / 5


def test_vocabulary_blocks_keep_within_the_budget():
    for blocks in (vocabulary.CPU_BLOCKS, vocabulary.ACCELERATOR_BLOCKS):
        for vocab in (1000, 32_000, 50_257, 50_304, 128_256, 151_936, 262_144):
            size = vocabulary.vocab_block(vocab, blocks)
            assert size <= vocab and size * blocks.tokens * 4 <= blocks.logits_bytes
            assert size == vocab or size * blocks.tokens * 4 >= blocks.logits_bytes / 8
