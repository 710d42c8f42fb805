"""The head in blocks against a dense log-softmax: values, gradients and memory, on one device and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.logprobs import completions, vocabulary
from dpo_jax.logprobs.vocabulary import Blocks, Head
from dpo_jax.types import Rows
from tests.support.memory import temporary_bytes

R, S, T, D, V, P = 2, 24, 24, 8, 31, 3


def problem(seed=0, dtype: type[np.floating] = np.float32, rows=R, vocab=V):
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
    Blocks(8, 4 * 8 * 9, 3 * 4 * 8 * 36),  # saves some of them
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
    ours = functools.partial(completions.completion_logps, pairs=P, blocks=blocks, soft_cap=soft_cap)
    assert_equals_dense(jax.jit(ours), functools.partial(dense, soft_cap=soft_cap), problem())


@pytest.mark.parametrize(
    ("sizes", "vocab"), [((1, 8, 1), 64), ((1, 1, 8), 64), ((2, 2, 2), 64), ((2, 2, 2), 31)], ids=str
)
def test_head_sharded_over_a_mesh_equals_the_whole_one(sizes, vocab):
    mesh = sharding.make_mesh(*sizes)
    axes = sharding.partition("head/embedding", (vocab, D), mesh.shape)
    head_sharding = vocabulary.HeadSharding(mesh, sharding.ROW_AXES, *axes)
    ours = functools.partial(
        completions.completion_logps, pairs=P, blocks=Blocks(8, 4 * 8 * 5, 2**20), sharding=head_sharding
    )
    assert_equals_dense(jax.jit(ours), dense, problem(rows=8, vocab=vocab))


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def with_likely(case, likely, seed=7):
    """Adds a random reference's log-probs of `likely` tokens at every entry to the problem."""
    hidden, head, rows = case
    rng, vocab = np.random.default_rng(seed), len(head)
    logps = jax.nn.log_softmax(rng.normal(size=(*rows.slot.shape, vocab)))
    ids = np.argsort(rng.random(logps.shape), axis=-1)[..., :likely]
    given = jnp.take_along_axis(logps, ids, axis=-1)
    # Entries that are not scored hold zeros, as from `layout.collate`.
    used = (rows.slot >= 0)[..., None]
    rows = rows._replace(likely=jnp.where(used, ids, 0), likely_logps=jnp.where(used, given, 0))
    return hidden.astype(float), head.astype(float), rows


def dense_sums(hidden, head, bias, rows, *, pairs, answers, soft_cap=None):
    """Computes each sum from all logits, by the formulas of the papers."""
    logits = jnp.take_along_axis(hidden, rows.source[..., None], axis=1) @ head.T + bias[None, None]
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logps = jax.nn.log_softmax(logits)
    hit = np.asarray(rows.slot)[..., None] == np.arange(pairs * answers)
    count = hit.sum((0, 1)).reshape(pairs, answers)
    shortest = np.repeat(np.where(count > 0, count, 99).min(1), answers)
    early = hit & (np.cumsum(hit, axis=1) <= shortest)
    total = lambda x, of: jnp.where(of, x[..., None], 0).sum((0, 1)).reshape(pairs, answers)
    policy, given = jnp.take_along_axis(logps, rows.likely, axis=-1), rows.likely_logps
    kl = (jnp.exp(given) * (given - policy)).sum(-1)
    if given.shape[-1] < len(head):
        is_likely = (rows.likely[..., None] == jnp.arange(len(head))[None, None, None]).any(2)
        rest = 1 - jnp.exp(given).sum(-1)
        rest = jnp.where(hit.any(-1), rest, 1)
        kl += rest * (jnp.log(rest) - jax.nn.logsumexp(jnp.where(is_likely, -jnp.inf, logps), axis=-1))
    return {
        "shared_logps": total(jnp.take_along_axis(logps, rows.target[..., None], axis=-1)[..., 0], early),
        "log_collision": total(jnp.log(jnp.exp(2 * jax.lax.stop_gradient(logps)).sum(-1)), hit),
        "sequence_kl": total(kl, hit),
    }


