"""Splash attention with masks that are data: values, gradients, skipped blocks, and compilation for TPUs."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.data import layout
from dpo_jax.models import attention, splash
from dpo_jax.types import Encoded
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
    # Of a size at which float32 resolves 1e-5: what sees itself alone has a gradient that is a difference of two sums.
    q, k, v, weight = 0.3 * q * q.shape[-1] ** -0.5, 0.3 * k, 0.3 * v, 0.3 * weight
    expected = theirs(q, k, v, weight, bounds[0], bounds[1], options.get("soft_cap"))
    for a, b in zip(ours(q, k, v, weight, bounds[0], bounds[1], **options), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "soft_cap"),
    [(64, None), pytest.param(80, None), (128, 5.0), pytest.param(96, 5.0, marks=pytest.mark.slow), (256, None)],
)
def test_values_and_gradients_are_those_of_dense_attention(width, soft_cap):
    # Two rows of packed pairs with padding, grouped-query heads.
    assert_equal(arrays(2, 384, 4, 2, width), packed(2, 384), soft_cap=soft_cap)


def test_oblong_blocks_and_intervals_that_are_not_causal():
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.integers(0, 500, (1, 512)))
    end = jnp.minimum(start + jnp.asarray(rng.integers(1, 90, (1, 512))), 512)
    assert_equal(arrays(1, 512, 2, 1, 64), (start, end), blocks=splash.Blocks(256, 128))


def separate(length, parts):
    """Bounds of a row of equal parts that see only themselves."""
    start = np.arange(length) // (length // parts) * (length // parts)
    return jnp.asarray(start)[None], jnp.asarray(start + length // parts)[None]


def test_blocks_that_no_query_sees_are_not_visited():
    # NaN in the other half's keys and values would come through 0 * NaN if a block of them were computed.
    q, k, v, weight = arrays(1, 512, 2, 2, 64)
    k, v = (x.at[:, 256:].set(jnp.nan) for x in (k, v))
    found = ours(q, k, v, weight.at[:, 256:].set(0.0), *separate(512, 2))
    assert all(np.isfinite(x[:, :256]).all() for x in found)


def test_next_block_is_the_next_that_is_needed():
    visible = jnp.asarray([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    assert splash.next_visible(visible, 1).tolist() == [[1, 1, 3, 3], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert splash.next_visible(visible, 0).tolist() == [[2, 0, 0, 0], [2, 0, 0, 0], [2, 0, 0, 0]]


def test_eight_packed_pairs_visit_a_third_of_what_causal_attention_would():
    rng = np.random.default_rng(0)
    sizes = [(int(rng.integers(120, 260)), int(rng.integers(60, 240))) for _ in range(8)]
    pairs = [Encoded(*(np.ones(n, int) for n in (prompt, c, 512 - prompt - c))) for prompt, c in sizes]
    shape = layout.Shape(pairs=8, rows=1, row_length=4096, microbatches=1)
    batch = layout.collate(pairs, None, shape, layout="shared")
    bounds = jnp.asarray(batch.rows.key_start[0]), jnp.asarray(batch.rows.key_end[0])
    given, causal = splash.visited(*bounds, splash.choose_blocks(4096))
    print(f"{given} blocks of {causal}: {given / causal:.3f}")
    assert given / causal <= 0.35


@pytest.mark.parametrize("length", [1000, 2**15])
def test_rows_that_the_kernel_cannot_take_are_refused(length):
    x, i = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
    with pytest.raises(ValueError, match=f"not of {length}"):
        jax.eval_shape(splash.attention, x, x, x, i, i)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_update_compiles_for_tpus(topology, width):
    # Forward and backward of 4 query heads to a key head, rows and heads cut across four chips.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    topologies = pytest.importorskip("jax.experimental.topologies")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        pytest.skip(f"no TPU compiler here: {error}")
    mesh = Mesh(np.array(found[:4]).reshape(1, 2, 2), ("replica", "fsdp", "tensor"))
    spread = attention.Spread(mesh, ("replica", "fsdp"), "tensor")
    attend = attention.make_attention("splash", platform="tpu", spread=spread)
    step = jax.grad(lambda q, k, v, *bounds: attend(q, k, v, *bounds).astype(jnp.float32).sum(), (0, 1, 2))

    def shaped(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    heads = ("fsdp", None, "tensor")
    q, k = (shaped((4, 2048, n, width), jnp.bfloat16, *heads) for n in (16, 4))
    bounds = [shaped((4, 2048), jnp.int32, "fsdp")] * 2
    memory = jax.jit(step).lower(q, k, k, *bounds).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 2**30
