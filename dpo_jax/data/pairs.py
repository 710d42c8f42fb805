"""Tokenised pairs on disk: written once for each data, tokenizer and rule, then memory-mapped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from jaxtyping import Float64, Int32, Int64, UInt64
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.formats import FORMATS, detect, header_left_out, render
from dpo_jax.data.sources import Source, read
from dpo_jax.data.tokenize import Outcome, encode, identity
from dpo_jax.types import Encoded, InputError, Pair, Row

CACHE_VERSION = 2  # raised when the same rows would be tokenised, ordered or stored in another way

_CHUNK_ROWS = 250  # in memory at a time
_PLACES = 5  # named for each reason that rows were dropped
_REASONS = 20  # told apart; further ones are counted together

# File name: dtype, values per pair (0: a vector without a second axis).
_COLUMNS = {
    "tokens": (np.int32, 0),  # prompt, chosen, rejected of pair after pair
    "starts": (np.int64, 0),  # of each pair in tokens
    "lengths": (np.int32, 3),
    "keys": (np.uint64, 2),
    "reference": (np.float64, 2),
    "source": (np.int32, 0),
    "numbers": (np.int64, 0),
}

# Of the report, summed over pairs.
_COUNTS = (
    "pairs",
    "prompts_cut",
    "prompt_tokens_cut",
    "answers_cut",
    "answer_tokens_cut",
    "boundary_split",
    "reference_given",
)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class PairSet:
    """Encoded pairs in the order of their sources, memory-mapped from disk; `pairs[i]` is the i-th."""

    digest: str  # of sources, weights, tokenizer, every rule and every token: equal digests mean equal pairs
    names: tuple[str, ...]  # of the sources
    weights: tuple[float, ...]  # of the sources: times their pairs appear in an epoch
    report: dict[str, Any]  # what was read, cut and dropped; see `load`
    keys: UInt64[np.ndarray, "N 2"]  # digest of each pair's token ids
    lengths: Int32[np.ndarray, "N 3"]  # tokens of prompt, chosen, rejected
    reference: Float64[np.ndarray, "N 2"]  # log-probabilities given with the data, in nats; nan where none
    source: Int32[np.ndarray, " N"]  # index into names
    numbers: Int64[np.ndarray, " N"]  # line or row in the source, counted from 1
    starts: Int64[np.ndarray, " N"]
    tokens: Int32[np.ndarray, " T"]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Encoded:
        start = self.starts[i]
        ends = start + np.cumsum(self.lengths[i])
        return Encoded(*(self.tokens[a:b] for a, b in zip((start, *ends), ends, strict=False)))

    def without_rejected(self) -> PairSet:
        """The same pairs with no token in their rejected answers, for an objective that does not read them."""
        return dataclasses.replace(self, lengths=self.lengths * np.array([1, 1, 0], np.int32))

    def place(self, i: int) -> str:
        """Where a pair comes from, such as `prefs.jsonl:17`."""
        return f"{self.names[self.source[i]]}:{self.numbers[i]}"


def load(
    spec: str,
    *,
    split: str,
    format: str,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    max_length: int,
    max_prompt_length: int,
    truncate_prompt: str,
    on_bad_row: str,
    cache_dir: str,
) -> PairSet:
    """Reads, renders and tokenises the preferences of a data specification, or opens the result of an earlier call.

    The report holds `rows` read and `pairs` kept; `dropped`, a list of {reason, rows, places}; `prompts_cut`,
    `prompt_tokens_cut`, `answers_cut`, `answer_tokens_cut`; `boundary_split`, pairs whose answers were tokenised by
    themselves; `reference_given`; and `sources`, a list of {name, weight, digest, format, rows, pairs,
    header_left_out}.

    Args:
      spec, split: as in `sources.read`.
      format: one of `formats.FORMATS`, or auto: each source's first row (the first of a known format, under
        skip) decides for all its rows.
      tokenizer, vocab_size, max_length, max_prompt_length, truncate_prompt: as in `tokenize.encode`.
      on_bad_row: error, or skip: rows that cannot be rendered or encoded are left out and counted. A source that
        cannot be read on, such as broken JSON, is an error either way.
      cache_dir: folder of the results, a folder each; empty: see `cache_folder`.
    Raises: InputError for bad options, bad rows under `error`, and data without a single usable row.
    """
    _check_choice("data.format", format, ("auto", *FORMATS))
    _check_choice("data.on_bad_row", on_bad_row, ("error", "skip"))
    sources = read(spec, split=split)
    limits: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "truncate_prompt": truncate_prompt,
    }
    rules = {"format": format, "on_bad_row": on_bad_row, **limits, **identity(tokenizer)}
    parts = [[source.digest, source.weight] for source in sources]
    key = xxhash.xxh3_128(json.dumps([CACHE_VERSION, parts, rules], sort_keys=True).encode()).hexdigest()
    folder = (Path(cache_dir).expanduser() if cache_dir else cache_folder("pairs")) / key
    if not folder.is_dir():
        encoder = functools.partial(encode, tokenizer=tokenizer, **limits)
        with _replacing(folder) as unfinished, _Writer(unfinished) as writer:
            for source in sources:
                _convert(source, writer, encoder, tokenizer, format=format, skip=on_bad_row == "skip")
            writer.finish(spec)
    return _open(folder, sources)


def cache_folder(name: str) -> Path:
    """`$DPO_JAX_CACHE/NAME`, or `dpo_jax/NAME` in the user's cache folder."""
    chosen = os.environ.get("DPO_JAX_CACHE")
    if chosen:
        return Path(chosen) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo_jax" / name


