"""Rows of JSON files: one object per line, a list of objects, or one object that holds the rows."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator

from dpo_jax.data.columns import MEDIA, described, is_empty, named
from dpo_jax.types import InputError, Row, Value, listed

# Columns of rows. An object with one of these keys is a row, or holds columns, unless it wraps rows that have answers.
_ANSWERS = {"chosen", "rejected", "responses", "completion", "completions", "answers", "preferred_output"}
_OF_ROWS = _ANSWERS | {
    *("prompt", "instruction", "question", "input", "context", "messages", "conversations", "conversation"),
}

# Columns that mean something in rows, beside which they are in no row.
_SHARED = _OF_ROWS | {
    *("system", "system_prompt", "system_message", "tools", "chat_template_kwargs", "history", "query", "trajectory"),
    *("weight", "margin", "label", "scores", "ranks", "ref_chosen_logps", "ref_rejected_logps", *MEDIA),
}
_SIDES, _ROLES = ("prompt", "chosen", "rejected"), {"role", "from"}

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
                decoder = _DECODER if number <= _CHECKED_LINES else _FAST_DECODER
                yield _row(f"{name}:{number}", _parse(line, f"{name}:{number}", decoder=decoder))
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


def _parse(
    data: bytes,
    place: str,
    first: tuple[int, bytes] | None = None,
    *,
    by_line: bool = False,
    decoder: json.JSONDecoder | None = None,
) -> Value:
    """Parses UTF-8 JSON.

    Args:
      first: number and text of the first line of a whole file, where it is broken if it has one object per line.
      by_line: the second line is complete by itself, so that there is one object per line.
      decoder: None: one that refuses a key that an object has twice.
    Raises: InputError that names the place.
    """
    try:
        return (decoder or _DECODER).decode(data.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        got, expected = f"byte {error.start + 1} is not UTF-8", "UTF-8 text"
        raise InputError(place, got=got, expected=expected, remedy=TO_UTF8) from error
    except (ValueError, RecursionError) as error:  # besides broken JSON: numbers of thousands of digits, deep nesting
        nested = isinstance(error, RecursionError)
        got, line = f"a value that is {'nested too deeply' if nested else 'too long a number'} to be read", 0
        if isinstance(error, _TwiceError):
            got = f"an object with the key {error.args[0]!r} twice"
        if isinstance(error, json.JSONDecodeError):
            line = error.lineno
            where = f"line {line}, column {error.colno}" if line > 1 else f"column {error.colno}"
            got = f"broken JSON at {where} ({error.msg})"
        if first and (0 < line <= first[0] or by_line):
            number, text = first
            _parse(text, f"{place}:{number}")
        expected = "a list of objects, or one object per line" if first else "valid JSON"
        expected = "every key once" if isinstance(error, _TwiceError) else expected
        remedy = "Correct the file there." if first else "Correct or remove the line."
        raise InputError(place, got=got, expected=expected, remedy=remedy) from error


class _TwiceError(ValueError):
    """A key that an object has twice, of whose values Python would drop all but the last."""


def _without_twins(pairs: list[tuple[str, Value]]) -> dict[str, Value]:
    """The object with these keys and values. Raises: _TwiceError if two keys are the same."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return value


_DECODER, _FAST_DECODER = json.JSONDecoder(object_pairs_hook=_without_twins), json.JSONDecoder()
_CHECKED_LINES = 1_000  # a program that writes a key twice does so in every row; the check doubles the time of parsing


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
    columns = _columns(value, name)
    if columns is not None:
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    lists = {key: each for key, each in value.items() if _holds_objects(each)}
    keys = [key for key, each in lists.items() if key in _WRAPPERS or _OF_ROWS & each[0].keys()]
    wrapped = any(key in _WRAPPERS and _ANSWERS & value[key][0].keys() for key in keys)
    if not keys or _ANSWERS & value.keys() or _OF_ROWS & value.keys() and not wrapped:
        return [value]
    if len(keys) > 1:
        raise InputError(
            name,
            got=f"one object with lists of rows under the keys {named(keys)}",
            expected="rows under one key",
            remedy="Write each list into a file of its own, and give the one that is meant.",
        )
    rows = value[keys[0]]
    shared = [key for key in value if key in _SHARED and not is_empty(value[key])]
    if shared:
        raise InputError(
            name,
            got=f"{named(shared)} beside the rows under {keys[0]!r}",
            expected="all columns in the rows",
            remedy="Put these values into each row.",
        )
    if all(isinstance(row.get("row"), dict) and "row_idx" in row for row in rows):  # the Hub's viewer
        return _viewed(value, rows, name)
    return rows


def _viewed(page: dict[str, Value], rows: list[dict[str, Value]], name: str) -> list[Value]:
    """Rows of a page of the Hub's viewer. Raises: InputError if it shows a part of a row or of the data set."""
    cut = next((number for number, row in enumerate(rows, start=1) if row.get("truncated_cells")), None)
    if cut is not None or page.get("partial") is True:
        cells = "" if cut is None else f"cut values in {named(rows[cut - 1]['truncated_cells'])}"
        raise InputError(
            f"{name}:{cut}" if cells else name,
            got=f"a page of the Hub's viewer with {cells or 'a part of the data set (partial)'}",
            expected="whole rows",
            remedy="Give the data set itself by its id, owner/name, or its Parquet files.",
        )
    return [row["row"] for row in rows]


def _holds_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _holds_text(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def _is_conversation(value: dict[str, Value]) -> bool:
    """Whether the lists of prompt and answers in an object are all lists of messages: it is a row."""
    sides = [value[key] for key in _SIDES if key in value]
    return bool(sides) and all(_holds_objects(each) and all(_ROLES & m.keys() for m in each) for each in sides)


def _columns(value: dict[str, Value], name: str) -> dict[str, list[Value]] | None:
    """Columns that an object holds; None if it holds something else. Raises: InputError if their lengths differ."""
    columns = list(value.values())
    if columns and all(isinstance(each, dict) and "0" in each and each.keys() == columns[0].keys() for each in columns):
        return {name: list(each.values()) for name, each in value.items()}
    if not columns or not all(isinstance(each, list) for each in columns):
        return None
    if len({len(each) for each in columns}) > 1:
        if any(map(_holds_text, map(value.get, _SIDES))):
            got = "columns of different lengths: " + listed([f"{key!r} {len(each)}" for key, each in value.items()])
            raise InputError(name, got=got, expected="as many values in each", remedy="Correct the file.")
        return None
    # Lists of messages are a single row, other lists of objects may be splits; columns hold more than objects, or one
    # of them has the name of an answer.
    if _is_conversation(value):
        return None
    objects = [each for each in columns if _holds_objects(each)]
    messages = all(_ROLES & each[0].keys() for each in objects)
    if len(objects) == len(columns) and (messages or not _OF_ROWS & value.keys()):
        return None
    return value
