"""Lengths to rows, and rows to microbatches: no token is looked at here.

How long pairs are decides which of them share a row, how many rows a microbatch has, and so the shape of every batch.
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

FULL_ENOUGH = 0.965  # share of the positions computed that should hold something, judged by a sample
SAMPLED_BATCHES, SAMPLED_PAIRS = 64, 8192  # the most of it
ROW_MULTIPLE = 128  # row lengths are multiples of this: what TPU lanes and attention blocks like

Crop = tuple[int, int]  # rows and positions in them that a microbatch with less to do is cut down to


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static shape of every batch of a run, so that a run compiles each program once."""

    pairs: int  # P, pairs in a batch
    rows: int  # R, rows in a microbatch
    row_length: int  # S, positions in a row
    microbatches: int  # A, the most a batch can need
    layout: str  # of each pair, one of layout.LAYOUTS: how often its prompt is stored
    shards: int = 1  # devices that the rows of a microbatch are spread over
    crops: tuple[Crop, ...] = ()  # sizes that a microbatch may be cut to, the whole one first; empty: none is cut
    here: tuple[int, ...] | None = None  # of the shards, those whose rows this process needs; None: all
    answers: int = 2  # K, the most of a pair

    @property
    def positions(self) -> int:
        """Positions in a whole microbatch."""
        return self.rows * self.row_length

    @property
    def sizes(self) -> tuple[Crop, ...]:
        """Sizes that a microbatch may have."""
        return self.crops or ((self.rows, self.row_length),)


def unit_lengths(lengths: Int[np.ndarray, "N _"], layout: str) -> Int[np.ndarray, "N"]:
    """Positions each pair takes, from the token counts of its prompt and answers."""
    prompt, *answers = np.asarray(lengths, np.int64).T
    return prompt_copies(lengths, layout) * prompt + sum(np.maximum(answer - 1, 0) for answer in answers)


def prompt_copies(lengths: Int[np.ndarray, "N _"], layout: str) -> Int[np.ndarray, "N"]:
    """How often each pair's prompt is stored: once for every two answers, or for every one, that are there."""
    there = np.asarray(lengths)[:, 1:] > 0
    each = 2 if layout == "shared" else 1
    return np.logical_or.reduceat(there, np.arange(0, there.shape[1], each), axis=1).sum(1)


def unit_room(lengths: Int[np.ndarray, "N _"], layout: str) -> Int[np.ndarray, "N"]:
    """What each pair takes of a row: its positions, and no less than its scored tokens, of which a row has as many.

    After a prompt of one token two answers' first tokens are predicted from one position, so there is a token more.
    """
    return np.maximum(unit_lengths(lengths, layout), np.asarray(lengths)[:, 1:].sum(1))


def piece_room(lengths: Int[np.ndarray, "N _"], layout: str, row_length: int) -> list[list[int]]:
    """What the pieces of each pair take of a row: the pair is one piece, or, longer than a row, one a completion.

    A pair without any answer has none.
    """
    room = unit_room(lengths, layout).tolist()
    apart = {i: _apart(np.asarray(lengths[i])) for i, size in enumerate(room) if size > row_length}
    return [apart.get(i, [size] if size else []) for i, size in enumerate(room)]


def _apart(lengths: np.ndarray) -> list[int]:
    return [int(lengths[0] + answer - 1) for answer in lengths[1:] if answer]


def fill_rows(pieces: Sequence[Sequence[int]], row_length: int) -> list[list[list[tuple[int, int]]]]:
    """Which pieces share a row: each row takes the longest left and, of the others, those that fill it best.

    On real pairs this comes out at the fewest rows that could hold them all, where best-fit decreasing often needs one
    more. Source: minimum bin slack, Gupta and Ho 1999, by dynamic programming over the sums.

    Args:
      pieces: of each pair, what its pieces take, as `piece_room` has it.
    Returns: groups of rows that one microbatch must hold: of one row, or of several for a pair in pieces. A row is a
      list of (pair, piece). A pair without pieces is in none.
    Raises: InputError if a piece is longer than a row.
    """
    longest = max((size for sizes in pieces for size in sizes), default=0)
    if longest > row_length:
        raise InputError(
            "config.data.row_length",
            got=f"a sequence takes {longest} positions and a row holds {row_length}",
            expected=f"at least {longest}",
            remedy="Unset data.row_length to have it chosen from the data, or lower data.max_length.",
        )
    sizes = [max(each, default=0) for each in pieces]
    left = sorted((i for i, each in enumerate(pieces) if len(each) == 1), key=lambda i: -sizes[i])
    apart = [i for i, each in enumerate(pieces) if len(each) > 1]
    begun = [[[(i, j) for j in row] for row in _rows_apart(pieces[i], row_length)] for i in apart]
    groups: list[list[list[tuple[int, int]]]] = []
    while begun or left:
        group = begun.pop() if begun else [[(left.pop(0), 0)]]
        for row in group:
            more = _best_fill(left, sizes, row_length - sum(pieces[pair][piece] for pair, piece in row))
            row.extend((i, 0) for i in more)
            taken = set(more)
            left = [i for i in left if i not in taken]
        groups.append(group)
    return groups


