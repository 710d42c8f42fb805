"""The reference pass: log-probs of the frozen model, computed once and kept on disk.

A store is a folder: `manifest.json` says under what identity its values were computed, and Parquet parts hold them,
keyed by a digest of each pair's token ids, so that a value cannot attach to another pair. Parts are written whole,
one after the other; a pass that was killed continues after the last of them. Of several processes, which score every
part together, each writes its share of the parts. Where an objective reads single tokens, parts have a list for each
answer besides: its tokens' log-probs, the likely tokens in the place of each, one after another, and theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from jaxtyping import Float, Float32, Float64, Int, Int32

from dpo_jax import hosts
from dpo_jax.data.packing import Shape
from dpo_jax.scoring import score_pairs
from dpo_jax.types import AnswerTokens, Batch, InputError, Pairs

PART_PAIRS = 256  # pairs in a part: what a killed pass can lose


@dataclasses.dataclass(frozen=True, eq=False)
class TokenValues:
    """What the reference says of every token of the answers of N pairs, and of the C likeliest tokens in its place.

    4 + 8C bytes a token; pairs that are taken `of` others have the same arrays. A sequence: of each pair, for every
    answer, the likely tokens and their log-probs, as `layout.collate` reads them.
    """

    bounds: Int[np.ndarray, "N K1"]  # of the M tokens, those of answer k are from [k] up to [k + 1]
    logps: Float32[np.ndarray, "M"]  # nats
    likely: Int32[np.ndarray, "M C"]  # the likeliest first
    likely_logps: Float32[np.ndarray, "M C"]

    @classmethod
    def empty(cls, lengths: Int[np.ndarray, "N K"], likely: int) -> TokenValues:
        """Room for pairs with answers of these lengths."""
        ends = np.concatenate([[0], np.cumsum(lengths.ravel(), dtype=np.int64)])
        firsts = np.arange(len(lengths))[:, None] * lengths.shape[1]
        shape = int(ends[-1]), likely
        arrays = np.zeros(shape[0], np.float32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        return cls(ends[firsts + np.arange(lengths.shape[1] + 1)], *arrays)

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, pair: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(self.likely[a:b], self.likely_logps[a:b]) for a, b in itertools.pairwise(self.bounds[pair].tolist())]

    def of(self, chosen: Int[np.ndarray, "P"]) -> TokenValues:
        """The same of these pairs alone, in this order."""
        return dataclasses.replace(self, bounds=self.bounds[chosen])

    def write(self, pair: int, answers: Sequence[AnswerTokens]) -> None:
        """Fills in a pair's values. Raises: ValueError if there are more or fewer of an answer's than tokens."""
        for (a, b), answer in zip(itertools.pairwise(self.bounds[pair].tolist()), answers, strict=False):
            if len(answer.logps) != b - a:
                raise ValueError(f"{len(answer.logps)} values of {b - a} tokens")
            self.logps[a:b], self.likely[a:b], self.likely_logps[a:b] = answer

    def shared_logps(self) -> Float64[np.ndarray, "N K"]:
        """Each answer's log-probs summed up to the length of the shortest of its pair that is there."""
        counts = np.diff(self.bounds, axis=1)
        shortest = np.where(counts > 0, counts, np.iinfo(np.int64).max).min(1, keepdims=True)
        sums = np.concatenate([[0.0], np.cumsum(self.logps, dtype=np.float64)])
        starts = self.bounds[:, :-1]
        return sums[starts + np.minimum(counts, shortest)] - sums[starts]


class Pass(NamedTuple):
    """What a reference pass found and did."""

    values: list[Float[np.ndarray, "N K"]]  # of each set of pairs, nats; 0 for an answer that is not there
    given: int  # pairs whose values came with the data
    stored: int  # distinct pairs found in the store
    scored: int  # distinct pairs scored now
    forward_passes: int
    tokens: list[TokenValues] | None = None  # of each set of pairs, if they were asked for


def platform() -> str:
    """The hardware that log-probs are computed on; another kind gives other values."""
    return jax.devices()[0].device_kind.lower()


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


