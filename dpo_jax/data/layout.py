"""Lays out each pair as one interval-masked sequence, and packed pairs as the rows of a batch.

The prompt is stored once. The chosen answer is placed before it, reversed, so that the keys that any token may attend
to are one contiguous interval. An answer's last token predicts nothing, so it is a target but takes no position:

    pair       prompt p1 p2 p3   chosen c1 c2 c3   rejected r1 r2 r3

    index       0      1    |  2      3      4    |  5      6
    token       c2     c1   |  p1     p2     p3   |  r1     r2
    position    4      3    |  0      1      2    |  3      4
    visible    [0,5)  [1,5) | [2,3)  [2,4)  [2,5) | [2,6)  [2,7)
    predicts    c3     c2   |                c1,r1|  r2     r3

A ranking of more than two answers is laid out in twos, each two answers around their own copy of the prompt:

    answers    1, 2                  | 3, 4                  | ...
    token      1 reversed, prompt, 2 | 3 reversed, prompt, 4 | ...

Where an interval cannot express the mask that a model needs, the `repeated` layout stores `prompt | answer` for each
completion. Both layouts are packed, and a model sees only two bounds per token in either. A missing answer, or one that
the objective does not read, has no tokens: it takes no position and needs no copy of the prompt. A pair without any
answer is in no row. An answer's token that is read but not scored (see `marks`) takes its position and is no target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dpo_jax.data.marks import count_scored, is_scored, unmark
from dpo_jax.data.packing import Crop, Shape, piece_spaces, plan, unit_lengths
from dpo_jax.types import Batch, Encoded, Rows

LAYOUTS = ("shared", "repeated")

# For each answer of a pair: the C likeliest tokens [n, C] in place of each of its n tokens, and their log-probs [n, C].
LikelyTokens = Sequence[tuple[np.ndarray, np.ndarray]]


class Unit(NamedTuple):
    """Arrays of one pair or of a piece of it: N tokens, T scored tokens; indices count from its own first token."""

    tokens: Int[np.ndarray, "N"]
    positions: Int[np.ndarray, "N"]
    key_start: Int[np.ndarray, "N"]
    key_end: Int[np.ndarray, "N"]
    source: Int[np.ndarray, "T"]  # index whose hidden state predicts the target
    target: Int[np.ndarray, "T"]  # scored token
    side: Int[np.ndarray, "T"]  # answer that the target belongs to: 0 chosen, 1 rejected, further ones of a ranking


def lay_out(pair: Encoded, layout: str) -> Unit:
    """Lays out a pair from index 0; see the drawings at the top of this file.

    Args:
      layout: one of LAYOUTS.
    """
    groups = _in_twos(pair) if layout == "shared" else _one_by_one(pair)
    return _concatenate([_around_prompt(pair.prompt, *group) for group in groups])


def _pieces(pair: Encoded, layout: str, count: int) -> list[Unit]:
    """Lays out a pair as `count` pieces, as `packing.piece_spaces` splits it: whole, or one piece per answer."""
    if count == 1:
        return [lay_out(pair, layout)]
    return [_around_prompt(pair.prompt, *group) for group in _one_by_one(pair)]


def _in_twos(pair: Encoded) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Groups the answers in twos around one prompt: (before, after, index of the first)."""
    answers = *pair.answers, pair.prompt[:0]
    groups = [(*answers[side : side + 2], side) for side in range(0, len(pair.answers), 2)]
    return [(before, after, side) for before, after, side in groups if len(before) or len(after)]


