"""Files of fields, YAML or JSON: sections with their fields, or dotted names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import yaml

from dpo_jax.types import InputError, shown

SUFFIXES = (".json", ".yaml", ".yml")


class Source(NamedTuple):
    """A file of fields, and the line of each by its dotted name, where it is known."""

    path: str = ""
    lines: Mapping[str, int] = MappingProxyType({})

    def place(self, name: str = "") -> str:
        """Returns the place of a field for errors; without a path it is that of a complete configuration."""
        field = f"config.{name}" if name else "config"
        return f"{_at(self.path, self.lines.get(name))}: {field}" if self.path else field


def is_data(path: str) -> bool:
    """Returns whether a path names a file of fields, by its suffix; other files are recipes."""
    return Path(path).suffix.lower() in SUFFIXES


def parse(text: str, place: str) -> tuple[dict[str, object], Source]:
    """Returns {section: {name: value}} of a text; `place` is its file, which says by its suffix whether it is YAML.

    Raises: InputError for text that cannot be parsed, a field that is there twice, or a value that no field has.
    """
    parser = _from_json if place.lower().endswith(".json") else _from_yaml
    fields, lines, values = parser(text, place), {}, {}
    for name, value, line in fields:
        *sections, last = name.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise _twice(place, section, line)
        if isinstance(value, dict):
            inner.setdefault(last, value)
        elif last in inner:
            raise _twice(place, name, line)
        else:
            inner[last] = value
        if line:
            lines[name] = line
    return values, Source(place, lines)


def _at(place: str, line: int | None) -> str:
    return f"{place}:{line}" if line else place


def _twice(place: str, name: str, line: int | None) -> InputError:
    remedy = "Leave one of them out."
    return InputError(_at(place, line), got=f"{name!r} twice", expected="each field once", remedy=remedy)


# --- JSON ------------------------------------------------------------------------------------------------------------


def _from_json(text: str, place: str) -> Iterable[tuple[str, object, None]]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise _twice(place, repeated[0], None)
        return dict(pairs)

    try:
        fields = json.loads(text, object_pairs_hook=unique)
        got = f"{shown(fields)} in place of fields"
    except json.JSONDecodeError as error:
        fields, got = None, f"broken JSON ({error})"
    if not isinstance(fields, dict):
        raise InputError(place, got=got, expected="a JSON object", remedy="Give the config.json that a run wrote.")
    return [(name, value, None) for name, value in _leaves(fields)]


def _leaves(fields: dict, prefix: str = "") -> Iterable[tuple[str, object]]:
    """Yields dotted names with their values; an empty section is its own value."""
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Resolves scalars as YAML 1.2 does: 1e-6 is a number; no, off and 2024-01-31 are text."""

    yaml_implicit_resolvers = {}


_TAG = "tag:yaml.org,2002:"
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), [*_first.replace("\0", ""), ""])
_SCALARS = {
    "bool": lambda text: text.lower() == "true",
    "null": lambda text: None,
    "int": int,
    "float": float,
    "str": str,
}
_EXAMPLE = "Write a section and under it, indented by spaces, its fields, or loss.beta: 0.1."


def _from_yaml(text: str, place: str) -> Iterable[tuple[str, object, int]]:
    try:
        root = yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        got = f"broken YAML ({error.problem or error.context})"
        remedy = "Indent with spaces, not tabs." if "\\t" in got else "Correct the line."
        raise InputError(
            _at(place, mark and mark.line + 1), got=got, expected="a YAML mapping", remedy=remedy
        ) from None
    except yaml.YAMLError as error:  # of characters that YAML forbids
        got = f"broken YAML ({' '.join(str(error).split())})"
        raise InputError(place, got=got, expected="a YAML mapping", remedy="Correct the file.") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        got = f"{shown(root.value) if isinstance(root, yaml.ScalarNode) else 'a list'} in place of fields"
        raise InputError(_at(place, root.start_mark.line + 1), got=got, expected="a YAML mapping", remedy=_EXAMPLE)
    return _entries(root, place, "")


def _entries(node: yaml.MappingNode, place: str, prefix: str) -> Iterable[tuple[str, object, int]]:
    """Yields the dotted name, value and line of each field."""
    names = set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(_at(place, line), got="a key that is no name", expected="a field", remedy=_EXAMPLE)
        name = prefix + key.value
        if name in names:
            raise _twice(place, name, line)
        names.add(name)
        if isinstance(value, yaml.MappingNode) and prefix:
            got = f"a section within {prefix.rstrip('.')!r}"
            raise InputError(_at(place, line), got=got, expected="a value", remedy=_EXAMPLE)
        if isinstance(value, yaml.MappingNode):
            yield from _entries(value, place, f"{name}.")
        else:
            yield name, _value(value, place, name), line


def _value(node: yaml.Node, place: str, name: str) -> object:
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
        return _SCALARS[kind](node.value)
    got = "a list" if isinstance(node, yaml.SequenceNode) else f"the tag {node.tag!r}"
    remedy = 'Write several as one text, such as "a.jsonl,b.jsonl".' if got == "a list" else "Leave the tag out."
    raise InputError(
        f"{_at(place, node.start_mark.line + 1)}: config.{name}", got=got, expected="a value", remedy=remedy
    )
