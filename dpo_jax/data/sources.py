"""Reads rows of preferences from files, folders written by `datasets`, and the Hub, one at a time."""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import functools
import gzip
import io
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import pyarrow
import pyarrow.parquet
import xxhash

from dpo_jax.data import json_rows
from dpo_jax.data.columns import named, without_nulls
from dpo_jax.data.specs import Part, is_pattern, parts_of
from dpo_jax.runtime import files, reading
from dpo_jax.runtime.terminal import passes
from dpo_jax.types import InputError, Row, listed

if TYPE_CHECKING:
    import datasets  # takes seconds to import, so at run time only where it is used

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(:(?P<config>[\w.-]+))??(:(?P<split>[\w.-]+))?")
_BATCH_ROWS = 256  # rows of Parquet or Arrow in memory at a time
_SHARD = re.compile(r"\d+-of-\d+")  # in the names of files that hold a part of a split
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclasses.dataclass(frozen=True)
class RowReader:
    """Iterable of rows that can be read repeatedly: each iteration opens the source again."""

    start: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.start()


@dataclasses.dataclass(frozen=True)
class Source:
    """One part of a data specification, with at least one row.

    Row places are `name:number`: the line of a JSONL or CSV file, the row elsewhere, counted from 1.
    """

    name: str  # as written in the specification, weight left off
    weight: float  # how often its rows appear in an epoch, > 0
    digest: str  # hexadecimal digest of the content, independent of its path
    rows: Iterable[Row]
    count: int | None = None  # rows, where that is known before they are read
    label: str = ""  # name in metrics of the part of the specification


def read(spec: str, *, split: str) -> list[Source]:
    """Opens every part of a data specification such as `a.jsonl,b.parquet*0.5`.

    A part is a file (.jsonl, .json, .csv, these also as .gz or .zst; .parquet), a pattern of files such as
    `data/train-*.parquet` (`**` for folders at any depth), a folder written by `datasets.save_to_disk`, or a Hub id
    `owner/name`, `owner/name:split` or `owner/name:config:split`; `*weight` may follow, 1 if it does not, and `name=`
    may come before it.

    Args:
      split: split of Hub data sets that name none, and of folders that hold several; a file has no splits.
    Returns: the sources in the order written, those of a pattern in the order of their names. Each file is read once
      for its digest; rows are read lazily.
    Raises: InputError for a part that is missing, empty, of an unknown kind or broken in its first row. Iterating over
      the rows raises it at the first broken row.
    """
    return [_source(name, part, split=split) for part in parts_of(spec) for name in _matching(part.source)]


def _matching(part: str) -> list[str]:
    """Names of the files that match a pattern, sorted; the name itself if it is none."""
    path = files.path(part)
    if not is_pattern(part) or path.exists():
        return [part]
    names = [*map(str, reading.matching(path))]
    if not names:
        raise InputError(
            part,
            got="a pattern that no file matches",
            expected="a pattern such as data/train-*.parquet, or a weight such as prefs.jsonl*0.5",
            remedy=f"Check the pattern; the working directory is {pathlib.Path.cwd()}.",
        )
    return names


def _source(name: str, part: Part, *, split: str) -> Source:
    path = reading.copied(files.path(name))
    if path.is_dir():
        rows, digest, count = _from_datasets(_folder(name, path, split), name)
    elif path.exists():
        extension = _extension(name)
        reader, (digest, lines) = READERS[extension], _file_digest(path, name)
        rows, count = RowReader(lambda: reader(path, name)), lines if extension == ".jsonl" else None
        if extension == ".parquet":
            with contextlib.suppress(pyarrow.ArrowException, OSError):  # an error that reading the rows raises again
                count = pyarrow.parquet.read_metadata(path).num_rows
    else:
        rows, digest, count = _from_datasets(_hub(name, split), name)
    if next(iter(rows), None) is None:
        raise InputError(
            name, got="no rows", expected="at least one preference", remedy="Check the file or leave it out."
        )
    return Source(name, part.weight, digest, rows, count, part.label)


def _extension(name: str) -> str:
    for extension in READERS:
        if name.lower().endswith(extension):
            return extension
    ending = "".join(pathlib.PurePosixPath(name).suffixes[-2:])
    raise InputError(
        name,
        got=f"a file with the extension {ending!r}" if ending else "a file without an extension",
        expected=_KINDS,
        remedy="Convert the file, or rename it with the extension of its format.",
    )


