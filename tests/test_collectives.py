"""Collectives of hand-written programs, and of compiled ones whose traffic has a closed form."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax import parallel, sharding
from dpo_jax.cost import collectives
from dpo_jax.cost.collectives import Collective
from dpo_jax.models import decoder
from dpo_jax.models.config import DecoderConfig

# A loop that the compiler has counted, in one that only the data counts; a gather in two steps; a sum of two arrays.
LAYERS = """HloModule jit_f, is_scheduled=true, num_partitions=8, entry_computation_layout={(f32[4])->f32[4]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%gather.body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %w = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %all-gather-start = (f32[8,16]{1,0:T(8,128)}, f32[64,16]{1,0:T(8,128)}) all-gather-start(%w), channel_id=1, \
replica_groups=[1,8]<=[8], dimensions={0}, metadata={op_name="jit(f)/layers/ni,if->nf"}
  %all-gather-done = f32[64,16]{1,0:T(8,128)} all-gather-done(%all-gather-start)
  ROOT %next = (s32[], f32[8,16]{1,0}) tuple(%i, %w)
}

%gather.condition (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %lt = pred[] fusion(%p), kind=kLoop, calls=%wrapped_compare
}

%micro.body (p: (s32[], s32[], f32[8,16])) -> (s32[], s32[], f32[8,16]) {
  %p = (s32[], s32[], f32[8,16]{1,0}) parameter(0)
  %layers = (s32[], f32[8,16]{1,0}) while(%start), condition=%gather.condition, body=%gather.body, \
backend_config={"known_trip_count":{"n":"32"},"known_init_step":{"init":"0","step":"1"}}
  %all-reduce = (bf16[2,16]{1,0}, /*index=1*/f32[]) all-reduce(%x, %y), replica_groups={{0,1,2,3},{4,5,6,7}}, \
to_apply=%add
  ROOT %next = (s32[], s32[], f32[8,16]{1,0}) tuple(%i, %n, %g)
}

%micro.condition (p: (s32[], s32[], f32[8,16])) -> pred[] {
  %p = (s32[], s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %done = (s32[], s32[], f32[8,16]{1,0}) while(%first), condition=%micro.condition, body=%micro.body
  %norm = f32[]{:T(128)} all-reduce(%square), replica_groups={}, to_apply=%add
  ROOT %out = f32[4]{0} copy(%x)
}
"""

# As libtpu writes a gather that goes round a ring while it is multiplied; the counter goes from 2 to 8 in steps of 2.
RING = """HloModule jit_g, num_partitions=4

%body (p: (f32[4,2], u32[])) -> (f32[4,2], u32[]) {
  %p = (f32[4,2]{1,0}, u32[]) parameter(0)
  %two = u32[] constant(2)
  %i = u32[] get-tuple-element(%p), index=1
  %copy = u32[] copy(%i)
  %next = u32[] add(%copy, %two)
  %part = f32[4,2]{1,0} get-tuple-element(%p), index=0
  %collective-permute-start.1 = (f32[4,2]{1,0}, f32[4,2]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%part), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %collective-permute-done.1 = f32[4,2]{1,0} collective-permute-done(%collective-permute-start.1)
  ROOT %out = (f32[4,2]{1,0}, u32[]) tuple(%collective-permute-done.1, %next)
}

%condition (p: (f32[4,2], u32[])) -> pred[] {
  %p = (f32[4,2]{1,0}, u32[]) parameter(0)
  %eight = u32[]{:T(128)} constant(8), metadata={op_name="jit(g)"}
  %i = u32[] get-tuple-element(%p), index=1
  ROOT %compare = pred[] compare(%i, %eight), direction=LT
}

ENTRY %main (x: f32[4,2]) -> f32[4,2] {
  %x = f32[4,2]{1,0} parameter(0)
  %first = u32[] constant(2)
  %start = u32[] copy(%first)
  %tuple = (f32[4,2]{1,0}, u32[]) tuple(%x, %start)
  ROOT %while = (f32[4,2]{1,0}, u32[]) while(%tuple), condition=%condition, body=%body
}
"""

# One gather that libtpu overlaps with two products; a conditional; a wrapped scatter; a sum over slices.
FUSED = """HloModule jit_h, num_partitions=8

%start (a: bf16[2,8]) -> bf16[16,8] {
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%a), replica_groups=[1,8]<=[8], frontend_attributes={chain_id="0"}
}

