"""Packs pairs into rows and rows into microbatches, and chooses the shape of every batch of a run.

Only token counts are read here, never tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dpo_jax.types import InputError

FULL_ENOUGH = 0.965  # share of the computed positions that should hold a token, measured on sampled batches
SAMPLED_BATCHES, SAMPLED_PAIRS = 64, 8192  # upper limits of that sample
ROW_MULTIPLE = 128  # chosen row lengths are multiples of this: the width of TPU lanes and of attention blocks

Crop = tuple[int, int]  # rows and positions per row that a microbatch is cropped to where it holds less


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static shape of every batch of a run, so that a run compiles each program once."""

    pairs: int  # P, pairs in a batch
    rows: int  # R, rows in a microbatch
    row_length: int  # S, positions in a row
    microbatches: int  # A, the most a batch can need
    layout: str  # one of layout.LAYOUTS: how often the prompt of a pair is stored
    shards: int = 1  # devices that the rows of a microbatch are sharded over
    crops: tuple[Crop, ...] = ()  # sizes that a microbatch may be cropped to, the full one first; empty: no cropping
    local_shards: tuple[int, ...] | None = None  # indices of shards whose rows this process needs; None: all
    answers: int = 2  # K, the most answers of a pair

    @property
    def positions(self) -> int:
        """Positions in a microbatch of full size."""
        return self.rows * self.row_length

    @property
    def sizes(self) -> tuple[Crop, ...]:
        """Sizes that a microbatch may have, the full one first."""
        return self.crops or ((self.rows, self.row_length),)


def unit_lengths(lengths: Int[np.ndarray, "N _"], layout: str) -> Int[np.ndarray, "N"]:
    """Positions that each pair takes, from the token counts of its prompt and answers."""
    prompt, *answers = np.asarray(lengths, np.int64).T
    return prompt_copies(lengths, layout) * prompt + sum(np.maximum(answer - 1, 0) for answer in answers)


def prompt_copies(lengths: Int[np.ndarray, "N _"], layout: str) -> Int[np.ndarray, "N"]:
    """Copies of each pair's prompt: one for every two answers (shared layout) or for every answer (repeated).

    Missing answers, which have no tokens, need no prompt.
    """
    present = np.asarray(lengths)[:, 1:] > 0
    answers_per_copy = 2 if layout == "shared" else 1
    return np.logical_or.reduceat(present, np.arange(0, present.shape[1], answers_per_copy), axis=1).sum(1)


def row_space(lengths: Int[np.ndarray, "N _"], layout: str) -> Int[np.ndarray, "N"]:
    """Row space of each pair: max(positions, scored tokens).

    A row of S positions has S entries for scored tokens. A pair with a prompt of one token scores one token more than
    it has positions, because one position predicts the first token of both answers.
    """
    return np.maximum(unit_lengths(lengths, layout), np.asarray(lengths)[:, 1:].sum(1))


def piece_spaces(lengths: Int[np.ndarray, "N _"], layout: str, row_length: int) -> list[list[int]]:
    """Row space of each piece of each pair.

    A pair that fits into a row is one piece. A longer one is split into one piece per completion. A pair without any
    answer has no pieces.
    """
    spaces = row_space(lengths, layout).tolist()
    split = {i: _completion_lengths(np.asarray(lengths[i])) for i, size in enumerate(spaces) if size > row_length}
    return [split.get(i, [size] if size else []) for i, size in enumerate(spaces)]


def _completion_lengths(lengths: np.ndarray) -> list[int]:
    """Positions of each completion of one pair, laid out after its own copy of the prompt."""
    return [int(lengths[0] + answer - 1) for answer in lengths[1:] if answer]