def _file_digest(path: pathlib.Path, name: str) -> tuple[str, int]:
    """Returns the digest of a file's bytes, and the number of its lines."""
    digest, lines = xxhash.xxh3_128(), 0
    try:
        with path.open("rb") as file, passes(path.stat().st_size, f"reading {path.name}", unit="bytes") as progress:
            while block := file.read(1 << 20):
                digest.update(block)
                lines += block.count(b"\n")
                progress.add(len(block))
    except OSError as error:
        raise InputError(
            name, got=f"cannot be read ({error})", expected="a readable file", remedy="Check its permissions."
        ) from error
    return digest.hexdigest(), lines


def _opened(path: pathlib.Path, name: str) -> io.BufferedReader:
    """Opens a file to read its bytes as `_bytes` does. Raises: InputError if it begins with the mark of UTF-16."""
    file = _bytes(path)
    if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        file.close()
        remedy = json_rows.TO_UTF8.replace("ENCODING", "UTF-16")
        raise InputError(name, got="text in UTF-16", expected="UTF-8 text", remedy=remedy)
    return file


def _bytes(path: pathlib.Path) -> io.BufferedReader:
    """Opens a file to read its bytes, decompressed if its name ends in .gz or .zst."""
    if path.name.lower().endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(path))
    if path.name.lower().endswith(".zst"):
        stream = pyarrow.input_stream(str(path), compression="zstd")
        return io.BufferedReader(cast(io.RawIOBase, stream))
    return path.open("rb")


def _json(path: pathlib.Path, name: str) -> Iterator[Row]:
    """Rows of a JSON file; see `json_rows.read`."""
    return _undamaged(json_rows.read(functools.partial(_opened, path, name), name), name)


def _undamaged(rows: Iterable[Row], name: str) -> Iterator[Row]:
    """Yields the rows. Raises: InputError if the file's compressed stream is damaged."""
    row = None
    try:
        for row in rows:
            yield row
    except (EOFError, OSError, zlib.error) as error:
        number = int(row.place.rpartition(":")[2]) if row else 0
        kind = name.lower().rpartition(".")[2]
        compressed = {"gz": "gzip", "zst": "zstd"}.get(kind, "")
        raise InputError(
            f"{name}:{number + 1}",
            got=f"a damaged {compressed} stream ({error})" if compressed else f"cannot be read ({error})",
            expected="a whole file",
            remedy="Copy or download it again."
            + f" If it is not compressed, take .{kind} off its name." * bool(compressed),
        ) from error


def _parquet(path: pathlib.Path, name: str) -> Iterator[Row]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield _of_arrow(f"{name}:{number}", fields)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{name}:{number + 1}",
            got=f"not readable as Parquet ({error})",
            expected="a whole Parquet file",
            remedy="Copy, download or write the file again.",
        ) from error


def _of_arrow(place: str, fields: dict[str, Any]) -> Row:
    """A row without the null keys within its columns that Arrow adds where only other rows have a key."""
    return Row(place, {column: without_nulls(value, keep=()) for column, value in fields.items()})


def _csv(path: pathlib.Path, name: str) -> Iterator[Row]:
    """Rows of a CSV file whose first line names the columns; every value is text."""
    return _undamaged(_csv_rows(path, name), name)