def _rows_apart(sizes: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows for a pair in pieces, each piece in the first that has room; so any two hold more than one could."""
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
    lengths: Int[np.ndarray, "N _"],
    *,
    layout: str,
    pairs: int,
    row_length: int | None,
    rows: int | None,
    shards: int,
    target_positions: int,
    field: str = "train.microbatch_rows",
    here: tuple[int, ...] | None = None,
) -> Shape:
    """Fixes the shape of a run's batches: microbatches as large as may be with batches still FULL_ENOUGH.

    Args:
      lengths: token counts of prompt and answers of every pair that will be laid out, training and evaluation.
      row_length: positions in a row; None: chosen from the data, no shorter than the longest pair.
      rows: rows in a microbatch; None: chosen from the data.
      shards: devices that rows are spread over; rows are a multiple of it.
      target_positions: of a microbatch on one device, about the most.
      field: what `rows` was given by, for errors.
      here: of the shards, those whose rows this process needs; None: all.
    Raises: InputError if `rows` does not divide so, or `row_length` is not a multiple of 8 that holds the longest pair
      or, in microbatches of as many rows as a pair has answers, the longest sequence.
    """
    longest, answers = int(unit_room(lengths, layout).max()), lengths.shape[1] - 1
    whole = rows is not None and rows < answers
    least = longest if whole else int((lengths[:, 0] + lengths[:, 1:].max(1)).max()) - 1
    if row_length is not None and (row_length < least or row_length % 8):
        raise InputError(
            "config.data.row_length",
            got=f"got {row_length}",
            expected=f"a multiple of 8 of at least {least}, the longest {'pair' if whole else 'sequence'}",
            remedy="Unset it to have it chosen from the data, or lower data.max_length.",
        )
    if rows is not None and (rows < 1 or rows % shards):
        raise InputError(
            f"config.{field}",
            got=f"got {rows}",
            expected=f"a positive multiple of {shards}, the devices that rows are spread over",
            remedy="Change it, or mesh.replica and mesh.fsdp, or unset it.",
        )
    sizes = _candidates(longest, answers, row_length, rows, shards, target_positions)
    return dataclasses.replace(_fullest(lengths, layout, pairs, sizes, shards), here=here)


def _candidates(
    longest: int, answers: int, row_length: int | None, rows: int | None, shards: int, target: int
) -> list[Crop]:
    """Sizes of a microbatch to choose from."""
    step = max(ROW_MULTIPLE, target // 16 // ROW_MULTIPLE * ROW_MULTIPLE)
    if row_length is not None:
        row_lengths = [row_length]
    else:
        first = -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE
        row_lengths = [first, *range(-(-(first + 1) // step) * step, target + 1, step)]
    fewest = 1 if max(row_lengths) >= longest else answers  # each sequence of a pair longer than a row may take one
    sizes = []
    for length in row_lengths:
        most = max(fewest, target // length)
        each = range(fewest, most + 1) if rows is None else [rows / shards]
        sizes += [(int(n * shards), length) for n in each]
    return sizes


def _fullest(lengths: np.ndarray, layout: str, pairs: int, sizes: Sequence[Crop], shards: int) -> Shape:
    """The largest shape whose batches are full, judged by batches drawn at random.

    Microbatches of one size are preferred, for every size that they are cut to is compiled. Where the batch is too
    small for that, or they would be less than half as large as could be, the last one is cut to what it holds.
    """
    rng, answers = np.random.default_rng(0), lengths.shape[1] - 1
    drawn = [
        lengths[rng.integers(0, len(lengths), pairs)]
        for _ in range(max(4, min(SAMPLED_BATCHES, SAMPLED_PAIRS // pairs)))
    ]
    real = sum(int(unit_lengths(each, layout).sum()) for each in drawn)

    def shape(size: Crop, cut: bool) -> Shape:
        rows, row_length = size
        crops = _crops(rows, row_length, shards) if cut else ()
        most, longest = worst(row_length)
        # Any two rows together hold more than one could, or they would be one.
        needed = min(pairs * longest, 2 * most // row_length + 1)
        # Rows that come in twos leave one empty where their number is odd, and in threes or more, some of each.
        filled = rows // longest * longest if longest <= 2 else rows - longest + 1
        microbatches = min(pairs, -(-needed // filled))  # each holds at least one pair whole
        return Shape(pairs, rows, row_length, microbatches, layout, shards, crops, answers=answers)

    @functools.cache
    def worst(row_length: int) -> tuple[int, int]:
        """Positions of the longest batch there can be, and rows that a pair may need."""
        sizes = piece_room(lengths, layout, row_length)
        rows = (len(_rows_apart(each, row_length)) for each in sizes if len(each) > 1)
        return sum(sorted(map(sum, sizes))[-pairs:]), max([1, *rows])

    @functools.cache
    def packed(row_length: int) -> list[Packed]:
        return [pack(each, row_length, layout) for each in drawn]

    @functools.cache
    def fill(found: Shape) -> float:
        plans = [into_microbatches(each, found) for each in packed(found.row_length)]
        return real / sum(microbatch.positions for each in plans for microbatch in each)

    def at_most(found: Shape) -> float:
        """What `fill` cannot be above, as no batch takes less than the smallest microbatch; found without packing."""
        return real / (len(drawn) * math.prod(found.sizes[-1]))

    best: tuple[float, Shape] | None = None
    for cut in (False, True):
        shapes = [shape(size, cut) for size in sizes]
        largest_first = sorted(shapes, key=lambda found: (found.positions, found.row_length), reverse=True)
        enough = (found for found in largest_first if at_most(found) >= FULL_ENOUGH <= fill(found))
        largest = next(enough, None)
        if largest is not None and (cut or 2 * largest.positions >= largest_first[0].positions):
            return largest
        for found in shapes:
            if best is None or at_most(found) > best[0] < fill(found):
                best = fill(found), found
    assert best is not None
    return best[1]


def _crops(rows: int, row_length: int, shards: int) -> tuple[Crop, ...]:
    """The whole size, its half and its quarter: of the rows where their number allows, else of their length."""
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
    """Which pieces stand in which row, and the size that is computed."""

    rows: list[list[tuple[int, int]]]  # (pair, piece)
    crop: int  # index into the shape's crops
    positions: int


def plan(lengths: Int[np.ndarray, "P _"], shape: Shape) -> list[Microbatch]:
    """Packs pairs into rows, and rows into microbatches."""
    return into_microbatches(pack(lengths, shape.row_length, shape.layout), shape)


class Packed(NamedTuple):
    """Groups of rows that one microbatch must hold, those with most to score first, and what each row holds."""

    groups: list[list[list[tuple[int, int]]]]
    used: list[int]  # positions of the longest row of each group


def pack(lengths: Int[np.ndarray, "P _"], row_length: int, layout: str) -> Packed:
    """Packs pairs into rows; rows with as much to score stand side by side.

    Devices that work at the same time so have as much to do, and what is left over gathers in the last microbatch.
    """
    pieces = piece_room(lengths, layout, row_length)
    scored = np.asarray(lengths)[:, 1:].sum(1).tolist()
    groups = fill_rows(pieces, row_length)
    groups.sort(key=lambda group: (-len(group), -sum(scored[pair] for row in group for pair, _ in row)))
    used = [max(sum(pieces[pair][piece] for pair, piece in row) for row in group) for group in groups]
    return Packed(groups, used)


def into_microbatches(packed: Packed, shape: Shape) -> list[Microbatch]:
    """Takes rows into microbatches in order, and cuts each to what it holds."""
    assert all(len(group) <= shape.rows for group in packed.groups), "a shape of too few rows for its pairs"
    waiting, found = list(zip(*packed, strict=True)), []
    while waiting:
        rows: list[list[tuple[int, int]]] = []
        used, rest = 0, []
        for group, length in waiting:
            if len(rows) + len(group) <= shape.rows:
                rows.extend(group)
                used = max(used, length)
            else:
                rest.append((group, length))
        waiting = rest
        crop = max(i for i, (count, length) in enumerate(shape.sizes) if count >= len(rows) and length >= used)
        found.append(Microbatch(rows, crop, math.prod(shape.sizes[crop])))
    return found
