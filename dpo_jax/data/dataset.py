"""Tokenized pairs on disk: written once for each combination of data, tokenizer and rules, then memory-mapped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import xxhash
from jaxtyping import Float32, Float64, Int32, Int64, UInt64
from transformers import PreTrainedTokenizerBase

from dpo_jax.data import formats, published
from dpo_jax.data.formats import FORMATS, RANKINGS, detect, header_left_out, kind_of, render
from dpo_jax.data.keys import content_key
from dpo_jax.data.marks import count_scored
from dpo_jax.data.mismatched import MismatchedPairs, mismatched
from dpo_jax.data.renaming import Renaming
from dpo_jax.data.sources import Source, read
from dpo_jax.data.templates import TURNS, TemplateLoss, excerpt, writes_date
from dpo_jax.data.tokenize import Outcome, TokenizationRules, TooLong, encode, identity
from dpo_jax.data.written import PROMPT
from dpo_jax.runtime import files
from dpo_jax.types import Encoded, InputError, Omission, Pair, Row, check_choice

CACHE_VERSION = 6  # to be raised when the same rows would be tokenized, ordered or stored differently

LOSSES = ("error", "warn")  # values of `on_template_loss`

_CHUNK_ROWS = 250  # rows in memory at a time
_PLACES = 5  # most dropped rows that the report names for one reason
_REASONS = 20  # most reasons that the report lists; further ones are counted together

# File name: dtype, values per pair (0: a vector without a second axis).
_COLUMNS = {
    "tokens": (np.int32, 0),  # ids of prompt, chosen, rejected and further answers, pair after pair; see `marks`
    "starts": (np.int64, 0),  # index of each pair's first id in tokens
    "lengths": (np.int32, 0),  # tokens of prompt, chosen, rejected and further answers, pair after pair
    "counts": (np.int32, 0),  # entries of each pair in lengths: 1 + its answers
    "scored": (np.int32, 0),  # scored tokens of chosen, rejected and further answers, pair after pair
    "keys": (np.uint64, 2),
    "reference": (np.float64, 2),
    "source": (np.int32, 0),
    "numbers": (np.int64, 0),
    "pair_weights": (np.float32, 0),
    "margins": (np.float32, 0),
}

# Fields of the report that are summed over pairs.
_COUNTS = (
    "pairs",
    "prompts_cut",
    "prompt_tokens_cut",
    "answers_cut",
    "answer_tokens_cut",
    "exchanges_cut",
    "partly_scored",
    "unscored_tokens",
    "inner_ends",
    "boundary_split",
    "reference_given",
    "weights_given",
    "margins_given",
)

T = TypeVar("T")
Encoder: TypeAlias = Callable[[Sequence[Pair]], list[Outcome | TooLong | InputError]]


@dataclasses.dataclass(frozen=True, eq=False)
class PairSet:
    """Encoded pairs in the order of their sources, memory-mapped from disk; `pairs[i]` is the i-th."""

    digest: str  # of sources, weights, tokenizer, every rule and every token: equal digests mean equal pairs
    kind: str  # paired; unpaired: one of the two answers is missing; ranked: all answers of a ranking
    names: tuple[str, ...]  # of the sources
    weights: tuple[float, ...]  # of the sources: how often their pairs appear in an epoch
    report: dict[str, Any]  # counts of what was read, truncated and dropped; see `load`
    keys: UInt64[np.ndarray, "N 2"]  # digest of each pair's token ids
    lengths: Int32[np.ndarray, "N _"]  # tokens of prompt, chosen, rejected and, of rankings, other answers: [N, 1 + K]
    scored: Int32[np.ndarray, "N _"]  # scored tokens of each answer, at most its length
    reference: Float64[np.ndarray, "N K"]  # reference log-probs given with the data, in nats; nan: none
    source: Int32[np.ndarray, " N"]  # index into names
    numbers: Int64[np.ndarray, " N"]  # line or row in the source, counted from 1
    starts: Int64[np.ndarray, " N"]  # index of each pair's first id in tokens
    tokens: Int32[np.ndarray, " T"]  # ids of all pairs; those of answers that are not scored are marked, see `marks`
    pair_weights: Float32[np.ndarray, " N"] | None = None  # factor of each pair's loss; None: 1 for every pair
    margins: Float32[np.ndarray, " N"] | None = None  # offset of each pair's reward margin; None: 0 for every pair

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Encoded:
        start = self.starts[i]
        ends = start + np.cumsum(self.lengths[i])
        prompt, *answers = (self.tokens[a:b] for a, b in zip((start, *ends), ends, strict=False))
        return Encoded.of(prompt, *answers[:2], *filter(len, answers[2:]))

    def without_rejected(self) -> PairSet:
        """Returns the pairs with chosen answers only, for an objective that does not read rejected ones."""
        kept = np.array([1, 1, 0], np.int32)
        lengths, scored = self.lengths[:, :3] * kept, self.scored[:, :2] * kept[1:]
        reference = self.reference[:, :2]
        return dataclasses.replace(self, lengths=lengths, scored=scored, reference=reference, margins=None)

    def widened(self, answers: int) -> PairSet:
        """Returns the pairs with columns for at least this many answers, as in a batch with longer rankings."""
        # Missing answers have no tokens and log-probs of 0, the sum over none.
        lengths, scored = _wider(self.lengths, 1 + answers), _wider(self.scored, answers)
        return dataclasses.replace(self, lengths=lengths, scored=scored, reference=_wider(self.reference, answers))

    def mismatched(self, max_length: int, *, place: str) -> MismatchedPairs:
        """Returns each prompt with the answers of another prompt, truncated to `max_length` tokens together.

        Raises: InputError, with `place` for the set, if all prompts are the same.
        """
        return mismatched(self, self.lengths, max_length=max_length, place=place)

    def place(self, i: int) -> str:
        """Names the row of the source that a pair comes from, such as `prefs.jsonl:17`."""
        return f"{self.names[self.source[i]]}:{self.numbers[i]}"


@dataclasses.dataclass(frozen=True)
class ReadingRules:
    """Rules by which rows of a source become pairs of text."""

    format: str  # one of `formats.FORMATS`; auto: the first row of a source decides, under skip the first good one
    on_bad_row: (
        str  # error; skip: rows that cannot be rendered or encoded are dropped, with all their pairs, and counted
    )
    rankings: str  # one of `formats.RANKINGS`
    turns: str = "assistant"  # one of `templates.TURNS`
    date: str = ""  # YYYY-MM-DD, the day that templates write; empty: today
    on_template_loss: str = "error"  # error; warn: rows of which a template leaves something out are used as they are
    columns: str = ""  # names under which columns are read; see `renaming.Renaming`

    @property
    def strict(self) -> bool:
        """Whether a template must write everything."""
        return self.on_template_loss == "error"


def load(
    spec: str,
    *,
    split: str,
    reading: ReadingRules,
    tokenizer: PreTrainedTokenizerBase,
    tokenization: TokenizationRules,
    cache_dir: str,
) -> PairSet:
    """Reads, renders and tokenizes the preferences of a data specification, or opens the result of an earlier call.

    The report holds `rows`, rows read; `pairs`, pairs made of them (several of a ranking); `dropped`, a list of
    {reason, rows, places}; `prompts_cut`, `prompt_tokens_cut`, `answers_cut` and `answer_tokens_cut`, truncation;
    `exchanges_cut`, exchanges dropped from the start of long prompts; `boundary_split`, pairs whose answers were
    tokenized separately; `partly_scored` and `unscored_tokens`, answers with tokens that are not scored; `inner_ends`,
    answers with EOS inside; `omitted`, what template and tokenizer left out, a list of
    {part, side, count, place, text};
    `reference_given`, pairs with reference log-probs of their own; `weights_given` and `margins_given`, pairs with a
    weight other than 1 and a margin other than 0; and `sources`, a list of {name, weight, digest, format, rows, pairs,
    header_left_out, layouts, unread, templated}.

    Args:
      spec, split: as in `sources.read`.
      cache_dir: folder that holds the results, a folder for each; empty: see `files.cache_folder`.
    Raises: InputError for bad rules, bad rows if `on_bad_row` is error, a source that is damaged (such as broken JSON),
      sources that become pairs of different kinds, and data without a single usable row.
    """
    check_choice("data.format", reading.format, ("auto", *FORMATS))
    check_choice("data.on_bad_row", reading.on_bad_row, ("error", "skip"))
    check_choice("data.rankings", reading.rankings, RANKINGS)
    check_choice("data.turns", reading.turns, TURNS)
    check_choice("data.on_template_loss", reading.on_template_loss, LOSSES)
    if not writes_date(tokenizer.chat_template):
        reading = dataclasses.replace(reading, date="")
    standard = formats.known_columns()
    renaming = Renaming(reading.columns, known=standard | published.COLUMNS, standard=standard)
    sources = read(spec, split=split)
    rules = {**dataclasses.asdict(reading), **dataclasses.asdict(tokenization), **identity(tokenizer)}
    parts = [[source.digest, source.weight] for source in sources]
    key = xxhash.xxh3_128(json.dumps([CACHE_VERSION, parts, rules], sort_keys=True).encode()).hexdigest()
    folder = (Path(cache_dir).expanduser() if cache_dir else files.cache_folder("pairs")) / key
    if not folder.is_dir():
        encoder = functools.partial(encode, tokenizer=tokenizer, rules=tokenization)
        with _replacing(folder) as unfinished, _EntryWriter(unfinished) as writer:
            for source in sources:
                _tokenize_source(source, writer, encoder, reading, published.Reader(renaming), tokenizer)
            renaming.check_ended()
            if reading.strict:
                writer.check_whole([source.name for source in sources])
            writer.finish(spec)
    return _open(folder, sources)


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that is renamed to `folder` if the body succeeds, unless another process was first."""
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

    def __init__(self, path: Path, dtype: type[np.generic], width: int):
        self.dtype, self.width, self.count = np.dtype(dtype), width, 0
        self.file = path.open("wb")
        self._header()

    def _header(self) -> None:
        # numpy pads the header so that the first axis can grow: the final header has the size of the first one.
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