%step (a: bf16[2,8]) -> bf16[16,8] {
  ROOT %all-gather.2 = bf16[16,8]{1,0} all-gather(%a), replica_groups=[1,8]<=[8], frontend_attributes={chain_id="0"}
}

%async (x: f32[16]) -> f32[2] {
  ROOT %reduce-scatter = f32[2]{0} reduce-scatter(%x), replica_groups=[1,8]<=[8], to_apply=%add
}

%left (x: f32[4]) -> f32[4] {
  ROOT %left.sum = f32[4]{0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add
}

%right (x: f32[4]) -> f32[4] {
  ROOT %right.to.all = (f32[2]{0}, f32[2]{0}) all-to-all(%x, %y), replica_groups={{0,1},{2,3},{4,5},{6,7}}
}

ENTRY %main (a: bf16[2,8]) -> f32[4] {
  %a = bf16[2,8]{1,0} parameter(0)
  %fusion.1 = bf16[16,8]{1,0} fusion(%a), kind=kCustom, calls=%start
  %fusion.2 = bf16[16,8]{1,0} fusion(%a, %fusion.1), kind=kCustom, calls=%step
  %scatter = ((f32[16]{0}), f32[2]{0}, u32[]) async-start(%x), calls=%async
  %scatter.done = f32[2]{0} async-done(%scatter), calls=%async
  %send.5 = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}, token[]) send(%y, %after), channel_id=2, \
is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %choice = f32[4]{0} conditional(%which, %l, %r), branch_computations={%left, %right}
}
"""


def summary(text, **options):
    return [(c.kind, c.bytes_in, c.bytes_out, c.times) for c in collectives.collectives(text, **options)]


def test_loops_multiply_and_combined_arrays_add_up():
    assert summary(LAYERS, unknown_trips=5) == [
        ("all-gather", 8 * 16 * 4, 64 * 16 * 4, 32 * 5),
        ("all-reduce", 2 * 16 * 2 + 4, 2 * 16 * 2 + 4, 5),
        ("all-reduce", 4, 4, 1),
    ]
    gather, both, norm = collectives.collectives(LAYERS)
    assert gather.source == "jit(f)/layers/ni,if->nf" and gather.shape == "f32[64,16]"
    assert both.groups == ((0, 1, 2, 3), (4, 5, 6, 7)) and norm.groups == (tuple(range(8)),)


def test_trips_are_read_from_the_counter_where_the_compiler_does_not_say():
    assert summary(RING, unknown_trips=100) == [("collective-permute", 32, 32, 3)]


def test_a_collective_in_pieces_counts_once_and_what_is_wrapped_is_found():
    assert summary(FUSED) == [
        ("all-gather", 2 * 8 * 2, 16 * 8 * 2, 1),
        ("reduce-scatter", 16 * 4, 2 * 4, 1),
        ("all-reduce", 256 * 8 * 128 * 2, 256 * 8 * 128 * 2, 1),
        ("all-reduce", 16, 16, 1),
        ("all-to-all", 16, 16, 1),
    ]
    over = [c for c in collectives.collectives(FUSED) if c.over_slices]
    assert [c.groups for c in over] == [((1, 2),)]
    assert collectives.bytes_across(over[0], lambda device: 0) == over[0].bytes_sent == 256 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['x'=2,'y'=2] {'y'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['x'=2,'y'=2] {'y','x'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['x'=8] {'x':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_groups_are_read_in_every_form(written, groups):
    text = f"""HloModule m, num_partitions=4

