"""Rows of JSON files: one object per line, a list of objects, or one object that holds the rows."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator

from dpo_jax.data.columns import described, named
from dpo_jax.types import InputError, Row, Value

# Columns of rows. An object that has one of these keys is a row, or holds columns; it is no wrapping around rows.
_OF_ROWS = {
    *("prompt", "instruction", "question", "input", "context", "messages", "conversations", "conversation"),
    *("chosen", "rejected", "responses", "completion", "completions", "answers", "preferred_output"),
}

TO_UTF8 = "Convert the file to UTF-8, for example with `iconv -f ENCODING -t UTF-8 FILE > NEW_FILE`."

_WRAPPERS = {"data", "rows", "examples", "records", "items", "instances", "samples", "train", "test", "validation"}


def read(opener: Callable[[], io.BufferedReader], name: str) -> Iterator[Row]:
    """Yields the rows of a JSON file, however it holds them; blank lines are skipped.

    Objects on lines of their own are read one at a time, and their places are `name:line`. Anything else is parsed as a
    whole, and places are `name:row`: a list of objects; one row; an object with one key whose value is a list of
    rows, such as `data`; columns, each a list or, as pandas writes them, an object with the row numbers as keys.

    Raises: InputError where the JSON is broken, rows that are no objects, and several keys with lists of rows.
    """
    with opener() as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        first, second = next(lines, None), next(lines, None)
        if first is None:
            return
        if second is not None and _is_complete(first[1]):
            for number, line in (first, second):
                yield _row(f"{name}:{number}", _parse(line, f"{name}:{number}"))
            for number, line in lines:
                yield _row(f"{name}:{number}", _parse(line, f"{name}:{number}"))
            return
    with opener() as file:
        value = _parse(file.read(), name, first, by_line=second is not None and _is_complete(second[1]))
    for number, fields in enumerate(_rows(value, name), start=1):
        yield _row(f"{name}:{number}", fields)


def _is_complete(line: bytes) -> bool:
    """Whether a line is a JSON value, not the beginning of one."""
    try:
        json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _parse(data: bytes, place: str, first: tuple[int, bytes] | None = None, *, by_line: bool = False) -> Value:
    """Parses UTF-8 JSON.

    Args:
      first: number and text of the first line of a whole file, where it is broken if it has one object per line.
      by_line: the second line is complete by itself, so that there is one object per line.
    Raises: InputError that names the place.
    """
    try:
        return json.loads(data.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        got, expected = f"byte {error.start + 1} is not UTF-8", "UTF-8 text"
        raise InputError(place, got=got, expected=expected, remedy=TO_UTF8) from error
    except (ValueError, RecursionError) as error:  # besides broken JSON: numbers of thousands of digits, deep nesting
        nested = isinstance(error, RecursionError)
        got, line = f"a value that is {'nested too deeply' if nested else 'too long a number'} to be read", 0
        if isinstance(error, json.JSONDecodeError):
            line = error.lineno
            where = f"line {line}, column {error.colno}" if line > 1 else f"column {error.colno}"
            got = f"broken JSON at {where} ({error.msg})"
        if first and (line <= first[0] or by_line):
            number, text = first
            _parse(text, f"{place}:{number}")
        expected = "a list of objects, or one object per line" if first else "valid JSON"
        remedy = "Correct the file there." if first else "Correct or remove the line."
        raise InputError(place, got=got, expected=expected, remedy=remedy) from error


def _row(place: str, value: object) -> Row:
    """A row from a parsed JSON value. Raises: InputError if it is no object."""
    if isinstance(value, dict):
        return Row(place, value)
    raise InputError(
        place,
        got=f"{described(value)} in place of a row",
        expected="a JSON object with the columns as keys",
        remedy="Correct or remove it.",
    )


def _rows(value: Value, name: str) -> Iterable[object]:
    """Rows in the value of a whole file; see `read`."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    columns = _columns(value)
    if columns is not None:
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    lists = {key: each for key, each in value.items() if _holds_objects(each)}
    keys = [key for key, each in lists.items() if key in _WRAPPERS or _OF_ROWS & each[0].keys()]
    if _OF_ROWS & value.keys() or not keys:
        return [value]
    if len(keys) > 1:
        raise InputError(
            name,
            got=f"one object with lists of rows under the keys {named(keys)}",
            expected="rows under one key",
            remedy="Write each list into a file of its own, and give the one that is meant.",
        )
    rows = value[keys[0]]
    if all(isinstance(row.get("row"), dict) and "row_idx" in row for row in rows):  # the Hub's viewer
        return [row["row"] for row in rows]
    return rows


def _holds_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _columns(value: dict[str, Value]) -> dict[str, list[Value]] | None:
    """Columns of equal length that an object holds; None if it holds something else."""
    columns = list(value.values())
    if columns and all(isinstance(each, dict) and "0" in each and each.keys() == columns[0].keys() for each in columns):
        return {name: list(each.values()) for name, each in value.items()}
    if len({len(each) if isinstance(each, list) else -1 for each in columns}) != 1 or not isinstance(columns[0], list):
        return None
    # Lists of messages are a single row, other lists of objects may be splits; columns hold more than objects, or one
    # of them has the name of an answer.
    objects = [each for each in columns if _holds_objects(each)]
    messages = all({"role", "from"} & each[0].keys() for each in objects)
    if len(objects) == len(columns) and (messages or not _OF_ROWS & value.keys()):
        return None
    return value
