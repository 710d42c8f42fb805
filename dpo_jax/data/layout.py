"""A pair as one interval-masked sequence, and several of them in a row.

The prompt is stored once. The chosen answer stands before it, reversed, so that the keys any token may see are one
contiguous interval. An answer's last token predicts nothing, so it is a target but takes no position:

    pair       prompt p1 p2 p3   chosen c1 c2 c3   rejected r1 r2 r3

    index       0      1    |  2      3      4    |  5      6
    token       c2     c1   |  p1     p2     p3   |  r1     r2
    position    4      3    |  0      1      2    |  3      4
    visible    [0,5)  [1,5) | [2,3)  [2,4)  [2,5) | [2,6)  [2,7)
    predicts    c3     c2   |                c1,r1|  r2     r3

Where an interval cannot say what a model needs, the `repeated` layout stores `prompt | answer` once a completion.
Both are still packed, and to a model both are still only two bounds a token. An answer without tokens is one that
nobody asks for: it takes no position, and neither does a prompt of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dpo_jax.types import Batch, Encoded, InputError, Rows

LAYOUTS = ("shared", "repeated")
FULL_ENOUGH = 0.95  # share of a batch's rows that should hold something
SAMPLED_BATCHES = 32  # batches drawn to find out
ROW_MULTIPLE = 128  # row lengths are multiples of this: what TPU lanes and attention blocks like


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static shape of every batch of a run, so that a run compiles each program once."""

    pairs: int  # P, pairs in a batch
    rows: int  # R, rows in a microbatch
    row_length: int  # S, positions in a row
    microbatches: int  # A, the most a batch can need: one row a pair


class Unit(NamedTuple):
    """One pair laid out from index 0; bounds and sources are relative to its own start."""

    tokens: Int[np.ndarray, "N"]
    positions: Int[np.ndarray, "N"]
    key_start: Int[np.ndarray, "N"]
    key_end: Int[np.ndarray, "N"]
    source: Int[np.ndarray, "T"]
    target: Int[np.ndarray, "T"]
    side: Int[np.ndarray, "T"]


def unit_lengths(lengths: Int[np.ndarray, "N 3"], layout: str) -> Int[np.ndarray, "N"]:
    """Positions each pair takes, from its prompt, chosen and rejected token counts."""
    prompt, *answers = np.asarray(lengths, np.int64).T
    prompts = 1 if layout == "shared" else sum(answer > 0 for answer in answers)
    return prompts * prompt + sum(np.maximum(answer - 1, 0) for answer in answers)


def unit_room(lengths: Int[np.ndarray, "N 3"], layout: str) -> Int[np.ndarray, "N"]:
    """What each pair takes of a row: its positions, and no less than its scored tokens, of which a row has as many.

    After a prompt of one token both answers' first tokens are predicted from one position, so there is a token more.
    """
    return np.maximum(unit_lengths(lengths, layout), np.asarray(lengths)[:, 1:].sum(1))


def lay_out(pair: Encoded, layout: str) -> Unit:
    """The pair's arrays in the given layout; see the drawing at the top of this file."""
    return _shared(pair) if layout == "shared" else _repeated(pair)


def _shared(pair: Encoded) -> Unit:
    p, chosen, rejected = len(pair.prompt), pair.chosen[:-1][::-1], pair.rejected[:-1]
    tokens = np.concatenate([chosen, pair.prompt, rejected])
    c, index = len(chosen), np.arange(len(tokens))
    before = index < c
    positions = np.where(before, p + c - 1 - index, index - c)
    key_start = np.where(before, index, c)
    key_end = np.where(before, c + p, index + 1)
    # The first token of either answer is predicted by the prompt's last token.
    last = c + p - 1
    from_chosen = np.concatenate([[last], np.arange(c)[::-1]])[: len(pair.chosen)]
    return _unit(pair, tokens, positions, key_start, key_end, [from_chosen, last + np.arange(len(pair.rejected))])


def _repeated(pair: Encoded) -> Unit:
    answers = [answer for answer in pair[1:] if len(answer)]
    parts = [np.concatenate([pair.prompt, answer[:-1]]) for answer in answers]
    starts = np.cumsum([0, *map(len, parts)])[:-1]
    tokens, base = np.concatenate(parts), np.repeat(starts, [len(part) for part in parts])
    index = np.arange(len(tokens))
    last = starts + len(pair.prompt) - 1
    source = [at + np.arange(len(answer)) for at, answer in zip(last, answers, strict=True)]
    return _unit(pair, tokens, index - base, base, index + 1, source)


def _unit(pair, tokens, positions, key_start, key_end, source):
    side = np.repeat([0, 1], [len(pair.chosen), len(pair.rejected)])
    target = np.concatenate([pair.chosen, pair.rejected])
    return Unit(tokens, positions, key_start, key_end, np.concatenate(source), target, side)


def fill_rows(lengths: Int[np.ndarray, "N"], row_length: int) -> list[list[int]]:
    """Which units share a row: each row takes the longest unit left and, of the others, those that fill it best.

    On real pairs this comes out at the fewest rows that could hold them all, where best-fit decreasing often needs one
    more. Source: minimum bin slack, Gupta and Ho 1999, by dynamic programming over the sums.

    Raises: InputError if a unit is longer than a row.
    """
    longest = int(np.max(lengths, initial=0))
    if longest > row_length:
        raise InputError(
            "config.data.row_length",
            got=f"a pair takes {longest} positions and a row holds {row_length}",
            expected=f"at least {longest}",
            remedy="Unset data.row_length to have it chosen from the data, or lower data.max_length.",
        )
    left = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    rows: list[list[int]] = []
    while left:
        first, *rest = left
        row = [first, *_best_fill(rest, sizes, row_length - sizes[first])]
        taken = set(row)
        left = [unit for unit in rest if unit not in taken]
        rows.append(row)
    return rows


