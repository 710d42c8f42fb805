"""Splash attention with masks that are data: values, gradients, skipped blocks, and compilation for TPUs."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.data import layout, packing
from dpo_jax.models.attention import choose, splash
from dpo_jax.models.attention.blockwise import visible_blocks
from dpo_jax.types import Encoded
from tests.support.memory import temporary_bytes
from tests.test_attention import arrays, dense, packed

SMALL = splash.Blocks(128, 128)


@functools.partial(jax.jit, static_argnames=("soft_cap", "blocks"))
def ours(q, k, v, weight, start, end, soft_cap=None, blocks=SMALL):
    def out(q, k, v):
        return splash.attention(q, k, v, start, end, soft_cap=soft_cap, blocks=blocks, interpret=True)

    value, pull = jax.vjp(out, q, k, v)
    return value, *pull(weight)


def theirs(q, k, v, weight, start, end, soft_cap=None):
    value, pull = jax.vjp(lambda q, k, v: dense(q, k, v, start, end, soft_cap), q, k, v)
    return value, *pull(weight)


def assert_equal(drawn, bounds, **options):
    q, k, v, weight = drawn
    # Scaled so that float32 resolves 1e-5: the gradient of a token that sees itself alone is a difference of two sums.
    q, k, v, weight = 0.3 * q * q.shape[-1] ** -0.5, 0.3 * k, 0.3 * v, 0.3 * weight
    expected = theirs(q, k, v, weight, bounds[0], bounds[1], options.get("soft_cap"))
    for a, b in zip(ours(q, k, v, weight, bounds[0], bounds[1], **options), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "soft_cap"),
    [(128, 5.0), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((64, None), (80, None), (96, 5.0), (256, None)))],
)
def test_values_and_gradients_are_those_of_dense_attention(width, soft_cap):
    # Two rows of packed pairs with padding, grouped-query heads.
    assert_equal(arrays(2, 384, 4, 2, width), packed(2, 384), soft_cap=soft_cap)


@pytest.mark.slow
def test_oblong_blocks_and_intervals_that_are_not_causal():
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.integers(0, 500, (1, 512)))
    end = jnp.minimum(start + jnp.asarray(rng.integers(1, 90, (1, 512))), 512)
    assert_equal(arrays(1, 512, 2, 1, 64), (start, end), blocks=splash.Blocks(256, 128))


def one_row(*row):
    return splash.attention(*(x[None] for x in row), blocks=SMALL, interpret=True)[0]


@pytest.mark.parametrize(
    "over_rows",
    [jax.vmap(one_row), pytest.param(lambda *x: jax.lax.map(lambda row: one_row(*row), x), marks=pytest.mark.slow)],
    ids=["vmap", "map"],
)
def test_rows_may_be_mapped_over_and_their_intervals_are_data(over_rows):
    def pulled(attend, weight, *x):
        value, pull = jax.vjp(attend, *x)
        return value, *pull(weight)

    q, k, v, weight = (0.3 * x for x in arrays(2, 256, 2, 1, 64))
    seeds = [packed(2, 256, seed) for seed in (0, 1)]
    given = lambda weight, q, k, v, *bounds: pulled(lambda *x: over_rows(*x, *bounds), weight, q, k, v)
    run = jax.jit(given).lower(weight, q, k, v, *seeds[0]).compile()  # a compiled program: it cannot recompile
    for bounds in seeds:
        expected = pulled(lambda *x, bounds=bounds: dense(*x, *bounds), weight, q, k, v)
        for a, b in zip(run(weight, q, k, v, *bounds), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_result_has_the_type_of_the_values():
    q, k = (jax.ShapeDtypeStruct((1, 256, 2, 64), dtype) for dtype in (jnp.float32, jnp.bfloat16))
    i = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    assert jax.eval_shape(splash.attention, q, k, k, i, i).dtype == jnp.bfloat16


def separate(length, parts):
    """Bounds of a row of equal parts, each of which attends to itself only."""
    start = np.arange(length) // (length // parts) * (length // parts)
    return jnp.asarray(start)[None], jnp.asarray(start + length // parts)[None]


def test_blocks_without_a_visible_key_are_not_visited():
    # NaN in the other half's keys and values would come through 0 * NaN if a block of them were computed, and a block
    # that is computed in place of a skipped one would count twice.
    q, k, v, weight = (0.3 * x for x in arrays(1, 512, 2, 2, 64))
    whole, halves = separate(256, 1), separate(512, 2)
    expected = theirs(q[:, :256], k[:, :256], v[:, :256], weight[:, :256], whole[0], whole[1])
    k, v = (x.at[:, 256:].set(jnp.nan) for x in (k, v))
    found = ours(q, k, v, weight.at[:, 256:].set(0.0), halves[0], halves[1])
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a[:, :256], b, atol=1e-5)


def test_next_block_is_the_next_visible_one():
    visible = jnp.asarray([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    assert splash.next_visible(visible, 1).tolist() == [[1, 1, 3, 3], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert splash.next_visible(visible, 0).tolist() == [[2, 0, 0, 0], [2, 0, 0, 0], [2, 0, 0, 0]]


def test_no_block_is_fetched_that_is_not_computed():
    # A pipeline fetches when the block's index changes. dk and dv loop over all heads' queries before the next keys.
    bounds, heads = packed(1, 2048), range(3)
    visible = visible_blocks(*bounds, 256, 128)[0]
    by_query, by_key = (np.asarray(splash.next_visible(visible, along)) for along in (1, 0))
    walks = [
        [(head, at) for head in heads for at in by_query.ravel()],
        [(head, at) for column in by_key.T for head in heads for at in column],
    ]
    for walk in walks:
        fetched = 1 + sum(a != b for a, b in zip(walk, walk[1:], strict=False))
        assert fetched <= len(heads) * int(visible.sum())


def test_eight_packed_pairs_visit_a_third_of_what_causal_attention_would():
    rng = np.random.default_rng(0)
    sizes = [(int(rng.integers(120, 260)), int(rng.integers(60, 240))) for _ in range(8)]
    pairs = [Encoded.of(*(np.ones(n, int) for n in (prompt, c, 512 - prompt - c))) for prompt, c in sizes]
    shape = packing.Shape(pairs=8, rows=1, row_length=4096, microbatches=1, layout="shared")
    batch = layout.collate(pairs, None, shape)
    bounds = jnp.asarray(batch.rows.key_start[0]), jnp.asarray(batch.rows.key_end[0])
    computed, causal = splash.visited(*bounds, splash.choose_blocks(4096))
    print(f"{computed} blocks of {causal}: {computed / causal:.3f}")
    assert computed / causal <= 0.35


@pytest.mark.parametrize("length", [1000, 2**15])
def test_rows_that_the_kernel_cannot_take_are_refused(length):
    x, i = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
    with pytest.raises(ValueError, match=f"not of {length}"):
        jax.eval_shape(splash.attention, x, x, x, i, i)


def compile_for(topology, width, *, length=2048, soft_cap=None):
    """Temporary bytes per chip, forward and backward: 4 query heads per kv head, sharded over 4 chips."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    topologies = pytest.importorskip("jax.experimental.topologies")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        pytest.skip(f"no TPU compiler here: {error}")
    mesh = Mesh(np.array(found[:4]).reshape(1, 2, 2), ("replica", "fsdp", "tensor"))
    rows_and_heads = choose.AttentionSharding(mesh, ("replica", "fsdp"), "tensor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splash, "attention", functools.partial(splash.attention, soft_cap=soft_cap))
        attend = choose.make_attention("splash", platform="tpu", sharding=rows_and_heads)
    step = jax.grad(lambda q, k, v, *bounds: (attend(q, k, v, *bounds).astype(jnp.float32) ** 2).sum(), (0, 1, 2))

    def shaped(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    heads = ("fsdp", None, "tensor")
    q, k = (shaped((4, length, n, width), jnp.bfloat16, *heads) for n in (16, 4))
    bounds = [shaped((4, length), jnp.int32, "fsdp")] * 2
    return temporary_bytes(jax.jit(step), q, k, k, *bounds)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("width, length", [(64, 2048), (80, 2048), (96, 2048), (128, 4096), (256, 2048), (256, 4096)])
def test_update_compiles_for_tpus(topology, width, length):
    assert compile_for(topology, width, length=length) < 2**30


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_soft_cap_and_the_longest_row_compile_for_tpus(topology):
    # The longest row has the largest lookup arrays, which must fit scalar memory.
    assert compile_for(topology, 128, soft_cap=30.0) < 2**30
    assert compile_for(topology, 128, length=2**15 - 128) < 2**31