@dataclasses.dataclass
class _SourceCounts:
    """Entry of a source in the report."""

    format: str
    rows: int
    pairs: int
    header_left_out: str  # see `formats.header_left_out`
    layouts: list[str] = dataclasses.field(default_factory=list)  # of `published` that rows had
    unread: list[str] = dataclasses.field(default_factory=list)  # columns with a value that nothing read
    templated: bool = False  # a chat template wrote its pairs


@dataclasses.dataclass
class _Dropped:
    """Entry of a reason in the report: rows that were dropped for it, and the first of them as [source, number]."""

    reason: str
    rows: int
    places: list[list[int]]


@dataclasses.dataclass
class _Omitted:
    """Entry of the report: text of a kind that was left out."""

    part: str  # such as "reasoning"
    side: str  # prompts | answers
    count: int  # prompts or answers concerned
    place: list[int]  # the first of them, as [source, number]
    text: str  # of its text, what was left out


class _EntryWriter:
    """Writes a cache entry: appends pairs to its files, one source at a time, and counts for the report."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.arrays = {name: _Array(folder / f"{name}.npy", *kind) for name, kind in _COLUMNS.items()}
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.dropped: dict[str, _Dropped] = {}
        self.sources: list[_SourceCounts] = []
        self.omitted: dict[tuple[str, str], _Omitted] = {}
        self.kind = ""

    def __enter__(self) -> _EntryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for array in self.arrays.values():
            array.close()

    def begin(self, source: Source, format: str, kind: str, header_left_out: str) -> None:
        """Starts the next source. Raises: InputError if its pairs are of another kind than earlier ones."""
        if self.kind not in ("", kind):
            raise InputError(
                source.name,
                got=f"{kind} examples, after {self.kind} ones",
                expected="sources of one kind, because one loss reads them all",
                remedy="Train on one kind at a time.",
            )
        self.kind = kind
        self.sources.append(_SourceCounts(format, 0, 0, header_left_out))

    def add(self, good: Sequence[tuple[Pair, Outcome]], rows: int) -> None:
        """Appends the pairs that were made of this many rows of the current source."""
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
            "scored": np.array([count_scored(ids) for pair in encoded for ids in pair.answers]),
            "keys": np.array([content_key(pair) for pair in encoded], np.uint64),
            "reference": np.array([pair.reference or (np.nan, np.nan) for pair, _ in good]),
            "source": np.full(len(good), len(self.sources) - 1),
            "numbers": np.array([_number(pair.place) for pair, _ in good]),
            "pair_weights": np.array([pair.weight for pair, _ in good]),
            "margins": np.array([pair.margin for pair, _ in good]),
        }
        for name, values in columns.items():
            self.arrays[name].append(values)
        for pair, outcome in good:
            for name, count in zip(_COUNTS, _counts_of(pair, outcome), strict=True):
                self.counts[name] += count
        self.sources[-1].rows += rows
        self.sources[-1].pairs += len(good)
        self.sources[-1].templated |= good[0][0].templated

    def drop(self, bad: Sequence[InputError]) -> None:
        """Counts bad rows of the current source by reason; numbers in a message do not make another reason."""
        for error in bad:
            reason = re.sub(r"\d+", "N", error.got)
            if reason not in self.dropped and len(self.dropped) >= _REASONS:
                reason = "other reasons"
            entry = self.dropped.setdefault(reason, _Dropped(reason, 0, []))
            entry.rows += 1
            if len(entry.places) < _PLACES:
                entry.places.append([len(self.sources) - 1, _number(error.place)])
        self.sources[-1].rows += len(bad)

    def omit(self, rows: Iterable[tuple[str, Sequence[Omission]]]) -> None:
        """Counts what was left out of rows of the current source, each given by its place."""
        for place, omissions in rows:
            longest = {(each.part, each.answer): each for each in sorted(omissions, key=lambda each: len(each.text))}
            for (part, answer), omission in longest.items():
                side = "prompts" if answer == PROMPT else "answers"
                first = _Omitted(part, side, 0, [len(self.sources) - 1, _number(place)], omission.text)
                self.omitted.setdefault((part, side), first).count += 1

    def check_whole(self, names: Sequence[str]) -> None:
        """Raises InputError, with counts and examples, if anything was left out of the sources with these names."""
        if not self.omitted:
            return
        most = sorted(self.omitted.values(), key=lambda entry: -entry.count)
        listed = [
            f"{entry.part} in {entry.count} {entry.side} (such as {excerpt(entry.text)} at {names[source]}:{number})"
            for entry in most
            for source, number in [entry.place]
        ]
        raise InputError(
            f"data {','.join(names)!r}",
            got=f"text is lost on its way to the model: {'; '.join(listed)}",
            expected="a chat template and a tokenizer that write all of it",
            remedy="Give such a template (tokenizer.path, chat_template_kwargs), take the text out of the data, or set "
            'data.on_template_loss="warn" to train on what is left.',
        )

    def finish(self, spec: str) -> None:
        """Writes the report. Raises: InputError if there is no pair."""
        rows = sum(source.rows for source in self.sources)
        dropped = sorted(self.dropped.values(), key=lambda entry: -entry.rows)
        if not self.counts["pairs"]:
            raise InputError(
                f"data {spec!r}",
                got=f"no usable row among {rows}; most often: {dropped[0].reason}",
                expected="at least one preference that can be used",
                remedy="Correct the data or data.format.",
            )
        omitted = sorted(self.omitted.values(), key=lambda entry: -entry.count)
        lists = {"dropped": dropped, "omitted": omitted, "sources": self.sources}
        entries = {name: [dataclasses.asdict(entry) for entry in values] for name, values in lists.items()}
        report = {"kind": self.kind, "rows": rows, **self.counts, **entries}
        files.write_text(self.folder / "report.json", json.dumps(report, indent=1))


def _counts_of(pair: Pair, outcome: Outcome) -> tuple[int, ...]:
    """Contribution of one pair to each of _COUNTS."""
    prompt_cut, cuts = outcome.prompt_cut, outcome.answer_cuts
    answers = outcome.encoded.answers
    unscored = sum(len(ids) - count_scored(ids) for ids in answers)
    return (
        1,
        bool(prompt_cut),
        prompt_cut,
        sum(map(bool, cuts)),
        sum(cuts),
        outcome.exchanges_cut,
        sum(count_scored(ids) < len(ids) for ids in answers),
        unscored,
        outcome.inner_ends,
        outcome.boundary_split,
        pair.reference is not None,
        pair.weight != 1,
        pair.margin != 0,
    )


def _number(place: str) -> int:
    """Line or row in a place such as `prefs.jsonl:17`."""
    return int(place.rpartition(":")[2])


def _tokenize_source(
    source: Source,
    writer: _EntryWriter,
    encoder: Encoder,
    reading: ReadingRules,
    reader: published.Reader,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Renders, encodes and writes the rows of a source, a chunk at a time."""
    rows, format, skip = iter(source.rows), reading.format, reading.on_bad_row == "skip"
    first = True
    while as_written := list(itertools.islice(rows, _CHUNK_ROWS)):
        chunk = [_or_error(functools.partial(reader.read, row)) for row in as_written]
        if first:
            reader.renaming.check_begun(source.name, as_written)
            format = _detect(chunk, skip) if format == "auto" else format
            kind = kind_of(format, reading.rankings)
            writer.begin(source, format, kind, _header_left_out(chunk, format, tokenizer))
            first = False
        renderer = functools.partial(
            render,
            format=format,
            rankings=reading.rankings,
            tokenizer=tokenizer,
            turns=reading.turns,
            date=reading.date,
        )
        results = _encoded(chunk, renderer, encoder)
        lost = [result for result in results if isinstance(result, TemplateLoss)] if reading.strict else []
        bad = [result for result in results if isinstance(result, InputError) and result not in lost]
        if bad and not skip:
            raise bad[0]
        good = [result for result in results if isinstance(result, list)]
        writer.omit([(each.place, each.omissions) for each in lost])
        writer.omit([(pairs[0][0].place, _row_omissions(pairs)) for pairs in good])
        writer.add(list(itertools.chain(*good)), rows=len(good))
        writer.drop(bad)
        for row in chunk:
            if isinstance(row, Row):
                reader.note(row, format)
    writer.sources[-1].layouts, writer.sources[-1].unread = list(reader.layouts), list(reader.unread)


