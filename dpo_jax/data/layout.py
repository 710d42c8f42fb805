"""A pair as one interval-masked sequence, and several of them in a row.

The prompt is stored once. The chosen answer stands before it, reversed, so that the keys any token may see are one
contiguous interval. An answer's last token predicts nothing, so it is a target but takes no position:

    pair       prompt p1 p2 p3   chosen c1 c2 c3   rejected r1 r2 r3

    index       0      1    |  2      3      4    |  5      6
    token       c2     c1   |  p1     p2     p3   |  r1     r2
    position    4      3    |  0      1      2    |  3      4
    visible    [0,5)  [1,5) | [2,3)  [2,4)  [2,5) | [2,6)  [2,7)
    predicts    c3     c2   |                c1,r1|  r2     r3

A ranking of more answers is laid out two and two, each couple around a prompt of its own:

    couple     answers 1, 2          | answers 3, 4          | ...
    token      1 reversed, prompt, 2 | 3 reversed, prompt, 4 | ...

Where an interval cannot say what a model needs, the `repeated` layout stores `prompt | answer` once a completion.
Both are still packed, and to a model both are still only two bounds a token. An answer without tokens is one that is
not there, or that nobody asks for: it takes no position, and neither does a prompt of its own. A pair without any
answer stands in no row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dpo_jax.data.packing import Crop, Shape, piece_room, plan, unit_lengths
from dpo_jax.types import Batch, Encoded, Rows

LAYOUTS = ("shared", "repeated")


class Unit(NamedTuple):
    """One pair, or a piece of it, laid out from index 0; bounds and sources are relative to its own start."""

    tokens: Int[np.ndarray, "N"]
    positions: Int[np.ndarray, "N"]
    key_start: Int[np.ndarray, "N"]
    key_end: Int[np.ndarray, "N"]
    source: Int[np.ndarray, "T"]
    target: Int[np.ndarray, "T"]
    side: Int[np.ndarray, "T"]


def lay_out(pair: Encoded, layout: str) -> Unit:
    """The pair's arrays in the given layout; see the drawings at the top of this file."""
    couples = _couples(pair) if layout == "shared" else _apart_from_others(pair)
    return _joined([_around(pair.prompt, *couple) for couple in couples])


def _pieces(pair: Encoded, layout: str, count: int) -> list[Unit]:
    """The pair's arrays in as many pieces as `piece_room` has."""
    if count == 1:
        return [lay_out(pair, layout)]
    return [_around(pair.prompt, *couple) for couple in _apart_from_others(pair)]


def _couples(pair: Encoded) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """What stands before and after each copy of the prompt, and the side of the first: answers two and two."""
    answers = *pair.answers, pair.prompt[:0]
    couples = [(*answers[side : side + 2], side) for side in range(0, len(pair.answers), 2)]
    return [(before, after, side) for before, after, side in couples if len(before) or len(after)]


def _apart_from_others(pair: Encoded) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """The same with each answer after a copy of its own."""
    return [(pair.prompt[:0], answer, side - 1) for side, answer in enumerate(pair.answers) if len(answer)]


def _around(prompt: np.ndarray, before: np.ndarray, after: np.ndarray, side: int) -> Unit:
    """An answer reversed before the prompt, of `side`, and the next one after it; either may be empty."""
    p, first, second = len(prompt), before[:-1][::-1], after[:-1]
    tokens = np.concatenate([first, prompt, second])
    c, index = len(first), np.arange(len(tokens))
    left = index < c
    positions = np.where(left, p + c - 1 - index, index - c)
    key_start = np.where(left, index, c)
    key_end = np.where(left, c + p, index + 1)
    # The first token of either answer is predicted by the prompt's last token.
    last = c + p - 1
    from_first = np.concatenate([[last], np.arange(c)[::-1]])[: len(before)]
    source = np.concatenate([from_first, last + np.arange(len(after))])
    sides = np.repeat([side, side + 1], [len(before), len(after)])
    return Unit(tokens, positions, key_start, key_end, source, np.concatenate([before, after]), sides)


