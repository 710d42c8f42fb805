"""Reads rows of preferences from files, folders written by `datasets`, and the Hub, one at a time."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow
import pyarrow.parquet
import xxhash

from dpo_jax.types import InputError, Row

if TYPE_CHECKING:
    import datasets  # takes seconds to import, so at run time only where it is used

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(:(?P<config>[\w.-]+))??(:(?P<split>[\w.-]+))?")
_BATCH_ROWS = 256  # rows of Parquet or Arrow in memory at a time


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


def read(spec: str, *, split: str) -> list[Source]:
    """Opens every part of a data specification such as `a.jsonl,b.parquet*0.5`.

    A part is a file (.jsonl, .jsonl.gz, .json, .parquet, .csv), a folder written by `datasets.save_to_disk`, or a Hub
    id `owner/name`, `owner/name:split` or `owner/name:config:split`; `*weight` may follow, 1 if it does not.

    Args:
      split: split of Hub data sets that name none, and of folders that hold several; a file has no splits.
    Returns: the sources in the order written. Each file is read once for its digest; rows are read lazily.
    Raises: InputError for a part that is missing, empty, of an unknown kind or broken in its first row. Iterating over
      the rows raises it at the first broken row.
    """
    return [_source(*_weighted(part.strip(), spec), split=split) for part in spec.split(",")]


def _weighted(part: str, spec: str) -> tuple[str, float]:
    """Splits `name*weight` into name and weight."""
    name, star, text = part.rpartition("*") if "*" in part else (part, "", "1")
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(
            f"data {spec!r}",
            got=f"weight {text!r}",
            expected="a number above 0 after '*', such as prefs.jsonl*0.5",
            remedy="Correct the weight or leave it off.",
        )
    if not name:
        raise InputError(
            f"data {spec!r}",
            got="a part without a name",
            expected="files, folders or Hub ids between commas",
            remedy="Name the data or remove the extra comma.",
        )
    return name.strip(), weight


def _source(name: str, weight: float, *, split: str) -> Source:
    path = Path(name).expanduser()
    if path.is_dir():
        rows, digest = _from_datasets(_folder(name, path, split), name)
    elif path.exists():
        reader = READERS[_extension(name)]
        rows, digest = RowReader(lambda: reader(path, name)), _file_digest(path, name)
    else:
        rows, digest = _from_datasets(_hub(name, split), name)
    if next(iter(rows), None) is None:
        raise InputError(name, got="no rows", expected="at least one preference", remedy="Give data with rows.")
    return Source(name, weight, digest, rows)


def _extension(name: str) -> str:
    for extension in READERS:
        if name.lower().endswith(extension):
            return extension
    raise InputError(
        name,
        got=f"a file with extension {Path(name).suffix!r}",
        expected=f"one of {', '.join(READERS)}",
        remedy="Convert the file, or rename it with the extension of its format.",
    )


def _file_digest(path: Path, name: str) -> str:
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(
            name, got=f"cannot be read ({error})", expected="a readable file", remedy="Check its permissions."
        ) from error
    return digest.hexdigest()


def _jsonl(path: Path, name: str) -> Iterator[Row]:
    """Rows of a file with one JSON object per line; blank lines are skipped."""
    number = 0
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _row(f"{name}:{number}", _parse(line, f"{name}:{number}"))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(
                f"{name}:{number + 1}",
                got=f"a damaged gzip stream ({error})",
                expected="a whole .gz file",
                remedy="Copy or download the file again.",
            ) from error


def _json(path: Path, name: str) -> Iterator[Row]:
    """Rows of a JSON file: a list of objects, parsed as a whole, or one object per line."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _jsonl(path, name)
        return
    for number, value in enumerate(_parse(path.read_bytes(), name), start=1):
        yield _row(f"{name}:{number}", value)


def _parse(data: bytes, place: str) -> Any:
    """Parses UTF-8 JSON. Raises: InputError that names the place."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        got, expected = f"byte {error.start + 1} is not UTF-8", "UTF-8 text"
        raise InputError(place, got=got, expected=expected, remedy="Convert the file to UTF-8.") from error
    except (ValueError, RecursionError) as error:  # besides broken JSON: numbers of thousands of digits, deep nesting
        got = f"cannot be read as JSON ({error})"
        if isinstance(error, json.JSONDecodeError):
            where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
            got = f"broken JSON at {where} ({error.msg})"
        raise InputError(place, got=got, expected="one complete JSON object", remedy="Correct or remove it.") from error


def _row(place: str, value: object) -> Row:
    """A row from a parsed JSON value. Raises: InputError if it is no object."""
    if isinstance(value, dict):
        return Row(place, value)
    raise InputError(
        place,
        got=f"a JSON {type(value).__name__}",
        expected="an object with the columns as keys",
        remedy="Correct or remove it.",
    )


def _parquet(path: Path, name: str) -> Iterator[Row]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{name}:{number}", fields)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{name}:{number + 1}",
            got=f"not readable as Parquet ({error})",
            expected="a whole Parquet file",
            remedy="Copy, download or write the file again.",
        ) from error


def _csv(path: Path, name: str) -> Iterator[Row]:
    """Rows of a CSV file whose first line names the columns; every value is text."""
    # The csv module allows 128 KiB per field, which long answers exceed; the limit is global to the process.
    csv.field_size_limit(2**31 - 1)
    line = 1
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for fields in reader:
                if (
                    None in fields or None in fields.values()
                ):  # extra fields have the key None, missing ones the value None
                    raise csv.Error("the number of fields differs from that of the first line")
                yield Row(f"{name}:{line + 1}", fields)
                line = reader.line_num
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(
                f"{name}:{line + 1}",
                got=f"broken CSV ({error})",
                expected="UTF-8, commas between fields, a quote inside a quoted field doubled",
                remedy="Correct the line, or give JSONL or Parquet instead.",
            ) from error


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}


def _folder(name: str, path: Path, split: str) -> datasets.Dataset:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise InputError(
            name,
            got="a folder that datasets.save_to_disk did not write",
            expected="a saved Dataset or DatasetDict, or a file",
            remedy="Give the files in it, separated by commas.",
        ) from error
    if isinstance(data, datasets.Dataset):
        return data
    if split not in data:
        raise InputError(
            name,
            got=f"no split {split!r}",
            expected=f"one of {', '.join(map(str, data))}",
            remedy="Give the folder of one split: each is a folder in this one.",
        )
    return data[split]


def _hub(name: str, split: str) -> datasets.Dataset:
    match = _HUB_ID.fullmatch(name)
    if match is None or name.lower().endswith(tuple(READERS)):
        raise InputError(
            name,
            got="no such file or folder",
            expected=f"a file ({', '.join(READERS)}), a saved datasets folder or a Hub id owner/name",
            remedy=f"Check the path; it is taken from {Path.cwd()}.",
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


def _from_datasets(data: datasets.Dataset, name: str) -> tuple[RowReader, str]:
    """Rows and digest of an Arrow data set that `datasets` memory-maps."""

    def rows() -> Iterator[Row]:
        for number, fields in enumerate(data.with_format(None), start=1):
            yield Row(f"{name}:{number}", cast("dict[str, Any]", fields))

    return RowReader(rows), _arrow_digest(data)


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
