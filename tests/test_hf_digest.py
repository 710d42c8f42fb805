"""Digests: what they see, what they do not, and how hosts share the reading."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax.hf import checkpoints
from tests.support.hf_folders import CONFIGS, FILE, INDEX, NEOX, SIZES, count_reads, edit_config, edit_weights, save

both_families = pytest.mark.parametrize("hf", CONFIGS.values(), ids=CONFIGS)


def test_digest_sees_one_bit_but_not_sharding_or_harmless_fields(tmp_path):
    save(tmp_path / "m")
    before = checkpoints.digest(tmp_path / "m")
    # Shards whose names interleave, so that the order of files is not the order of tensors.
    shards, tensors = tmp_path / "shards", load_file(tmp_path / "m" / FILE)
    shutil.copytree(tmp_path / "m", shards)
    (shards / FILE).unlink()
    files = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, shards / file)
    (shards / INDEX).write_text(json.dumps({"weight_map": files}))
    assert checkpoints.digest(shards) == before
    edit_config(tmp_path / "m", transformers_version="9", eos_token_id=7)
    assert checkpoints.digest(tmp_path / "m") == before

    def flip(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"].view("u4")[3, 5] ^= 1

    edit_weights(tmp_path / "m", flip)
    after = checkpoints.digest(tmp_path / "m")
    assert after != before
    edit_weights(tmp_path / "m", flip)
    assert checkpoints.digest(tmp_path / "m") == before


@pytest.mark.parametrize("changes", [dict(rope_theta=2e4), dict(rms_norm_eps=1e-4), dict(hidden_act="gelu")])
def test_digest_sees_the_architecture(tmp_path, changes):
    save(tmp_path / "m")
    before = checkpoints.digest(tmp_path / "m")
    edit_config(tmp_path / "m", **changes)
    assert checkpoints.digest(tmp_path / "m") != before


def test_digest_sees_names_and_types(tmp_path):
    """Two tensors under each other's names are another model, and so are the same numbers in another type."""
    save(tmp_path / "m", NEOX)
    digests = [checkpoints.digest(tmp_path / "m")]
    up = "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight".format

    def swap(tensors):
        tensors[up(0)], tensors[up(1)] = tensors[up(1)], tensors[up(0)]

    edit_weights(tmp_path / "m", swap)
    digests.append(checkpoints.digest(tmp_path / "m"))
    for dtype in (ml_dtypes.bfloat16, np.float16):  # zeros are the same bytes in both
        edit_weights(tmp_path / "m", lambda tensors, dtype=dtype: tensors.update({up(0): np.zeros((24, 16), dtype)}))
        digests.append(checkpoints.digest(tmp_path / "m"))
    assert len(set(digests)) == 4


@both_families
def test_digest_shared_by_hosts_is_that_of_one(tmp_path, monkeypatch, hf):
    """Three hosts, one after another, each reading a third of the tensors; a fourth pass puts theirs together."""
    save(tmp_path / "m", hf, max_shard_bytes=4000)
    alone = checkpoints.digest(tmp_path / "m")
    sizes, hashes, seen = count_reads(monkeypatch), {}, []
    hosts = 3

    def gather(part):
        assert not hashes.keys() & part.keys()
        hashes.update(part)
        return hashes

    for host in range(hosts):
        mine = lambda names, host=host: seen.append(names) or names[host::hosts]
        try:
            assert checkpoints.digest(tmp_path / "m", mine=mine, gather=gather) == alone
        except KeyError:  # not all are there yet
            assert host < hosts - 1
    assert len(hashes) == len(sizes) and sorted(seen[0]) == sorted(hashes)
    assert all(names == seen[0] for names in seen)
    assert checkpoints.digest(tmp_path / "m", mine=lambda names: [], gather=gather) == alone


def test_every_nth_tensor_is_a_fair_share_of_the_reading(tmp_path, monkeypatch):
    """In order of names, GPT-NeoX's biases and weights alternate, and every second one is nearly all or nothing."""
    save(tmp_path / "m", NEOX | SIZES)
    sizes, read = count_reads(monkeypatch), []
    for host in range(2):
        sizes.clear()
        with pytest.raises(KeyError):
            checkpoints.digest(tmp_path / "m", mine=lambda names, host=host: names[host::2])
        read.append(sum(sizes))
    assert max(read) < 1.1 * min(read)