def _joined(units: Sequence[Unit]) -> Unit:
    """Units one after another, as one."""
    if len(units) == 1:
        return units[0]
    starts = np.cumsum([0, *(len(unit.tokens) for unit in units)])
    moved = [
        unit._replace(key_start=unit.key_start + at, key_end=unit.key_end + at, source=unit.source + at)
        for unit, at in zip(units, starts, strict=False)
    ]
    return Unit(*map(np.concatenate, zip(*moved, strict=True)))


def collate(
    pairs: Sequence[Encoded],
    reference: np.ndarray | None,
    shape: Shape,
    *,
    reference_sums: Mapping[str, np.ndarray] | None = None,
    tokens: Any = None,
) -> Batch:
    """Packs at most `shape.pairs` pairs into one batch of fixed shape.

    Which row a pair stands in follows from lengths alone. Only rows of the shards in `shape.here` are written, and only
    their pairs' tokens read; the others are left as padding.

    Args:
      pairs: in batch order; fewer than `shape.pairs` leaves the rest as padding, marked absent.
      reference: stored log-probs [len(pairs), K] in nats, or None where there are none.
      reference_sums: further sums over answers under the reference, [len(pairs), K] each.
      tokens: of each pair, for every answer, likely tokens [n, C] in place of each of its own, and their log-probs
        under the reference.
    """
    assert len(pairs) <= shape.pairs
    lengths = np.zeros((len(pairs), 1 + shape.answers), np.int64)
    for i, pair in enumerate(pairs):
        lengths[i, : len(pair.lengths)] = pair.lengths
    room = piece_room(lengths, shape.layout, shape.row_length)
    planned = plan(lengths, shape)
    grid = (shape.microbatches * shape.rows, shape.row_length)
    index = np.arange(shape.row_length, dtype=np.int32)
    rows = Rows(
        tokens=np.zeros(grid, np.int32),
        positions=np.zeros(grid, np.int32),
        # A padding token sees itself alone: attention stays finite, and nothing real sees it.
        key_start=np.tile(index, (grid[0], 1)),
        key_end=np.tile(index + 1, (grid[0], 1)),
        source=np.zeros(grid, np.int32),
        target=np.zeros(grid, np.int32),
        slot=np.full(grid, -1, np.int32),
    )
    present = np.zeros((shape.microbatches, shape.pairs), bool)
    crop = np.zeros(shape.microbatches, np.int32)
    for micro, microbatch in enumerate(planned):
        crop[micro] = microbatch.crop
        for at, members in zip(_dealt(shape), microbatch.rows, strict=False):
            if shape.here is None or at // (shape.rows // shape.shards) in shape.here:
                units = [_pieces(pairs[p], shape.layout, len(room[p]))[j] for p, j in members]
                pieces = [(p, unit, room[p][j]) for (p, j), unit in zip(members, units, strict=True)]
                _write_row(rows, micro * shape.rows + at, pieces, shape.answers)
            present[micro, [pair for pair, _ in members]] = True
    if tokens is not None:
        likely, likely_logps = _likely(rows.slot, tokens, shape.answers)
        rows = rows._replace(likely=likely, likely_logps=likely_logps)

    def padded(values: np.ndarray | None) -> np.ndarray:
        stored = np.zeros((shape.pairs, shape.answers), np.float32)
        if values is not None:
            stored[: len(pairs)] = values
        return stored

    scored = np.zeros((shape.pairs, shape.answers), np.int32)
    scored[: len(pairs)] = lengths[:, 1:]
    micro = (shape.microbatches, shape.rows, shape.row_length)
    return Batch(
        rows=map_rows(lambda array: array.reshape(*micro, *array.shape[2:]), rows),
        count=np.int32(len(planned)),
        present=present,
        reference=padded(reference),
        lengths=scored,
        crop=crop if shape.crops else None,
        reference_sums=None if reference_sums is None else {name: padded(x) for name, x in reference_sums.items()},
    )


