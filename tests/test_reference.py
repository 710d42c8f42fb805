"""The reference store: computed once, never reused under another identity, continued after a kill."""

import dataclasses

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from dpo_jax.data import packing
from dpo_jax.data.keys import content_key
from dpo_jax.reference import scoring_pass, store
from dpo_jax.reference.scoring_pass import PairsToScore
from dpo_jax.types import Encoded, InputError

IDENTITY = {"weights": "w", "tokenizer": "t", "template": "p", "max_length": 64}
SHAPE = packing.Shape(pairs=4, rows=2, row_length=64, microbatches=2, layout="shared")


def make_set(count, seed=0):
    rng = np.random.default_rng(seed)
    pairs = [Encoded.of(*(rng.integers(1, 99, rng.integers(2, 15)) for _ in range(3))) for _ in range(count)]
    lengths = np.array([p.lengths for p in pairs])
    keys = np.array([[p.prompt.sum() * 1000 + p.chosen.sum(), p.rejected.sum()] for p in pairs], np.uint64)
    return PairsToScore(pairs, lengths, keys, np.full((count, 2), np.nan))


def make_rankings(count, answers, seed=0):
    """Rankings: the first has `answers` answers, the others from two to as many."""
    rng = np.random.default_rng(seed)
    sizes = [answers, *rng.integers(2, answers + 1, count - 1)]
    pairs = [Encoded.of(*(rng.integers(1, 99, rng.integers(2, 9)) for _ in range(1 + n))) for n in sizes]
    lengths = np.array([[*pair.lengths, *[0] * (answers + 1 - len(pair.lengths))] for pair in pairs])
    keys = np.array([content_key(pair) for pair in pairs], np.uint64)
    return PairsToScore(pairs, lengths, keys, np.full((count, answers), np.nan))


def make_unpaired(count):
    """Pairs with one answer each, the other missing."""
    pairs, empty = make_set(count).pairs, np.array([], int)
    pairs = [pair._replace(**{"rejected" if i % 2 else "chosen": empty}) for i, pair in enumerate(pairs)]  # type: ignore[arg-type]
    keys = np.array([content_key(pair) for pair in pairs], np.uint64)
    return PairsToScore(pairs, np.array([pair.lengths for pair in pairs]), keys, np.full((count, 2), np.nan))


def with_provided(pairs, values, indices: slice | np.ndarray = slice(None)):
    """The set with log-probs that come with the data for some of its pairs."""
    provided = pairs.provided.copy()
    provided[indices] = values
    return dataclasses.replace(pairs, provided=provided)


def take(pairs, indices):
    """The pairs at these indices, as a set."""
    arrays = (array[indices] for array in (pairs.lengths, pairs.keys, pairs.provided))
    return PairsToScore([pairs.pairs[i] for i in indices], *arrays)


def concatenate(one, two):
    arrays = (np.concatenate([getattr(x, name) for x in (one, two)]) for name in ("lengths", "keys", "provided"))
    return PairsToScore(one.pairs + two.pairs, *arrays)


def widen(pairs, answers):
    more = ((0, 0), (0, answers + 1 - pairs.lengths.shape[1]))
    return dataclasses.replace(pairs, lengths=np.pad(pairs.lengths, more), provided=np.pad(pairs.provided, more))


def values_of(pairs, answers=2):
    values = [[-ids.sum() for ids in pair.answers] for pair in pairs]
    return np.array([[*each, *[0] * (answers - len(each))] for each in values], float)


class Scorer:
    """Stands in for the model: the sum of the targets, negated; counts its calls and may fail at one."""

    def __init__(self, fail_at=None, shape=SHAPE):
        self.calls, self.fail_at, self.shape = 0, fail_at, shape

    def __call__(self, batch):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        logps = np.zeros((self.shape.pairs, self.shape.answers))
        slot, target = batch.rows.slot.ravel(), batch.rows.target.ravel()
        np.add.at(logps.reshape(-1), slot[slot >= 0], -target[slot >= 0])
        return logps, {}