def _encoded(
    rows: Sequence[Row | InputError], renderer: Callable[..., list[Pair]], encoder: Encoder
) -> list[list[tuple[Pair, Outcome]] | InputError]:
    """Renders and encodes rows: for each, its pairs with their outcomes, or the error that makes it a bad row.

    A conversation whose prompt is too long is rendered again without its oldest exchange, and so on, until it fits or
    one exchange is left, which is then truncated.
    """
    results: list[list[tuple[Pair, Outcome]] | InputError | None] = [None] * len(rows)
    waiting, full, drop = list(range(len(rows))), dict[int, int](), 0
    while waiting:
        rendered = {
            i: _or_error(functools.partial(renderer, row, drop=drop)) if isinstance(row := rows[i], Row) else row
            for i in waiting
        }
        encoded = iter(encoder([pair for item in rendered.values() if isinstance(item, list) for pair in item]))
        waiting = []
        for i, pairs in rendered.items():
            if isinstance(pairs, InputError):
                results[i] = pairs
                continue
            outcomes = list(itertools.islice(encoded, len(pairs)))
            too_long = [each.prompt_tokens for each in outcomes if isinstance(each, TooLong)]
            if too_long:
                full.setdefault(i, max(too_long))
                waiting.append(i)
            else:
                results[i] = _with_outcomes(pairs, outcomes, full.get(i), drop)
        drop += 1
    return [each for each in results if each is not None]


