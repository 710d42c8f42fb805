"""Files and folders that are written completely or not at all, and the place of the cache.

Every file of the package is written here, except streams: logs that grow line by line, and big files that are
written piece by piece into a folder of `replacing_folder`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Returns `$DPO_JAX_CACHE/NAME`, or `dpo_jax/NAME` in the user's cache folder."""
    configured = os.environ.get("DPO_JAX_CACHE")
    if configured:
        return Path(configured) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo_jax" / name


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, also one after a crash, sees all of the new content or all of the old.

    A hidden file beside it is written and flushed to disk, then renamed. A killed process may leave the hidden file.

    Raises: OSError if the folder is missing or cannot be written to; the file is then as it was.
    """
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


@contextlib.contextmanager
def replacing_folder(path: Path, *, temporary: Path | None = None, keep_existing: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `path` that takes its place if the body succeeds, and is deleted if it fails.

    A killed process leaves a hidden folder beside `path`, and never a half-written one in its place.

    Args:
      temporary: the folder to yield, on the same file system; a leftover is deleted. None: a hidden one of a new name.
      keep_existing: a `path` that exists when the body ends is kept, and the new folder is deleted. For content
        that another process may have finished first. False: it is deleted once the new folder is in place.
    Raises: OSError if the folder cannot be made or renamed; `path` is then as it was.
    """
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


def _beside(path: Path, kind: str) -> Path:
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
