"""Exports: bit-exact, whole or not at all, and never over anything they did not write."""

import collections
import functools
import json
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from dpo_jax import trees
from dpo_jax.hf import checkpoints, folders
from dpo_jax.hf.checkpoints import WriteOptions
from dpo_jax.types import InputError
from tests.support.hf_folders import (
    CONFIG,
    CONFIGS,
    FILE,
    INDEX,
    LLAMA,
    assert_same,
    edit_weights,
    load,
    save,
    snapshot,
)

both_families = pytest.mark.parametrize("hf", CONFIGS.values(), ids=CONFIGS)


def export(leaves, base, out, **options):
    checkpoints.export(trees.nest(leaves), base=base, out=out, options=WriteOptions(**options))


@both_families
def test_import_then_export_is_bit_exact_with_mixed_types(tmp_path, hf):
    """Each tensor keeps its own type, through float32 parameters."""
    save(tmp_path / "base", hf)

    def mix(tensors):
        for i, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].astype(("float32", ml_dtypes.bfloat16, "float16")[i % 3])

    edit_weights(tmp_path / "base", mix)
    params = trees.nest(load(tmp_path / "base"))
    checkpoints.export(params, base=tmp_path / "base", out=tmp_path / "out")
    # Whole files: the same bytes as the safetensors library's own.
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "base" / FILE).read_bytes()
    assert json.loads((tmp_path / "out" / CONFIG).read_text()) == json.loads((tmp_path / "base" / CONFIG).read_text())


def test_export_takes_jax_arrays(tmp_path):
    leaves = save(tmp_path / "base")
    checkpoints.export(jax.tree.map(jnp.asarray, trees.nest(leaves)), base=tmp_path / "base", out=tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "base")


@both_families
def test_export_takes_arrays_spread_over_devices(tmp_path, hf):
    leaves = save(tmp_path / "base", hf)
    params = jax.device_put(trees.nest(leaves), spread(leaves))
    checkpoints.export(params, base=tmp_path / "base", out=tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "base")


def spread(leaves):
    """A sharding for each leaf, as `trees.nest` nests them: its last axes over eight devices, where they divide."""
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    last = {1: ("y",), 2: ("y", "x"), 3: (None, "x", "y"), 4: (None, "x", "y", None)}
    specs = {
        path: [axis if size % 4 == 0 else None for axis, size in zip(last[x.ndim], x.shape, strict=True)]
        for path, x in leaves.items()
    }
    return trees.nest({path: NamedSharding(mesh, PartitionSpec(*spec)) for path, spec in specs.items()})


def test_array_shared_with_other_processes_is_copied_a_layer_at_a_time(tmp_path, monkeypatch, caplog):
    """Of those a test in one process has none: here every array says that it is one."""
    leaves = save(tmp_path / "base")
    params = jax.device_put(trees.nest(leaves), spread(leaves))
    copied, copier = [], checkpoints.copier

    def counting(mesh):
        return lambda array, layer: copied.append(copier(mesh)(array, layer)) or copied[-1]

    monkeypatch.setattr(checkpoints, "copier", counting)
    monkeypatch.setattr(type(params["embed"]["embedding"]), "is_fully_addressable", property(lambda self: False))
    jax.config.update("jax_log_compiles", True)
    try:
        checkpoints.export(params, base=tmp_path / "base", out=tmp_path / "out")
    finally:
        jax.config.update("jax_log_compiles", False)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "base")
    layers = 3
    assert len(copied) == sum(layers if path.startswith("blocks") else 1 for path in leaves)
    assert all(x.is_fully_replicated and len(x.addressable_shards) == 8 for x in copied)
    assert max(x.size for x in copied) == leaves["embed/embedding"].size
    assert 0 < caplog.text.count("Compiling jit(copy)") <= len(leaves)  # one program serves all layers


# Many hosts.


def exporting(leaves, folder, **options):
    return functools.partial(export, leaves, folder / "base", folder / "out", **options)