ENTRY %main (x: f32[4]) -> f32[4] {{
  ROOT %r = f32[4]{{0}} all-reduce(%x), {written}, to_apply=%add
}}
"""
    (found,) = collectives.collectives(text)
    assert {tuple(sorted(group)) for group in found.groups} == {tuple(sorted(group)) for group in groups}


def of(kind, into, out, *groups):
    return Collective(kind, "", into, out, groups, 1, "")


@pytest.mark.parametrize(
    ("found", "sent"),
    [
        (of("all-gather", 10, 40, (0, 1, 2, 3)), 30),
        (of("reduce-scatter", 40, 10, (0, 1, 2, 3)), 30),
        (of("all-reduce", 40, 40, (0, 1, 2, 3)), 60),
        (of("all-to-all", 40, 40, (0, 1, 2, 3)), 30),
        (of("collective-permute", 40, 40, (0, 1), (1, 0)), 40),
        (of("all-reduce", 40, 40, (0,), (1,)), 0),
    ],
)
def test_bytes_sent_are_those_of_a_ring(found, sent):
    assert found.bytes_sent == sent


@pytest.mark.parametrize(
    ("found", "across"),
    [
        (of("all-reduce", 40, 40, (0, 1, 2, 3)), 20),  # a half is summed with the other slice's: 10 out, 10 back
        (of("all-gather", 10, 40, (0, 1, 2, 3)), 10),  # its own part, once
        (of("reduce-scatter", 40, 10, (0, 1, 2, 3)), 10),
        (of("all-to-all", 40, 40, (0, 1, 2, 3)), 20),
        (of("collective-permute", 40, 40, (1, 2)), 40),
        (of("all-reduce", 40, 40, (0, 2), (1, 3)), 40),
        (of("all-reduce", 40, 40, (0, 1), (2, 3)), 0),  # stays in its slice
    ],
)
def test_bytes_across_slices_of_two(found, across):
    slice_of = {0: 0, 1: 0, 2: 1, 3: 1}.__getitem__
    assert collectives.bytes_across(found, slice_of) == across
    assert collectives.crosses(found, slice_of) == (across > 0)


@pytest.mark.parametrize("layers", [3, 6])
def test_weights_of_a_scan_are_gathered_once_a_layer_and_microbatch(layers):
    mesh = jax.make_mesh((2, 4), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def place(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    def forward(w, x, microbatches):
        def one(i, total):
            return total + jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x + i, w)[0].sum()

        return jax.lax.fori_loop(0, microbatches, one, 0.0)

    w, x = place((layers, 64, 64), None, "fsdp"), place((32, 64), ("replica", "fsdp"))
    text = jax.jit(forward).lower(w, x, jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    assert text is not None
    found = collectives.collectives(text, unknown_trips=7)
    gathers = [c for c in found if c.kind == "all-gather"]
    assert sum(c.times for c in gathers) == 7 * layers
    assert sum(c.times * c.bytes_sent for c in gathers) == 7 * layers * 64 * 64 * 4 * 3 / 4
    # Devices of a row of the mesh gather together, and a row is a slice.
    assert {tuple(sorted(group)) for c in gathers for group in c.groups} == {(0, 1, 2, 3), (4, 5, 6, 7)}
    assert not any(collectives.crosses(c, lambda device: device // 4) for c in gathers)
    assert any(collectives.crosses(c, lambda device: device // 4) for c in found if c.kind == "all-reduce")


@pytest.mark.parametrize("qk_norm", ["head", pytest.param("all", marks=pytest.mark.slow)])
def test_norms_of_queries_and_keys_gather_no_heads(qk_norm):
    model = DecoderConfig(
        vocab_size=64,
        width=32,
        layers=2,
        heads=8,
        kv_heads=4,
        head_dim=16,
        mlp_width=64,
        max_positions=64,
        qk_norm=qk_norm,
    )
    mesh = sharding.make_mesh(1, 4, 2)
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), model))
    placed = functools.partial(jax.tree.map, lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at))
    params, rows = placed(shapes, sharding.shardings(mesh, shapes)), NamedSharding(mesh, P(sharding.ROW_AXES))
    x = jax.ShapeDtypeStruct((8, 16, 32), jnp.float32, sharding=rows)
    index = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=rows)
    shardings = functools.partial(parallel.kernel_sharding, model, mesh, sharding.RULES)
    options = decoder.BlockOptions(kernel_shardings=shardings)

    def loss(params, x, *index):
        return decoder.hidden_states(params, model, x, *index, options=options)[0].sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(params, x, index, index, index).compile().as_text()
    assert text is not None
    gathers = [c for c in collectives.collectives(text) if c.kind == "all-gather"]
    assert gathers  # of kernels, over `fsdp`
    assert {tuple(sorted(group)) for c in gathers for group in c.groups} == {(0, 2, 4, 6), (1, 3, 5, 7)}
