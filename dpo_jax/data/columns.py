"""Reads and checks the columns of a row; errors name the row."""

from __future__ import annotations

import difflib
import itertools
import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from decimal import Decimal

from dpo_jax.types import InputError, Row, Value, listed

DROP = "Correct or drop the row, or give --config.data.on_bad_row=skip."
MEDIA = {"image", "images", "video", "videos", "audio", "audios"}  # names of columns, and of fields of messages
TEXT_ALONE = "text alone: dpo_jax trains models that read neither images nor sound"

_KINDS = {
    **{type(None): "null", bool: "true or false", int: "a number", float: "a number", Decimal: "a number"},
    **{str: "text", list: "a list", bytes: "bytes (Parquet's binary; store the column as strings)"},
}

# Words in the names of columns that may hold what a target of data.columns does; the longer ones come first.
_HINTS = {
    "prompt": ("prompt", "question", "instruction", "query", "input"),
    "chosen": ("chosen", "preferred", "accepted", "better", "best", "win", "good", "pos"),
    "rejected": ("rejected", "dispreferred", "worse", "worst", "lose", "bad", "neg"),
}


def described(value: object) -> str:
    """Returns what a value is, for messages: `text`, `a number`, `an object with the keys 'a', 'b'`."""
    if isinstance(value, dict):
        return f"an object with the keys {named(value)}" if value else "an empty object"
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def named(names: Iterable[object]) -> str:
    """Joins the names of columns or keys for a message, a few of them."""
    return listed([repr(name) if name != "" else "'' (without a name)" for name in names], most=8)


def column(row: Row, name: str) -> Value:
    """Value of a column. Raises: InputError if it is missing or null."""
    value = row.fields.get(name)
    if value is not None:
        return value
    if name in row.fields:
        raise InputError(row.place, got=f"{name!r} is null", expected="a value", remedy=DROP)
    raise missing(row, name)


# Columns by which rows of other forms than pairs are known.
_OTHER_FORMS = {"a ranking": ("prompt", "responses"), "an unpaired example": ("prompt", "completion", "label")}


def missing(row: Row, name: str) -> InputError:
    """Error for a row without a column, which says what is read and how to map the columns that it has."""
    got = f"no {name!r} among the columns {named(row.fields) or '(there is none)'}"
    form = next((form for form, names in _OTHER_FORMS.items() if {*names} <= row.fields.keys()), None)
    if form and name in ("chosen", "rejected"):
        remedy = "Give --config.data.format=auto, or data of the form that the recipe or the command line names."
        return InputError(row.place, got=f"{got}: the row is {form}", expected="a pair", remedy=remedy)
    return InputError(
        row.place,
        got=got,
        expected="the columns prompt, chosen and rejected (prompt may be left out where both answers begin "
        "with the conversation); prompt, "
        "responses and scores or ranks; prompt, completion and label; or those of a layout in docs/data.md",
        remedy=f'Say which column is which, for example --config.data.columns="{_mapping(row)}", or rename them. If '
        "other rows have it, drop this one, or give --config.data.on_bad_row=skip.",
    )


def _mapping(row: Row) -> str:
    """Suggests a value of data.columns from the names of a row's columns."""
    pairs = []
    for target, hints in _HINTS.items():
        columns = [name for name, value in row.fields.items() if isinstance(value, (str, list, dict))]
        columns = [name for name in columns if not {*",=;"} & {*name}]  # a mapping cannot hold the first two
        names = (name for hint in hints for name in columns if hint in name.lower())
        fitting = itertools.chain(
            difflib.get_close_matches(target, columns, n=1, cutoff=0.75),
            (name for name in names if not (target == "chosen" and re.search("non|dis", name.lower()))),
        )
        if target not in row.fields:
            pairs.append(f"{target}={next(fitting, f'{target.upper()}_COLUMN')}")
    return ",".join(pairs)


def text(row: Row, name: str) -> str:
    """Text of a column. Raises: InputError if it is missing or no text."""
    return as_text(row, column(row, name), repr(name))


def as_text(row: Row, value: object, name: str) -> str:
    """Returns the value. Raises: InputError if it is no text."""
    if not isinstance(value, str):
        where = "Where all rows are conversations, give --config.data.format=chat. "
        remedy = where * isinstance(value, (list, dict)) + DROP
        raise InputError(row.place, got=f"{name} is {described(value)}", expected="text", remedy=remedy)
    return value


def check_characters(row: Row, text: str) -> None:
    """Raises InputError for text that UTF-8 cannot encode: half of a surrogate pair."""
    try:
        text.encode()
    except (
        UnicodeEncodeError
    ) as error:  # from JSON escapes such as \ud800; tokenizers fail on them without naming the row
        raise InputError(
            row.place,
            got=f"half a character (lone surrogate {text[error.start]!r})",
            expected="text that UTF-8 can encode",
            remedy=DROP,
        ) from error


def check_different(row: Row, answers: Sequence[Value], *, same: Callable[[Value, Value], bool] = operator.eq) -> None:
    """Raises InputError if two answers are the same text, or what `same` says of other values."""
    for (n, first), (m, second) in itertools.combinations(enumerate(answers, start=1), 2):
        if same(first, second):
            which = "the answers" if len(answers) == 2 else f"responses {n} and {m}"
            expected = "two different answers" if len(answers) == 2 else "different answers"
            raise InputError(row.place, got=f"{which} are equal", expected=expected, remedy=DROP)


def is_given(value: object) -> bool:
    """Whether an optional column has a value. Empty text counts as none, because CSV has no other null."""
    return value is not None and value != ""


def is_empty(value: object) -> bool:
    """Whether a column says nothing: null, empty text, an empty list or an empty object."""
    return not value and not isinstance(value, (bool, int, float, Decimal))


def number(value: object) -> float | None:
    """Converts a finite number, or the text of one (as in CSV), to float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Decimal)):
        return None
    try:
        converted = float(value)
    except (ValueError, OverflowError):
        return None
    return converted if math.isfinite(converted) else None


# Keys of messages and of schemas of tools in whose values null says something.
_AS_WRITTEN = frozenset({"arguments", "parameters", "input_schema", "content", "value"})


def without_nulls(value: Value, keep: Collection[str] = _AS_WRITTEN) -> Value:
    """Removes null keys at any depth, but not within the values of the keys in `keep`."""
    if isinstance(value, dict):
        return {
            name: without_nulls(each, keep) if isinstance(each, (dict, list)) and name not in keep else each
            for name, each in value.items()
            if each is not None
        }
    return [without_nulls(each, keep) for each in value] if isinstance(value, list) else value
