"""Memory of a process while it loads its part of a checkpoint: in proportion to that part."""

import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import host_memory
from dpo_jax import sharding

MIB = 2**20
PROCESSES = 4


@pytest.mark.slow
def test_processes_load_their_parts_in_bounded_memory(tmp_path):
    total = host_memory.write_checkpoint(tmp_path / "model", width=768, target_bytes=256 * MIB)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > PROCESSES
    found = host_memory.measure(tmp_path, tmp_path / "model", processes=PROCESSES, devices=2, param_dtype="bfloat16")
    for one in found:
        assert total / PROCESSES <= one["kept_bytes"] < 1.01 * total / PROCESSES  # norms are whole everywhere
        # While a leaf is placed it is there twice, and it is read in pieces: a fixed number of MiB more.
        assert one["risen_bytes"] < 1.25 * one["kept_bytes"] + 32 * MIB, one


@pytest.mark.parametrize(
    ("spec", "reads"), [(P(), 1), (P("fsdp"), 2), (P("tensor", "fsdp"), 4), (P(("replica", "fsdp", "tensor")), 8)]
)
def test_part_that_several_devices_hold_is_read_once(spec, reads):
    whole = np.arange(128.0, dtype=np.float32).reshape(16, 8)
    asked = []
    place = NamedSharding(sharding.make_mesh(2, 2, 2), spec)
    found = sharding.from_parts(whole.shape, place, lambda index: asked.append(index) or whole[index])
    assert len(asked) == reads and found.sharding == place
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