def answer_starts(lengths: Int[np.ndarray, "P _"], shape: Shape) -> Int[np.ndarray, "P K 3"]:
    """Where the entries of each answer's tokens begin in a batch: microbatch, row, and index in the row.

    They follow one another from there. What an answer that is not there has means nothing.
    """
    lengths = np.asarray(lengths)
    room, found = piece_room(lengths, shape.layout, shape.row_length), np.zeros((*lengths[:, 1:].shape, 3), np.int64)
    for micro, microbatch in enumerate(plan(lengths, shape)):
        for row, members in zip(_dealt(shape), microbatch.rows, strict=False):
            at = 0
            for pair, piece in members:
                there = np.flatnonzero(lengths[pair, 1:])
                for side in there if len(room[pair]) == 1 else there[piece : piece + 1]:
                    found[pair, side] = micro, row, at
                    at += lengths[pair, 1 + side]
    return found


def _likely(slot: np.ndarray, tokens: Any, answers: int) -> tuple[np.ndarray, np.ndarray]:
    """Likely tokens [R, T, C] at the entries of answers, and their log-probs; 0 at the others."""
    likely = tokens[0][0][0].shape[1]
    ids, logps = np.zeros((slot.size, likely), np.int32), np.zeros((slot.size, likely), np.float32)
    flat = slot.ravel()
    for at in np.flatnonzero(np.diff(flat, prepend=-1)):  # an answer's first entry, or the first after answers
        if flat[at] >= 0:
            pair, side = divmod(int(flat[at]), answers)
            here = slice(at, at + len(tokens[pair][side][0]))
            ids[here], logps[here] = tokens[pair][side]
    return ids.reshape(*slot.shape, likely), logps.reshape(*slot.shape, likely)


def _dealt(shape: Shape) -> list[int]:
    """Where the rows of a microbatch go, the first to the first device, and back and forth over the devices."""
    if shape.crops:
        return list(range(shape.rows))  # what is cut off is at the end
    each = np.arange(shape.rows).reshape(shape.shards, -1).T.copy()
    each[1::2] = each[1::2, ::-1]
    return each.ravel().tolist()


def crop_rows(rows: Rows, crop: Crop) -> Rows:
    """The first rows of a microbatch, and of them the first positions."""
    count, length = crop
    return map_rows(lambda array: array[:count, :length], rows)


def map_rows(function: Callable[[Any], Any], rows: Rows) -> Rows:
    """The same of each array that there is."""
    return Rows(*(None if array is None else function(array) for array in rows))


def _write_row(rows: Rows, row: int, members: list[tuple[int, Unit, int]], answers: int) -> None:
    at, scored = 0, 0
    for pair, unit, room in members:
        span = slice(at, at + len(unit.tokens))
        rows.tokens[row, span] = unit.tokens
        rows.positions[row, span] = unit.positions
        rows.key_start[row, span] = unit.key_start + at
        rows.key_end[row, span] = unit.key_end + at
        into = slice(scored, scored + len(unit.target))
        rows.source[row, into] = unit.source + at
        rows.target[row, into] = unit.target
        rows.slot[row, into] = answers * pair + unit.side
        at, scored = at + room, into.stop


def positions_computed(batch: Batch, shape: Shape) -> int:
    """Positions of the microbatches in use, padding and empty rows included."""
    used = range(int(batch.count))
    return sum(math.prod(shape.sizes[0 if batch.crop is None else int(batch.crop[micro])]) for micro in used)


def work_counts(batch: Batch, lengths: Int[np.ndarray, "P _"], shape: Shape) -> dict[str, int]:
    """Positions that an update computes, padding and empty rows included, and how many of them hold a token."""
    pieces = piece_room(lengths, shape.layout, shape.row_length)
    apart = sum(sum(each) for each in pieces if len(each) > 1)
    whole = [i for i, each in enumerate(pieces) if len(each) == 1]
    return {
        "positions_computed": positions_computed(batch, shape),
        "tokens_real": int(unit_lengths(np.asarray(lengths)[whole], shape.layout).sum()) + apart,
    }
