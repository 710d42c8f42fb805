"""The mesh and the rules that lay parameters across it."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dpo_jax import sharding, steps
from dpo_jax.models import decoder
from dpo_jax.models.config import DecoderConfig
from dpo_jax.optim import make_optimizer
from dpo_jax.types import Batch, InputError

CONFIG = DecoderConfig(
    vocab_size=64,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=64,
    max_positions=64,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    norm="layernorm",
)


@pytest.mark.parametrize(
    ("sizes", "filled"),
    [((1, -1, 1), (1, 8, 1)), ((2, -1, 2), (2, 2, 2)), ((-1, 2, 1), (4, 2, 1)), ((1, 1, 8), (1, 1, 8))],
)
def test_mesh_takes_what_is_left(sizes, filled):
    assert sharding.mesh_shape(sizes, 8) == filled
    assert tuple(sharding.make_mesh(*sizes).shape.values()) == filled


@pytest.mark.parametrize("sizes", [(1, 4, 1), (3, -1, 1), (2, 8, 1)])
def test_mesh_that_does_not_cover_the_devices_is_refused(sizes):
    with pytest.raises(InputError, match="on 8 devices; expected sizes whose product is 8"):
        sharding.mesh_shape(sizes, 8)


def test_every_matrix_and_its_moments_are_sharded_and_no_norm_is():
    mesh = sharding.make_mesh(1, 4, 2)
    tx, _ = make_optimizer(
        name="adamw",
        learning_rate=1e-3,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        clip_norm=0.0,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        total_steps=10,
    )
    state = jax.eval_shape(lambda: steps.init_state(decoder.init(jax.random.key(0), CONFIG), tx))
    placed = jax.tree_util.tree_flatten_with_path(sharding.shardings(mesh, state))[0]
    for path, place in placed:
        name = jax.tree_util.keystr(path)
        cut = {axis for axis in place.spec if axis}
        if "kernel" in name or "embedding" in name:
            assert cut == {"fsdp", "tensor"}, name
        elif "norm" in name:
            assert not cut, name
    assert sum("kernel" in jax.tree_util.keystr(path) for path, _ in placed) == 3 * 7


def test_axis_that_does_not_divide_a_dimension_is_left_out():
    sizes = {"replica": 1, "fsdp": 4, "tensor": 2}
    assert sharding.partition("blocks/attention/k/kernel", (2, 32, 1, 8), sizes) == P(None, "fsdp", None, None)
    assert sharding.partition("embed/embedding", (63, 32), sizes) == P(None, "fsdp")


def test_bytes_of_a_placed_array_are_those_one_device_holds():
    mesh = sharding.make_mesh(1, 8, 1)
    array = jax.device_put(np.zeros((64, 2), np.float32), jax.sharding.NamedSharding(mesh, P("fsdp")))
    assert sharding.bytes_per_device({"a": array}) == 64 * 2 * 4 // 8


def test_rules_of_the_configuration_come_before_the_familys_own():
    rules = sharding.parse_rules("mlp/down/kernel$=-,fsdp,tensor; final_norm = fsdp ")
    sizes = {"replica": 1, "fsdp": 4, "tensor": 2}
    assert sharding.partition("blocks/mlp/down/kernel", (2, 64, 32), sizes, rules) == P(None, "fsdp", "tensor")
    assert sharding.partition("blocks/mlp/up/kernel", (2, 32, 64), sizes, rules) == P(None, "fsdp", "tensor")
    assert sharding.parse_rules("") == sharding.RULES


@pytest.mark.parametrize("text", ["kernel$", "kernel$=fsdp,rows", "(=fsdp", "kernel$=fsdp,fsdp", "=fsdp"])
def test_rule_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="config.mesh.rules"):
        sharding.parse_rules(text)


def test_large_replicated_array_is_named():
    mesh = sharding.make_mesh(1, 8, 1)
    whole, cut = sharding.replicated(mesh), jax.sharding.NamedSharding(mesh, P("fsdp"))
    shape = lambda rows, place: jax.ShapeDtypeStruct((rows, 1024), np.float32, sharding=place)
    tree = {"a": {"large": shape(256, whole), "small": shape(255, whole)}, "cut": shape(256, cut)}
    assert sharding.large_replicated(tree) == {"a/large": 2**20}
    alone = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",), devices=jax.devices()[:1]), P())
    assert sharding.large_replicated({"a": shape(256, alone)}) == {}


def test_every_row_shard_of_one_process_is_here():
    for sizes in ((1, 8, 1), (2, 2, 2), (1, 1, 8)):
        mesh = sharding.make_mesh(*sizes)
        assert sharding.shards_here(mesh) == tuple(range(sharding.row_shards(mesh)))


def batch_of_rows(first, mismatched=None):
    return Batch(
        rows={"tokens": first + np.arange(2 * 8 * 4).reshape(2, 8, 4)},
        count=np.int32(2),
        present=np.ones((2, 3), bool),
        reference=np.zeros((3, 2), np.float32),
        lengths=np.ones((3, 2), np.int32),
        reference_sums={"shared_logps": np.ones((3, 2), np.float32)},
        mismatched=mismatched,
    )


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_rows_of_a_batch_within_a_batch_are_sharded_as_rows(sizes):
    mesh = sharding.make_mesh(*sizes)
    batch = batch_of_rows(0, mismatched=batch_of_rows(1000, mismatched=batch_of_rows(2000)))
    placed, by_rows = sharding.put(batch, mesh), P(None, ("replica", "fsdp"))
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    batches = [placed, placed.mismatched, placed.mismatched and placed.mismatched.mismatched]
    for each in batches:
        assert each is not None
        rows = each.rows["tokens"]
        assert rows.sharding.spec == by_rows
        assert rows.addressable_shards[0].data.shape == (2, 8 // sharding.row_shards(mesh), 4)
        flat = jax.tree.leaves(each._replace(rows=None, mismatched=None))
        assert len(flat) == 5 and all(array.sharding.is_fully_replicated for array in flat)