def assert_sums_equal_dense(case, *, answers=2, soft_cap=None, tolerance=1e-9, **options):
    hidden, head, rows = case
    pairs = 6 // answers + 1  # one more than there are
    bias = jnp.asarray(np.random.default_rng(5).normal(size=len(head)))
    weight = np.random.default_rng(6).normal(size=(len(completions.SUMS), pairs, answers))

    def ours(hidden, head, bias):
        asked = dict(pairs=pairs, answers=answers, soft_cap=soft_cap, sums=completions.SUMS)
        _, aux, _ = completions.completion_logps(hidden, head, rows, bias=bias, **asked, **options)
        return {name: aux[name] for name in completions.SUMS}

    def theirs(hidden, head, bias):
        return dense_sums(hidden, head, bias, rows, pairs=pairs, answers=answers, soft_cap=soft_cap)

    def weighted(function):
        def total(*args):
            found = function(*args)
            return sum((w * found[name]).sum() for w, name in zip(weight, completions.SUMS, strict=True)), found

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(hidden, head, bias)

    ((_, sums), grads), ((_, expected), slopes) = weighted(ours), weighted(theirs)
    for name in completions.SUMS:
        np.testing.assert_allclose(sums[name], expected[name], rtol=tolerance, atol=1e-12, err_msg=name)
    for a, b in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    ("blocks", "soft_cap", "likely", "answers"),
    [(BLOCKS[0], None, 5, 2), (BLOCKS[1], 3.0, 1, 3), (BLOCKS[2], 3.0, 5, 2), (BLOCKS[3], None, V, 3)],
    ids=str,
)
def test_extra_outputs_and_gradients_equal_dense_ones(wide, blocks, soft_cap, likely, answers):
    case = with_likely(problem(dtype=np.float64), likely)
    assert_sums_equal_dense(case, answers=answers, soft_cap=soft_cap, blocks=blocks)


@pytest.mark.parametrize(
    ("sizes", "vocab", "likely"),
    [
        ((2, 2, 2), 64, 5),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (((1, 2, 4), 64, 40), ((2, 2, 2), 31, 31))),
    ],
    ids=str,
)
def test_extra_outputs_of_a_head_sharded_over_a_mesh_equal_dense_ones(wide, sizes, vocab, likely):
    mesh = sharding.make_mesh(*sizes)
    axes = sharding.partition("head/embedding", (vocab, D), mesh.shape)
    head_sharding = vocabulary.HeadSharding(mesh, sharding.ROW_AXES, *axes)
    case = with_likely(problem(rows=8, vocab=vocab, dtype=np.float64), likely)
    assert_sums_equal_dense(case, blocks=Blocks(8, 4 * 8 * 5, 2**20), sharding=head_sharding)


def test_missing_answers_do_not_shorten_the_shared_length(wide):
    hidden, head, rows = with_likely(problem(dtype=np.float64), 5)
    rows = rows._replace(slot=jnp.where(rows.slot == 3, -1, rows.slot))  # of pair 1 the answer of one token
    logps, aux, _ = jax.jit(functools.partial(completions.completion_logps, pairs=P, sums=("shared_logps",)))(
        hidden, head, rows
    )
    np.testing.assert_allclose(aux["shared_logps"][1], logps[1], rtol=1e-12)
    assert logps[1, 0] < 0 == logps[1, 1]


