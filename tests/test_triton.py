import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from dpo_jax.data.layout import collate
from dpo_jax.data.packing import Shape
from dpo_jax.models.attention.blockwise import visible_blocks
from dpo_jax.models.attention.triton import Blocks, Tile, attention, choose_blocks, visits
from dpo_jax.types import Encoded, InputError

WIDTHS = (64, 80, 96, 128, 256)
SMALL = Blocks(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2))  # no two sides are alike
EVEN = Blocks(*[Tile(16, 16, 4, 2)] * 3)


def packed_bounds(length, lengths=((9, 14, 11), (20, 8, 17), (5, 3, 30), (12, 6, 6)), rows=2, layout="shared"):
    """Bounds of packed pairs, given token counts of prompt, chosen and rejected; unused positions are padding."""
    pairs = [Encoded.of(*(np.arange(1, n + 1) for n in pair)) for pair in lengths]
    shape = Shape(pairs=len(pairs), rows=rows, row_length=length, microbatches=-(-len(pairs) // rows), layout=layout)
    packed = collate(pairs, None, shape).rows
    return packed.key_start[0], packed.key_end[0]


def any_bounds(rows, length, seed=0):
    """Random intervals, neither causal nor packed."""
    ends = np.sort(np.random.default_rng(seed).integers(0, length, (2, rows, length)).astype(np.int32), axis=0)
    return ends[0], ends[1] + 1


def arrays(bounds, *, heads, kv_heads, width, dtype=jnp.float32, seed=0):
    """Returns q (not scaled), k, v, and a cotangent, for rows with the given bounds."""
    rng = np.random.default_rng(seed)
    q, k, v, grad = (rng.normal(size=(*bounds[0].shape, n, width)) for n in (heads, kv_heads, kv_heads, heads))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v, grad))


