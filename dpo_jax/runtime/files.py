"""Paths that users write, on disk and in buckets, and files and folders that are written completely or not at all.

Every file of the package is written here, except streams: big files that are written piece by piece into a folder of
`replacing_folder`. A path on disk is a `pathlib.Path`, one in a bucket an `epath.Path` with the same methods; what
differs between the two is in this module.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, TypeAlias, TypeVar, cast

from etils import epath

from dpo_jax.runtime import buckets
from dpo_jax.types import InputError

Path: TypeAlias = pathlib.Path | epath.Path
P = TypeVar("P", bound=Path)

REWRITE_S = 30.0  # seconds between two writes of a log in a bucket


def path(text: str | os.PathLike, place: str = "") -> Path:
    """Returns the path that a user's text names: on disk, `~` expanded, or in a bucket as gs://BUCKET/PATH or s3://.

    Args:
      place: flag or field that names it, for errors.
    Raises: InputError for any other scheme, also one with a single slash, or if the store's package is missing.
    """
    text = os.fspath(text)
    if buckets.scheme_of(text):
        return buckets.path_of(text, place)
    return pathlib.Path(text).expanduser()


def local(text: str | os.PathLike, place: str, why: str) -> pathlib.Path:
    """Returns the path of a folder that must be on disk. Raises: InputError, with the reason, for one in a bucket."""
    found = path(text, place)
    if in_bucket(found):
        raise InputError(
            place, got=f"{str(found)!r}", expected=f"a folder on disk, since {why}", remedy="Name a local folder."
        )
    return cast(pathlib.Path, found)


def in_bucket(path: Path) -> bool:
    """Returns whether a path is in a bucket."""
    return bool(buckets.scheme_of(str(path)))


def resolved(path: Path) -> Path:
    """Returns the absolute path, through links; that of a bucket is so already."""
    return path if in_bucket(path) else path.resolve()


def cache_folder(name: str) -> pathlib.Path:
    """Returns `$DPO_JAX_CACHE/NAME`, or `dpo_jax/NAME` in the user's cache folder. Raises: InputError for a bucket."""
    configured = os.environ.get("DPO_JAX_CACHE")
    if configured:
        return local(configured, "DPO_JAX_CACHE", MAPPED) / name
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo_jax" / name


MAPPED = "what is in it is mapped into memory"


def check_writable(folder: Path) -> None:
    """Raises InputError if a folder in a bucket cannot be written to; one on disk is checked when it is made."""
    if in_bucket(folder):
        make_folder(folder)


def make_folder(folder: Path) -> None:
    """Makes the folder if it is missing, and writes and deletes a file in it.

    Raises: InputError if that fails: a disk that is read-only, a bucket that is missing or may not be written to.
    """
    if in_bucket(folder):
        probe = folder / f".{uuid.uuid4().hex}"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        except Exception as error:  # of many packages, from the name of a host to credentials
            raise buckets.refused(folder, error, "written to") from error
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            str(folder),
            got=f"cannot be written to ({error})",
            expected="a folder for the run",
            remedy="Name another folder.",
        ) from error


def remove_folder(folder: Path) -> None:
    """Deletes a folder with all that is in it, if it exists."""
    if not in_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError):
        cast(epath.Path, folder).rmtree()


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, also one after a crash, sees all of the new content or all of the old.

    A hidden file beside it is written and flushed to disk, then renamed. A killed process may leave the hidden file.
    In a bucket an object is replaced whole in any case.

    Raises: OSError if the folder is missing or cannot be written to; the file is then as it was.
    """
    if in_bucket(path):
        path.write_bytes(content)
        return
    temporary = _beside(path, "new")
    # Not tempfile: its files are private (mode 600), and these get the mode that the umask allows, as any file.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, otherwise as `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Mapping) -> None:
    """Writes a JSON object with an indent of 2 and a newline at its end, otherwise as `write_bytes`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Writes a file piece by piece into a folder that is being replaced, and makes its parent folders there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for piece in pieces:
            cast(IO[bytes], file).write(piece)