def run_pass(
    folder: Path,
    identity: dict[str, Any],
    sets: Sequence[tuple[Pairs, np.ndarray, np.ndarray, np.ndarray]],
    score: Callable[[Batch], tuple[Any, dict[str, Any]]],
    *,
    shape: Shape,
    layout: str,
    report: Callable[[int, int], None] = lambda done, total: None,
    tokens: int | None = None,
) -> Pass:
    """Reads what the store holds, scores what it lacks, and returns the values of every pair.

    Args:
      identity: everything besides a pair's tokens that changes its values.
      sets: of each set of N pairs: the pairs, their token counts [N, 1 + K], their keys (digests of their token ids)
        [N, 2] uint64, and values given with the data [N, K] in nats, nan where there are none; given ones are used
        as they are.
      score: a host batch to its log-probs under the reference; called only for pairs that have no value.
      report: told the number of pairs done and to do, as parts finish.
      tokens: C: what is known of single tokens is read, scored and returned as well, C likely ones for each, and the
        identity says so; None: sums over answers alone.
    Raises: InputError if the store's identity differs, or if tokens are wanted of pairs that bring sums of their own;
      Stopped after a part, if the run is asked to stop.
    """
    check_identity(folder, identity)
    named = [(pairs, lengths, _names(keys), _given(given)) for pairs, lengths, keys, given in sets]
    from_data = sum(int(has_value.sum()) for *_, has_value in named)
    kept = None
    if tokens is not None:
        _check_none_given(from_data)
        kept = [TokenValues.empty(lengths[:, 1:], tokens) for _, lengths, *_ in named]
    keep = _keep_in(zip(kept or (), (names for _, _, names, _ in named), strict=False))
    known = read_store(folder, None if tokens is None else keep, likely=tokens or 0)
    # Processes pack what no value is known for, together: what they know must be the same.
    keys = xxhash.xxh3_64_hexdigest("".join(sorted(known)).encode())
    hosts.agree("reference store", {"values": len(known), "their keys": keys})
    needed = {name for _, _, names, has_value in named for name in names[~has_value]}
    total = len(needed - known.keys())
    found, scored, passes = len(needed) - total, 0, 0
    if total and hosts.first():
        _write_manifest(folder, identity)
    parts = itertools.count()
    for pairs, lengths, names, has_value in named:

        def skip(part, names=names, has_value=has_value):
            return has_value[part] | np.array([name in known for name in names[part]])

        for done in score_pairs(score, pairs, lengths, shape=shape, layout=layout, skip=skip):
            new_names = names[done.indices].tolist()
            new = dict(zip(new_names, map(tuple, done.logps.astype(float).tolist()), strict=True))
            of_tokens = None if tokens is None else dict(zip(new_names, done.tokens or (), strict=True))
            if hosts.is_mine(next(parts)):
                _write_part(folder, new, of_tokens)
            for each in (of_tokens or {}).items():
                keep(*each)
            known.update(new)
            scored, passes = scored + len(new), passes + done.forward_passes
            report(scored, total)
            hosts.stop_if_asked()
    hosts.wait("reference pass")
    values = [
        np.array([pair if own else _padded(known[name], len(pair)) for name, own, pair in zip(*each, strict=True)])
        for each in ((names, has_value, given) for (*_, names, has_value), (*_, given) in zip(named, sets, strict=True))
    ]
    return Pass(values, from_data, found, scored, passes, kept)


def _check_none_given(count: int) -> None:
    """Raises InputError if so many pairs that bring values of whole answers are some."""
    if count:
        raise InputError(
            "config.loss.name",
            got=f"a loss that reads the reference token by token, and {count} pairs that bring its sums over answers",
            expected="pairs without, which are scored",
            remedy="Take the columns ref_chosen_logps and ref_rejected_logps away.",
        )


def _keep_in(sets: Iterable[tuple[TokenValues, np.ndarray]]) -> Keep:
    """Writes a pair's values wherever the pair stands in the sets, each with its pairs' keys."""
    places: dict[str, list[tuple[TokenValues, int]]] = {}
    for values, keys in sets:
        for i, key in enumerate(keys.tolist()):
            places.setdefault(key, []).append((values, i))

    def keep(key: str, answers: Sequence[AnswerTokens]) -> None:
        for values, i in places.get(key, ()):
            values.write(i, answers)

    return keep


def _names(keys: np.ndarray) -> np.ndarray:
    """Keys as they stand in the store, in hexadecimal."""
    return np.array([key.tobytes().hex() for key in keys])


def _padded(logps: Sequence[float], answers: int) -> list[float]:
    """Values of so many answers, 0 for each that a pair lacks: other runs may store more or fewer of those."""
    return [*logps, *[0.0] * answers][:answers]


def _given(values: np.ndarray) -> np.ndarray:
    """Which pairs came with both values."""
    return np.asarray(np.isfinite(values).all(1))


def _write_manifest(folder: Path, identity: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(folder / "manifest.json", json.dumps({"identity": identity}, indent=2, sort_keys=True).encode())


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
    _write_whole(folder / f"part-{name}.parquet", sink.getvalue().to_pybytes())


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


def _write_whole(path: Path, content: bytes) -> None:
    """Writes beside and renames, so that a reader sees the whole file or none."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    os.replace(beside, path)