class TokenScorer(Scorer):
    """Scores each token as its negated id; the likely tokens are the ids after it, with -0.25 id as log-probs."""

    def __init__(self, likely, **how):
        super().__init__(**how)
        self.likely = likely

    def __call__(self, batch):
        logps, _ = super().__call__(batch)
        ids = np.asarray(batch.rows.target)[..., None] + 1 + np.arange(self.likely)
        return logps, {"tokens": (-batch.rows.target.astype(np.float32), ids, ids * np.float32(-0.25))}


def run(folder, *sets, identity=IDENTITY, score=None, answers=2, tokens=None):
    """Result of a pass over sets named a, b, ..., and how often it called the model."""
    shape = dataclasses.replace(SHAPE, answers=answers)
    score = score or (Scorer(shape=shape) if tokens is None else TokenScorer(tokens, shape=shape))
    named = dict(zip("abc", sets, strict=False))
    place = store.Store(folder, identity)
    done = scoring_pass.run_pass(place, named, score, shape=shape, tokens=tokens)
    return done, score.calls


def test_values_come_back_in_the_order_of_the_pairs(tmp_path):
    train, held_out = make_set(10), make_set(5, seed=1)
    done, calls = run(tmp_path / "r", train, held_out)
    np.testing.assert_allclose(done.values["a"], values_of(train.pairs))
    np.testing.assert_allclose(done.values["b"], values_of(held_out.pairs))
    assert (done.provided, done.stored, done.scored) == (0, 0, 15) and calls == 3 + 2


def test_a_second_pass_computes_nothing(tmp_path):
    train = make_set(10)
    first, _ = run(tmp_path / "r", train)
    second, calls = run(tmp_path / "r", train)
    assert calls == 0 and (second.stored, second.scored, second.forward_passes) == (10, 0, 0)
    np.testing.assert_array_equal(second.values["a"], first.values["a"])


def test_progress_begins_at_nothing_and_comes_with_every_microbatch(tmp_path):
    train, reports = make_set(10), []
    shape, place = dataclasses.replace(SHAPE, rows=1, microbatches=4), store.Store(tmp_path / "r", IDENTITY)
    for _ in range(2):  # nothing is left to do, nor to report, the second time
        score, before = Scorer(shape=shape), len(reports)
        done = scoring_pass.run_pass(place, {"a": train}, score, shape=shape, report=lambda *at: reports.append(at))
        np.testing.assert_allclose(done.values["a"], values_of(train.pairs))
        assert len(reports) - before == (score.calls + 1 if score.calls else 0)
    assert reports[0] == (0, 10) and reports[-1] == (10, 10) and reports == sorted(reports)
    assert len(reports) > 1 + 3  # more often than parts are finished


def test_values_follow_pairs_not_rows(tmp_path):
    # Filtering and reordering the data must not shift stored values to other pairs.
    train = make_set(10)
    run(tmp_path / "r", train)
    subset = take(train, [7, 2, 9])
    done, calls = run(tmp_path / "r", subset)
    assert calls == 0
    np.testing.assert_allclose(done.values["a"], values_of(subset.pairs))


def test_new_pairs_alone_are_scored(tmp_path):
    run(tmp_path / "r", make_set(10))
    both = concatenate(make_set(10), make_set(3, 1))
    done, calls = run(tmp_path / "r", both)
    assert (done.stored, done.scored, calls <= 3) == (10, 3, True)
    np.testing.assert_allclose(done.values["a"], values_of(both.pairs))


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_killed_pass_does_not_repeat_finished_parts(tmp_path, fail_at):
    train = make_set(10)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r", train, score=Scorer(fail_at))
    done, calls = run(tmp_path / "r", train)
    assert calls == 3 - (fail_at - 1) and done.stored == 4 * (fail_at - 1)
    np.testing.assert_allclose(done.values["a"], values_of(train.pairs))