@pytest.mark.slow
def test_gradients_of_extra_outputs_are_added_to_running_sums(wide):
    hidden, head, rows = with_likely(problem(dtype=np.float64), 5)
    loss = lambda found: found[1]["sequence_kl"].sum() + found[1]["shared_logps"].sum()
    asked = functools.partial(completions.completion_logps, pairs=P, blocks=BLOCKS[2], sums=completions.SUMS)
    plain = jax.grad(lambda w: loss(asked(hidden, w, rows)))(head)

    def with_total(total):
        found = asked(hidden, head, rows, total=total)
        return loss(found), found[2]

    before = Head(jnp.ones_like(head))
    _, pull = jax.vjp(with_total, before)
    ((after, _),) = pull((1.0, before))
    np.testing.assert_allclose(after - 1, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("least", [0.0, 1e-4])
def test_divergence_is_finite_where_likely_tokens_have_all_the_probability(least):
    # The policy gives all other tokens 1e-9, the reference 0 or 1e-4, in float32.
    policy = jnp.log(jnp.array([[[1 - 1e-4 - 1e-9, 1e-4]]]))
    given = jnp.log(jnp.array([[[1 - 2 * least - 1e-4, 1e-4]]]))
    value, slope = jax.value_and_grad(lambda x: completions._kl(given, x, any_other=True).sum())(policy)
    assert np.isfinite(value) and np.isfinite(slope).all() and (least or abs(value) < 1e-6)
    # The gradient still moves probability to the other tokens: it lowers the likely ones.
    assert not least or (slope[..., 0] > 1)


def test_divergence_from_a_certain_reference_ignores_impossible_tokens():
    given, policy = jnp.array([[[0.0, -jnp.inf]]]), jnp.log(jnp.array([[[0.5, 0.25]]]))
    value, slope = jax.value_and_grad(lambda x: completions._kl(given, x, any_other=True).sum())(policy)
    assert float(value) == pytest.approx(np.log(2)) and slope.tolist() == [[[-1, 0]]]


def lowered(**asked):
    hidden, head, rows = problem()
    return jax.jit(lambda h, w: completions.completion_logps(h, w, rows, pairs=P, **asked)[:2]).lower(hidden, head)


def test_outputs_that_are_not_requested_are_not_computed():
    hidden, head, rows = problem()
    assert completions.completion_logps(hidden, head, rows, pairs=P)[1].keys() == {"logits"}
    plain, sums, tokens, likely = (
        lowered(**asked) for asked in ({}, {"sums": ("log_collision",)}, {"likely": 0}, {"likely": 3})
    )
    ways = ("top_k", "stablehlo.sort")
    assert not any(way in each.as_text() for way in ways for each in (plain, sums, tokens))
    assert any(way in likely.as_text() for way in ways)
    # Squared probabilities reuse the exponentials of the softmax.
    plain, sums = (each.as_text().count("stablehlo.exponential") for each in (plain, sums))
    assert plain == sums == 2


@pytest.mark.parametrize(("sizes", "likely"), [(None, 1), (None, 20), ((1, 2, 4), 20), ((2, 2, 2), 4)], ids=str)
def test_likely_tokens_are_those_of_all_logits(sizes, likely):
    # Integers sum to the same in any order, so many logits are equal; among equals the first token is taken.
    rng, vocab, rows = np.random.default_rng(0), 64, problem(rows=8, vocab=64)[2]
    hidden, head = (jnp.asarray(rng.integers(-1, 2, shape), jnp.float32) for shape in ((8, S, D), (vocab, D)))
    head_sharding, blocks = None, Blocks(8, 4 * 8 * 9, 0)
    if sizes is not None:
        mesh = sharding.make_mesh(*sizes)
        head_sharding = vocabulary.HeadSharding(mesh, sharding.ROW_AXES, "tensor", "fsdp")
        blocks = Blocks(8, 4 * 8 * 5, 0)
    ours = functools.partial(
        completions.completion_logps, pairs=P, blocks=blocks, sharding=head_sharding, likely=likely
    )
    logps, aux, _ = jax.jit(ours)(hidden, head, rows)
    own, ids, found = aux["tokens"]
    used = np.asarray(rows.slot >= 0)
    dense = jax.nn.log_softmax(jnp.take_along_axis(hidden, rows.source[..., None], axis=1) @ head.T)
    most, at = jax.lax.top_k(dense, likely)
    np.testing.assert_array_equal(ids[used], at[used])
    np.testing.assert_allclose(found[used], most[used], rtol=1e-6, atol=1e-6)
    target = jnp.take_along_axis(dense, rows.target[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(own, jnp.where(used, target, 0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(completions.sum_by_slot(own, rows.slot, P), logps, rtol=1e-6)
    assert not np.any(ids[~used]) and not np.any(found[~used])


def test_no_logits_and_no_full_head_are_communicated():
    # Parts of the vocabulary matrix are gathered along its columns; no array of tokens times vocabulary is.
    mesh = sharding.make_mesh(1, 2, 4)
    head_sharding = vocabulary.HeadSharding(mesh, sharding.ROW_AXES, "tensor", "fsdp")
    hidden, head, rows = problem(rows=8, vocab=1024)
    place = jax.sharding.NamedSharding(mesh, sharding.partition("head/embedding", head.shape, mesh.shape))
    blocks = Blocks(8, 4 * 8 * 64, 0)
    grad = jax.grad(
        lambda h, w: completions.completion_logps(h, w, rows, pairs=P, blocks=blocks, sharding=head_sharding)[0].sum(),
        (0, 1),
    )
    text = jax.jit(grad).lower(hidden, jax.device_put(head, place)).compile().as_text()
    assert text is not None
    moved = [line.split(" = ")[1].split(" ")[0] for line in text.splitlines() if "all-gather(" in line]
    part = 1024 // 4 // vocabulary.GATHERED_PARTS
    assert moved and all(shape.startswith(f"f32[{part},{D}]") for shape in moved), moved


def test_blocks_without_a_scored_token_are_not_computed():
    # NaN in the head's rows would reach any block that is computed: only the two with scored tokens may see it.
    hidden, head, rows = problem()
    options = completions._Options(Blocks(8, 2**20, 0), None, None)
    few = (jnp.arange(T) < 12)[None] & (jnp.arange(R) == 0)[:, None]
    logps = completions.score_tokens(
        hidden, Head(head.at[0].set(jnp.nan)), None, rows.source, rows.target, None, few, options
    )[0].logps
    assert np.isnan(logps[0, :12]).all() and not np.any(logps[0, 12:]) and not np.any(logps[1])
    tokens = completions._tokens(hidden, rows.source, rows.target, None, few, 8)
    assert int(tokens.blocks) == 2 and len(tokens.index) == R * T


def test_log_softmax_is_float32_whatever_the_compute_type():
    # bfloat16 logits of a 512-token answer lose half a nat and more when the softmax is taken in bfloat16.
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, 512, 64)), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(1000, 64)) / 4, jnp.bfloat16)
    target = jnp.asarray(rng.integers(0, 1000, (1, 512)))
    options = completions._Options(Blocks(64, 2**16, 0), None, None)
    source = jnp.arange(512)[None]
    ours = completions.score_tokens(hidden, Head(head), None, source, target, None, jnp.ones((1, 512), bool), options)[
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
    grad = jax.grad(lambda h, w, rows: completions.completion_logps(h, w, rows, pairs=2)[0].sum(), (0, 1))
    return temporary_bytes(jax.jit(grad), *args, rows)


def test_peak_memory_grows_with_tokens_and_vocabulary_and_not_with_their_product():
    # Sixteen times the logits: 2 GiB of them in float32 at the larger size.
    small, large = peak_bytes(2048, 16_384), peak_bytes(8192, 65_536)
    copies = 4 * 4 * 16 * (8192 + 65_536)
    budget = vocabulary.CPU_BLOCKS.saved_bytes + 4 * vocabulary.CPU_BLOCKS.logits_bytes
    assert large < small + copies + budget < 8192 * 65_536 * 4 / 5


def test_vocabulary_blocks_keep_within_the_budget():
    for blocks in (vocabulary.CPU_BLOCKS, vocabulary.ACCELERATOR_BLOCKS):
        for vocab in (1000, 32_000, 50_257, 50_304, 128_256, 151_936, 262_144):
            size = vocabulary.vocab_block(vocab, blocks)
            assert size <= vocab and size * blocks.tokens * 4 <= blocks.logits_bytes
            assert size == vocab or size * blocks.tokens * 4 >= blocks.logits_bytes / 8
