"""Data specifications such as `a.jsonl,b-*.parquet*0.5` or `helpful=a.jsonl,harmless=b.jsonl`, split into parts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from dpo_jax.runtime import files, reading
from dpo_jax.types import InputError

_NAMED = re.compile(r"(?P<name>\w[\w.-]*)\s*=\s*(?P<rest>.+)")
_EXTENSIONS = re.compile(r"\.(jsonl|json|csv|parquet)(\.gz|\.zst)?$", re.IGNORECASE)


class Part(NamedTuple):
    """One part of a data specification: a file, a pattern of files, a folder or a Hub id."""

    source: str  # name and weight left off
    weight: float  # > 0
    label: str  # its name in metrics: the one given as `name=`, or one made of `source`


def parts_of(spec: str) -> list[Part]:
    """Returns the parts of a specification in the order written.

    `name=` before a part names it and the parts after it, up to the next name. A part that exists as it is written, or
    is a pattern that a file matches, has no name.

    Raises: InputError for a weight that is no number above 0, and for a part without a source.
    """
    name, named = "", []
    for text in spec.split(","):
        found, source, weight = _part(text.strip(), spec)
        name = found or name
        named.append((name, source, weight))
    labels = iter(_labels([source for name, source, _ in named if not name]))
    return [Part(source, weight, name or next(labels)) for name, source, weight in named]


def sets_of(spec: str) -> dict[str, str]:
    """Splits the specification of `data.eval` into that of each set, by name; one without names is the set "".

    >>> sets_of("helpful=a.jsonl,b.jsonl,harmless=c.jsonl")
    {'helpful': 'a.jsonl,b.jsonl', 'harmless': 'c.jsonl'}

    Raises: InputError if only some parts have a name, or two sets have the same.
    """
    sets: dict[str, list[str]] = {}
    name = ""
    for number, text in enumerate(spec.split(",")):
        found, *_ = _part(text.strip(), spec)
        if found and (found in sets or (number and not name)):
            raise InputError(
                "config.data.eval",
                got=f"two sets with the name {found!r}" if found in sets else f"a part without a name before {found!r}",
                expected="a name of its own for each set, as in helpful=a.jsonl,harmless=b.jsonl, or no names",
                remedy="Name the sets apart; further files of a set follow it, without a name.",
            )
        name = found or name
        sets.setdefault(name, []).append(text.strip().partition("=")[2].strip() if found else text.strip())
    return {name: ",".join(parts) for name, parts in sets.items()}


def _part(text: str, spec: str) -> tuple[str, str, float]:
    """Splits `name=source*weight`; without a name it is empty."""
    source, weight = weighted(text, spec)
    match = _NAMED.fullmatch(source)
    if match is None or _exists(source):
        return "", source, weight
    return match["name"], match["rest"], weight


def _exists(source: str) -> bool:
    path = files.path(source)
    return path.exists() or (is_pattern(source) and bool(reading.matching(path)))


def weighted(part: str, spec: str) -> tuple[str, float]:
    """Splits `name*weight` into name and weight; a `*` with something else after it belongs to a pattern."""
    name, star, text = part.rpartition("*") if "*" in part else (part, "", "1")
    try:
        weight = float(text)
    except ValueError:
        return part, 1.0
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
            got="a part without a source",
            expected="files, folders or Hub ids between commas",
            remedy="Name the data or remove the extra comma.",
        )
    return name.strip(), weight


def is_pattern(part: str) -> bool:
    """Whether a part of a specification may stand for several files."""
    return bool(set("*?[") & set(part))


def _labels(sources: Sequence[str]) -> list[str]:
    """Returns a short name of each source: its file's, with as many folders before it as tell the sources apart.

    >>> _labels(["hh/helpful.jsonl", "code/train-*.parquet"]), _labels(["hh/train.jsonl", "code/train.jsonl"])
    (['helpful', 'train'], ['hh-train', 'code-train'])
    """
    paths = [[piece for piece in map(_plain, source.split("/")) if piece] or ["data"] for source in sources]
    labels = ["-".join(path[-1:]) for path in paths]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        labels = ["-".join(path[-depth:]) for path in paths]
        if len({*labels}) == len({*sources}):
            return labels
    return [re.sub(r"[^\w.-]+", "-", source) if labels.count(label) > 1 else label
            for source, label in zip(sources, labels, strict=True)]  # fmt: skip


def _plain(piece: str) -> str:
    """Returns a piece of a path without extension, and without what follows the first wildcard."""
    fixed = re.split(r"[*?\[]", _EXTENSIONS.sub("", piece))[0]
    return re.sub(r"[^\w.-]+", "-", fixed).strip("-_.")
