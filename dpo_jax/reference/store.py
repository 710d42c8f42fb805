"""Reference log-probs on disk.

A store is a folder. `manifest.json` holds the identity under which its values were computed: everything but a pair's
token ids that changes them. Parquet parts hold the values, keyed by a digest of each pair's token ids, so that a value
cannot attach to another pair. Columns: `key`, `chosen`, `rejected`, and `others` for a ranking's further answers. Where
an objective reads single tokens, `token_logps`, `likely` and `likely_logps` have a list for each answer: its tokens'
log-probs, the likely tokens in the place of each, one after another, and their log-probs. A part is written
completely or not at all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from dpo_jax.runtime import files
from dpo_jax.runtime.files import Path
from dpo_jax.types import AnswerTokens, InputError

TokenWriter: TypeAlias = Callable[[str, Sequence[AnswerTokens]], None]  # takes a pair's key and its answers' values


class Store(NamedTuple):
    """Folder of a reference store, and the identity of its values."""

    folder: Path
    identity: dict[str, object]
    date: str = ""  # YYYY-MM-DD, the day that chat templates write; not part of the identity, because the keys show it


def check_identity(store: Store) -> None:
    """Raises InputError, naming every part that differs, if the folder holds values of another identity."""
    folder, identity, _ = store
    manifest = folder / "manifest.json"
    if folder.exists() and not folder.is_dir():
        remedy = "Give another --config.reference.path."
        raise InputError(str(folder), got="a file", expected="a folder, or nothing yet", remedy=remedy)
    if not manifest.exists():
        if folder.exists() and any(folder.glob("*.parquet")):
            raise InputError(
                str(folder),
                got="holds Parquet files and no manifest.json",
                expected="a reference store, or a folder that does not exist yet",
                remedy="Give another --config.reference.path.",
            )
        return
    with _undamaged(manifest):
        stored = json.loads(manifest.read_text())["identity"]
    differ = [part for part in stored.keys() | identity.keys() if stored.get(part) != identity.get(part)]
    if differ:
        details = "; ".join(f"{part} was {stored.get(part)}, is {identity.get(part)}" for part in sorted(differ))
        raise InputError(
            str(folder),
            got=f"reference log-probs of a run that differs in {', '.join(sorted(differ))} ({details})",
            expected="log-probs of this run's model, data and settings",
            remedy="Give --config.reference.path=NEW_FOLDER to compute them anew, or undo the change.",
        )


def read_store(
    folder: Path, write_tokens: TokenWriter | None = None, *, likely: int = 0
) -> dict[str, tuple[float, ...]]:
    """Reads all finished parts: pair key to the log-probs of the pair's answers in nats.

    Args:
      write_tokens: called with the token values of each pair; None: they are not read.
      likely: number of likely tokens that the store has in the place of each.
    Raises: InputError if a part is damaged.
    """
    values: dict[str, tuple[float, ...]] = {}
    for part in sorted(folder.glob("part-*.parquet")):
        with _undamaged(part):
            table = pq.read_table(pa.BufferReader(part.read_bytes()))
            others = table.column("others").to_pylist() if "others" in table.column_names else [()] * len(table)
            if write_tokens is not None:
                for key, answers in zip(table.column("key").to_pylist(), _read_tokens(table, likely), strict=True):
                    write_tokens(key, answers)
        columns = (table.column(name).to_pylist() for name in ("key", "chosen", "rejected"))
        rows = zip(*columns, others, strict=True)
        values.update((key, (chosen, rejected, *more)) for key, chosen, rejected, more in rows)
    return values


@contextlib.contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """Turns errors of reading the file into an InputError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise InputError(
            str(path),
            got=f"a damaged file ({error})",
            expected="a file as a reference pass wrote it",
            remedy="Restore it, or delete its folder to compute the log-probs anew.",
        ) from error


def hex_keys(keys: np.ndarray) -> np.ndarray:
    """Returns keys [N, 2] in hexadecimal [N], as the store has them."""
    return np.array([key.tobytes().hex() for key in keys])


def fit_answers(logps: Sequence[float], answers: int) -> list[float]:
    """Pads log-probs with 0, or truncates them, to a number of answers: other runs may store more or fewer of those."""
    return [*logps, *[0.0] * answers][:answers]


def write_manifest(store: Store) -> None:
    """Writes the identity of the values."""
    folder, identity, date = store
    folder.mkdir(parents=True, exist_ok=True)
    content = {"identity": identity, "date": date}
    files.write_text(folder / "manifest.json", json.dumps(content, indent=2, sort_keys=True))


def write_part(
    folder: Path, values: Mapping[str, Sequence[float]], tokens: Mapping[str, Sequence[AnswerTokens]] | None
) -> None:
    """Writes a part of the store.

    Args:
      values: log-probs of a pair's answers in nats, by the pair's key.
      tokens: values of the tokens of its answers; None: sums over answers alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Named by its pairs, so that two runs which share the folder never overwrite each other's parts.
    name = xxhash.xxh3_64_hexdigest("".join(values).encode())
    logps = np.array([*values.values()], np.float64)
    columns: dict[str, list | np.ndarray | pa.Array] = {
        "key": list(values),
        "chosen": logps[:, 0],
        "rejected": logps[:, 1],
    }
    if logps.shape[1] > 2:
        columns["others"] = logps[:, 2:].tolist()
    if tokens is not None:
        for i, (column, dtype) in enumerate(TOKEN_COLUMNS.items()):
            columns[column] = _nested([[answer[i] for answer in answers] for answers in tokens.values()], dtype)
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    files.write_bytes(folder / f"part-{name}.parquet", sink.getvalue().to_pybytes())


# Columns of parts with values of single tokens, in the order of AnswerTokens, and the types of their numbers.
TOKEN_COLUMNS: dict[str, type[np.generic]] = {"token_logps": np.float32, "likely": np.int32, "likely_logps": np.float32}


def _nested(rows: Sequence[Sequence[np.ndarray]], dtype: type[np.generic]) -> pa.Array:
    """Returns a column that has, in each row, a list of answers, each a flat list of numbers."""
    arrays = [np.asarray(array, dtype).ravel() for row in rows for array in row]
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    answers = pa.LargeListArray.from_arrays(ends, np.concatenate(arrays))
    return pa.LargeListArray.from_arrays(np.cumsum([0, *map(len, rows)], dtype=np.int64), answers)


def _read_tokens(table: pa.Table, likely: int) -> Iterator[list[AnswerTokens]]:
    """Yields the token values of each pair's answers in a part."""
    columns = []
    for name in TOKEN_COLUMNS:
        rows = table.column(name).combine_chunks()
        ends, numbers = rows.values.offsets.to_numpy(), rows.values.values.to_numpy()
        arrays = [numbers[a:b] for a, b in itertools.pairwise(ends.tolist())]
        columns.append([arrays[a:b] for a, b in itertools.pairwise(rows.offsets.to_numpy().tolist())])
    for pair in zip(*columns, strict=True):
        yield [
            AnswerTokens(logps, *(column.reshape(len(logps), likely) for column in (ids, likely_logps)))
            for logps, ids, likely_logps in zip(*pair, strict=True)
        ]