def dense(q, k, v, key_start, key_end, *, soft_cap=None):
    """Dense attention by its definition, in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("rqhd,rkhd->rhqk", q, k, precision="highest")
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    keys = jnp.arange(q.shape[1])[None, None]
    seen = (keys >= key_start[..., None]) & (keys < key_end[..., None])
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
    return jnp.einsum("rhqk,rkhd->rqhd", weights, v, precision="highest")


def out_and_grads(function, inputs, bounds):
    """out, dq, dk, dv for inputs (q, k, v, cotangent); bounds are traced."""

    @jax.jit
    def run(q, k, v, grad, key_start, key_end):
        scale = q.shape[-1] ** -0.5
        out, pull = jax.vjp(lambda q, k, v: function(q * scale, k, v, key_start, key_end), q, k, v)
        return out, *pull(grad.astype(out.dtype))

    return run(*inputs, *map(jnp.asarray, bounds))


def assert_same(inputs, bounds, *, blocks=SMALL, soft_cap=None):
    kernel = functools.partial(attention, blocks=blocks, soft_cap=soft_cap, interpret=True)
    got = out_and_grads(kernel, inputs, bounds)
    want = out_and_grads(functools.partial(dense, soft_cap=soft_cap), inputs, bounds)
    for name, one, other in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("width", [w if w in (64, 80) else pytest.param(w, marks=pytest.mark.slow) for w in WIDTHS])
def test_packed_pairs_match_dense_for_each_head_width(width):
    bounds = packed_bounds(96)
    assert (bounds[1] - bounds[0] == 1).any(), "some padding"
    assert_same(arrays(bounds, heads=4, kv_heads=2, width=width), bounds)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (3, 1), pytest.param(14, 2, marks=pytest.mark.slow)])
def test_groups_of_any_size_match_dense(heads, kv_heads):
    bounds = packed_bounds(64, rows=4)
    assert_same(arrays(bounds, heads=heads, kv_heads=kv_heads, width=16), bounds)


def test_soft_cap_matches_dense():
    bounds = packed_bounds(96)
    q, *others = arrays(bounds, heads=2, kv_heads=1, width=16)
    assert_same((4 * q, *others), bounds, soft_cap=1.5)  # scores that the cap bends


def test_repeated_layout_matches_dense():
    bounds = packed_bounds(128, layout="repeated")
    assert_same(arrays(bounds, heads=2, kv_heads=1, width=16), bounds)


def test_intervals_without_order_in_rows_that_no_tile_divides_match_dense():
    bounds = any_bounds(2, 72)
    assert_same(arrays(bounds, heads=4, kv_heads=2, width=16), bounds)


def test_own_tiles_match_dense():
    bounds = packed_bounds(128)
    assert_same(arrays(bounds, heads=2, kv_heads=1, width=64), bounds, blocks=choose_blocks(64, jnp.float32))


def test_bfloat16_is_near_dense():
    bounds = packed_bounds(128)
    inputs = arrays(bounds, heads=2, kv_heads=1, width=64, dtype=jnp.bfloat16)
    got = out_and_grads(functools.partial(attention, interpret=True), inputs, bounds)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    assert_near(got, out_and_grads(dense, inputs, bounds), 1e-2)


def assert_near(got, want, tolerance):
    for name, one, other in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert error < tolerance, f"{name}: {error:.2e} of the norm"


def test_blocks_without_a_visible_key_are_not_read():
    # Even queries see the first 16 keys, odd ones the last 16: the hull of every block of queries is the whole row.
    index = np.arange(64)[None]
    bounds = np.where(index % 2, 48, 0).astype(np.int32), np.where(index % 2, 64, 16).astype(np.int32)
    q, k, v, grad = arrays(bounds, heads=2, kv_heads=1, width=16)
    kernel = functools.partial(attention, blocks=EVEN, interpret=True)
    clean = out_and_grads(kernel, (q, k, v, grad), bounds)
    spoilt = out_and_grads(kernel, (q, k.at[:, 16:48].set(jnp.nan), v.at[:, 16:48].set(jnp.nan), grad), bounds)
    for one, other in zip(spoilt, clean, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not spoilt[2][:, 16:48].any() and not spoilt[3][:, 16:48].any(), "no query moves these keys"


def test_tokens_of_one_pair_do_not_affect_another():
    # The first pair takes 31 + 2 + 31 = 64 positions, exactly four blocks, so no block holds tokens of both pairs.
    bounds = packed_bounds(128, ((2, 32, 32), (10, 20, 20)), rows=1)
    inputs = arrays(bounds, heads=2, kv_heads=1, width=16)
    kernel = functools.partial(attention, blocks=EVEN, interpret=True)
    clean = out_and_grads(kernel, inputs, bounds)
    spoilt = out_and_grads(kernel, tuple(x.at[:, 64:].set(jnp.nan) for x in inputs), bounds)
    for one, other in zip(spoilt, clean, strict=True):
        np.testing.assert_array_equal(one[:, :64], other[:, :64])
        assert np.isnan(one[:, 64:112]).any()


@pytest.mark.parametrize("bounds", [packed_bounds(96), any_bounds(3, 96)], ids=["packed", "any"])
def test_visits_list_each_visible_block_once(bounds):
    start, end = bounds
    visible = np.zeros((len(start), 3, 6), bool)
    for row, query in np.ndindex(*start.shape):
        visible[row, query // 32, start[row, query] // 16 : (end[row, query] - 1) // 16 + 1] = True
    for seen, listed in (
        (visible, visits(visible_blocks(jnp.asarray(start), jnp.asarray(end), 32, 16))),
        (visible.swapaxes(1, 2), visits(jnp.asarray(visible).swapaxes(1, 2))),
    ):
        for at in np.ndindex(*seen.shape[:2]):
            np.testing.assert_array_equal(listed.blocks[at][: listed.count[at]], np.flatnonzero(seen[at]))


def test_packed_rows_visit_far_fewer_blocks_than_causal_rows():
    # A pair takes four blocks: the chosen one visits 3, the prompt's visit 1 and 2, the rejected one visits 3.
    start, end = map(jnp.asarray, packed_bounds(1024, [(128, 65, 65)] * 4, rows=1))
    count = visits(visible_blocks(start, end, 64, 64)).count
    np.testing.assert_array_equal(count[0], [3, 1, 2, 3] * 4)  # 36; a causal row would have 136


def test_runs_in_a_map_on_each_shard_of_a_mesh():
    bounds = packed_bounds(64, rows=4)
    kernel = functools.partial(attention, blocks=EVEN, interpret=True)
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("rows", "heads"))
    head_spec, row_spec = PartitionSpec("rows", None, "heads"), PartitionSpec("rows")
    sharded = jax.shard_map(
        kernel, mesh=mesh, in_specs=(*[head_spec] * 3, row_spec, row_spec), out_specs=head_spec, check_vma=False
    )

    def mapped(function):
        def run(*args):
            twice = tuple(jnp.stack([x, x]) for x in args)
            return jax.lax.map(lambda one: function(*one), twice).mean(0)

        return run

    inputs = arrays(bounds, heads=4, kv_heads=2, width=16)
    got, want = (out_and_grads(mapped(function), inputs, bounds) for function in (sharded, dense))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_saved_result_is_not_recomputed():
    bounds = packed_bounds(64, rows=4)
    q, k, v, _ = arrays(bounds, heads=2, kv_heads=1, width=16)
    start, end = map(jnp.asarray, bounds)
    kernel = functools.partial(attention, blocks=EVEN, interpret=True)

    def calls(policy):
        rematerialized = jax.checkpoint(lambda q: kernel(q, k, v, start, end).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(rematerialized))(q)).count("pallas_call[")

    assert calls(jax.checkpoint_policies.save_only_these_names("attention")) == 3
    assert calls(jax.checkpoint_policies.nothing_saveable) == 4


@pytest.mark.parametrize("width, dtype", [(320, jnp.bfloat16), (64, jnp.float64)])
def test_heads_that_no_tiling_is_for_are_refused(width, dtype):
    with pytest.raises(InputError, match="heads of at most 256"):
        choose_blocks(width, dtype)


def hopper():
    """Context that lowers for an H100 on a machine without one; skips if this version of jax cannot."""
    try:
        device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="cuda")
        return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
    except (AttributeError, TypeError, ValueError) as error:
        pytest.skip(f"jax {jax.__version__} cannot lower for an absent GPU: {error}")


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("width", (16, *WIDTHS))
def test_lowers_for_cuda_without_a_gpu(width, dtype):
    bounds = [jax.ShapeDtypeStruct((2, 1000), jnp.int32)] * 2
    inputs = [jax.ShapeDtypeStruct((2, 1000, heads, width), dtype) for heads in (12, 4, 4)]

    def grads(q, k, v, key_start, key_end):
        _, pull = jax.vjp(lambda q, k, v: attention(q, k, v, key_start, key_end, soft_cap=30.0), q, k, v)
        return pull(q)

    with hopper():
        lowered = jax.jit(grads).trace(*inputs, *bounds).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@__gpu$xla.gpu.triton") == 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 1e-2), ("float16", 2e-3), ("float32", 1e-5)])
@pytest.mark.parametrize("width", WIDTHS)
def test_compiled_kernels_match_dense(width, dtype, tolerance):
    lengths = [(150, 90, 120), (80, 200, 40), (30, 60, 60), (300, 100, 20)]
    for bounds in (packed_bounds(640, lengths), any_bounds(2, 328)):
        inputs = arrays(bounds, heads=6, kv_heads=2, width=width, dtype=jnp.dtype(dtype))
        assert_near(out_and_grads(attention, inputs, bounds), out_and_grads(dense, inputs, bounds), tolerance)


@pytest.mark.gpu
def test_compiled_soft_cap_matches_dense():
    bounds = packed_bounds(640, [(150, 90, 120), (80, 200, 40)])
    q, *others = arrays(bounds, heads=6, kv_heads=2, width=64)
    got, want = (
        out_and_grads(functools.partial(function, soft_cap=1.5), (4 * q, *others), bounds)
        for function in (attention, dense)
    )
    assert_near(got, want, 1e-5)