def fill_rows(pieces: Sequence[Sequence[int]], row_length: int) -> list[list[list[tuple[int, int]]]]:
    """Assigns pieces to rows: each row takes the longest remaining piece and the others that fill it best.

    On real pairs this gives the fewest rows that could hold them all; best-fit decreasing often needs one more.
    Source: minimum bin slack, Gupta and Ho 1999, by dynamic programming over the sums.

    Args:
      pieces: row space of the pieces of each pair, from `piece_spaces`.
    Returns: groups of rows, each of which must stay in one microbatch. A group is one row, or several if a pair is
      split into pieces. A row is a list of (pair, piece). A pair without pieces is in no row.
    Raises: InputError if a piece is longer than a row.
    """
    longest = max((size for sizes in pieces for size in sizes), default=0)
    if longest > row_length:
        raise InputError(
            "config.data.row_length",
            got=f"a sequence takes {longest} positions and a row holds {row_length}",
            expected=f"at least {longest}",
            remedy="Give --config.data.row_length=None, to have it chosen, or lower --config.data.max_length.",
        )
    sizes = [max(each, default=0) for each in pieces]
    remaining = sorted((i for i, each in enumerate(pieces) if len(each) == 1), key=lambda i: -sizes[i])
    split = [i for i, each in enumerate(pieces) if len(each) > 1]
    started = [[[(i, j) for j in row] for row in _first_fit(pieces[i], row_length)] for i in split]
    groups: list[list[list[tuple[int, int]]]] = []
    while started or remaining:
        group = started.pop() if started else [[(remaining.pop(0), 0)]]
        for row in group:
            fill = _best_fill(remaining, sizes, row_length - sum(pieces[pair][piece] for pair, piece in row))
            row.extend((i, 0) for i in fill)
            filled = set(fill)
            remaining = [i for i in remaining if i not in filled]
        groups.append(group)
    return groups


