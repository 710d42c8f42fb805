"""Memory of a process while it loads its part of a checkpoint: in proportion to that part."""

import pytest

from benchmarks import host_memory

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
