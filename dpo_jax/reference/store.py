"""TODO reference.store."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from dpo_jax.runtime import files
from dpo_jax.types import AnswerTokens, InputError


def check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Raises InputError if a store exists whose identity differs, naming every part that does."""
    manifest = folder / "manifest.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(str(folder), got="is a file", expected="a folder, or nothing yet", remedy="Name another.")
    if not manifest.exists():
        if folder.exists() and any(folder.glob("*.parquet")):
            raise InputError(
                str(folder),
                got="holds Parquet files and no manifest.json",
                expected="a reference store, or a folder that does not exist yet",
                remedy="Point reference.path elsewhere.",
            )
        return
    with _undamaged(manifest):
        stored = json.loads(manifest.read_text())["identity"]
    differ = [part for part in stored.keys() | identity.keys() if stored.get(part) != identity.get(part)]
    if differ:
        details = "; ".join(f"{part} was {stored.get(part)}, is {identity.get(part)}" for part in sorted(differ))
        raise InputError(
            str(folder),
            got=f"reference log-probs of another {', '.join(sorted(differ))} ({details})",
            expected="log-probs computed under this run's identity",
            remedy="Point reference.path at another folder to score anew, or undo the change.",
        )


Keep = Callable[[str, Sequence[AnswerTokens]], None]  # takes what is known of the tokens of a pair, by its key


def read_store(folder: Path, keep: Keep | None = None, *, likely: int = 0) -> dict[str, tuple[float, ...]]:
    """All finished parts: pair key to the log-probs of its answers in nats.

    Args:
      keep: given what they have of each pair's tokens, so many likely ones in the place of each; None: not read.
    """
    values: dict[str, tuple[float, ...]] = {}
    for part in sorted(folder.glob("part-*.parquet")):
        with _undamaged(part):
            table = pq.read_table(part)
            others = table.column("others").to_pylist() if "others" in table.column_names else [()] * len(table)
            if keep is not None:
                for key, answers in zip(table.column("key").to_pylist(), _tokens_in(table, likely), strict=True):
                    keep(key, answers)
        columns = (table.column(name).to_pylist() for name in ("key", "chosen", "rejected"))
        rows = zip(*columns, others, strict=True)
        values.update((key, (chosen, rejected, *rest)) for key, chosen, rejected, rest in rows)
    return values


@contextlib.contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise InputError(
            str(path),
            got=f"a damaged file ({error})",
            expected="a file as a reference pass wrote it",
            remedy="Restore it, or delete the folder to score anew.",
        ) from error


def _names(keys: np.ndarray) -> np.ndarray:
    """Keys as they stand in the store, in hexadecimal."""
    return np.array([key.tobytes().hex() for key in keys])


def _padded(logps: Sequence[float], answers: int) -> list[float]:
    """Values of so many answers, 0 for each that a pair lacks: other runs may store more or fewer of those."""
    return [*logps, *[0.0] * answers][:answers]


def _write_manifest(folder: Path, identity: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "manifest.json", json.dumps({"identity": identity}, indent=2, sort_keys=True))


def _write_part(
    folder: Path, values: dict[str, tuple[float, ...]], tokens: dict[str, list[AnswerTokens]] | None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Named by its pairs, so that two runs which share the folder never take each other's place.
    name = xxhash.xxh3_64_hexdigest("".join(values).encode())
    logps = np.array([*values.values()], np.float64)
    columns: dict[str, Any] = {"key": list(values), "chosen": logps[:, 0], "rejected": logps[:, 1]}
    if logps.shape[1] > 2:
        columns["others"] = logps[:, 2:].tolist()
    if tokens is not None:
        for i, (column, dtype) in enumerate(COLUMNS.items()):
            columns[column] = _nested([[answer[i] for answer in answers] for answers in tokens.values()], dtype)
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    files.write_bytes(folder / f"part-{name}.parquet", sink.getvalue().to_pybytes())


# Of parts with what is known of single tokens, and the type of their numbers.
COLUMNS = {"token_logps": np.float32, "likely": np.int32, "likely_logps": np.float32}


def _nested(rows: Sequence[Sequence[np.ndarray]], dtype: Any) -> pa.Array:
    """A column of a list of lists a row: of each answer, its numbers one after another."""
    arrays = [np.asarray(array, dtype).ravel() for row in rows for array in row]
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    answers = pa.LargeListArray.from_arrays(ends, np.concatenate(arrays))
    return pa.LargeListArray.from_arrays(np.cumsum([0, *map(len, rows)], dtype=np.int64), answers)


def _tokens_in(table: pa.Table, likely: int) -> Iterator[list[AnswerTokens]]:
    """What a part has of the tokens of each pair's answers."""
    columns = []
    for name in COLUMNS:
        rows = table.column(name).combine_chunks()
        ends, numbers = rows.values.offsets.to_numpy(), rows.values.values.to_numpy()
        arrays = [numbers[a:b] for a, b in itertools.pairwise(ends.tolist())]
        columns.append([arrays[a:b] for a, b in itertools.pairwise(rows.offsets.to_numpy().tolist())])
    for pair in zip(*columns, strict=True):
        answers = zip(*pair, strict=True)
        yield [AnswerTokens(own, *(each.reshape(len(own), likely) for each in others)) for own, *others in answers]
