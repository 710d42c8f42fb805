"""The setting `data.columns`: gives columns of a file the names under which they are read."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dpo_jax.data.columns import is_empty, named
from dpo_jax.types import InputError, Row, Value

_MISSING = object()
EXAMPLE = 'Write the name that is read before the column, as in --config.data.columns="prompt=question,chosen=best".'
# Columns that rows can do without; they may be missing at the beginning of a file.
_OPTIONAL = {"system", "tools", "chat_template_kwargs", "weight", "margin", "ref_chosen_logps", "ref_rejected_logps"}


class Renaming:
    """A mapping `target=source,...` from names of columns that are read to those that a file has.

    A source `a.b` is the key `b` of the objects in a column `a`. An empty source leaves the target out.

    Args:
      text: the mapping; empty: rows pass unchanged.
      known: names of the columns that something reads.
      standard: those among them that a message lists.
    Raises: InputError if the text is no mapping, or names an unknown target or one target twice.
    """

    def __init__(self, text: str, *, known: Collection[str], standard: Collection[str]):
        self.sources: dict[str, str] = {}
        self.seen: set[str] = set()  # sources that a row had
        for part in text.split(",") if text.strip() else []:
            target, equals, source = (each.strip() for each in part.partition("="))
            if not target or not equals or "=" in source:
                raise _refusal(f"got {part!r}", "NAME=COLUMN, separated by commas", EXAMPLE)
            if target in self.sources:
                raise _refusal(f"{target!r} twice", "each name once", "Leave one of them.")
            if source and target not in known:
                expected = f"one of {', '.join(sorted(standard))}; or a column of a layout in docs/data.md"
                remedy = f"Did you mean {source}={target}?" if source in known else EXAMPLE
                raise _refusal(f"{target!r} before the =, a name that nothing reads", expected, remedy)
            self.sources[target] = source

    def apply(self, row: Row) -> Row:
        """Returns the row with its columns under the names by which they are read."""
        if not self.sources:
            return row
        values = {target: _value(row.fields, source) for target, source in self.sources.items() if source}
        values = {target: value for target, value in values.items() if value is not _MISSING}
        self.seen.update(self.sources[target] for target in values)
        fields = row.fields
        for target, source in self.sources.items():
            fields = _without(fields, source or target)
        return Row(row.place, fields | values)

    def replaced(self, row: Row) -> list[str]:
        """Names the columns of a row in place of which others are read, and whose values nothing reads."""
        sources = self.sources
        lost = [name for name in sources if name not in sources.values() and not is_empty(row.fields.get(name))]
        there = [name for name in lost if sources[name] and _value(row.fields, sources[name]) is not _MISSING]
        return [replaced(name, sources[name]) for name in there]

    def check_begun(self, place: str, rows: Sequence[Row]) -> None:
        """Raises InputError if the first rows of a source, as they were read, lack a column that is necessary."""
        names = dict.fromkeys(name for row in rows for name in row.fields)
        for target, source in self.sources.items():
            there = source in self.seen or source in names or target in names
            if source and not there and target not in _OPTIONAL and "." not in source:
                raise InputError(
                    place,
                    got=f"no column {source!r} among {named(names)}",
                    expected=f"it, because config.data.columns reads it as {target!r}",
                    remedy="Correct --config.data.columns.",
                )

    def check_ended(self) -> None:
        """Raises InputError if no row of all sources had one of the columns."""
        missing = [source for source in self.sources.values() if source and source not in self.seen]
        if missing:
            got = f"columns that no row has: {named(missing)}"
            raise _refusal(got, "columns of the data after the =", "Correct the names or leave them out.")


def replaced(name: str, by: str) -> str:
    """Name, for a report, of a column in place of which another one is read."""
    return f"{name} (replaced by {by})"


def _value(fields: dict[str, Value], source: str) -> Value:
    """Value of a column, or of a key within the objects of one."""
    value: Value = fields
    for name in [source] if source in fields else source.split("."):
        value = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
    return value


def _without(fields: dict[str, Value], source: str) -> dict[str, Value]:
    """Columns without one of them, or without a key within the objects of one; an object that had no other goes too."""
    if source in fields or "." not in source:
        return {name: value for name, value in fields.items() if name != source}
    name, _, key = source.partition(".")
    inner = fields.get(name)
    if not isinstance(inner, dict):
        return fields
    rest = _without(inner, key)
    return {**fields, name: rest} if rest else {each: value for each, value in fields.items() if each != name}


def _refusal(got: str, expected: str, remedy: str) -> InputError:
    return InputError("config.data.columns", got=got, expected=expected, remedy=remedy)
