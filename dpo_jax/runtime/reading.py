"""Reads big files of a disk or a bucket: parts of them, patterns of names, and copies where a package needs a disk."""

from __future__ import annotations

import glob
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import IO, cast

import xxhash
from etils import epath

from dpo_jax.runtime import buckets, files
from dpo_jax.runtime.files import Path

PIECE = 1 << 20  # bytes read or written at a time: few calls, and still in a core's own cache when they are converted
GAP = 256 << 10  # bytes read where only some of them are needed: to skip the others would be slower, even in cache
REQUEST = 8 << 20  # both, for a bucket: a request takes as long as to send some of these bytes


def matching(pattern: Path) -> list[Path]:
    """Returns the files that match a pattern, in order of their names; `**` stands for folders at any depth."""
    if files.in_bucket(pattern):
        filesystem = buckets.filesystem(cast(epath.Path, pattern))
        found: list[Path] = [
            epath.Path(filesystem.unstrip_protocol(name).replace("gcs://", "gs://"))
            for name, info in filesystem.glob(str(pattern), detail=True).items()
            if info["type"] == "file"
        ]
    else:
        found = [each for name in glob.glob(str(pattern), recursive=True) if (each := pathlib.Path(name)).is_file()]
    return sorted(found, key=str)


class Ranges:
    """A file that several threads read from at any byte.

    Fields:
      size: bytes in all.
      piece: bytes that are read at a time: few calls on disk, and few requests to a bucket.
      gap: bytes read where only some of them are needed, since to skip the others would be slower.
    """

    def __init__(self, path: Path):
        self.path = path
        self.piece, self.gap = PIECE, GAP
        if files.in_bucket(path):
            self._filesystem = buckets.filesystem(cast(epath.Path, path))
            self.size = int(self._filesystem.info(str(path))["size"])
            self.piece = self.gap = REQUEST
            self._file = None
        else:
            self._file = cast(IO[bytes], path.open("rb"))
            self.size = os.fstat(self._file.fileno()).st_size

    def read(self, start: int, count: int) -> bytes:
        """Returns `count` bytes from byte `start`, fewer at the end of the file.

        pread does not move the file's position, which threads share: a seek of one thread could come between the seek
        and the read of another.
        """
        if self._file is not None:
            return os.pread(self._file.fileno(), count, start)
        if not count or start >= self.size:
            return b""
        return self._filesystem.cat_file(str(self.path), start=start, end=min(start + count, self.size))

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Ranges:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def copied(path: Path, keep: Callable[[str], bool] = lambda name: True) -> pathlib.Path:
    """Returns a path on disk with the content of a file or folder: the path itself, or a cached copy of a bucket's.

    A copy is written whole or not at all, and is found again by name, size and checksum of each file.

    Args:
      keep: whether a file of the folder is needed, by its name in it.
    """
    if not files.in_bucket(path):
        return cast(pathlib.Path, path)
    filesystem = buckets.filesystem(cast(epath.Path, path))
    begin = len(filesystem._strip_protocol(str(path))) + 1
    objects = {name[begin:]: info for name, info in filesystem.find(str(path), detail=True).items()}
    parents = {str(parent) for name in objects if name for parent in pathlib.PurePosixPath(name).parents}
    objects = {  # without those that stand for folders, which consoles make
        name: info for name, info in objects.items() if not name.endswith("/") and (name or ".") not in parents
    }
    single = not objects.keys() - {""}
    chosen = {name or path.name: info for name, info in objects.items() if keep(name or path.name)}
    sums = {
        name: [info["size"], str(info.get("etag")), str(info.get("ETag")), str(info.get("md5Hash"))]
        for name, info in sorted(chosen.items())
    }
    copy = files.cache_folder("copies") / xxhash.xxh3_128_hexdigest(json.dumps([str(path), sums]).encode())
    if not copy.is_dir():
        with files.replacing_folder(copy, keep_existing=True) as new:
            for name in chosen:
                files.write_pieces(new / name, pieces(path if single else path / name))
    return copy / path.name if single else copy


def pieces(path: Path) -> Iterator[bytes]:
    """Yields the bytes of a file in order, some MiB at a time."""
    with Ranges(path) as file:
        for start in range(0, file.size, file.piece):
            yield file.read(start, file.piece)
