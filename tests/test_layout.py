"""A pair's layout against its drawing, and what packing must never change."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from dpo_jax.data import layout, packing
from dpo_jax.data.marks import mark, unmark
from dpo_jax.types import Encoded, InputError

PAIR = Encoded(np.array([10, 11, 12]), np.array([20, 21, 22]), np.array([30, 31, 32]))
SHAPE = packing.Shape(pairs=8, rows=2, row_length=64, microbatches=4, layout="shared")


def random_pairs(count, seed=0, longest=20):
    rng = np.random.default_rng(seed)
    return [Encoded.of(*(rng.integers(1, 99, rng.integers(1, longest)) for _ in range(3))) for _ in range(count)]


def chosen_only(pairs):
    return [pair._replace(rejected=pair.rejected[:0]) for pair in pairs]


def rejected_only(pairs):
    return [pair._replace(chosen=pair.chosen[:0]) for pair in pairs]


def unpaired(pairs):
    """One answer each, in turn the chosen and the rejected one, and at last a pair without any."""
    halves = [each for couple in zip(chosen_only(pairs), rejected_only(pairs), strict=True) for each in couple]
    return [*halves[: len(pairs) - 1], pairs[-1]._replace(chosen=pairs[-1].chosen[:0], rejected=pairs[-1].rejected[:0])]


def rankings(count, answers, seed=0, longest=20):
    """As many answers in the first, and two to as many in the others."""
    rng = np.random.default_rng(seed)
    sizes = [answers, *rng.integers(2, answers + 1, count - 1)]
    return [Encoded.of(*(rng.integers(1, 99, rng.integers(1, longest)) for _ in range(1 + n))) for n in sizes]


def tokens_of(pairs, likely):
    """Of each answer, its tokens and those that follow in number in place of each, and the negated halves of them."""
    each = [[answer[answer >= 0][:, None] + np.arange(likely) for answer in pair.answers] for pair in pairs]
    return [[(ids, -ids / 2) for ids in answers] for answers in each]


def partly_scored(pairs, seed=1):
    """A stretch within each answer of several tokens is not scored; its last token is."""
    rng = np.random.default_rng(seed)

    def marked(ids):
        begin, end = np.sort(rng.integers(0, max(len(ids), 1), 2))
        inside = (np.arange(len(ids)) >= begin) & (np.arange(len(ids)) < end)
        return mark(ids, ~inside)

    return [Encoded.of(pair.prompt, *map(marked, pair.answers)) for pair in pairs]


def scored_of(pairs):
    """Scored tokens [N, K]."""
    width = max(len(pair.answers) for pair in pairs)
    counts = [[int((ids >= 0).sum()) for ids in pair.answers] for pair in pairs]
    return np.array([[*each, *[0] * (width - len(each))] for each in counts])


def lengths_of(pairs):
    """Token counts [N, 1 + K]."""
    width = max(len(pair.lengths) for pair in pairs)
    return np.array([[*pair.lengths, *[0] * (width - len(pair.lengths))] for pair in pairs])


SETS = {
    "pairs": random_pairs(8),
    "chosen only": chosen_only(random_pairs(8)),
    "rejected only": rejected_only(random_pairs(8)),
    "unpaired": unpaired(random_pairs(8)),
    "three": rankings(8, 3, longest=12),
    "four": rankings(8, 4, longest=12),
    "five": rankings(8, 5, longest=10),
    "turns": partly_scored(random_pairs(8)),
    "turns of four": partly_scored(rankings(8, 4, longest=12)),
}


def test_shared_layout_is_the_one_drawn():
    unit = layout.lay_out(PAIR, "shared")
    assert unit.tokens.tolist() == [21, 20, 10, 11, 12, 30, 31]
    assert unit.positions.tolist() == [4, 3, 0, 1, 2, 3, 4]
    assert unit.key_start.tolist() == [0, 1, 2, 2, 2, 2, 2]
    assert unit.key_end.tolist() == [5, 5, 3, 4, 5, 6, 7]
    assert unit.target.tolist() == [20, 21, 22, 30, 31, 32]
    assert unit.source.tolist() == [4, 1, 0, 4, 5, 6]
    assert unit.side.tolist() == [0, 0, 0, 1, 1, 1]


def test_ranking_is_laid_out_two_and_two_as_drawn():
    ranking = Encoded.of(*PAIR[:3], np.array([40, 41]), np.array([50]))
    pair, unit = layout.lay_out(PAIR, "shared"), layout.lay_out(ranking, "shared")
    assert unit.tokens.tolist() == [*pair.tokens, 40, 10, 11, 12]
    assert unit.positions.tolist() == [*pair.positions, 3, 0, 1, 2]
    assert unit.key_start.tolist() == [*pair.key_start, 7, 8, 8, 8]
    assert unit.key_end.tolist() == [*pair.key_end, 11, 9, 10, 11]
    assert unit.target.tolist() == [*pair.target, 40, 41, 50]
    assert unit.source.tolist() == [*pair.source, 10, 7, 10]
    assert unit.side.tolist() == [*pair.side, 2, 2, 3]


def test_an_odd_answer_stands_before_a_prompt_of_its_own():
    ranking = Encoded.of(*PAIR[:3], np.array([40, 41]))
    assert layout.lay_out(ranking, "shared").tokens.tolist() == [21, 20, 10, 11, 12, 30, 31, 40, 10, 11, 12]


def test_repeated_layout_stores_the_prompt_twice():
    unit = layout.lay_out(PAIR, "repeated")
    assert unit.tokens.tolist() == [10, 11, 12, 20, 21, 10, 11, 12, 30, 31]
    assert unit.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert unit.key_start.tolist() == [0] * 5 + [5] * 5
    assert unit.key_end.tolist() == list(range(1, 11))
    assert unit.source.tolist() == [2, 3, 4, 7, 8, 9]


def seen_sequence(rows, row, at):
    """The tokens that an index of a row attends to, in order of their positions."""
    keys = np.arange(rows.key_start[row, at], rows.key_end[row, at])
    return rows.tokens[row, keys[np.argsort(rows.positions[row, keys])]].tolist()


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_every_target_is_predicted_from_exactly_its_own_prefix(name, kind):
    # The claim the project rests on: what a source index sees is the prompt and the answer up to there, of its own
    # completion, and nothing of its neighbors in the row. So scores are those of sequences computed one by one.
    pairs = SETS[kind]
    answers = lengths_of(pairs).shape[1] - 1
    shape = dataclasses.replace(SHAPE, row_length=128, layout=name, answers=answers)
    batch = layout.collate(pairs, None, shape)
    rows = layout.map_rows(lambda x: x.reshape(-1, 128), batch.rows)
    seen = {(pair, side): 0 for pair in range(8) for side in range(answers)}
    for row, entry in np.argwhere(rows.slot >= 0):
        pair, side = divmod(int(rows.slot[row, entry]), answers)
        answer = pairs[pair].answers[side]
        at = np.flatnonzero(answer >= 0)[seen[pair, side]]
        source = rows.source[row, entry]
        assert seen_sequence(rows, row, source) == [*pairs[pair].prompt, *unmark(answer[:at])]
        assert rows.positions[row, source] == len(pairs[pair].prompt) + at - 1
        assert rows.target[row, entry] == answer[at]
        seen[pair, side] += 1
    assert [*seen.values()] == batch.lengths.ravel().tolist() == scored_of(pairs).ravel().tolist()
    assert batch.present.sum(0).tolist() == (batch.lengths > 0).any(1).tolist()


@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_every_position_attends_to_itself_and_padding_to_nothing_else(name):
    batch = layout.collate(random_pairs(5), None, dataclasses.replace(SHAPE, layout=name))
    rows, index = batch.rows, np.arange(64)
    assert np.all((rows.key_start <= index) & (index < rows.key_end) & (rows.key_end <= 64))
    real = packing.unit_lengths(np.array([p.lengths for p in random_pairs(5)]), name).sum()
    alone = (rows.key_end - rows.key_start == 1) & (rows.tokens == 0)
    assert alone.sum() >= rows.tokens.size - real


def test_answer_that_nobody_asks_for_takes_no_position():
    (pair,) = chosen_only([PAIR])
    for name in layout.LAYOUTS:
        unit = layout.lay_out(pair, name)
        assert sorted(unit.tokens.tolist()) == [10, 11, 12, 20, 21] and unit.side.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_full_rows_have_room_for_what_prompts_of_one_token_score(name):
    # Two answers after one token: a target more than positions, in rows that the positions alone would fill.
    rng = np.random.default_rng(0)
    pairs = [Encoded.of(*(rng.integers(1, 99, n) for n in (1, *rng.integers(1, 20, 2)))) for _ in range(40)]
    lengths = np.array([p.lengths for p in pairs])
    row_length = int(packing.row_space(lengths, name).max())
    shape = packing.Shape(pairs=40, rows=1, row_length=row_length, microbatches=40, layout=name)
    batch = layout.collate(pairs, None, shape)
    assert np.bincount(batch.rows.slot[batch.rows.slot >= 0]).tolist() == lengths[:, 1:].ravel().tolist()
    assert layout.work_counts(batch, lengths, shape)["tokens_real"] == packing.unit_lengths(lengths, name).sum()


@pytest.mark.parametrize("kind", SETS)
def test_unit_lengths_count_what_is_laid_out(kind):
    pairs = [pair for pair in SETS[kind] if any(map(len, pair.answers))]
    for name in layout.LAYOUTS:
        counted = [len(layout.lay_out(p, name).tokens) for p in pairs]
        assert packing.unit_lengths(lengths_of(pairs), name).tolist() == counted


def test_pair_without_answers_takes_nothing_and_counts_as_padding():
    (none,) = unpaired([PAIR])
    shape = packing.Shape(pairs=3, rows=1, row_length=64, microbatches=1, layout="shared")
    batch = layout.collate([none, PAIR], None, shape)
    alone = layout.collate([PAIR], None, shape)
    assert batch.present.tolist() == [[False, True, False]]
    assert batch.rows.tokens.tolist() == alone.rows.tokens.tolist()
    assert packing.unit_lengths(np.array([none.lengths]), "shared").tolist() == [0]
    assert layout.work_counts(batch, lengths_of([none, PAIR]), shape)["tokens_real"] == 7


def test_batch_has_columns_for_as_many_answers_as_its_shape():
    shape = packing.Shape(pairs=3, rows=1, row_length=128, microbatches=1, layout="shared", answers=4)
    pairs = [PAIR, rankings(1, 4, longest=9)[0]]
    batch = layout.collate(pairs, np.arange(8).reshape(2, 4), shape)
    assert batch.reference.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [0] * 4]
    assert batch.lengths.tolist() == [[3, 3, 0, 0], pairs[1].lengths[1:], [0] * 4]
    assert set(batch.rows.slot.ravel().tolist()) == {-1, 0, 1, 4, 5, 6, 7}


def test_arrays_that_rows_lack_stay_missing_when_they_are_cut():
    batch = layout.collate([PAIR], None, SHAPE)
    first = layout.map_rows(lambda x: x[0], batch.rows)
    assert layout.crop_rows(first, (1, 8)).likely is None
    some = first._replace(likely=np.zeros((2, 64, 5), int), likely_logps=np.zeros((2, 64, 5)))
    cut = layout.crop_rows(some, (1, 8))
    assert cut.likely is not None and cut.likely.shape == (1, 8, 5) and cut.tokens.shape == (1, 8)


def test_batch_marks_pairs_present_in_one_microbatch_each_and_padding_in_none():
    pairs = random_pairs(5)
    batch = layout.collate(pairs, np.arange(10).reshape(5, 2), SHAPE)
    assert batch.present.sum(0).tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert batch.reference[:5].tolist() == np.arange(10).reshape(5, 2).tolist() and not batch.reference[5:].any()
    assert batch.lengths.tolist() == [[len(p.chosen), len(p.rejected)] for p in pairs] + [[0, 0]] * 3
    for micro in range(4):
        held = {s // 2 for s in batch.rows.slot[micro].ravel() if s >= 0}
        assert held == set(np.flatnonzero(batch.present[micro]))
    assert not batch.present[int(batch.count) :].any() and batch.present[int(batch.count) - 1].any()


def rows_of(lengths, row_length):
    """Pairs of each row, for pairs that fit one."""
    groups = packing.fill_rows([[int(n)] for n in lengths], row_length)
    return [[pair for pair, _ in row] for group in groups for row in group]


def test_rows_never_overflow_and_hold_every_pair_once():
    lengths = np.random.default_rng(0).integers(1, 65, 200)
    rows = rows_of(lengths, 64)
    assert sorted(sum(rows, [])) == list(range(200))
    assert max(lengths[row].sum() for row in rows) <= 64


def test_rows_are_as_few_as_could_hold_the_units():
    # Lengths spread like those of real pairs; best-fit decreasing needs a row more in nine of these batches.
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = np.minimum(rng.lognormal(5, 0.6, 64).astype(int) + 8, 768)
        assert len(rows_of(lengths, 768)) == np.ceil(lengths.sum() / 768)


def test_rows_are_filled_where_the_best_single_fit_would_leave_room():
    # 50 + 25 + 25 and 34 + 33 + 33 fill two rows of 100; taking 34 to 50 would open a third.
    rows = rows_of([25, 33, 50, 34, 33, 25], 100)
    assert [sorted(row) for row in rows] == [[0, 2, 5], [1, 3, 4]]


def test_sequence_longer_than_a_row_is_refused():
    with pytest.raises(InputError, match="a sequence takes 65 positions and a row holds 64"):
        packing.fill_rows([[65]], 64)


def long_pair(prompt, chosen, rejected, seed=9):
    rng = np.random.default_rng(seed)
    return Encoded.of(*(rng.integers(1, 99, n) for n in (prompt, chosen, rejected)))


def test_pair_longer_than_a_row_stands_in_two_of_one_microbatch():
    # 90 positions with the prompt once, rows of 64: each answer after a prompt of its own.
    pairs = [*random_pairs(6), long_pair(30, 31, 31), *random_pairs(6, seed=1), long_pair(20, 40, 25)]
    shape = packing.Shape(pairs=14, rows=2, row_length=64, microbatches=14, layout="shared")
    batch = layout.collate(pairs, None, shape)
    seen = {}
    for micro, row, entry in np.argwhere(batch.rows.slot >= 0):
        rows = layout.map_rows(lambda x, micro=micro: x[micro], batch.rows)
        pair, side = divmod(int(rows.slot[row, entry]), 2)
        scored = seen.setdefault((pair, side), [])
        prefix = seen_sequence(rows, row, rows.source[row, entry])
        assert prefix == [*pairs[pair].prompt, *pairs[pair][1 + side][: len(scored)]]
        scored.append(int(rows.target[row, entry]))
        assert batch.present[micro, pair]
    assert seen == {(i, s): p.answers[s].tolist() for i, p in enumerate(pairs) for s in (0, 1)}
    assert batch.present.sum(0).tolist() == [1] * 14
    lengths = np.array([p.lengths for p in pairs])
    real = packing.unit_lengths(lengths, "shared").sum() + 30 + 20
    assert layout.work_counts(batch, lengths, shape)["tokens_real"] == real


def long_ranking(prompt, *answers, seed=3):
    rng = np.random.default_rng(seed)
    return Encoded.of(*(rng.integers(1, 99, n) for n in (prompt, *answers)))


def test_ranking_longer_than_a_row_stands_in_rows_of_one_microbatch():
    # Of four answers the two short ones share a row; a fifth pair fills what is left.
    pairs = [*rankings(5, 4, longest=8), long_ranking(20, 40, 10, 30, 9), *random_pairs(3), long_ranking(9, 50, 50, 50)]
    shape = packing.Shape(pairs=10, rows=3, row_length=64, microbatches=6, layout="shared", answers=4)
    batch = layout.collate(pairs, None, shape)
    rows = {pair: set() for pair in range(10)}
    scored = {}
    for micro, row, entry in np.argwhere(batch.rows.slot >= 0):
        here = layout.map_rows(lambda x, micro=micro: x[micro], batch.rows)
        pair, side = divmod(int(here.slot[row, entry]), 4)
        targets = scored.setdefault((pair, side), [])
        prefix = seen_sequence(here, row, here.source[row, entry])
        assert prefix == [*pairs[pair].prompt, *pairs[pair].answers[side][: len(targets)]]
        targets.append(int(here.target[row, entry]))
        rows[pair].add((int(micro), int(row)))
        assert batch.present[micro, pair]
    assert scored == {(i, s): ids.tolist() for i, p in enumerate(pairs) for s, ids in enumerate(p.answers)}
    assert batch.present.sum(0).tolist() == [1] * 10
    assert [len(rows[pair]) for pair in range(10)] == [1] * 5 + [3] + [1] * 3 + [3]
    lengths = lengths_of(pairs)
    apart = [sum(p.lengths[0] + n - 1 for n in p.lengths[1:]) for p in (pairs[5], pairs[9])]
    others = packing.unit_lengths(lengths[[0, 1, 2, 3, 4, 6, 7, 8]], "shared").sum()
    assert layout.work_counts(batch, lengths, shape)["tokens_real"] == others + sum(apart)


@pytest.mark.parametrize("rows", [4, 5, 8])
def test_shape_has_microbatches_for_any_batch_of_rankings_longer_than_a_row(rows):
    # Some need two rows, some three, some four, and what fits beside them in a microbatch differs.
    rng = np.random.default_rng(0)
    few = [[30, *rng.integers(60, 90, n), *[0] * (4 - n)] for n in rng.integers(2, 5, 60)]
    lengths = np.array([*few, *np.concatenate([rng.integers(5, 40, (20, 3)), np.zeros((20, 2), int)], 1)])
    shape = packing.choose_shape(
        lengths, layout="shared", pairs=8, row_length=120, rows=rows, shards=1, target_positions=1024
    )
    assert shape.answers == 4 and shape.rows == rows
    worst = [lengths[np.argsort(-packing.row_space(lengths, "shared"))[:8]]]
    needed = [len(packing.plan(each, shape)) for each in [*worst, *(rng.permutation(lengths)[:8] for _ in range(200))]]
    assert max(needed) <= shape.microbatches <= 2 * max(needed)


def test_rows_that_come_in_threes_leave_some_of_a_microbatch_empty():
    # Sequences a little longer than half a row; of eight rows, three and three are used.
    lengths = np.array([[4, 60, 60, 60, 60], *[[4, 60, 60, 60, 0]] * 16])
    shape = packing.choose_shape(
        lengths, layout="shared", pairs=16, row_length=120, rows=8, shards=1, target_positions=1024
    )
    assert len(packing.plan(lengths[1:], shape)) == 8 <= shape.microbatches


def test_pair_that_scores_more_than_a_row_holds_stands_in_two_rows():
    # After a prompt of one token a pair has 64 positions and 65 scored tokens: a row of 64 has no place for the last.
    pairs = [long_pair(1, 33, 32)]
    shape = packing.Shape(pairs=1, rows=2, row_length=64, microbatches=1, layout="shared")
    batch = layout.collate(pairs, None, shape)
    assert np.bincount(batch.rows.slot[batch.rows.slot >= 0]).tolist() == [33, 32]


def lengths_taking(units):
    """Of pairs that take so many positions: 8 of prompt and half of the rest an answer."""
    return np.array([[8, (n - 8) // 2 + 1, n - 8 - (n - 8) // 2 + 1] for n in units])


def choose(units, **changes):
    """The shape for pairs that take so many positions."""
    lengths = lengths_taking(units)
    assert packing.unit_lengths(lengths, "shared").tolist() == list(units)
    settings: dict[str, Any] = dict(
        layout="shared", pairs=64, row_length=None, rows=None, shards=1, target_positions=1024
    )
    return packing.choose_shape(lengths, **settings | changes)


def hh_like(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.minimum(rng.lognormal(5.2, 0.55, count).astype(int) + 20, 760).tolist()


def test_shape_has_rows_for_the_longest_pair_and_microbatches_for_the_worst_batch():
    units = hh_like(500)
    shape = choose(units)
    assert shape.row_length >= max(units) and shape.rows == 1
    worst = sorted(units)[-64:]
    lengths = lengths_taking(worst)
    assert len(packing.plan(lengths, shape)) <= shape.microbatches


@pytest.mark.parametrize("pairs", [8, 64, 256])
@pytest.mark.parametrize("target", [1536, 16384])
@pytest.mark.parametrize("shards", [1, 4])
def test_batches_of_the_chosen_shape_are_full(pairs, target, shards):
    units = hh_like(2000)
    shape = choose(units, pairs=pairs, target_positions=target, shards=shards)
    computed = real = 0
    for seed in range(60):
        drawn = np.random.default_rng(100 + seed).choice(units, pairs)
        lengths = lengths_taking(drawn)
        planned = packing.plan(lengths, shape)
        computed += sum(microbatch.positions for microbatch in planned)
        real += drawn.sum()
        assert len(planned) <= shape.microbatches
    assert shape.rows % shards == 0
    if pairs >= 64 * shards:
        assert real / computed >= 0.95


def test_choosing_packs_no_rows_of_a_length_that_cannot_be_full(monkeypatch):
    units, packed = hh_like(500), []
    few: dict[str, Any] = dict(pairs=2, target_positions=4096, shards=4)

    def counted(lengths, row_length, name, *, real=packing.pack):
        packed.append(row_length)
        return real(lengths, row_length, name)

    monkeypatch.setattr(packing, "pack", counted)
    found = choose(units, **few)
    others = set(range(768, 4097, 256)) - set(packed)
    assert len(others) == 10 and len(packed) == packing.SAMPLED_BATCHES * 4
    monkeypatch.undo()

    def fill(shape):
        draws = [np.random.default_rng(seed).choice(units, 2) for seed in range(40)]
        planned = [each for drawn in draws for each in packing.plan(lengths_taking(drawn), shape)]
        return sum(map(sum, draws)) / sum(each.positions for each in planned)

    assert all(fill(choose(units, row_length=length, **few)) < fill(found) for length in others)


def test_small_batches_are_cut_to_what_they_hold():
    shape = choose(hh_like(500), pairs=8, target_positions=1536)
    assert len(shape.crops) > 1 and shape.crops[0] == (shape.rows, shape.row_length)
    pairs = [long_pair(20, 31, 31)]
    batch = layout.collate(pairs, None, shape)
    assert batch.crop is not None
    rows, length = shape.crops[int(batch.crop[0])]
    assert 80 <= rows * length < shape.positions
    cut = layout.crop_rows(layout.map_rows(lambda x: x[0], batch.rows), (rows, length))
    assert (cut.slot >= 0).sum() == 62 and cut.key_end.max() <= length
    lengths = np.array([p.lengths for p in pairs])
    assert layout.work_counts(batch, lengths, shape) == {
        "positions_computed": rows * length,
        "tokens_real": 80,
    }


def test_rows_of_a_microbatch_score_about_as_much():
    # Sorted by what they score: the rows that devices work at side by side differ least.
    pairs = [long_pair(10, 1 + n, 39 - n if n % 2 else 1, seed=n) for n in range(1, 33)]
    shape = packing.Shape(pairs=32, rows=4, row_length=64, microbatches=8, layout="shared", shards=4)
    batch = layout.collate(pairs, None, shape)
    scored = (batch.rows.slot >= 0).sum(-1)[: int(batch.count)]
    assert all(before.min() >= after.max() for before, after in zip(scored, scored[1:], strict=False))


def test_shape_spreads_rows_over_all_devices():
    shape = choose([100, 700, 300], shards=8, target_positions=10**4)
    assert shape.rows % 8 == 0 and shape.shards == 8


def test_rows_fewer_than_the_answers_of_a_ranking_must_hold_it_whole():
    lengths = np.array([[30, 60, 60, 60]])
    settings: dict[str, Any] = dict(layout="shared", pairs=1, row_length=120, shards=1, target_positions=1024)
    with pytest.raises(InputError, match="at least 237, the longest pair"):
        packing.choose_shape(lengths, rows=2, **settings)
    assert packing.choose_shape(lengths, rows=3, **settings).microbatches == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"row_length": 512, "rows": 1},
            "config.data.row_length: got 512; expected a multiple of 8 of at least 700, the longest pair",
        ),
        ({"row_length": 320}, "got 320; expected a multiple of 8 of at least 354, the longest sequence"),
        ({"row_length": 701}, "config.data.row_length: got 701"),
        ({"rows": 3, "shards": 2}, "config.train.microbatch_rows: got 3; expected a positive multiple of 2"),
        (
            {"rows": 3, "shards": 2, "field": "reference.microbatch_rows"},
            "config.reference.microbatch_rows: got 3",
        ),
    ],
)
def test_shape_that_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        choose([700], **changes)


@pytest.mark.parametrize("pairs", SETS.values(), ids=SETS.keys())
@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_answers_begin_where_their_slots_do(name, pairs):
    pairs = [*pairs, long_pair(30, 31, 31)]
    lengths = lengths_of(pairs)
    shape = packing.Shape(9, rows=4, row_length=64, microbatches=9, layout=name, answers=lengths.shape[1] - 1)
    slot = layout.collate(pairs, None, shape).rows.slot
    starts = layout.answer_starts(lengths, scored_of(pairs), shape)
    for pair, side in np.argwhere(lengths[:, 1:]):
        micro, row, at = starts[pair, side]
        expected = shape.answers * pair + side
        assert np.argwhere(slot == expected)[0].tolist() == [micro, row, at]
        assert (slot[micro, row, at : at + scored_of(pairs)[pair, side]] == expected).all()


@pytest.mark.parametrize("pairs", SETS.values(), ids=SETS.keys())
@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_likely_tokens_stand_beside_the_targets_that_they_could_have_been(name, pairs):
    pairs = [*pairs, long_pair(30, 31, 31)]
    shape = packing.Shape(9, rows=4, row_length=64, microbatches=9, layout=name, answers=lengths_of(pairs).shape[1] - 1)
    rows = layout.collate(pairs, None, shape, tokens=tokens_of(pairs, 3)).rows
    assert rows.likely is not None and rows.likely_logps is not None
    expected = np.where((rows.slot >= 0)[..., None], rows.target[..., None] + np.arange(3), 0)
    np.testing.assert_array_equal(rows.likely, expected)
    np.testing.assert_array_equal(rows.likely_logps, -expected / 2)
    assert (rows.likely.dtype, rows.likely_logps.dtype) == (np.int32, np.float32)
    cut = layout.crop_rows(layout.map_rows(lambda x: x[0], rows), (2, 32))
    np.testing.assert_array_equal(cut.likely, rows.likely[0, :2, :32])


def test_further_sums_are_padded_as_the_reference_is():
    sums = {"shared_logps": np.arange(10).reshape(5, 2)}
    batch = layout.collate(random_pairs(5), None, SHAPE, reference_sums=sums)
    assert batch.reference_sums is not None
    assert batch.reference_sums.keys() == sums.keys() and batch.reference_sums["shared_logps"].dtype == np.float32
    assert batch.reference_sums["shared_logps"].tolist() == [*sums["shared_logps"].tolist(), *[[0, 0]] * 3]
    without = layout.collate(random_pairs(5), None, SHAPE)
    assert without.reference_sums is None and without.rows.likely is None and without.rows.likely_logps is None