def _best_fill(units: list[int], sizes: list[int], room: int) -> list[int]:
    """Some of the units, their sizes adding up to `room` or as near below it as can be; early ones are preferred."""
    within = (1 << (room + 1)) - 1
    reached = [1]  # after each unit, a bit for every sum that some of the units so far have
    for unit in units:
        if reached[-1] >> room:
            break  # a full row is found, and no other can be fuller
        reached.append((reached[-1] | reached[-1] << sizes[unit]) & within)
    best, chosen = reached[-1].bit_length() - 1, []
    for unit, before in zip(reversed(units[: len(reached) - 1]), reversed(reached[:-1]), strict=True):
        if not before >> best & 1:
            chosen.append(unit)
            best -= sizes[unit]
    return chosen


def choose_shape(
    lengths: Int[np.ndarray, "N"],
    *,
    pairs: int,
    row_length: int | None,
    rows: int | None,
    row_multiple: int,
    target_positions: int,
    field: str = "train.microbatch_rows",
) -> Shape:
    """Fixes the shape of a run's batches from the positions its pairs take.

    Args:
      lengths: `unit_room` of every pair that will be laid out, training and evaluation.
      row_length: positions in a row; None: the longest pair, rounded up to ROW_MULTIPLE.
      rows: rows in a microbatch; None: as many as `target_positions` allow while few of them run empty.
      row_multiple: rows are a multiple of this, the number of devices that rows are spread over.
      field: what `rows` was given by, for errors.
    Raises: InputError if `rows` does not divide so, or `row_length` is not a positive multiple of 8.
    """
    longest = int(np.max(lengths))
    if row_length is None:
        row_length = -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE
    if row_length < longest or row_length % 8:
        raise InputError(
            "config.data.row_length",
            got=f"got {row_length}",
            expected=f"a multiple of 8 of at least {longest}, the longest pair",
            remedy="Unset it to have it chosen from the data, or lower data.max_length.",
        )
    if rows is None:
        rows = _choose_rows(lengths, pairs, row_length, row_multiple, target_positions // row_length)
    if rows < 1 or rows % row_multiple:
        raise InputError(
            f"config.{field}",
            got=f"got {rows}",
            expected=f"a positive multiple of {row_multiple}, the devices that rows are spread over",
            remedy="Change it, or mesh.replica and mesh.fsdp, or unset it.",
        )
    return Shape(pairs=pairs, rows=rows, row_length=row_length, microbatches=-(-pairs // rows))


def _choose_rows(lengths: np.ndarray, pairs: int, row_length: int, multiple: int, most: int) -> int:
    """The most rows a microbatch may have with batches still FULL_ENOUGH, judged by batches drawn at random.

    The last microbatch of a batch is seldom full, so the number must suit how many rows batches come out at.
    """
    rng = np.random.default_rng(0)
    drawn = [rng.choice(lengths, pairs) for _ in range(SAMPLED_BATCHES)]
    needed = np.array([len(fill_rows(batch, row_length)) for batch in drawn])
    full = {rows: needed.sum() / (-(-needed // rows) * rows).sum() for rows in range(multiple, most + 1, multiple)}
    enough = [rows for rows in full if full[rows] >= FULL_ENOUGH]
    return max(enough, default=max(full, key=lambda rows: full[rows], default=multiple))


def collate(pairs: Sequence[Encoded], reference: np.ndarray | None, shape: Shape, *, layout: str) -> Batch:
    """Packs at most `shape.pairs` pairs into one batch of fixed shape.

    Args:
      pairs: in batch order; fewer than `shape.pairs` leaves the rest as padding, marked absent.
      reference: stored log-probs [len(pairs), 2] in nats, or None where there are none.
    """
    units = [lay_out(pair, layout) for pair in pairs]
    assert len(units) <= shape.pairs
    lengths = np.array([[len(ids) for ids in pair] for pair in pairs])
    room = unit_room(lengths, layout)
    packed = fill_rows(room, shape.row_length)
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
    for row, members in enumerate(packed):
        _write_row(rows, row, [(pair, units[pair], int(room[pair])) for pair in members])
        present[row // shape.rows, members] = True
    stored = np.zeros((shape.pairs, 2), np.float32)
    if reference is not None:
        stored[: len(pairs)] = reference
    scored = np.zeros((shape.pairs, 2), np.int32)
    scored[: len(pairs)] = lengths[:, 1:]
    micro = (shape.microbatches, shape.rows, shape.row_length)
    return Batch(
        rows=Rows(*(array.reshape(micro) for array in rows)),
        count=np.int32(-(-len(packed) // shape.rows)),
        present=present,
        reference=stored,
        lengths=scored,
    )


def _write_row(rows: Rows, row: int, members: list[tuple[int, Unit, int]]) -> None:
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
        rows.slot[row, into] = 2 * pair + unit.side
        at, scored = at + room, into.stop


def work_counts(batch: Batch, lengths: Int[np.ndarray, "P 3"], layout: str) -> dict[str, int]:
    """Positions that an update computes, padding and empty rows included, and how many of them hold a token."""
    _, rows, row_length = batch.rows.tokens.shape
    return {
        "positions_computed": int(batch.count) * rows * row_length,
        "tokens_real": int(unit_lengths(lengths, layout).sum()),
    }
