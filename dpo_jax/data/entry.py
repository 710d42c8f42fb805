"""Files of tokenized pairs: one for each column, appended to pair after pair, and a report of counts."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dpo_jax.data.keys import content_key
from dpo_jax.data.marks import count_scored
from dpo_jax.data.sources import Source
from dpo_jax.data.templates import excerpt
from dpo_jax.data.tokenize import Outcome
from dpo_jax.data.written import PROMPT
from dpo_jax.runtime import files
from dpo_jax.types import InputError, Omission, Pair, counted

_PLACES = 5  # most dropped rows that the report names for one reason
_REASONS = 20  # most reasons that the report lists; further ones are counted together

# File name: dtype, values per pair (0: a vector without a second axis).
COLUMNS = {
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
    unread_keys: list[str] = dataclasses.field(default_factory=list)  # likewise keys of messages
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


class EntryWriter:
    """Writes a cache entry: appends pairs to its files, one source at a time, and counts for the report."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.arrays = {name: _Array(folder / f"{name}.npy", *kind) for name, kind in COLUMNS.items()}
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.dropped: dict[str, _Dropped] = {}
        self.sources: list[_SourceCounts] = []
        self.omitted: dict[tuple[str, str], _Omitted] = {}
        self.kind = ""

    def __enter__(self) -> EntryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for array in self.arrays.values():
            array.close()

    def begin(self, source: Source, format: str, kind: str, header_left_out: str) -> None:
        """Starts the next source. Raises: InputError if its pairs are of another kind than earlier ones."""
        if self.kind not in ("", kind):
            raise InputError(
                source.name,
                got=f"{kind} examples, and the sources before it have {self.kind} ones",
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
            f"{entry.part} in {counted(entry.count, entry.side)} "
            f"(such as {excerpt(entry.text)} at {names[source]}:{number})"
            for entry in most
            for source, number in [entry.place]
        ]
        raise InputError(
            f"data {','.join(names)!r}",
            got=f"the model does not get all of the text: {'; '.join(listed)}",
            expected="a chat template and a tokenizer that write all of it",
            remedy='Give another template (--config.tokenizer.path=FOLDER, or {"chat_template": TEXT} in the column '
            "chat_template_kwargs), take the text out of the data, or give --config.data.on_template_loss=warn to "
            "train on what is left.",
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
                remedy="Correct the rows, or --config.data.format and --config.data.columns.",
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
    unscored = [len(ids) - count_scored(ids) for ids in answers]
    return (
        1,
        bool(prompt_cut),
        prompt_cut,
        sum(map(bool, cuts)),
        sum(cuts),
        outcome.exchanges_cut,
        sum(map(bool, unscored)),
        sum(unscored),
        outcome.inner_ends,
        outcome.boundary_split,
        pair.reference is not None,
        pair.weight != 1,
        pair.margin != 0,
    )


def _number(place: str) -> int:
    """Line or row in a place such as `prefs.jsonl:17`."""
    return int(place.rpartition(":")[2])