def test_values_that_come_with_the_data_are_used_as_they_are(tmp_path):
    provided = [[-1.5, -2.5], [-3.5, -4.5]]
    done, _ = run(tmp_path / "r", with_provided(make_set(6), provided, np.array([1, 4])))
    np.testing.assert_array_equal(done.values["a"][[1, 4]], provided)
    assert (done.provided, done.scored) == (2, 4)
    stored = sum(len(pq.read_table(part)) for part in (tmp_path / "r").glob("*.parquet"))
    assert stored == 4


def test_a_pass_whose_values_all_come_with_the_data_writes_no_store(tmp_path):
    done, calls = run(tmp_path / "r", with_provided(make_set(6), -1.0))
    assert calls == 0 and not (tmp_path / "r").exists() and done.provided == 6


@pytest.mark.parametrize("part", IDENTITY)
def test_another_identity_is_refused_and_names_the_part(tmp_path, part):
    run(tmp_path / "r", make_set(4))
    before = sorted(p.name for p in (tmp_path / "r").iterdir())
    with pytest.raises(
        InputError, match=f"reference log-probs of a run that differs in {part} .*{part} was .* is other"
    ) as error:
        run(tmp_path / "r", make_set(4), identity=IDENTITY | {part: "other"})
    assert all(name not in error.value.got.split("(")[0] for name in IDENTITY if name != part)
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == before


def test_parts_without_a_manifest_are_not_taken_for_a_store(tmp_path):
    run(tmp_path / "r", make_set(4))
    (tmp_path / "r" / "manifest.json").unlink()
    with pytest.raises(InputError, match="holds Parquet files and no manifest.json"):
        run(tmp_path / "r", make_set(4))


