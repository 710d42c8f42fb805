"""Reads, renders and tokenizes the rows of a source."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from transformers import PreTrainedTokenizerBase

from dpo_jax.data import published
from dpo_jax.data.entry import EntryWriter
from dpo_jax.data.formats import detect, header_left_out, kind_of, render
from dpo_jax.data.sources import Source
from dpo_jax.data.templates import TemplateLoss
from dpo_jax.data.tokenize import Outcome, TooLong
from dpo_jax.types import InputError, Omission, Pair, Row

LOSSES = ("error", "warn")  # values of `on_template_loss`

_CHUNK_ROWS = 250  # rows in memory at a time

T = TypeVar("T")
Encoder: TypeAlias = Callable[[Sequence[Pair]], list[Outcome | TooLong | InputError]]


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


def tokenize_source(
    source: Source,
    writer: EntryWriter,
    encoder: Encoder,
    reading: ReadingRules,
    reader: published.Reader,
    tokenizer: PreTrainedTokenizerBase,
    report: Callable[[int], None] = lambda rows: None,
) -> None:
    """Renders, encodes and writes the rows of a source, a chunk at a time, after which `report` gets its rows."""
    rows, format, skip = iter(source.rows), reading.format, reading.on_bad_row == "skip"
    first, keys = True, set[str]()
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
        keys |= {key for pairs in good for key in pairs[0][0].unread}
        report(len(chunk))
    entry = writer.sources[-1]
    entry.layouts, entry.unread, entry.unread_keys = list(reader.layouts), list(reader.unread), sorted(keys)


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
    """Returns the text of a row that template and tokenizer left out, each omission once."""
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
