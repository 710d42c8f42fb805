"""Tokenized pairs on disk: written once for each data, tokenizer and rule, then memory-mapped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from jaxtyping import Float64, Int32, Int64, UInt64
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.formats import FORMATS, RANKINGS, detect, header_left_out, kind_of, render
from dpo_jax.data.keys import content_key
from dpo_jax.data.mismatched import MismatchedPairs, mismatched
from dpo_jax.data.sources import Source, read
from dpo_jax.data.tokenize import Outcome, encode, identity
from dpo_jax.runtime import files
from dpo_jax.types import Encoded, InputError, Pair, Row

CACHE_VERSION = 3  # raised when the same rows would be tokenized, ordered or stored in another way

_CHUNK_ROWS = 250  # in memory at a time
_PLACES = 5  # named for each reason that rows were dropped
_REASONS = 20  # told apart; further ones are counted together

# File name: dtype, values per pair (0: a vector without a second axis).
_COLUMNS = {
    "tokens": (np.int32, 0),  # prompt, chosen, rejected and other answers of pair after pair
    "starts": (np.int64, 0),  # of each pair in tokens
    "lengths": (np.int32, 0),  # of prompt, chosen, rejected and other answers of pair after pair
    "counts": (np.int32, 0),  # of each pair in lengths
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
    kind: str  # paired; unpaired: one of the two answers is not there; ranked: all answers of a ranking
    names: tuple[str, ...]  # of the sources
    weights: tuple[float, ...]  # of the sources: times their pairs appear in an epoch
    report: dict[str, Any]  # what was read, cut and dropped; see `load`
    keys: UInt64[np.ndarray, "N 2"]  # digest of each pair's token ids
    lengths: Int32[np.ndarray, "N _"]  # tokens of prompt, chosen, rejected and, of rankings, other answers: [N, 1 + K]
    reference: Float64[np.ndarray, "N K"]  # log-probabilities given with the data, in nats; nan where none
    source: Int32[np.ndarray, " N"]  # index into names
    numbers: Int64[np.ndarray, " N"]  # line or row in the source, counted from 1
    starts: Int64[np.ndarray, " N"]
    tokens: Int32[np.ndarray, " T"]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Encoded:
        start = self.starts[i]
        ends = start + np.cumsum(self.lengths[i])
        prompt, *answers = (self.tokens[a:b] for a, b in zip((start, *ends), ends, strict=False))
        return Encoded.of(prompt, *answers[:2], *filter(len, answers[2:]))

    def without_rejected(self) -> PairSet:
        """The same pairs with chosen answers only, for an objective that does not read the others."""
        lengths = self.lengths[:, :3] * np.array([1, 1, 0], np.int32)
        return dataclasses.replace(self, lengths=lengths, reference=self.reference[:, :2])

    def widened(self, answers: int) -> PairSet:
        """The same pairs in arrays for at least so many answers, as a batch with longer rankings has them."""
        # The log-probs of no token add up to 0.
        lengths, reference = _wider(self.lengths, 1 + answers), _wider(self.reference, answers)
        return dataclasses.replace(self, lengths=lengths, reference=reference)

    def mismatched(self, max_length: int) -> MismatchedPairs:
        """Each prompt with the answers of another, cut to `max_length` tokens with it.

        Raises: InputError if all prompts are the same.
        """
        return mismatched(self, self.lengths, max_length=max_length)

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
    rankings: str,
    cache_dir: str,
) -> PairSet:
    """Reads, renders and tokenizes the preferences of a data specification, or opens the result of an earlier call.

    The report holds `rows` read and `pairs` kept (of a ranking, several); `dropped`, a list of {reason, rows, places};
    `prompts_cut`, `prompt_tokens_cut`, `answers_cut`, `answer_tokens_cut`; `boundary_split`, pairs whose answers were
    tokenized by themselves; `reference_given`; and `sources`, a list of {name, weight, digest, format, rows, pairs,
    header_left_out}.

    Args:
      spec, split: as in `sources.read`.
      format: one of `formats.FORMATS`, or auto: each source's first row (the first of a known format, under
        skip) decides for all its rows.
      tokenizer, vocab_size, max_length, max_prompt_length, truncate_prompt: as in `tokenize.encode`.
      on_bad_row: error, or skip: rows that cannot be rendered or encoded, with all that they make, are left out and
        counted. A source that cannot be read on, such as broken JSON, is an error either way.
      rankings: as in `formats.render`.
      cache_dir: folder of the results, a folder each; empty: see `cache_folder`.
    Raises: InputError for bad options, bad rows under `error`, sources that become pairs of different kinds, and data
      without a single usable row.
    """
    _check_choice("data.format", format, ("auto", *FORMATS))
    _check_choice("data.on_bad_row", on_bad_row, ("error", "skip"))
    _check_choice("data.rankings", rankings, RANKINGS)
    sources = read(spec, split=split)
    limits: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "truncate_prompt": truncate_prompt,
    }
    rules = {"format": format, "on_bad_row": on_bad_row, "rankings": rankings, **limits, **identity(tokenizer)}
    parts = [[source.digest, source.weight] for source in sources]
    key = xxhash.xxh3_128(json.dumps([CACHE_VERSION, parts, rules], sort_keys=True).encode()).hexdigest()
    folder = (Path(cache_dir).expanduser() if cache_dir else files.cache_folder("pairs")) / key
    if not folder.is_dir():
        encoder = functools.partial(encode, tokenizer=tokenizer, **limits)
        rendering = {"format": format, "rankings": rankings, "tokenizer": tokenizer}
        with _replacing(folder) as unfinished, _Writer(unfinished) as writer:
            for source in sources:
                _convert(source, writer, encoder, **rendering, skip=on_bad_row == "skip")
            writer.finish(spec)
    return _open(folder, sources)


def _check_choice(place: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(place, got=repr(value), expected=f"one of {', '.join(choices)}", remedy="Correct it.")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the name of `folder` when the body succeeds, unless another process was first."""
    with contextlib.ExitStack() as stack:
        try:
            unfinished = stack.enter_context(files.replacing_folder(folder, keep_existing=True))
        except OSError as error:
            raise InputError(
                str(folder.parent),
                got=f"cannot be written to ({error})",
                expected="a folder for tokenized data",
                remedy="Set data.cache_dir or the environment variable DPO_JAX_CACHE.",
            ) from error
        yield unfinished


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
        self.kind = ""

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for array in self.arrays.values():
            array.close()

    def begin(self, source: Source, format: str, kind: str, header_left_out: str) -> None:
        """Starts the next source. Raises: InputError if its pairs are of another kind than those before."""
        if self.kind not in ("", kind):
            raise InputError(
                source.name,
                got=f"{kind} examples, after {self.kind} ones",
                expected="sources of one kind, for one loss reads them all",
                remedy="Train on one kind at a time.",
            )
        self.kind = kind
        self.sources.append({"format": format, "rows": 0, "pairs": 0, "header_left_out": header_left_out})

    def add(self, good: Sequence[tuple[Pair, Outcome]], rows: int) -> None:
        """Stores pairs that so many rows of the source begun last made."""
        if not good:
            return
        encoded = [outcome.encoded for _, outcome in good]
        lengths = [pair.lengths for pair in encoded]
        sizes = np.array([sum(each) for each in lengths])
        columns = {
            "starts": self.arrays["tokens"].count + np.cumsum(sizes) - sizes,
            "tokens": np.concatenate([ids for pair in encoded for ids in (pair.prompt, *pair.answers)]),
            "lengths": np.concatenate(lengths),
            "counts": np.array([len(each) for each in lengths]),
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
        self.sources[-1]["rows"] += rows
        self.sources[-1]["pairs"] += len(good)

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
        report = {"kind": self.kind, "rows": rows, **self.counts, "dropped": dropped, "sources": self.sources}
        files.write_text(self.folder / "report.json", json.dumps(report, indent=1))


def _tally(pair: Pair, outcome: Outcome) -> tuple[int, ...]:
    """What one pair adds to each of _COUNTS."""
    cut, cuts = outcome.prompt_cut, outcome.answer_cuts
    given = pair.reference is not None
    return 1, bool(cut), cut, sum(map(bool, cuts)), sum(cuts), outcome.boundary_split, given


def _number(place: str) -> int:
    return int(place.rpartition(":")[2])


def _convert(
    source: Source,
    writer: _Writer,
    encoder: Callable[[Sequence[Pair]], list[Outcome | InputError]],
    *,
    format: str,
    rankings: str,
    tokenizer: PreTrainedTokenizerBase,
    skip: bool,
) -> None:
    """Takes a source through rendering and encoding into the writer, a chunk at a time."""
    rows = iter(source.rows)
    first = True
    while chunk := list(itertools.islice(rows, _CHUNK_ROWS)):
        if first:
            format = _detected(chunk, skip) if format == "auto" else format
            writer.begin(source, format, kind_of(format, rankings), _left_out(chunk, format, tokenizer))
            first = False
        renderer = functools.partial(render, format=format, rankings=rankings, tokenizer=tokenizer)
        rendered = [_caught(functools.partial(renderer, row)) for row in chunk]
        encoded = iter(encoder([pair for item in rendered if isinstance(item, list) for pair in item]))
        results = [_whole(item, encoded) if isinstance(item, list) else item for item in rendered]
        bad = [result for result in results if isinstance(result, InputError)]
        if bad and not skip:
            raise bad[0]
        good = [result for result in results if isinstance(result, list)]
        writer.add(list(itertools.chain(*good)), rows=len(good))
        writer.drop(bad)


def _whole(pairs: Sequence[Pair], encoded: Iterator[Outcome | InputError]) -> list[tuple[Pair, Outcome]] | InputError:
    """The pairs of a row with what the next outcomes say of them, or what is wrong with the first bad one."""
    outcomes = list(itertools.islice(encoded, len(pairs)))
    good = [(pair, found) for pair, found in zip(pairs, outcomes, strict=True) if isinstance(found, Outcome)]
    return next((found for found in outcomes if isinstance(found, InputError)), good)


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


def _left_out(rows: Sequence[Row], format: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template leaves out of its generation header, told by the first row it can write."""
    read = functools.partial(header_left_out, format=format, tokenizer=tokenizer)
    tried = (_caught(functools.partial(read, row)) for row in rows)
    return next((text for text in tried if isinstance(text, str)), "")


def _open(folder: Path, sources: Sequence[Source]) -> PairSet:
    """Maps a finished entry. Names of sources are not part of it: the same content may lie elsewhere by now."""
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS}
        report = json.loads((folder / "report.json").read_text())
        arrays["lengths"] = _padded(arrays["lengths"], arrays.pop("counts"))
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
    pairs = PairSet(digest, report.pop("kind"), names, weights, report, **arrays)
    return pairs.widened(pairs.lengths.shape[1] - 1)


def _wider(array: np.ndarray, width: int) -> np.ndarray:
    more = width - array.shape[1]
    return np.pad(array, ((0, 0), (0, more))) if more > 0 else array


def _padded(lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Lengths [N, 1 + K], of which each pair has so many, and 0 for answers that it lacks."""
    most = int(counts.max())
    if counts.sum() == len(counts) * most:
        return lengths.reshape(-1, most)  # as it lies on disk
    padded = np.zeros((len(counts), most), np.int32)
    padded[np.arange(most) < counts[:, None]] = lengths
    return padded