def test_a_part_cut_short_is_never_read(tmp_path, monkeypatch):
    # The process dies between writing and renaming: the next pass sees no part and scores it again.
    monkeypatch.setattr(store.files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r", make_set(4))
    monkeypatch.undo()
    done, _ = run(tmp_path / "r", make_set(4))
    assert done.scored == 4
    np.testing.assert_allclose(done.values["a"], values_of(make_set(4).pairs))


def test_two_passes_into_one_folder_keep_each_others_parts(tmp_path):
    # The second begins after the first has read the store and before it writes.
    one, other = make_set(8), make_set(8, seed=3)

    class Interleaved(Scorer):
        def __call__(self, batch):
            if self.calls == 0:
                run(tmp_path / "r", other)
            return super().__call__(batch)

    run(tmp_path / "r", one, score=Interleaved())
    done, calls = run(tmp_path / "r", one, other)
    assert calls == 0 and done.stored == 16


def test_values_of_rankings_come_back_with_zeros_for_missing_answers(tmp_path):
    ranked = make_rankings(10, 4)
    for stored in (0, 10):
        done, _ = run(tmp_path / "r", ranked, answers=4)
        np.testing.assert_allclose(done.values["a"], values_of(ranked.pairs, 4))
        assert done.stored == stored


def test_unpaired_answers_have_values_and_missing_ones_zeros(tmp_path):
    unpaired = make_unpaired(6)
    done, _ = run(tmp_path / "r", unpaired)
    np.testing.assert_allclose(done.values["a"], values_of(unpaired.pairs))
    assert (done.values["a"] == 0).sum() == 6


def test_runs_with_longer_and_shorter_rankings_share_a_store(tmp_path):
    # Pairs scored in a run of pairs are read in a run of rankings, beside whose parts they lie, and the reverse.
    two, three, four = make_rankings(5, 2), make_rankings(6, 3, seed=1), make_rankings(7, 4, seed=2)
    run(tmp_path / "r", two)
    done, _ = run(tmp_path / "r", widen(two, 4), four, answers=4)
    assert (done.stored, done.scored) == (5, 7)
    np.testing.assert_allclose(done.values["a"], values_of(two.pairs, 4))
    done, calls = run(tmp_path / "r", two)
    assert calls == 0
    np.testing.assert_allclose(done.values["a"], values_of(two.pairs))
    run(tmp_path / "r", widen(three, 4), answers=4)
    done, calls = run(tmp_path / "r", three, answers=3)
    assert calls == 0
    np.testing.assert_allclose(done.values["a"], values_of(three.pairs, 3))


def test_values_that_come_with_pairs_are_used_beside_rankings(tmp_path):
    done, calls = run(tmp_path / "r", widen(with_provided(make_set(6), [-1.5, -2.5]), 3), answers=3)
    assert calls == 0 and done.values["a"].tolist() == [[-1.5, -2.5, 0]] * 6


# --- values of single tokens -----------------------------------------------------------------------------------------


def assert_of_tokens(values, pairs, likely):
    assert len(values) == len(pairs)
    for i, pair in enumerate(pairs):
        shortest = min(len(ids) for ids in pair.answers if len(ids))
        np.testing.assert_allclose(values.shared_logps()[i], [-ids[:shortest].sum() for ids in pair.answers])
        for ids, (found, logps) in zip(pair.answers, values[i], strict=True):
            np.testing.assert_array_equal(found, ids[:, None] + 1 + np.arange(likely))
            np.testing.assert_allclose(logps, found * -0.25)


@pytest.mark.parametrize("likely", [0, 3])
def test_values_of_tokens_come_back_scored_or_stored(tmp_path, likely):
    train, held_out = make_set(10), make_set(5, seed=1)
    for scored in (15, 0):
        done, _ = run(tmp_path / "r", train, held_out, tokens=likely)
        assert done.scored == scored and done.tokens is not None
        assert done.tokens.keys() == {"a", "b"}
        assert_of_tokens(done.tokens["a"], train.pairs, likely)
        assert_of_tokens(done.tokens["b"], held_out.pairs, likely)
    # Some pairs alone, in another order, and a set that has each pair twice.
    assert_of_tokens(done.tokens["a"].of(np.array([7, 2])), [train.pairs[i] for i in (7, 2)], likely)
    twice = concatenate(train, train)
    done, calls = run(tmp_path / "r", twice, tokens=likely)
    assert calls == 0 and done.tokens is not None
    assert_of_tokens(done.tokens["a"], twice.pairs, likely)


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_killed_pass_over_tokens_repeats_no_finished_part(tmp_path, fail_at):
    train = make_set(10)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r", train, score=TokenScorer(2, fail_at=fail_at), tokens=2)
    done, calls = run(tmp_path / "r", train, tokens=2)
    assert calls == 3 - (fail_at - 1) and done.tokens is not None
    assert_of_tokens(done.tokens["a"], train.pairs, 2)


def test_values_of_tokens_of_rankings_and_of_single_answers(tmp_path):
    ranked = make_rankings(6, 4)
    for _ in range(2):
        done, _ = run(tmp_path / "ranked", ranked, answers=4, tokens=2)
        assert done.tokens is not None
        for i, pair in enumerate(ranked.pairs):  # type: ignore[arg-type]
            for ids, (found, _) in zip(pair.answers, done.tokens["a"][i], strict=False):
                np.testing.assert_array_equal(found[:, 0], ids + 1)
            assert all(len(found) == 0 for found, _ in done.tokens["a"][i][len(pair.answers) :])
    single = make_unpaired(6)
    for _ in range(2):
        done, _ = run(tmp_path / "single", single, tokens=2)
        assert done.tokens is not None
        assert_of_tokens(done.tokens["a"], single.pairs, 2)


def test_values_of_whole_answers_that_came_with_the_data_do_not_do_for_tokens(tmp_path):
    with pytest.raises(InputError, match="token by token, and 6 pairs"):
        run(tmp_path / "r", with_provided(make_set(6), [-1.5, -2.5]), tokens=2)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["manifest.json", "part-0.parquet"])
def test_damaged_store_is_refused_and_named(tmp_path, name):
    run(tmp_path / "r", make_set(4))
    (tmp_path / "r" / name).write_bytes(b"")
    with pytest.raises(InputError, match=f"{name}: a damaged file"):
        run(tmp_path / "r", make_set(4))


def test_store_in_the_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "r").write_text("")
    with pytest.raises(InputError, match="r: a file; expected a folder"):
        run(tmp_path / "r", make_set(4))


def test_platform_names_the_hardware():
    assert scoring_pass.platform() == jax.devices()[0].device_kind.lower()
