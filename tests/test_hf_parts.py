"""Parts of leaves: the same numbers as in the whole, for little more reading than they take."""

import struct
import sys
import threading

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from dpo_jax import trees
from dpo_jax.hf import checkpoints, folders, transpose
from dpo_jax.runtime import reading
from dpo_jax.types import InputError
from tests.support.hf_folders import (
    CONFIGS,
    FILE,
    LLAMA,
    NEOX,
    SIZES,
    assert_same,
    count_reads,
    edit_weights,
    load,
    repeat_head,
    save,
)

both_families = pytest.mark.parametrize("hf", CONFIGS.values(), ids=CONFIGS)


@both_families
@pytest.mark.parametrize("piece, gap", [(64, 1), (200, 100), (reading.PIECE, reading.GAP)])
def test_parts_of_a_leaf_are_slices_of_the_whole(tmp_path, monkeypatch, hf, piece, gap):
    """Whichever part is asked for, and whether it is read a few numbers at a time, across gaps or at once."""
    monkeypatch.setattr(reading, "PIECE", piece)
    monkeypatch.setattr(reading, "GAP", gap)
    leaves = save(tmp_path / "m", hf)
    edit_weights(tmp_path / "m", lambda tensors: repeat_head(hf, tensors))
    rng = np.random.default_rng(4)

    def place(path, shape, read):
        full = (slice(None),) * len(shape)
        indices = [full]
        for axis, size in enumerate(shape):  # halves, single numbers and nothing, of one axis
            for part in (slice(size // 2), slice(size // 2, None), slice(size - 1, size), slice(1, 1)):
                indices.append((*full[:axis], part, *full[axis + 1 :]))
        for _ in range(8):
            ends = [sorted(rng.integers(0, size + 1, 2).tolist()) for size in shape]
            indices.append(tuple(slice(*pair) for pair in ends))
        for index in indices:
            part, expected = read(index), leaves[path][index]
            assert part.flags.c_contiguous and part.shape == expected.shape, (path, index)
            assert part.tobytes() == expected.tobytes(), (path, index)

    load(tmp_path / "m", place=place)


@pytest.fixture
def hurried_threads(monkeypatch):
    """Eight threads that take turns after every few steps, so that one is met in the middle of another's work."""
    monkeypatch.setattr(transpose, "THREADS", 8)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_that_read_one_file_at_once_get_what_they_asked_for(tmp_path, hurried_threads):
    """A position of the file that threads have in common, as seek and read have it, would give them one another's."""
    path, count = tmp_path / "numbers", 4096
    path.write_bytes(struct.pack(f"<{count}Q", *range(count)))
    wrong = []

    def read(file, own):
        for at in range(own, count, 8):
            found = struct.unpack("<Q", folders.read_bytes(file, 8 * at, 8))[0]
            if found != at:
                wrong.append((at, found))

    with reading.Ranges(path) as file:
        threads = [threading.Thread(target=read, args=(file, own)) for own in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("family", ["llama", "gpt_neox_tied"])
def test_threads_fill_every_part_of_a_leaf_and_of_a_file(tmp_path, monkeypatch, hurried_threads, family):
    """Again and again, a few numbers at a time: each number is in its place before the leaf is handed out."""
    monkeypatch.setattr(reading, "PIECE", 128)
    monkeypatch.setattr(reading, "GAP", 64)
    monkeypatch.setattr(transpose, "TILE", (3, 5))
    hf = CONFIGS[family] | dict(num_hidden_layers=9)
    leaves = save(tmp_path / "m", hf)
    edit_weights(tmp_path / "m", lambda tensors: repeat_head(hf, tensors))
    for _ in range(2):
        assert_same(load(tmp_path / "m"), leaves)
    checkpoints.export(trees.nest(leaves), base=tmp_path / "m", out=tmp_path / "again")
    assert_same(load(tmp_path / "again"), leaves)


@both_families
def test_shards_on_devices_are_the_same_as_whole_arrays(tmp_path, hf):
    """As in a run, with each host's devices asking for their own parts, here all eight on one host."""
    leaves = save(tmp_path / "m", hf)
    mesh = jax.make_mesh((2, 4), ("x", "y"))

    def place(path, shape, read):
        spec = [axis if size % 4 == 0 else None for axis, size in zip(("x", "y"), shape[-2:], strict=False)]
        spec = (None,) * (len(shape) - len(spec)) + tuple(spec)
        return jax.make_array_from_callback(shape, NamedSharding(mesh, PartitionSpec(*spec)), read)

    loaded = load(tmp_path / "m", dtype="bfloat16", place=place)
    assert any(8 * leaf.addressable_shards[0].data.size == leaf.size for leaf in loaded.values())
    expected = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in leaves.items()}
    assert_same({path: np.asarray(leaf) for path, leaf in loaded.items()}, expected)


WIDE = LLAMA | SIZES | dict(num_key_value_heads=4, head_dim=64)


@pytest.mark.parametrize("hf", [WIDE, NEOX | SIZES], ids=["llama", "gpt_neox"])
def test_part_of_a_leaf_reads_little_more_of_the_files(tmp_path, monkeypatch, hf):
    """Layers, and heads or outputs of a linear map, are rows of the files' tensors, and cost what they hold."""
    monkeypatch.setattr(reading, "GAP", 1024)  # 256 KiB would be all of these tensors
    save(tmp_path / "m", hf)
    sizes = count_reads(monkeypatch)

    def quarter(axis, path, shape, read):
        sizes.clear()
        size = shape[axis]
        part = read(tuple(slice(size // 4, size // 2) if i == axis else slice(0, n) for i, n in enumerate(shape)))
        assert sum(sizes) == part.nbytes == np.prod(shape), path  # in float32 a fourth of four bytes each

    def check(path, shape, read):
        if path.endswith(("kernel", "embedding")):
            quarter(0, path, shape, read)  # layers, or rows of the vocabulary
        if path.endswith("kernel"):
            quarter(3 if path.endswith("o/kernel") else 2, path, shape, read)
            # An axis of inputs is columns: a fourth of each row, and not one call for each.
            sizes.clear()
            read((slice(1, 2), slice(0, shape[1] // 4), *(slice(0, n) for n in shape[2:])))
            assert sum(sizes) <= np.prod(shape[1:]) * 4
            assert len(sizes) <= 1 + np.prod(shape[1:]) * 4 // 512

    load(tmp_path / "m", place=check)
    sizes.clear()
    load(tmp_path / "m")
    total = sum(x.nbytes for x in load_file(tmp_path / "m" / FILE).values())
    assert total <= sum(sizes) < 1.002 * total  # biases of gpt_neox are read across one another


def test_no_more_than_a_piece_is_read_at_a_time(tmp_path, monkeypatch):
    """Neither by loading, nor for the digest, nor where a repeated head is compared."""
    monkeypatch.setattr(reading, "PIECE", 4096)
    monkeypatch.setattr(reading, "GAP", 1024)
    hf = WIDE | dict(tie_word_embeddings=True)
    save(tmp_path / "m", hf)
    edit_weights(tmp_path / "m", lambda tensors: repeat_head(hf, tensors))
    total = sum(x.nbytes for x in load_file(tmp_path / "m" / FILE).values())
    sizes = count_reads(monkeypatch)
    load(tmp_path / "m")
    embedding = 512 * 256 * 4
    assert sum(sizes) == total + embedding and max(sizes) == 4096
    sizes.clear()
    checkpoints.digest(tmp_path / "m")
    assert sum(sizes) == total and max(sizes) == 4096


def test_file_cut_while_it_is_read_is_refused(tmp_path):
    save(tmp_path / "m")
    whole = (tmp_path / "m" / FILE).read_bytes()

    def cut(path, shape, read):
        (tmp_path / "m" / FILE).write_bytes(whole[: len(whole) // 2])
        return checkpoints.whole(path, shape, read)

    with pytest.raises(InputError, match=r"model.safetensors: ends at byte \d+; expected \d+ bytes or more"):
        load(tmp_path / "m", place=cut)
