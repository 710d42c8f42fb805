"""Files and folders appear completely or not at all, whatever happens while they are written."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dpo_jax.runtime import files

KILLED_BEFORE_RENAME = """
import os, signal, sys
from pathlib import Path
from dpo_jax.runtime import files
os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
files.write_text(Path(sys.argv[1]), "new")
"""


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_writer_killed_before_the_rename_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    code = subprocess.run([sys.executable, "-c", KILLED_BEFORE_RENAME, str(path)], cwd=Path(__file__).parents[1])
    assert code.returncode == -9
    assert path.read_text() == "old"
    (left,) = set(tmp_path.iterdir()) - {path}
    assert left.name.startswith(".") and left.read_text() == "new"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def fail(*names):
        raise OSError("disk full")

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_bytes(path, b"new")
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_two_writers_at_once_leave_one_whole_file(tmp_path):
    path, contents = tmp_path / "file", [bytes([letter]) * 100_000 for letter in b"ab"]
    seen = set()
    files.write_bytes(path, contents[0])

    def write(content):
        for _ in range(20):
            files.write_bytes(path, content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.add(path.read_bytes())
    for thread in threads:
        thread.join()
    assert seen | {path.read_bytes()} <= set(contents)
    assert [*tmp_path.iterdir()] == [path]


def test_a_written_file_has_the_mode_of_any_other(tmp_path, umask):
    (tmp_path / "usual").write_text("")
    files.write_text(tmp_path / "ours", "")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "ours")]
    assert modes == [0o640, 0o640]


def test_json_is_indented_utf8(tmp_path):
    files.write_json(tmp_path / "file", {"b": "ä", "a": [1]})
    assert (tmp_path / "file").read_bytes() == '{\n  "b": "ä",\n  "a": [\n    1\n  ]\n}\n'.encode()


def test_a_folder_replaces_an_older_one(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with files.replacing_folder(out) as new:
        (new / "new").touch()
        assert new.parent == tmp_path and [path.name for path in out.iterdir()] == ["old"]
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [*tmp_path.iterdir()] == [out]


def test_a_folder_whose_body_fails_vanishes(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(KeyboardInterrupt), files.replacing_folder(out) as new:
        (new / "new").touch()
        raise KeyboardInterrupt
    assert [*tmp_path.iterdir()] == [out] and [path.name for path in out.iterdir()] == ["old"]


def test_an_older_folder_is_put_back_where_the_new_one_cannot_be_renamed(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()
    (out / "old").touch()

    def fail(self, target):
        if ".new-" in self.name:
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk full"), files.replacing_folder(out):
        pass
    assert [*tmp_path.iterdir()] == [out] and [path.name for path in out.iterdir()] == ["old"]


def test_the_first_of_two_equal_folders_stays(tmp_path):
    out = tmp_path / "out"
    with files.replacing_folder(out, keep_existing=True) as new:
        (new / "second").touch()
        with files.replacing_folder(out, keep_existing=True) as first:
            (first / "first").touch()
    assert [path.name for path in out.iterdir()] == ["first"]
    assert [*tmp_path.iterdir()] == [out]


def test_a_named_temporary_folder_starts_empty(tmp_path):
    shared = tmp_path / ".out.new-shared"
    shared.mkdir()
    (shared / "left by a killed process").touch()
    with files.replacing_folder(tmp_path / "out", temporary=shared) as new:
        assert new == shared and not [*new.iterdir()]
