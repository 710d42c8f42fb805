"""Reference pass: log-probs of the frozen model, computed once and stored on disk (see `store`).

Of several processes, which score every part together, each writes its share of the parts. A pass that was killed
continues after the last part on disk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
import xxhash
from jaxtyping import Bool, Float, Int, PyTree, UInt64

from dpo_jax.data.batches import TokenValues
from dpo_jax.data.packing import Shape
from dpo_jax.reference.store import (
    Store,
    TokenWriter,
    check_identity,
    fit_answers,
    hex_keys,
    read_store,
    write_manifest,
    write_part,
)
from dpo_jax.runtime import hosts
from dpo_jax.scoring import score_pairs
from dpo_jax.types import AnswerTokens, Batch, InputError, Pairs

PART_PAIRS = 256  # pairs in a part: what a killed pass can lose

# Host batch -> (logps [P, K], token sums or tokens).
Score: TypeAlias = Callable[[Batch], tuple[PyTree, dict[str, PyTree]]]
Logps: TypeAlias = dict[str, tuple[float, ...]]  # of a pair's answers in nats, by the pair's key


@dataclasses.dataclass(frozen=True, eq=False)
class PairsToScore:
    """N pairs that need reference log-probs, some of which may have come with the data."""

    pairs: Pairs
    lengths: Int[np.ndarray, "N K1"]  # tokens of the prompt and of each answer
    keys: UInt64[np.ndarray, "N 2"]  # digests of the pairs' token ids
    provided: Float[np.ndarray, "N _"]  # log-probs from the data in nats, used as they are; nan where there are none
    scored: Int[np.ndarray, "N _"] | None = None  # scored tokens of each answer; None: all its tokens

    @functools.cached_property
    def hex_keys(self) -> np.ndarray:
        """Keys [N] as the store has them."""
        return hex_keys(self.keys)

    @functools.cached_property
    def is_provided(self) -> Bool[np.ndarray, "N"]:
        """Whether all log-probs of a pair came with the data."""
        return np.asarray(np.isfinite(self.provided).all(1))


class PassResult(NamedTuple):
    """Log-probs of every set of pairs, by its name, and counts of the work of a reference pass."""

    values: dict[str, Float[np.ndarray, "N K"]]  # nats; 0 for a missing answer
    provided: int  # pairs whose log-probs came with the data
    stored: int  # distinct pairs read from the store
    scored: int  # distinct pairs scored now
    forward_passes: int
    tokens: dict[str, TokenValues] | None = None  # values of single tokens, if the pass was to score them


class _Part(NamedTuple):
    """Values of the pairs that were scored together, by their keys."""

    logps: Logps
    tokens: dict[str, list[AnswerTokens]] | None
    forward_passes: int


def platform() -> str:
    """Name of the hardware that computes log-probs; other hardware gives slightly other values."""
    return jax.devices()[0].device_kind.lower()


def run_pass(
    store: Store,
    sets: Mapping[str, PairsToScore],
    score: Score,
    *,
    shape: Shape,
    report: Callable[[int, int], None] = lambda done, total: None,
    tokens: int | None = None,
) -> PassResult:
    """Reads the log-probs that the store has, scores pairs that it lacks, and returns those of every pair.

    Args:
      sets: pairs by the name of their set, scored in this order. A pair in several of them is scored once.
      score: log-probs of a host batch under the reference; called only for pairs that have none.
      report: called with the numbers of pairs done and to do, at first with none done and then after each microbatch;
        not called if there is nothing to do.
      tokens: C, to read, score and return values of single tokens as well, with the C likeliest tokens in the place of
        each (the store's identity must include it); None: sums over answers alone.
    Raises: InputError if the store's identity differs, or if `tokens` is set and pairs bring sums of their own;
      Stopped after a part, if the run is asked to stop.
    """
    check_identity(store)
    provided = sum(int(each.is_provided.sum()) for each in sets.values())
    token_values, write_tokens = None, None
    if tokens is not None:
        _check_none_provided(provided)
        counts = {name: each.lengths[:, 1:] if each.scored is None else each.scored for name, each in sets.items()}
        token_values = {name: TokenValues.empty(each, tokens) for name, each in counts.items()}
        write_tokens = _token_writer((token_values[name], each.hex_keys) for name, each in sets.items())
    logps = read_store(store.folder, write_tokens, likely=tokens or 0)
    _check_same_everywhere(logps)
    needed = {key for each in sets.values() for key in each.hex_keys[~each.is_provided]}
    total = len(needed - logps.keys())
    stored = len(needed) - total
    if total and hosts.first():
        write_manifest(store)
    scored = forward_passes = in_part = 0

    def report_pairs(pairs: int) -> None:
        nonlocal in_part
        in_part += pairs
        report(min(scored + in_part, total), total)  # a pair that is twice in a part is scored twice

    if total:
        report(0, total)
    for number, part in enumerate(_score_missing(score, sets.values(), logps, shape, report_pairs)):
        if hosts.is_mine(number):
            write_part(store.folder, part.logps, part.tokens)
        if write_tokens is not None and part.tokens is not None:
            for key, answers in part.tokens.items():
                write_tokens(key, answers)
        scored, forward_passes, in_part = scored + len(part.logps), forward_passes + part.forward_passes, 0
        hosts.stop_if_asked()
    hosts.barrier("reference pass")
    values = {name: _in_order(each, logps) for name, each in sets.items()}
    return PassResult(values, provided, stored, scored, forward_passes, token_values)


def _score_missing(
    score: Score, sets: Iterable[PairsToScore], logps: Logps, shape: Shape, report: Callable[[int], None]
) -> Iterator[_Part]:
    """Scores every pair that `logps` lacks, part by part, and adds each part to `logps` before it is yielded."""
    for each in sets:

        def skip(indices: np.ndarray, each: PairsToScore = each) -> np.ndarray:
            return each.is_provided[indices] | np.array([key in logps for key in each.hex_keys[indices]])

        for done in score_pairs(score, each.pairs, each.lengths, shape=shape, skip=skip, report=report):
            keys = each.hex_keys[done.indices].tolist()
            new = dict(zip(keys, map(tuple, done.logps.astype(float).tolist()), strict=True))
            logps.update(new)
            tokens = None if done.tokens is None else dict(zip(keys, done.tokens, strict=True))
            yield _Part(new, tokens, done.forward_passes)


def _in_order(pairs: PairsToScore, logps: Logps) -> Float[np.ndarray, "N K"]:
    """Log-probs of the pairs in their order, those that came with the data as they are."""
    rows = zip(pairs.hex_keys, pairs.is_provided, pairs.provided, strict=True)
    values = [own if is_provided else fit_answers(logps[key], len(own)) for key, is_provided, own in rows]
    return np.array(values).reshape(pairs.provided.shape)


def _check_same_everywhere(logps: Logps) -> None:
    """Raises InputError unless all processes read the same store: they pack the pairs that it lacks together."""
    keys = xxhash.xxh3_64_hexdigest("".join(sorted(logps)).encode())
    hosts.agree("reference store", {"values": len(logps), "their keys": keys})


def _check_none_provided(count: int) -> None:
    """Raises InputError if `count` pairs came with reference log-probs, which are sums over whole answers."""
    if count:
        raise InputError(
            "config.loss.name",
            got=f"a loss that reads the reference token by token, and {count} pairs with reference log-probs of whole "
            "answers",
            expected="pairs without reference log-probs of their own; the reference pass scores them",
            remedy="Leave them out with --config.data.columns=ref_chosen_logps=,ref_rejected_logps=.",
        )


def _token_writer(sets: Iterable[tuple[TokenValues, np.ndarray]]) -> TokenWriter:
    """Returns a function that writes a pair's token values in every place that has its key.

    Args:
      sets: values to write into, and the keys [N] of their pairs.
    """
    places: dict[str, list[tuple[TokenValues, int]]] = {}
    for values, keys in sets:
        for i, key in enumerate(keys.tolist()):
            places.setdefault(key, []).append((values, i))

    def write(key: str, answers: Sequence[AnswerTokens]) -> None:
        for values, i in places.get(key, ()):
            values.write(i, answers)

    return write