def _csv_rows(path: pathlib.Path, name: str) -> Iterator[Row]:
    # The csv module allows 128 KiB per field, which long answers exceed; the limit is global to the process.
    csv.field_size_limit(2**31 - 1)
    line = 1
    with io.TextIOWrapper(_opened(path, name), encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _check_headers(name, reader.fieldnames or ())
            for fields in reader:
                # Extra fields have the key None, missing ones the value None.
                if None in fields or None in fields.values():
                    raise csv.Error("the number of fields differs from that of the first line")
                if line == 1 and len(fields) == 1 and (other := re.search("[;\\t|]", next(iter(fields)))):
                    raise csv.Error(f"{other[0]!r} between fields")
                yield Row(f"{name}:{line + 1}", fields)
                line = reader.line_num
        except UnicodeDecodeError as error:
            got = f"bytes that are not UTF-8, such as {error.object[error.start]:#04x}"
            raise InputError(f"{name}:{line + 1}", got=got, expected="UTF-8 text", remedy=json_rows.TO_UTF8) from error
        except csv.Error as error:
            raise InputError(
                f"{name}:{line + 1}",
                got=f"broken CSV ({error})",
                expected="commas between fields, and a quote inside a quoted field doubled",
                remedy="Correct the file, or give JSONL or Parquet instead.",
            ) from error


def _check_headers(name: str, columns: Sequence[str]) -> None:
    """Raises InputError if two columns of a CSV file have the same name; spreadsheets leave some without one."""
    twice = dict.fromkeys(column for column in columns if column and columns.count(column) > 1)
    if twice:
        raise InputError(
            f"{name}:1",
            got=f"several columns with the name {named(twice)}",
            expected="a name for each column",
            remedy="Rename or remove all but one of them.",
        )


READERS: dict[str, Callable[[pathlib.Path, str], Iterator[Row]]] = {
    **{f".jsonl{compression}": _json for compression in ("", ".gz", ".zst")},
    **{f".json{compression}": _json for compression in ("", ".gz", ".zst")},
    **{f".csv{compression}": _csv for compression in ("", ".gz", ".zst")},
    ".parquet": _parquet,
}
_KINDS = ".jsonl, .json, .csv, these also as .gz or .zst, or .parquet"


def _folder(name: str, path: pathlib.Path, split: str) -> datasets.Dataset:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise InputError(
            name,
            got="a folder that datasets.save_to_disk did not write",
            expected="a saved Dataset or DatasetDict, or files",
            remedy=f"Give the files in it: {_patterns(name, path) or 'there is none that can be read'}.",
        ) from error
    if isinstance(data, datasets.Dataset):
        return data
    if split not in data:
        raise InputError(
            name,
            got=f"no split {split!r}, but {listed([*map(str, data)])}",
            expected="that split, or a folder with a single one",
            remedy=f"Name the folder of one split, such as {name.rstrip('/')}/{next(iter(data))}.",
        )
    return data[split]


def _patterns(name: str, folder: pathlib.Path) -> str:
    """Names the data files in a folder, those of a split by one pattern such as `data/train-*.parquet`."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    files = (path for path in paths if path.name.lower().endswith(tuple(READERS)) and path.name not in _METADATA)
    visible = (path.as_posix() for path in files if not any(part.startswith(".") for part in path.parts))
    patterns = dict.fromkeys(_SHARD.sub("*", path) for path in visible)
    return listed([f"{name.rstrip('/')}/{pattern}" for pattern in patterns])


def _hub(name: str, split: str) -> datasets.Dataset:
    match = _HUB_ID.fullmatch(name)
    if match is None or name.lower().endswith(tuple(READERS)):
        raise InputError(
            name,
            got="no such file or folder",
            expected=f"a file ({_KINDS}), a folder that datasets.save_to_disk wrote, or a Hub id owner/name",
            remedy=f"Check the path; the working directory is {pathlib.Path.cwd()}.",
        )
    import datasets

    try:
        data = datasets.load_dataset(match["repo"], match["config"], split=match["split"] or split)
    except Exception as error:  # the connection, the Hub and the data set's own reader raise many types
        raise InputError(
            name,
            got=f"no such file or folder, and not a Hub data set that could be loaded ({error})",
            expected="a path, or a Hub id owner/name, owner/name:split or owner/name:config:split",
            remedy="Check the path, the id, the split and the connection.",
        ) from error
    return cast("datasets.Dataset", data)


def _from_datasets(data: datasets.Dataset, name: str) -> tuple[RowReader, str, int]:
    """Rows, digest and number of rows of an Arrow data set that `datasets` memory-maps."""

    def rows() -> Iterator[Row]:
        for number, fields in enumerate(data.with_format(None), start=1):
            yield _of_arrow(f"{name}:{number}", cast("dict[str, Any]", fields))

    return RowReader(rows), _arrow_digest(data), len(data)


class _DigestFile:
    """Writable file object that computes a digest of the written bytes and does not store them."""

    closed = False

    def __init__(self):
        self.digest = xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def _arrow_digest(data: datasets.Dataset) -> str:
    """Digest of the values. The fingerprint of `datasets` would change with file times and versions."""
    sink, writer = _DigestFile(), None
    for table in data.with_format("arrow").iter(batch_size=_BATCH_ROWS):
        table = cast("pyarrow.Table", table).replace_schema_metadata(None).combine_chunks()
        writer = writer or pyarrow.ipc.new_stream(sink, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()
    return sink.digest.hexdigest()
