"""Which pairs form which step."""

import numpy as np
import pytest

from dpo_jax.data.order import epoch_size, make_order, reached


def run(steps, *, source=None, weights=(1.0,), batch_pairs=4, seed=0, shuffle=True):
    source = np.zeros(10, int) if source is None else np.asarray(source)
    order = make_order(source, weights, batch_pairs=batch_pairs, seed=seed, shuffle=shuffle)
    return np.concatenate([order(step) for step in steps]).tolist()


def test_every_pair_comes_once_an_epoch():
    # Five batches of 4 are two epochs of 10, and the third batch spans both.
    order = run(range(5))
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


def test_a_step_does_not_depend_on_the_steps_before():
    assert run([7]) == run(range(8))[-4:]


def test_seed_decides_the_order():
    assert run(range(5), seed=1) == run(range(5), seed=1) != run(range(5), seed=2)


def test_without_shuffling_pairs_come_in_file_order():
    assert run(range(5), shuffle=False) == list(range(10)) * 2


@pytest.mark.parametrize(("steps", "weights"), [(2, (1.0, 1.0)), (250, (1.0, 1.0)), (9, (0.25, 2.0))])
def test_pairs_that_some_steps_reach_are_those_of_their_batches(steps, weights):
    source = [0] * 40 + [1] * 10
    order = make_order(np.array(source), weights, batch_pairs=4, seed=0, shuffle=True)
    expected = sorted(set(run(range(steps), source=source, weights=weights)))
    assert reached(order, range(steps), 50).tolist() == expected
    assert (len(expected) == 50) == (steps == 250)


@pytest.mark.parametrize("shuffle", [True, False])
def test_weights_are_appearances_an_epoch(shuffle):
    source = [0] * 4 + [1] * 4
    assert epoch_size(np.array(source), (2.5, 0.5)) == 12
    order = run(range(3), source=source, weights=(2.5, 0.5), shuffle=shuffle)
    counts = np.bincount(order, minlength=8)
    assert sorted(counts[:4]) == [2, 2, 3, 3] and sorted(counts[4:]) == [0, 0, 1, 1]


def test_a_fraction_is_drawn_anew_each_epoch():
    drawn = {tuple(sorted(run([step], weights=(0.4,), batch_pairs=4))) for step in range(8)}
    assert len(drawn) > 1
