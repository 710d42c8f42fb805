"""The reference pass: log-probs of the frozen model, computed once and kept on disk.

A store is a folder: `manifest.json` says under what identity its values were computed, and Parquet parts hold them,
keyed by a digest of each pair's token ids, so that a value cannot attach to another pair. Parts are written whole,
one after the other; a pass that was killed continues after the last of them. Of several processes, which score every
part together, each writes its share of the parts.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from jaxtyping import Float

from dpo_jax import hosts
from dpo_jax.data.layout import Shape
from dpo_jax.scoring import score_pairs
from dpo_jax.types import Batch, InputError, Pairs

PART_PAIRS = 256  # pairs in a part: what a killed pass can lose


class Pass(NamedTuple):
    """What a reference pass found and did."""

    values: list[Float[np.ndarray, "N K"]]  # of each set of pairs, nats; 0 for an answer that is not there
    given: int  # pairs whose values came with the data
    stored: int  # distinct pairs found in the store
    scored: int  # distinct pairs scored now
    forward_passes: int


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


def read_store(folder: Path) -> dict[str, tuple[float, ...]]:
    """All finished parts: pair key to the log-probs of its answers in nats."""
    values: dict[str, tuple[float, ...]] = {}
    for part in sorted(folder.glob("part-*.parquet")):
        with _undamaged(part):
            table = pq.read_table(part)
            others = table.column("others").to_pylist() if "others" in table.column_names else [()] * len(table)
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
) -> Pass:
    """Reads what the store holds, scores what it lacks, and returns the values of every pair.

    Args:
      identity: everything besides a pair's tokens that changes its values.
      sets: of each set of N pairs: the pairs, their token counts [N, 1 + K], their keys (digests of their token ids)
        [N, 2] uint64, and values given with the data [N, K] in nats, nan where there are none; given ones are used
        as they are.
      score: a host batch to its log-probs under the reference; called only for pairs that have no value.
      report: told the number of pairs done and to do, as parts finish.
    Raises: InputError if the store's identity differs; Stopped after a part, if the run is asked to stop.
    """
    check_identity(folder, identity)
    known = read_store(folder)
    # Processes pack what no value is known for, together: what they know must be the same.
    keys = xxhash.xxh3_64_hexdigest("".join(sorted(known)).encode())
    hosts.agree("reference store", {"values": len(known), "their keys": keys})
    named = [(pairs, lengths, _names(keys), _given(given)) for pairs, lengths, keys, given in sets]
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
            new = {
                str(name): tuple(logps)
                for name, logps in zip(names[done.indices], done.logps.astype(float).tolist(), strict=True)
            }
            if hosts.is_mine(next(parts)):
                _write_part(folder, new)
            known.update(new)
            scored, passes = scored + len(new), passes + done.forward_passes
            report(scored, total)
            hosts.stop_if_asked()
    hosts.wait("reference pass")
    values = [
        np.array([pair if own else _padded(known[name], len(pair)) for name, own, pair in zip(*each, strict=True)])
        for each in ((names, has_value, given) for (*_, names, has_value), (*_, given) in zip(named, sets, strict=True))
    ]
    from_data = sum(int(has_value.sum()) for *_, has_value in named)
    return Pass(values, from_data, found, scored, passes)


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


def _write_part(folder: Path, values: dict[str, tuple[float, ...]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Named by its pairs, so that two runs which share the folder never take each other's place.
    name = xxhash.xxh3_64_hexdigest("".join(values).encode())
    logps = np.array([*values.values()], np.float64)
    columns: dict[str, Any] = {"key": list(values), "chosen": logps[:, 0], "rejected": logps[:, 1]}
    if logps.shape[1] > 2:
        columns["others"] = logps[:, 2:].tolist()
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    _write_whole(folder / f"part-{name}.parquet", sink.getvalue().to_pybytes())


def _write_whole(path: Path, content: bytes) -> None:
    """Writes beside and renames, so that a reader sees the whole file or none."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    os.replace(beside, path)