def _with_outcomes(
    pairs: Sequence[Pair], outcomes: Sequence[Outcome | TooLong | InputError], full: int | None, drop: int
) -> list[tuple[Pair, Outcome]] | InputError:
    """The pairs of a row, each with its outcome; or the first error among the outcomes.

    Args:
      full: tokens of the prompt before exchanges were dropped; None: none were.
      drop: exchanges that were.
    """
    good = []
    for pair, outcome in zip(pairs, outcomes, strict=True):
        if isinstance(outcome, InputError):
            return outcome
        assert isinstance(outcome, Outcome)
        if full is not None:
            cut = full - len(outcome.encoded.prompt)
            outcome = outcome._replace(prompt_cut=cut, exchanges_cut=drop)
        good.append((pair, outcome))
    return good


def _row_omissions(pairs: Sequence[tuple[Pair, Outcome]]) -> tuple[Omission, ...]:
    """What template and tokenizer left out of a row, each of its answers counted once."""
    of_template = pairs[0][0].omissions
    of_tokenizer = [each for _, outcome in pairs for each in outcome.omissions]
    return (*of_template, *dict.fromkeys(of_tokenizer))


def _or_error(function: Callable[[], T]) -> T | InputError:
    """Result of a call, or the InputError that it raises."""
    try:
        return function()
    except InputError as error:
        return error