@contextlib.contextmanager
def replacing_folder(
    path: P, *, temporary: P | None = None, keep_existing: bool = False, last: str = ""
) -> Iterator[P]:
    """Yields an empty folder beside `path` that takes its place if the body succeeds, and is deleted if it fails.

    A killed process leaves a hidden folder beside `path`, and never a half-written one in its place.

    Objects of a bucket have no folder to rename, so there `path` itself is emptied and yielded. It is valid once it has
    the object `last`, which is deleted before all others and which the body writes after all others. Who reads the
    folder looks for that object: without it, the others are what a killed process left, which the next one deletes.

    Args:
      temporary: the folder to yield, on the same file system; a leftover is deleted. None: a hidden one of a new name.
      keep_existing: a `path` that exists when the body ends is kept, and the new folder is deleted. For content
        that another process may have finished first. False: it is deleted once the new folder is in place.
      last: name of the file that the body writes last; needed in a bucket.
    Raises: OSError if the folder cannot be made or renamed; `path` is then as it was on disk, and absent in a bucket.
    """
    if in_bucket(path):
        assert last, "without an object that makes it valid, a folder in a bucket could be read half-written"
        with contextlib.ExitStack() as on_error:
            on_error.callback(_empty, path, last)
            _empty(path, last)
            yield path
            on_error.pop_all()
        return
    temporary = temporary or _beside(path, "new")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if keep_existing:
            _rename_if_absent(temporary, path)
        else:
            _rename_over(temporary, path)
        _flush_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def has_folder(path: Path, last: str) -> bool:
    """Whether a whole folder of `replacing_folder` is there: on disk by its name, in a bucket by its object `last`."""
    return (path / last).is_file() if in_bucket(path) else path.exists()


def shared_temporary(path: Path) -> Path:
    """Returns a `temporary` of `replacing_folder` at which all processes of a run arrive by themselves."""
    return path if in_bucket(path) else path.with_name(f".{path.name}.new-shared")


def _empty(path: Path, last: str) -> None:
    (path / last).unlink(missing_ok=True)
    remove_folder(path)


def _rename_if_absent(new: Path, path: Path) -> None:
    try:
        new.rename(path)
    except OSError:
        if not path.is_dir():
            raise


def _rename_over(new: Path, path: Path) -> None:
    """Renames a folder; an older one of that name is deleted, or put back if the renaming fails."""
    old = _beside(path, "old")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: P, kind: str) -> P:
    """Returns a hidden name in the same folder that no other writer uses, on this machine or another."""
    return path.with_name(f".{path.name}.{kind}-{uuid.uuid4().hex}")


def _flush_folder(folder: Path) -> None:
    """Flushes the names in a folder to disk, so that a renamed file keeps its new name after a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse this for folders, and do not need it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LineLog:
    """A text file that grows by lines, made by the first of them. Closing it again has no effect.

    On disk each line is there, whole, before `write` returns. An object of a bucket cannot grow, so it is replaced,
    with all lines, at most every REWRITE_S seconds, and by `flush` and `close`.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: IO[str] | None = None  # on disk
        self._lines: list[str] | None = None  # in a bucket; None: as they are there
        self._written, self._unwritten = time.monotonic(), False

    def write(self, line: str) -> None:
        """Appends a line, which ends with a newline."""
        if not in_bucket(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = cast(IO[str], self._path.open("a"))
            self._file.write(line)
            self._file.flush()
            return
        if self._lines is None:
            self._lines = [self._path.read_text()] if self._path.exists() else []
        self._lines.append(line)
        self._unwritten = True
        if time.monotonic() > self._written + REWRITE_S:
            self.flush()

    def flush(self) -> None:
        """Returns once every line is where it is read from."""
        if self._unwritten:
            write_text(self._path, "".join(self._lines or ()))
            self._written, self._unwritten = time.monotonic(), False

    def close(self) -> None:
        """Flushes and closes the file, if it is open."""
        self.flush()
        self._lines = None
        if self._file is not None:
            self._file.close()
            self._file = None


class Mirror:
    """A folder for packages that write on disk alone: itself, or a temporary one whose files are copied to a bucket.

    `local` is the folder that the package writes to. `upload` copies to the bucket what is new or longer there;
    `close` does so and deletes the temporary folder.
    """

    def __init__(self, path: Path):
        self._path, self._uploaded = path, {}
        self._temporary = tempfile.TemporaryDirectory() if in_bucket(path) else None
        self.local = pathlib.Path(self._temporary.name) if self._temporary else cast(pathlib.Path, path)

    def upload(self) -> None:
        """Copies files to the bucket that are new or have another size than when they were copied; on disk nothing."""
        if self._temporary is None:
            return
        for file in sorted(each for each in self.local.rglob("*") if each.is_file()):
            content, name = file.read_bytes(), file.relative_to(self.local)
            if self._uploaded.get(name) != len(content):
                write_bytes(self._path / name.as_posix(), content)
                self._uploaded[name] = len(content)

    def close(self) -> None:
        """Uploads the rest and deletes the temporary folder; closing again has no effect."""
        if self._temporary is not None:
            self.upload()
            self._temporary.cleanup()
            self._temporary = None