def from_hosts(count, export):
    """Exports as `count` hosts at once, each a thread; returns the names each has waited for, and its errors."""
    barrier, waits, errors = threading.Barrier(count), [[] for _ in range(count)], [None] * count

    def run(index):
        def wait(name):
            waits[index].append(name)
            barrier.wait(60)

        try:
            export(hosts=checkpoints.Hosts(index, count, wait))
        except BaseException as error:
            errors[index] = error
            barrier.abort()  # as the others' barriers fail when a process dies

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return waits, errors


@pytest.mark.parametrize("count", [2, 3, 30])
def test_export_shared_by_hosts_is_that_of_one(tmp_path, count):
    """Also where there are more hosts than files."""
    leaves = folder_with_tokenizer(tmp_path / "base")
    export = exporting(leaves, tmp_path, card="# A model\n", max_shard_bytes=4000)
    export()
    one = snapshot(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    waits, errors = from_hosts(count, export)
    assert errors == [None] * count
    assert waits == [["export: folder made", "export: files written"]] * count
    assert snapshot(tmp_path / "out") == one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_hosts_write_files_in_turn(tmp_path, monkeypatch):
    leaves = save(tmp_path / "base")
    written = collections.defaultdict(list)
    real = folders.write_file

    def write_file(path, *arguments):
        written[threading.current_thread().name].append(path.name)
        real(path, *arguments)

    monkeypatch.setattr(folders, "write_file", write_file)
    _, errors = from_hosts(3, exporting(leaves, tmp_path, max_shard_bytes=4000))
    assert errors == [None] * 3
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(written.values()) == [names[0::3], names[1::3], names[2::3]]


@pytest.mark.parametrize("failing", [0, 1])
def test_failure_of_one_host_leaves_the_old_export(tmp_path, monkeypatch, failing):
    leaves = save(tmp_path / "base")
    export(leaves, tmp_path / "base", tmp_path / "out", card="old")
    before = snapshot(tmp_path / "out")
    real = folders.write_file

    def write_file(path, *arguments):
        if path.name.startswith(f"model-{failing + 3:05d}"):  # the second file of that host
            raise OSError("No space left on device")
        real(path, *arguments)

    monkeypatch.setattr(folders, "write_file", write_file)
    _, errors = from_hosts(2, exporting(leaves, tmp_path, max_shard_bytes=4000))
    assert "No space left" in str(errors[failing]) and all(errors)
    assert snapshot(tmp_path / "out") == before
    # Where host 0 fails, the other may still be writing into the hidden folder that is being deleted.
    assert sorted(path.name for path in tmp_path.iterdir() if failing or path.name[0] != ".") == ["base", "out"]


def test_what_killed_hosts_left_behind_is_replaced(tmp_path):
    leaves = save(tmp_path / "base")
    (tmp_path / ".out.new-shared").mkdir()
    (tmp_path / ".out.new-shared" / "model-00001-of-00009.safetensors").write_text("half")
    _, errors = from_hosts(2, exporting(leaves, tmp_path))
    assert errors == [None] * 2
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_export_in_another_type_says_so_in_config(tmp_path):
    leaves = save(tmp_path / "base")
    export(leaves, tmp_path / "base", tmp_path / "out", dtype="bfloat16")
    assert {t.dtype.name for t in load_file(tmp_path / "out" / FILE).values()} == {"bfloat16"}
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["torch_dtype"] == "bfloat16"
    back = load(tmp_path / "out", dtype="bfloat16")
    assert_same(back, {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in leaves.items()})


def test_config_keeps_the_key_it_names_its_type_by():
    assert checkpoints.with_dtype({"dtype": "float32"}, "float16") == {"dtype": "float16"}
    assert checkpoints.with_dtype({"torch_dtype": "float32"}, "float16") == {"torch_dtype": "float16"}


def test_numbers_too_large_for_the_type_are_refused(tmp_path):
    """float16 ends at 65504: an infinity in its place would be a broken model."""
    leaves = save(tmp_path / "base")
    leaves["final_norm/scale"][0] = 1e5
    with pytest.raises(InputError, match="model.norm.weight.*beyond the range of float16"):
        export(leaves, tmp_path / "base", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    export(leaves, tmp_path / "base", tmp_path / "out")
    with pytest.raises(InputError, match="model.norm.weight.*beyond the range of float16"):
        load(tmp_path / "out", dtype="float16")


def folder_with_tokenizer(folder, hf=LLAMA):
    leaves = save(folder, hf)
    (folder / "tokenizer.json").write_text("base")
    (folder / "chat_template.jinja").write_text("base")
    (folder / "generation_config.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("base")
    (folder / "modeling_llama.py").write_text("import os")
    return leaves


def test_export_copies_the_small_files_and_no_code(tmp_path):
    leaves = folder_with_tokenizer(tmp_path / "base")
    export(leaves, tmp_path / "base", tmp_path / "deep" / "out", card="# A model\n")
    written = {str(path): data for path, data in snapshot(tmp_path / "deep" / "out").items()}
    assert written.keys() == {
        "README.md",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert written["README.md"] == b"# A model\n"


def test_export_takes_the_tokenizer_from_its_own_folder(tmp_path):
    leaves = folder_with_tokenizer(tmp_path / "base")
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(InputError, match="no tokenizer files"):
        export(leaves, tmp_path / "base", tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert not (tmp_path / "out").exists()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("other")
    (tmp_path / "tokenizer" / "config.json").write_text("other")
    export(leaves, tmp_path / "base", tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "other"
    assert (tmp_path / "out" / CONFIG).read_text() != "other"
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_export_replaces_an_earlier_one_whole(tmp_path):
    leaves = folder_with_tokenizer(tmp_path / "base")
    base, out = tmp_path / "base", tmp_path / "out"
    export(leaves, base, out, card="old", max_shard_bytes=4000)
    export(leaves, base, out)
    assert not (out / "README.md").exists() and not (out / INDEX).exists()
    assert [path.name for path in out.glob("*.safetensors")] == [FILE]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_failed_export_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    leaves = save(tmp_path / "base")
    base, out = tmp_path / "base", tmp_path / "out"
    export(leaves, base, out, card="old")
    before = snapshot(out)
    calls = []
    write_file = folders.write_file

    def fail_on_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("No space left on device")
        write_file(*arguments)

    monkeypatch.setattr(folders, "write_file", fail_on_the_second)
    with pytest.raises(OSError, match="No space left"):
        export(leaves, base, out, card="new", max_shard_bytes=4000)
    assert len(calls) == 2
    assert snapshot(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_export_that_cannot_take_its_place_puts_the_old_one_back(tmp_path, monkeypatch):
    leaves = save(tmp_path / "base")
    base, out = tmp_path / "base", tmp_path / "out"
    export(leaves, base, out, card="old")
    before = snapshot(out)
    rename = Path.rename

    def fail_on_the_new(path, target):
        if ".new-" in path.name:
            raise OSError("Stale file handle")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_on_the_new)
    with pytest.raises(OSError, match="Stale"):
        export(leaves, base, out, card="new")
    assert snapshot(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_export_through_a_link_replaces_what_it_points_to(tmp_path):
    leaves = save(tmp_path / "base")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for card in ("old", "new"):
        export(leaves, tmp_path / "base", tmp_path / "link", card=card)
    assert (tmp_path / "real" / "README.md").read_text() == "new" and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "link", "real"]


def test_export_refuses_to_replace_what_it_did_not_write(tmp_path):
    leaves = save(tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="thesis.tex"):
        export(leaves, tmp_path / "base", tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_export_refuses_the_folder_it_reads_from(tmp_path):
    leaves = save(tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    with pytest.raises(InputError, match="also the folder read from"):
        export(leaves, tmp_path / "base", tmp_path / "link")


def test_export_names_every_leaf_that_does_not_fit(tmp_path):
    leaves = save(tmp_path / "base")
    leaves["final_norm/bias"] = leaves.pop("final_norm/scale")
    leaves["head/embedding"] = leaves["head/embedding"][1:]
    with pytest.raises(InputError) as error:
        export(leaves, tmp_path / "base", tmp_path / "out")
    assert error.value.got == (
        "missing final_norm/scale [16]; unexpected final_norm/bias; head/embedding is [39, 16], not [40, 16]"
    )
