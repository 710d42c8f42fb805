"""Paths at gs:// and s3:// behave as those on disk, against servers of both protocols; nothing else is a path."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import random
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest

from dpo_jax import commands, config, train
from dpo_jax.reporting.trackers import JsonlWriter
from dpo_jax.run import workdir
from dpo_jax.runtime import buckets, files, reading
from dpo_jax.types import InputError
from tests.support import object_stores, runs
from tests.support.hub import USER, serve


@pytest.fixture(scope="module")
def stores():
    # Not imported: gcsfs reads at its import what is set where a bucket is first named.
    missing = [name for name in ("gcsfs", "s3fs", "gcp_storage_emulator", "moto") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}, of the `test` extra")
    with object_stores.servers():
        yield


@pytest.fixture(params=["gs", "s3"])
def folder(request, stores, tmp_path, monkeypatch):
    """A new folder in a bucket. The working directory is an empty one, and stays so."""
    monkeypatch.chdir(tmp_path)
    yield files.path(f"{request.param}://{object_stores.BUCKET}/{uuid.uuid4().hex}")
    assert not [*tmp_path.iterdir()]


def names(folder):
    """Everything below a folder in a bucket."""
    begin = str(folder).partition("://")[2]
    return sorted(name.removeprefix(begin)[1:] for name in buckets.filesystem(folder).find(str(folder)))


@pytest.mark.parametrize(
    "text", ["hdfs://a/b", "http://a/b", "az://a/b", "file:///a", "gs:/a/b", "s3:/a", "gs://", "s3://../a"]
)
def test_other_schemes_are_refused_before_anything_is_made(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--workdir: .*gs://BUCKET/PATH"):
        files.path(text, "--workdir")
    assert not [*tmp_path.iterdir()]


def test_a_path_on_disk_and_a_hub_id_are_no_scheme(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for text, path in (
        ("a:b/c", "a:b/c"),
        ("owner/name:config:train", "owner/name:config:train"),
        ("~/a", "/home/me/a"),
    ):
        assert str(files.path(text)) == path and not files.in_bucket(files.path(text))


def test_dots_in_a_path_of_a_bucket_are_resolved(stores):
    assert str(files.path("gs://b/run/sft/../inputs/./a")) == "gs://b/run/inputs/a"
    assert str(files.path("s3://b/../../a")) == "s3://b/a"


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    buckets._connect.cache_clear()
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"gcsfs is not installed.*pip install 'dpo-jax\[gcs\]'"):
        files.path("gs://b/run")


def test_a_missing_bucket_is_an_input_error(stores):
    for scheme in ("gs", "s3"):
        with pytest.raises(InputError, match=f"{scheme}://no-such-bucket/run: cannot be written to"):
            files.make_folder(files.path(f"{scheme}://no-such-bucket/run"))


def test_a_folder_is_probed_and_nothing_stays(folder):
    files.make_folder(folder)
    workdir.check_shared(folder)
    assert names(folder) == []


def test_caches_that_are_mapped_into_memory_are_refused_in_a_bucket(stores, monkeypatch):
    monkeypatch.setenv("DPO_JAX_CACHE", "gs://my-bucket/cache")
    with pytest.raises(InputError, match="DPO_JAX_CACHE: .*on disk, since what is in it is mapped into memory"):
        files.cache_folder("pairs")


def test_files_are_replaced_whole_and_read_back(folder):
    for content in (b"old", b"new and longer" * 1000, b""):
        files.write_bytes(folder / "a" / "file", content)
        assert (folder / "a" / "file").read_bytes() == content
    files.write_json(folder / "a.json", {"x": "\u00e9"})
    assert json.loads((folder / "a.json").read_text()) == {"x": "\u00e9"}
    files.remove_folder(folder)
    files.remove_folder(folder)
    assert names(folder) == []


def test_a_folder_counts_once_its_last_object_is_there(folder):
    out = folder / "export"
    with files.replacing_folder(out, last="config.json") as new:
        files.write_text(new / "weights", "1")
        assert not files.has_folder(out, "config.json")
        files.write_text(new / "config.json", "{}")
    assert files.has_folder(out, "config.json")
    with contextlib.suppress(KeyboardInterrupt), files.replacing_folder(out, last="config.json") as new:
        assert names(out) == []
        files.write_text(new / "weights", "2")
        raise KeyboardInterrupt
    assert names(folder) == [], "what failed is deleted"
    files.write_text(out / "left-by-a-killed-run", "")
    with files.replacing_folder(out, last="config.json") as new:
        files.write_text(new / "config.json", "{}")
    assert names(out) == ["config.json"]


def test_what_counts_is_deleted_first(folder, monkeypatch):
    files.write_text(folder / "config.json", "{}")
    files.write_text(folder / "weights", "1")
    monkeypatch.setattr(files, "remove_folder", lambda path: os.kill(os.getpid(), 0) or 1 / 0)
    with pytest.raises(ZeroDivisionError), files.replacing_folder(folder, last="config.json"):
        pass
    assert names(folder) == ["weights"]


def test_rows_of_a_log_are_there_after_a_flush_and_later_ones_are_dropped_on_resuming(folder):
    def steps():
        return [row["step"] for row in workdir.read_rows(folder / "metrics.jsonl")]

    with JsonlWriter(folder / "metrics.jsonl") as log:
        for step in range(3):
            log.write(step, {"loss": step / 3})
        assert steps() == [], "an object cannot grow: it is written at intervals"
        log.flush()
        assert steps() == [0, 1, 2]
        log.write(3, {})
    assert steps() == [0, 1, 2, 3]
    with JsonlWriter(folder / "metrics.jsonl") as log:
        log.truncate_after(1)
        log.write(2, {"loss": 1.0})
    assert steps() == [0, 1, 2]


def test_a_log_is_rewritten_at_intervals(folder, monkeypatch):
    monkeypatch.setattr(files, "REWRITE_S", 0.0)
    with JsonlWriter(folder / "metrics.jsonl") as log:
        log.write(0, {})
        assert len(workdir.read_rows(folder / "metrics.jsonl")) == 1


def test_parts_of_a_file_are_read_by_their_bytes(folder):
    content = np.random.default_rng(0).bytes(100_000)
    files.write_bytes(folder / "file", content)
    with reading.Ranges(folder / "file") as file:
        assert file.size == len(content)
        for start, count in ((0, 8), (99_990, 100), (100_000, 5), (50, 0), (1, 99_999)):
            assert file.read(start, count) == content[start : start + count]


def test_patterns_name_files_in_order(folder):
    for name in ("b/train-1.jsonl", "b/train-0.jsonl", "b/test-0.jsonl", "c/d/train-2.jsonl"):
        files.write_text(folder / name, name)
    found = reading.matching(files.path(f"{folder}/**/train-*.jsonl"))
    assert [path.read_text() for path in found] == ["b/train-0.jsonl", "b/train-1.jsonl", "c/d/train-2.jsonl"]
    assert all(files.in_bucket(path) for path in found)


def test_a_copy_is_made_once_and_anew_after_a_change(folder):
    for name, text in (("a.json", "1"), ("deep/b", "22"), ("model.safetensors", "333")):
        files.write_text(folder / name, text)
    for marker in ("", "deep", "empty") if files.in_bucket(folder) else ():  # of folders, as consoles make them
        buckets.filesystem(folder).pipe_file(f"{folder / marker}/", b"")
    copy = reading.copied(folder, lambda name: "safetensors" not in name)
    assert {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()} == {"a.json", "deep/b"}
    assert copy == reading.copied(folder, lambda name: "safetensors" not in name)
    files.write_text(folder / "a.json", "2")
    changed = reading.copied(folder, lambda name: "safetensors" not in name)
    assert (changed / "a.json").read_text() == "2" and (copy / "a.json").read_text() == "1"
    assert reading.copied(folder / "deep" / "b").read_text() == "22"


def test_a_mirror_uploads_what_is_new_or_longer(folder):
    mirror = files.Mirror(folder)
    (mirror.local / "events").write_text("a")
    mirror.upload()
    (mirror.local / "events").write_text("ab")
    (mirror.local / "more").mkdir()
    (mirror.local / "more" / "x").write_text("c")
    mirror.close()
    mirror.close()
    assert names(folder) == ["events", "more/x"] and (folder / "events").read_text() == "ab"
    assert not mirror.local.exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on disk whose reference is mixed with the policy twice, which writes all that a run can write."""
    inputs = runs.make_inputs(tmp_path_factory.mktemp("inputs"))
    train.run(configured(inputs), inputs / "run")
    return inputs