def _one_by_one(pair: Encoded) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Groups with one answer each, after its own copy of the prompt: (nothing before, after, its index - 1)."""
    return [(pair.prompt[:0], answer, side - 1) for side, answer in enumerate(pair.answers) if len(answer)]


def _around_prompt(prompt: np.ndarray, before: np.ndarray, after: np.ndarray, side: int) -> Unit:
    """Lays out answer `side` reversed before the prompt and answer `side + 1` after it; either may be empty."""
    p, first, second = len(prompt), before[:-1][::-1], after[:-1]
    tokens = np.concatenate([first, prompt, second])
    c, index = len(first), np.arange(len(tokens))
    reversed_part = index < c
    positions = np.where(reversed_part, p + c - 1 - index, index - c)
    key_start = np.where(reversed_part, index, c)
    key_end = np.where(reversed_part, c + p, index + 1)
    # The first token of either answer is predicted by the prompt's last token.
    last = c + p - 1
    from_first = np.concatenate([[last], np.arange(c)[::-1]])[: len(before)]
    source = np.concatenate([from_first, last + np.arange(len(after))])
    sides = np.repeat([side, side + 1], [len(before), len(after)])
    targets = np.concatenate([before, after])
    scored = is_scored(targets)
    return Unit(unmark(tokens), positions, key_start, key_end, source[scored], targets[scored], sides[scored])


def _concatenate(units: Sequence[Unit]) -> Unit:
    """Concatenates units; key bounds and source indices are shifted to the start of the first."""
    if len(units) == 1:
        return units[0]
    starts = np.cumsum([0, *(len(unit.tokens) for unit in units)])
    shifted = [
        unit._replace(key_start=unit.key_start + at, key_end=unit.key_end + at, source=unit.source + at)
        for unit, at in zip(units, starts, strict=False)
    ]
    return Unit(*map(np.concatenate, zip(*shifted, strict=True)))


def collate(
    pairs: Sequence[Encoded],
    reference: np.ndarray | None,
    shape: Shape,
    *,
    reference_sums: Mapping[str, np.ndarray] | None = None,
    tokens: Sequence[LikelyTokens] | None = None,
) -> Batch:
    """Packs at most `shape.pairs` pairs into one batch of fixed shape.

    The row of a pair depends on token counts alone. Only rows of the shards in `shape.local_shards` are written, and
    only the tokens of their pairs are read; other rows stay padding.

    Args:
      pairs: in batch order; if they are fewer than `shape.pairs`, the batch is padded with absent pairs.
      reference: stored reference log-probs [len(pairs), K] in nats; None: zeros.
      reference_sums: {name: [len(pairs), K]}, further sums over answers under the reference.
      tokens: for each pair, the likely tokens of its answers and their log-probs under the reference, in nats.
    """
    assert len(pairs) <= shape.pairs
    lengths = np.zeros((len(pairs), 1 + shape.answers), np.int64)
    for i, pair in enumerate(pairs):
        lengths[i, : len(pair.lengths)] = pair.lengths
    spaces = piece_spaces(lengths, shape.layout, shape.row_length)
    planned = plan(lengths, shape)
    grid = (shape.microbatches * shape.rows, shape.row_length)
    index = np.arange(shape.row_length, dtype=np.int32)
    rows = Rows(
        tokens=np.zeros(grid, np.int32),
        positions=np.zeros(grid, np.int32),
        # A padding token attends only to itself, which keeps attention finite, and no real token attends to it.
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
        for at, members in zip(_row_order(shape), microbatch.rows, strict=False):
            if shape.local_shards is None or at // (shape.rows // shape.shards) in shape.local_shards:
                units = [_pieces(pairs[p], shape.layout, len(spaces[p]))[j] for p, j in members]
                pieces = [(p, unit, spaces[p][j]) for (p, j), unit in zip(members, units, strict=True)]
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
    for i, pair in enumerate(pairs):
        scored[i, : len(pair.answers)] = [count_scored(ids) for ids in pair.answers]
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


def answer_starts(
    lengths: Int[np.ndarray, "P _"], scored: Int[np.ndarray, "P K"], shape: Shape
) -> Int[np.ndarray, "P K 3"]:
    """Place of each answer's first scored token in a batch: (microbatch, row, index in the row).

    The other scored tokens of the answer follow it. The values of missing answers are meaningless.

    Args:
      lengths: token counts of prompt and answers.
      scored: scored tokens of each answer.
    """
    lengths = np.asarray(lengths)
    spaces = piece_spaces(lengths, shape.layout, shape.row_length)
    starts = np.zeros((*lengths[:, 1:].shape, 3), np.int64)
    for micro, microbatch in enumerate(plan(lengths, shape)):
        for row, members in zip(_row_order(shape), microbatch.rows, strict=False):
            at = 0
            for pair, piece in members:
                answers = np.flatnonzero(lengths[pair, 1:])
                for side in answers if len(spaces[pair]) == 1 else answers[piece : piece + 1]:
                    starts[pair, side] = micro, row, at
                    at += scored[pair, side]
    return starts


def _likely(slot: np.ndarray, tokens: Sequence[LikelyTokens], answers: int) -> tuple[np.ndarray, np.ndarray]:
    """Likely tokens [R, T, C] of each entry and their log-probs; 0 at entries that belong to no answer."""
    likely = tokens[0][0][0].shape[1]
    ids, logps = np.zeros((slot.size, likely), np.int32), np.zeros((slot.size, likely), np.float32)
    flat = slot.ravel()
    for at in np.flatnonzero(np.diff(flat, prepend=-1)):  # first entries of answers, and the first unused one
        if flat[at] >= 0:
            pair, side = divmod(int(flat[at]), answers)
            entries = slice(at, at + len(tokens[pair][side][0]))
            ids[entries], logps[entries] = tokens[pair][side]
    return ids.reshape(*slot.shape, likely), logps.reshape(*slot.shape, likely)


def _row_order(shape: Shape) -> list[int]:
    """Row indices in the order in which packed rows are written: back and forth over the shards, to balance them."""
    if shape.crops:
        return list(range(shape.rows))  # cropping drops the last rows, so the empty ones must come last
    order = np.arange(shape.rows).reshape(shape.shards, -1).T.copy()
    order[1::2] = order[1::2, ::-1]
    return order.ravel().tolist()


def crop_rows(rows: Rows, crop: Crop) -> Rows:
    """Crops a microbatch to its first rows and to their first positions."""
    count, length = crop
    return map_rows(lambda array: array[:count, :length], rows)


def map_rows(function: Callable[[Any], Any], rows: Rows) -> Rows:
    """Applies a function to each array of the rows; arrays that are None stay None."""
    return Rows(*(None if array is None else function(array) for array in rows))


def _write_row(rows: Rows, row: int, members: list[tuple[int, Unit, int]], answers: int) -> None:
    """Writes the units of one row, each a (pair, unit, row space), one after another into the arrays of `rows`."""
    at, scored = 0, 0
    for pair, unit, space in members:
        span = slice(at, at + len(unit.tokens))
        rows.tokens[row, span] = unit.tokens
        rows.positions[row, span] = unit.positions
        rows.key_start[row, span] = unit.key_start + at
        rows.key_end[row, span] = unit.key_end + at
        into = slice(scored, scored + len(unit.target))
        rows.source[row, into] = unit.source + at
        rows.target[row, into] = unit.target
        rows.slot[row, into] = answers * pair + unit.side
        at, scored = at + space, into.stop


def positions_computed(batch: Batch, shape: Shape) -> int:
    """Positions of the microbatches in use, including padding and empty rows."""
    used = range(int(batch.count))
    return sum(math.prod(shape.sizes[0 if batch.crop is None else int(batch.crop[micro])]) for micro in used)


def work_counts(batch: Batch, lengths: Int[np.ndarray, "P _"], shape: Shape) -> dict[str, int]:
    """Positions that an update computes, including padding and empty rows, and how many of them hold a token.

    Returns: {"positions_computed": int, "tokens_real": int}.
    """
    pieces = piece_spaces(lengths, shape.layout, shape.row_length)
    split = sum(sum(each) for each in pieces if len(each) > 1)
    whole = [i for i, each in enumerate(pieces) if len(each) == 1]
    return {
        "positions_computed": positions_computed(batch, shape),
        "tokens_real": int(unit_lengths(np.asarray(lengths)[whole], shape.layout).sum()) + split,
    }
