"""Tokenized pairs on disk: written once for each combination of data, tokenizer and rules, then memory-mapped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Float32, Float64, Int32, Int64, UInt64
from transformers import PreTrainedTokenizerBase

from dpo_jax.data import formats, published
from dpo_jax.data.entry import COLUMNS, EntryWriter
from dpo_jax.data.formats import FORMATS, RANKINGS
from dpo_jax.data.mismatched import MismatchedPairs, mismatched
from dpo_jax.data.reading import LOSSES, ReadingRules, tokenize_source
from dpo_jax.data.renaming import Renaming
from dpo_jax.data.sources import Source, read
from dpo_jax.data.templates import TURNS, writes_date
from dpo_jax.data.tokenize import TokenizationRules, encode, identity
from dpo_jax.runtime import files
from dpo_jax.runtime.terminal import Progress, passes
from dpo_jax.types import Encoded, InputError, check_choice

CACHE_VERSION = 7  # to be raised when the same rows would be tokenized, ordered or stored differently


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
    labels: tuple[str, ...] = ()  # name in metrics of each source; files of one part of a specification share it

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

    @functools.cached_property
    def mixture(self) -> tuple[str, ...]:
        """Names of the parts of a mixture, for metrics of each; empty where all pairs are of one."""
        parts = tuple(dict.fromkeys(self.labels))
        return parts if len(parts) > 1 else ()

    @functools.cached_property
    def part(self) -> Int32[np.ndarray, " N"] | None:
        """Index into `mixture` of each pair; None where that is empty."""
        if not self.mixture:
            return None
        return np.array([self.mixture.index(label) for label in self.labels], np.int32)[self.source]

    def place(self, i: int) -> str:
        """Names the row of the source that a pair comes from, such as `prefs.jsonl:17`."""
        return f"{self.names[self.source[i]]}:{self.numbers[i]}"


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
    header_left_out, layouts, unread, unread_keys, templated}.

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
    standard = formats.known_columns()
    renaming = Renaming(reading.columns, known=standard | published.COLUMNS, standard=standard)
    sources = read(spec, split=split)
    rules = {**dataclasses.asdict(reading), **dataclasses.asdict(tokenization), **identity(tokenizer)}
    if not writes_date(tokenizer.chat_template):
        del rules["date"]
    parts = [[source.digest, source.weight] for source in sources]
    key = xxhash.xxh3_128(json.dumps([CACHE_VERSION, parts, rules], sort_keys=True).encode()).hexdigest()
    named = cache_dir and files.local(cache_dir, "config.data.cache_dir", files.MAPPED)
    folder = (named or files.cache_folder("pairs")) / key
    if not folder.is_dir():
        encoder = functools.partial(encode, tokenizer=tokenizer, rules=tokenization)
        with (
            _rows_of(sources) as progress,
            _replacing(folder) as unfinished,
            EntryWriter(unfinished) as writer,
            _few_objects_to_scan(),
        ):
            for source in sources:
                reader = published.Reader(renaming)
                tokenize_source(source, writer, encoder, reading, reader, tokenizer, progress.add)
            renaming.check_ended()
            if reading.strict:
                writer.check_whole([source.name for source in sources])
            writer.finish(spec)
    return _open(folder, sources)


def _rows_of(sources: Sequence[Source]) -> Progress:
    """Returns the progress of tokenizing the rows of all sources."""
    counts = [source.count for source in sources]
    total = sum(count for count in counts if count is not None) if None not in counts else None
    names = Path(sources[0].name).name if len(sources) == 1 else f"{len(sources)} sources"
    return passes(total, f"tokenizing {names}", unit="rows")


@contextlib.contextmanager
def _few_objects_to_scan() -> Iterator[None]:
    """Keeps the objects that exist from being scanned by the garbage collector: rows make much garbage of their own."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
                remedy="Give --config.data.cache_dir=FOLDER, or set the environment variable DPO_JAX_CACHE.",
            ) from error
        yield unfinished


def _open(folder: Path, sources: Sequence[Source]) -> PairSet:
    """Memory-maps a cache entry. It does not hold the names of sources: their files may have moved since."""
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
        report = json.loads((folder / "report.json").read_text())
        counts = arrays.pop("counts")
        arrays |= {"lengths": _padded(arrays["lengths"], counts), "scored": _padded(arrays["scored"], counts - 1)}
    except (OSError, ValueError) as error:
        raise InputError(
            str(folder),
            got=f"a damaged cache entry ({error})",
            expected="the files as they were written",
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
    labels = tuple(source.label for source in sources)
    pairs = PairSet(digest, report.pop("kind"), names, weights, report, labels=labels, **arrays)
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