def configured(inputs):
    """The configuration of the run whose model and data are in a folder."""
    fields = dict(reference__sync_steps=2, reference__mixup_alpha=0.5, data__date="2024-02-29", log__tensorboard=True)
    return runs.make_config(inputs, eval__every_steps=3, **fields)


def upload(source, target):
    """Copies a folder of a disk into a bucket."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            files.write_bytes(target / path.relative_to(source).as_posix(), path.read_bytes())


def check_equal(run, whole):
    """Fails unless two runs logged the same rows and exported the same bytes, wherever they lie."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        ours, theirs = (runs.untimed(runs.read_rows(each / name)) for each in (run, whole))
        assert ours == theirs
    ours, theirs = ((each / "export" / "model.safetensors").read_bytes() for each in (run, whole))
    assert ours == theirs


@pytest.mark.slow
def test_a_run_in_a_bucket_with_its_model_and_data_equals_one_on_disk(whole, folder):
    for name in ("model", "train.jsonl", "eval.jsonl"):
        if (whole / name).is_dir():
            upload(whole / name, folder / name)
        else:
            files.write_bytes(folder / name, (whole / name).read_bytes())
    run, chosen = folder / "run", configured(folder)
    train.run(chosen, run)
    check_equal(run, whole / "run")
    assert {name.partition("/")[0] for name in names(run)} == {path.name for path in (whole / "run").iterdir()}, (
        "everything that a run on disk has"
    )
    ours, theirs = (commands.evaluate_checkpoint(configured(each), each / "run") for each in (folder, whole))
    assert runs.untimed([ours]) == runs.untimed([theirs])
    with serve() as hub:
        chosen = dataclasses.replace(chosen, export=config.Export(push_to_hub=f"{USER}/aligned"))
        commands.export_checkpoint(chosen, run, folder / "again")
    ours = {name: (folder / "again" / name).read_bytes() for name in names(folder / "again")}
    assert ours["model.safetensors"] == (run / "export" / "model.safetensors").read_bytes()
    assert hub.repositories[f"{USER}/aligned"] == ours


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_run_killed_in_a_bucket_and_resumed_equals_one_that_never_was(scheme, whole, stores, tmp_path):
    folder = files.path(f"{scheme}://{object_stores.BUCKET}/{uuid.uuid4().hex}")
    (tmp_path / "config.json").write_text(config.to_json(configured(whole)))
    command = [sys.executable, "-m", "dpo_jax", "train", f"--config={tmp_path / 'config.json'}", f"--workdir={folder}"]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1]), "HOME": str(tmp_path / "home")}

    def start():
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)

    wait = random.uniform(0, 4)
    print("killed", wait, "s after its first object")  # of a test that fails
    process = start()
    while not names(folder):
        assert process.poll() is None
        time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(wait)
    process.kill()
    process.wait()
    assert start().wait(timeout=300) == 0
    check_equal(folder, whole / "run")
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json", "home"}, "nothing of it is on disk"