def _detect(rows: Sequence[Row | InputError], skip: bool) -> str:
    """Format of the first row, or, if rows may be skipped, of the first row that has a known format."""
    first = rows if skip else rows[:1]
    found = [_or_error(functools.partial(detect, row)) if isinstance(row, Row) else row for row in first]
    for format in found:
        if isinstance(format, str):
            return format
    raise next(error for error in found if isinstance(error, InputError))


def _header_left_out(rows: Sequence[Row | InputError], format: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Result of `formats.header_left_out` for the first row that the template can write; empty if there is none."""
    left_out = functools.partial(header_left_out, format=format, tokenizer=tokenizer)
    results = (_or_error(functools.partial(left_out, row)) for row in rows if isinstance(row, Row))
    return next((text for text in results if isinstance(text, str)), "")


def _open(folder: Path, sources: Sequence[Source]) -> PairSet:
    """Memory-maps a cache entry. It does not hold the names of sources: their files may have moved since."""
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS}
        report = json.loads((folder / "report.json").read_text())
        counts = arrays.pop("counts")
        arrays |= {"lengths": _padded(arrays["lengths"], counts), "scored": _padded(arrays["scored"], counts - 1)}
    except (OSError, ValueError) as error:
        raise InputError(
            str(folder),
            got=f"a damaged cache entry ({error})",
            expected=f"files {', '.join(_COLUMNS)}, as they were written",
            remedy="Delete the folder; it will be written again.",
        ) from error
    for entry in report["dropped"]:
        entry["places"] = [f"{sources[source].name}:{number}" for source, number in entry["places"]]
    for entry in report["omitted"]:
        source, number = entry["place"]
        entry["place"] = f"{sources[source].name}:{number}"
    for entry, source in zip(report["sources"], sources, strict=True):
        entry.update(name=source.name, weight=source.weight, digest=source.digest)
    names = tuple(source.name for source in sources)
    weights = tuple(source.weight for source in sources)
    # The rules alone do not determine the tokens: some chat templates write today's date.
    digest = xxhash.xxh3_128(folder.name.encode() + arrays["keys"].tobytes()).hexdigest()
    for name, count in (("pair_weights", "weights_given"), ("margins", "margins_given")):
        arrays[name] = arrays[name] if report[count] else None  # so that a run without them compiles what it always did
    pairs = PairSet(digest, report.pop("kind"), names, weights, report, **arrays)
    return pairs.widened(pairs.lengths.shape[1] - 1)


def _wider(array: np.ndarray, width: int) -> np.ndarray:
    """Pads an array [N, K] with columns of zeros to at least `width` columns."""
    more = width - array.shape[1]
    return np.pad(array, ((0, 0), (0, more))) if more > 0 else array


def _padded(numbers: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Numbers of N pairs as an array [N, most], padded with 0, from those of all pairs in a row and their counts."""
    most = int(counts.max())
    if counts.sum() == len(counts) * most:
        return numbers.reshape(-1, most)  # a view of the file
    padded = np.zeros((len(counts), most), np.int32)
    padded[np.arange(most) < counts[:, None]] = numbers
    return padded
