"""Prompts with answers of other prompts: every pair of a set once as each, cut to the limit."""

import numpy as np
import pytest

from dpo_jax.data.keys import content_key
from dpo_jax.data.mismatched import mismatched
from dpo_jax.types import Encoded, InputError


def make_pairs(prompts, answers=2, seed=0):
    """Pairs with these prompts, by number."""
    rng = np.random.default_rng(seed)
    given = {p: np.array([p, 7, p], np.int32) for p in prompts}
    pairs = [
        Encoded.of(given[p], *(rng.integers(10, 99, rng.integers(2, 9)).astype(np.int32) for _ in range(answers)))
        for p in prompts
    ]
    return pairs, np.array([pair.lengths for pair in pairs])


def sides(pair):
    return [ids.tolist() for ids in (pair.prompt, *pair.answers)]


@pytest.mark.parametrize(
    "prompts",
    [range(2), range(30), [1, 1, 2, 2], [1] * 4 + [2, 3, 4, 5], [p % 7 for p in range(50)], [1, 2, 2, 3, 3, 3] * 5],
    ids=str,
)
def test_every_pair_lends_its_answers_once_to_another_prompt(prompts):
    pairs, lengths = make_pairs(prompts)
    found = mismatched(pairs, lengths, max_length=64)
    assert len(found) == len(pairs) and sorted(found.answers_of.tolist()) == [*range(len(pairs))]
    for i, partner in enumerate(found.answers_of.tolist()):
        assert prompts[partner] != prompts[i]
        assert sides(found[i]) == [pairs[i].prompt.tolist(), *sides(pairs[partner])[1:]]


def test_prompt_of_more_than_half_of_the_pairs_keeps_as_few_of_its_own_as_must_be():
    prompts = [1] * 7 + [2, 3, 4]
    pairs, lengths = make_pairs(prompts)
    partner = mismatched(pairs, lengths, max_length=64).answers_of
    assert sorted(partner.tolist()) == [*range(10)] and (partner != np.arange(10)).all()
    assert sum(prompts[i] == prompts[j] for i, j in enumerate(partner.tolist())) == 7 - 3


def test_assigned_answers_are_the_same_each_time_and_not_the_neighbors():
    pairs, lengths = make_pairs(range(40))
    first, again = (mismatched(pairs, lengths, max_length=64).answers_of for _ in range(2))
    assert first.tolist() == again.tolist()
    assert np.mean(np.abs(first - np.arange(40)) == 1) < 0.2
    two = mismatched(*make_pairs([1] * 40 + [2] * 40), max_length=64).answers_of
    assert np.mean(np.abs(two - np.arange(80)) == 40) < 0.2


def test_answers_are_cut_to_what_the_prompt_leaves_and_lengths_say_so():
    pairs, lengths = make_pairs(range(12))
    pairs[3] = pairs[3]._replace(prompt=np.arange(8, dtype=np.int32))
    lengths[3, 0] = 8
    found = mismatched(pairs, lengths, max_length=8)
    assert found.lengths.dtype == np.int32
    for i, partner in enumerate(found.answers_of.tolist()):
        room = 8 - len(pairs[i].prompt)
        assert sides(found[i])[1:] == [ids.tolist()[:room] for ids in pairs[partner].answers]
        assert found.lengths[i].tolist() == found[i].lengths
    assert found.lengths[3].tolist() == [8, 0, 0] and (found.lengths.sum(1) > 8).any()


def test_an_answer_that_is_not_there_is_not_there_for_the_other_prompt():
    pairs, lengths = make_pairs(range(6))
    none = np.array([], np.int32)
    pairs = [pair._replace(**{"rejected" if i % 2 else "chosen": none}) for i, pair in enumerate(pairs)]
    lengths = np.array([pair.lengths for pair in pairs])
    found = mismatched(pairs, lengths, max_length=64)
    assert (found.lengths[:, 1] > 0).tolist() == [bool(j % 2) for j in found.answers_of.tolist()]


def test_rankings_lend_all_their_answers():
    pairs, lengths = make_pairs(range(5), answers=4)
    found = mismatched(pairs, lengths, max_length=64)
    assert found.lengths.shape == (5, 5) and found.reference.shape == (5, 4)
    assert sides(found[2])[1:] == sides(pairs[found.answers_of[2]])[1:]


def test_keys_are_those_of_the_tokens_and_no_value_is_given():
    pairs, lengths = make_pairs(range(6))
    found = mismatched(pairs, lengths, max_length=8)
    assert [tuple(key) for key in found.keys.tolist()] == [content_key(found[i]) for i in range(6)]
    assert found.keys.dtype == np.uint64 and found.keys is found.keys
    assert not {*map(tuple, found.keys.tolist())} & {content_key(pair) for pair in pairs}
    assert found.reference.shape == (6, 2) and np.isnan(found.reference).all()


@pytest.mark.parametrize("prompts", [[1], [1, 1, 1]])
def test_one_prompt_alone_is_refused(prompts):
    with pytest.raises(InputError, match="config.data.eval: all . examples have the same prompt") as caught:
        mismatched(*make_pairs(prompts), max_length=64, place="config.data.eval")
    assert "two prompts" in caught.value.expected