def _first_fit(sizes: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows for the pieces of one pair, by first fit: any two rows together hold more than one row could."""
    rows: list[list[int]] = []
    for piece, size in enumerate(sizes):
        fitting = (row for row in rows if sum(sizes[j] for j in row) + size <= row_length)
        row = next(fitting, None)
        if row is None:
            rows.append([piece])
        else:
            row.append(piece)
    return rows


def _best_fill(units: list[int], sizes: list[int], room: int) -> list[int]:
    """Units whose sizes add up to `room` or to the largest sum below it; earlier units are preferred."""
    within = (1 << (room + 1)) - 1
    reached = [1]  # after each unit, a bitmask of the sums that subsets of the units so far have
    for unit in units:
        if reached[-1] >> room:
            break  # the row can be filled completely
        reached.append((reached[-1] | reached[-1] << sizes[unit]) & within)
    best, chosen = reached[-1].bit_length() - 1, []
    for unit, before in zip(reversed(units[: len(reached) - 1]), reversed(reached[:-1]), strict=True):
        if not before >> best & 1:
            chosen.append(unit)
            best -= sizes[unit]
    return chosen


def choose_shape(
    lengths: Int[np.ndarray, "N _"],
    *,
    layout: str,
    pairs: int,
    row_length: int | None,
    rows: int | None,
    shards: int,
    target_positions: int,
    field: str = "train.microbatch_rows",
) -> Shape:
    """Chooses the shape of a run's batches: the largest microbatches with which batches are still FULL_ENOUGH.

    Args:
      lengths: token counts of prompt and answers of every pair that will be laid out, training and evaluation.
      layout: one of layout.LAYOUTS.
      pairs: pairs in a batch.
      row_length: positions in a row; None: chosen from the data, no shorter than the longest pair.
      rows: rows in a microbatch; None: chosen from the data.
      shards: devices that rows are sharded over; rows are a multiple of it.
      target_positions: approximate upper limit of the positions of a microbatch on one device.
      field: the configuration field that holds `rows`, for errors.
    Raises: InputError if `rows` is not a positive multiple of `shards`; if `row_length` is not a multiple of 8; or if
      it is shorter than the longest pair (the longest sequence, if a microbatch has a row for each answer of a pair).
    """
    longest, answers = int(row_space(lengths, layout).max()), lengths.shape[1] - 1
    unsplit = rows is not None and rows < answers  # too few rows for the pieces of a split pair
    least = longest if unsplit else int((lengths[:, 0] + lengths[:, 1:].max(1)).max()) - 1
    if row_length is not None and (row_length < least or row_length % 8):
        raise InputError(
            "config.data.row_length",
            got=f"got {row_length}",
            expected=f"a multiple of 8 of at least {least}, the longest {'pair' if unsplit else 'sequence'}",
            remedy="Give --config.data.row_length=None, to have it chosen, or lower --config.data.max_length.",
        )
    if rows is not None and (rows < 1 or rows % shards):
        raise InputError(
            f"config.{field}",
            got=f"got {rows}",
            expected=f"a positive multiple of {shards}, the devices that rows are sharded over",
            remedy=f"Change it or --config.mesh.fsdp, or give --config.{field}=None to have it chosen.",
        )
    sizes = _candidates(longest, answers, row_length, rows, shards, target_positions)
    return _fullest(lengths, layout, pairs, sizes, shards)


def _candidates(
    longest: int, answers: int, row_length: int | None, rows: int | None, shards: int, target: int
) -> list[Crop]:
    """Sizes that a microbatch could have, over all devices."""
    step = max(ROW_MULTIPLE, target // 16 // ROW_MULTIPLE * ROW_MULTIPLE)
    if row_length is not None:
        row_lengths = [row_length]
    else:
        first = -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE
        row_lengths = [first, *range(-(-(first + 1) // step) * step, target + 1, step)]
    fewest = 1 if max(row_lengths) >= longest else answers  # a pair longer than a row may need a row per answer
    sizes = []
    for length in row_lengths:
        most = max(fewest, target // length)
        each = range(fewest, most + 1) if rows is None else [rows / shards]
        sizes += [(int(n * shards), length) for n in each]
    return sizes


def _fullest(lengths: np.ndarray, layout: str, pairs: int, sizes: Sequence[Crop], shards: int) -> Shape:
    """The largest shape with which batches drawn at random are FULL_ENOUGH; if there is none, the fullest one.

    Microbatches of a single size are preferred, because every size is a program of its own to compile. Microbatches may
    be cropped only if without that the batch is too small, or they are less than half as large as the largest size.
    """
    rng, answers = np.random.default_rng(0), lengths.shape[1] - 1
    drawn = [
        lengths[rng.integers(0, len(lengths), pairs)]
        for _ in range(max(4, min(SAMPLED_BATCHES, SAMPLED_PAIRS // pairs)))
    ]
    real = sum(int(unit_lengths(each, layout).sum()) for each in drawn)

    def shape(size: Crop, cropped: bool) -> Shape:
        rows, row_length = size
        crops = _crops(rows, row_length, shards) if cropped else ()
        positions, group = largest_batch(row_length)
        # Any two rows together hold more than one row could, or they would have been one.
        needed = min(pairs * group, 2 * positions // row_length + 1)
        # Groups of two rows leave one row empty if the number of rows is odd; larger groups may leave group - 1 empty.
        filled = rows // group * group if group <= 2 else rows - group + 1
        microbatches = min(pairs, -(-needed // filled))  # each holds all of at least one pair
        return Shape(pairs, rows, row_length, microbatches, layout, shards, crops, answers=answers)

    @functools.cache
    def largest_batch(row_length: int) -> tuple[int, int]:
        """Row space of the largest possible batch, and the most rows that one pair needs."""
        sizes = piece_spaces(lengths, layout, row_length)
        rows = (len(_first_fit(each, row_length)) for each in sizes if len(each) > 1)
        return sum(sorted(map(sum, sizes))[-pairs:]), max([1, *rows])

    @functools.cache
    def packed(row_length: int) -> list[Packed]:
        return [pack(each, row_length, layout) for each in drawn]

    @functools.cache
    def fill(candidate: Shape) -> float:
        plans = [into_microbatches(each, candidate) for each in packed(candidate.row_length)]
        return real / sum(microbatch.positions for each in plans for microbatch in each)

    def fill_bound(candidate: Shape) -> float:
        """Upper bound of `fill` that needs no packing: a batch takes at least one microbatch of the smallest size."""
        return real / (len(drawn) * math.prod(candidate.sizes[-1]))

    best: tuple[float, Shape] | None = None
    for cropped in (False, True):
        shapes = [shape(size, cropped) for size in sizes]
        largest_first = sorted(shapes, key=lambda each: (each.positions, each.row_length), reverse=True)
        full_enough = (each for each in largest_first if fill_bound(each) >= FULL_ENOUGH <= fill(each))
        largest = next(full_enough, None)
        if largest is not None and (cropped or 2 * largest.positions >= largest_first[0].positions):
            return largest
        for each in shapes:
            if best is None or fill_bound(each) > best[0] < fill(each):
                best = fill(each), each
    assert best is not None
    return best[1]


def _crops(rows: int, row_length: int, shards: int) -> tuple[Crop, ...]:
    """Full, half and quarter size of a microbatch: fewer rows where their number divides, else shorter rows."""
    crops = [(rows, row_length)]
    for _ in range(2):
        if rows % (2 * shards) == 0:
            rows //= 2
        elif row_length % (2 * ROW_MULTIPLE) == 0:
            row_length //= 2
        else:
            break
        crops.append((rows, row_length))
    return tuple(crops) if len(crops) > 1 else ()


class Microbatch(NamedTuple):
    """Pieces of each row of a microbatch, and the size that is computed."""

    rows: list[list[tuple[int, int]]]  # (pair, piece)
    crop: int  # index into the shape's crops
    positions: int


def plan(lengths: Int[np.ndarray, "P _"], shape: Shape) -> list[Microbatch]:
    """Packs pairs into rows, and rows into microbatches."""
    return into_microbatches(pack(lengths, shape.row_length, shape.layout), shape)


class Packed(NamedTuple):
    """Packed rows in groups that must stay in one microbatch, in the order in which microbatches take them."""

    groups: list[list[list[tuple[int, int]]]]
    used: list[int]  # positions of the longest row of each group


def pack(lengths: Int[np.ndarray, "P _"], row_length: int, layout: str) -> Packed:
    """Packs pairs into rows, sorted by their number of scored tokens.

    So the devices that compute rows of one microbatch have about as much to do, and the emptiest rows come last.
    """
    pieces = piece_spaces(lengths, layout, row_length)
    scored = np.asarray(lengths)[:, 1:].sum(1).tolist()
    groups = fill_rows(pieces, row_length)
    groups.sort(key=lambda group: (-len(group), -sum(scored[pair] for row in group for pair, _ in row)))
    used = [max(sum(pieces[pair][piece] for pair, piece in row) for row in group) for group in groups]
    return Packed(groups, used)


def into_microbatches(packed: Packed, shape: Shape) -> list[Microbatch]:
    """Fills microbatches with groups of rows in order, and crops each to the smallest size that holds its rows."""
    assert all(len(group) <= shape.rows for group in packed.groups), "a shape of too few rows for its pairs"
    waiting, microbatches = list(zip(*packed, strict=True)), []
    while waiting:
        rows: list[list[tuple[int, int]]] = []
        used, postponed = 0, []
        for group, length in waiting:
            if len(rows) + len(group) <= shape.rows:
                rows.extend(group)
                used = max(used, length)
            else:
                postponed.append((group, length))
        waiting = postponed
        crop = max(i for i, (count, length) in enumerate(shape.sizes) if count >= len(rows) and length >= used)
        microbatches.append(Microbatch(rows, crop, math.prod(shape.sizes[crop])))
    return microbatches
