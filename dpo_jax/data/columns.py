"""Reads and checks the columns of a row; errors name the row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dpo_jax.types import InputError, Row

DROP = 'Correct or drop the row, or set data.on_bad_row="skip".'


def column(row: Row, name: str) -> Any:
    """Value of a column. Raises: InputError if it is missing or null."""
    value = row.fields.get(name)
    if value is None:
        raise InputError(
            row.place,
            got=f"no {name!r} among the columns {', '.join(map(repr, row.fields))}",
            expected="chosen and rejected, with a prompt column unless the answers carry the prompt; or prompt, "
            "responses and scores or ranks; or prompt, completion and label",
            remedy="Rename or add the column.",
        )
    return value


def text(row: Row, name: str) -> str:
    """Text of a column. Raises: InputError if it is missing or no text."""
    return as_text(row, column(row, name), repr(name))


def as_text(row: Row, value: object, name: str) -> str:
    """Returns the value. Raises: InputError if it is no text."""
    if not isinstance(value, str):
        raise InputError(row.place, got=f"{name} is a {type(value).__name__}", expected="text", remedy=DROP)
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


def check_different(row: Row, answers: Sequence[object]) -> None:
    """Raises InputError if two answers, as text or as messages, are equal."""
    for n, answer in enumerate(answers):
        if answer in answers[:n]:
            which = "the answers" if len(answers) == 2 else f"responses {answers.index(answer) + 1} and {n + 1}"
            expected = "two different answers" if len(answers) == 2 else "different answers"
            raise InputError(row.place, got=f"{which} are equal", expected=expected, remedy=DROP)


def is_given(value: object) -> bool:
    """Whether an optional column has a value. Empty text counts as none, because CSV has no other null."""
    return value is not None and value != ""


def number(value: object) -> float | None:
    """Converts a finite number, or the text of one (as in CSV), to float; None for anything else."""
    try:
        converted = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return converted if math.isfinite(converted) else None
