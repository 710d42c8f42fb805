"""The reference pass: log-probs of the frozen model, computed once and kept on disk.

A store is a folder: `manifest.json` says under what identity its values were computed, and Parquet parts hold them,
keyed by a digest of each pair's token ids, so that a value cannot attach to another pair. Parts are written whole,
one after the other; a pass that was killed continues after the last of them. Of several processes, which score every
part together, each writes its share of the parts. Where an objective reads single tokens, parts have a list for each
answer besides: its tokens' log-probs, the likely tokens in the place of each, one after another, and theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash
from jaxtyping import Float

from dpo_jax.data.batches import TokenValues
from dpo_jax.data.packing import Shape
from dpo_jax.reference.store import Keep, _names, _padded, _write_manifest, _write_part, check_identity, read_store
from dpo_jax.runtime import hosts
from dpo_jax.scoring import score_pairs
from dpo_jax.types import AnswerTokens, Batch, InputError, Pairs

PART_PAIRS = 256  # pairs in a part: what a killed pass can lose


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


def _given(values: np.ndarray) -> np.ndarray:
    """Which pairs came with both values."""
    return np.asarray(np.isfinite(values).all(1))