def content_key(pair: Encoded) -> tuple[int, int]:
    """Digest of the token ids as two uint64: whatever is stored under it cannot reach another pair."""
    digest = xxhash.xxh3_128(np.array([len(ids) for ids in pair], np.int64).tobytes())
    for ids in pair:
        digest.update(np.ascontiguousarray(ids, np.int32).tobytes())
    return divmod(digest.intdigest(), 1 << 64)


def _check_choice(place: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(place, got=repr(value), expected=f"one of {', '.join(choices)}", remedy="Correct it.")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder that takes the name of `folder` when the block is through; a killed process leaves `folder` unmade."""
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            str(folder.parent),
            got=f"cannot be written to ({error})",
            expected="a folder for tokenised data",
            remedy="Set data.cache_dir or the environment variable DPO_JAX_CACHE.",
        ) from error
    try:
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # if it is, another process was first, with the same content
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class _Array:
    """A .npy file that grows by appending."""

    def __init__(self, path: Path, dtype: Any, width: int):
        self.dtype, self.width, self.count = np.dtype(dtype), width, 0
        self.file = path.open("wb")
        self._header()

    def _header(self) -> None:
        # numpy pads headers for the first axis to grow, so the last one written takes the room of the first.
        shape = (self.count, self.width) if self.width else (self.count,)
        header = {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(self.dtype)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, values: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(values, self.dtype).tobytes())
        self.count += len(values)

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        self.file.close()


class _Writer:
    """Appends pairs to the files of a cache entry and keeps the report, source after source."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.arrays = {name: _Array(folder / f"{name}.npy", *kind) for name, kind in _COLUMNS.items()}
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.dropped: dict[str, dict[str, Any]] = {}
        self.sources: list[dict[str, Any]] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for array in self.arrays.values():
            array.close()

    def begin(self, format: str, header_left_out: str) -> None:
        """Starts the next source."""
        self.sources.append({"format": format, "rows": 0, "pairs": 0, "header_left_out": header_left_out})

    def add(self, good: Sequence[tuple[Pair, Outcome]]) -> None:
        """Stores pairs of the source begun last."""
        if not good:
            return
        encoded = [outcome.encoded for _, outcome in good]
        lengths = np.array([[len(ids) for ids in pair] for pair in encoded])
        sizes = lengths.sum(axis=1)
        columns = {
            "starts": self.arrays["tokens"].count + np.cumsum(sizes) - sizes,
            "tokens": np.concatenate([ids for pair in encoded for ids in pair]),
            "lengths": lengths,
            "keys": np.array([content_key(pair) for pair in encoded], np.uint64),
            "reference": np.array([pair.reference or (np.nan, np.nan) for pair, _ in good]),
            "source": np.full(len(good), len(self.sources) - 1),
            "numbers": np.array([_number(pair.place) for pair, _ in good]),
        }
        for name, values in columns.items():
            self.arrays[name].append(values)
        for pair, outcome in good:
            for name, count in zip(_COUNTS, _tally(pair, outcome), strict=True):
                self.counts[name] += count
        for name in ("rows", "pairs"):
            self.sources[-1][name] += len(good)

    def drop(self, bad: Sequence[InputError]) -> None:
        """Counts bad rows of the source begun last by what is wrong with them, whatever the numbers in it."""
        for error in bad:
            reason = re.sub(r"\d+", "N", error.got)
            if reason not in self.dropped and len(self.dropped) >= _REASONS:
                reason = "other reasons"
            entry = self.dropped.setdefault(reason, {"reason": reason, "rows": 0, "places": []})
            entry["rows"] += 1
            if len(entry["places"]) < _PLACES:
                entry["places"].append([len(self.sources) - 1, _number(error.place)])
        self.sources[-1]["rows"] += len(bad)

    def finish(self, spec: str) -> None:
        """Writes the report."""
        rows = sum(source["rows"] for source in self.sources)
        dropped = sorted(self.dropped.values(), key=lambda entry: -entry["rows"])
        if not self.counts["pairs"]:
            raise InputError(
                f"data {spec!r}",
                got=f"no usable row among {rows}; most often: {dropped[0]['reason']}",
                expected="at least one preference that can be used",
                remedy="Correct the data or data.format.",
            )
        report = {"rows": rows, **self.counts, "dropped": dropped, "sources": self.sources}
        (self.folder / "report.json").write_text(json.dumps(report, indent=1))


def _tally(pair: Pair, outcome: Outcome) -> tuple[int, ...]:
    """What one pair adds to each of _COUNTS."""
    cuts = (outcome.prompt_cut, outcome.chosen_cut, outcome.rejected_cut)
    answers = [bool(cut) for cut in cuts[1:]]
    given = pair.reference is not None
    return 1, bool(cuts[0]), cuts[0], sum(answers), sum(cuts[1:]), outcome.boundary_split, given


def _number(place: str) -> int:
    return int(place.rpartition(":")[2])


def _convert(
    source: Source,
    writer: _Writer,
    encoder: Callable[[Sequence[Pair]], list[Outcome | InputError]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str,
    skip: bool,
) -> None:
    """Takes a source through rendering and encoding into the writer, a chunk at a time."""
    rows = iter(source.rows)
    first = True
    while chunk := list(itertools.islice(rows, _CHUNK_ROWS)):
        if first:
            format = _detected(chunk, skip) if format == "auto" else format
            writer.begin(format, _left_out(chunk, tokenizer) if format == "chat" else "")
            first = False
        rendered = [_caught(functools.partial(render, row, format=format, tokenizer=tokenizer)) for row in chunk]
        encoded = iter(encoder([item for item in rendered if isinstance(item, Pair)]))
        results = [next(encoded) if isinstance(item, Pair) else item for item in rendered]
        bad = [result for result in results if isinstance(result, InputError)]
        if bad and not skip:
            raise bad[0]
        kept = zip(rendered, results, strict=True)
        good = [(pair, result) for pair, result in kept if isinstance(pair, Pair) and isinstance(result, Outcome)]
        writer.add(good)
        writer.drop(bad)


def _caught(function: Callable[[], T]) -> T | InputError:
    try:
        return function()
    except InputError as error:
        return error


def _detected(rows: Sequence[Row], skip: bool) -> str:
    """The format of the first row; if rows may be skipped, of the first that has one."""
    formats = [_caught(functools.partial(detect, row)) for row in (rows if skip else rows[:1])]
    for format in formats:
        if isinstance(format, str):
            return format
    raise next(error for error in formats if isinstance(error, InputError))


def _left_out(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template leaves out of its generation header, told by the first row it can write."""
    tried = (_caught(functools.partial(header_left_out, row, tokenizer=tokenizer)) for row in rows)
    return next((text for text in tried if isinstance(text, str)), "")


def _open(folder: Path, sources: Sequence[Source]) -> PairSet:
    """Maps a finished entry. Names of sources are not part of it: the same content may lie elsewhere by now."""
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS}
        report = json.loads((folder / "report.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            str(folder),
            got=f"a damaged cache entry ({error})",
            expected=f"files {', '.join(_COLUMNS)}, as they were written",
            remedy="Delete the folder; it will be made again.",
        ) from error
    for entry in report["dropped"]:
        entry["places"] = [f"{sources[source].name}:{number}" for source, number in entry["places"]]
    for entry, source in zip(report["sources"], sources, strict=True):
        entry.update(name=source.name, weight=source.weight, digest=source.digest)
    names = tuple(source.name for source in sources)
    weights = tuple(source.weight for source in sources)
    # The rules alone do not tell the tokens: some chat templates write today's date.
    digest = xxhash.xxh3_128(folder.name.encode() + arrays["keys"].tobytes()).hexdigest()
    return PairSet(digest, names, weights, report, **arrays)
