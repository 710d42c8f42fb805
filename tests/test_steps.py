"""The update: what one batch does must not depend on how it was cut up, padded or spread over devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import losses, sharding, steps
from dpo_jax.batch_checks import check_batch
from dpo_jax.data import layout, packing
from dpo_jax.logprobs import vocabulary
from dpo_jax.metrics import pair_metrics
from dpo_jax.models import decoder, rope
from dpo_jax.models.config import DecoderConfig, LayerKind
from dpo_jax.parallel import Placement
from dpo_jax.scoring import make_logps_fn
from dpo_jax.types import Batch, Encoded, InputError
from tests.support.memory import temporary_bytes

KINDS = (LayerKind(rope.usual(8)),)
CONFIG = DecoderConfig(
    vocab_size=64, width=32, layers=2, heads=8, kv_heads=8, head_dim=8, mlp_width=64, max_positions=64, kinds=KINDS
)
PAIRS, LENGTH = 12, 128


def random_pairs(count=PAIRS, seed=0):
    rng = np.random.default_rng(seed)
    return [Encoded.of(*(rng.integers(1, 64, rng.integers(1, 25)) for _ in range(3))) for _ in range(count)]


@functools.cache
def params():
    init = jax.jit(lambda key: jax.tree.map(lambda x: 4 * x, decoder.init(key, CONFIG)))
    return init(jax.random.key(0))


def make_batch(pairs, rows, *, total=PAIRS, layout_name="shared"):
    reference = np.random.default_rng(1).normal(-60, 3, (len(pairs), 2))
    shape = packing.Shape(pairs=total, rows=rows, row_length=LENGTH, microbatches=-(-total // rows), layout=layout_name)
    return layout.collate(pairs, reference, shape)


def make_step(loss="sigmoid", tx=None, total=PAIRS, mesh=None, config=CONFIG, in_place=True, crops=(), **options):
    logps_fn = make_logps_fn(config, pairs=total, placement=Placement(mesh))
    loss_fn = losses.make_loss(loss, options)
    return steps.make_train_step(logps_fn, loss_fn, tx or optax.sgd(0.1), has_aux=True, in_place=in_place, crops=crops)


def update(batch, loss="sigmoid", total=PAIRS, **options):
    tx = optax.sgd(0.1)
    state = steps.init_state(params(), tx, losses.make_loss(loss, {}))
    state, metrics = jax.jit(make_step(loss, tx, total, **options))(state, batch)
    return state.params, metrics


def assert_same_update(one, other):
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    for name in one[1]:
        np.testing.assert_allclose(one[1][name], other[1][name], rtol=1e-5, atol=1e-6, err_msg=name)


SLOW_SFT = pytest.param("sft", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def whole():
    """The same batch in one microbatch, of a loss."""
    return functools.cache(lambda loss: update(make_batch(random_pairs(), PAIRS), loss))


@pytest.mark.parametrize("loss", ["sigmoid", SLOW_SFT])  # the others: tests/test_losses_steps.py
def test_microbatches_change_nothing(whole, loss):
    batch = make_batch(random_pairs(), 2)
    assert batch.count > 1
    assert_same_update(update(batch, loss), whole(loss))


@pytest.mark.parametrize("loss", ["sigmoid", SLOW_SFT])
def test_padding_pairs_change_nothing(whole, loss):
    # Twenty slots for twelve pairs: a masked margin of zero would add log 2 eight times and shrink every mean.
    assert_same_update(update(make_batch(random_pairs(), 2, total=20), loss, total=20), whole(loss))


def test_layout_changes_nothing(whole):
    assert_same_update(update(make_batch(random_pairs(), 3, layout_name="repeated")), whole("sigmoid"))


@pytest.mark.parametrize("loss", ["sigmoid", SLOW_SFT])
def test_gradients_added_in_place_equal_those_added_afterwards(whole, loss):
    assert_same_update(update(make_batch(random_pairs(), 2), loss, in_place=False), whole(loss))


@pytest.mark.slow
def test_tied_embeddings_get_the_gradients_of_both_their_uses():
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    weights = {name: leaf for name, leaf in params().items() if name != "head"}
    batch, tx = make_batch(random_pairs(), 2), optax.sgd(0.1)
    found = [
        jax.jit(make_step(config=tied, in_place=in_place))(steps.init_state(weights, tx), batch)
        for in_place in (True, False)
    ]
    assert_same_update(*((state.params, metrics) for state, metrics in found))


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "sizes"), [(True, ((1, 128), (1, 64))), (False, ())])
def test_vocabulary_takes_memory_for_one_sum_of_gradients(tied, sizes):
    # A further vocabulary entry may take its sum's width, and the logits of the scored tokens that the head keeps.
    def temporaries(vocab):
        config = dataclasses.replace(CONFIG, vocab_size=vocab, width=512, tie_embeddings=tied)
        shape = packing.Shape(PAIRS, rows=1, row_length=LENGTH, microbatches=PAIRS, layout="shared", crops=sizes)
        batch = layout.collate(random_pairs(), np.zeros((PAIRS, 2)), shape)
        crops = [functools.partial(layout.crop_rows, crop=crop) for crop in shape.crops]
        tx = optax.sgd(0.1)
        state = jax.eval_shape(lambda: steps.init_state(decoder.init(jax.random.key(0), config), tx))
        step = jax.jit(make_step(config=config, tx=tx, crops=crops), donate_argnums=0)
        return temporary_bytes(step, state, batch)

    small, large = 16384, 32768
    kept = vocabulary.CPU_BLOCKS.tokens * -(-2 * LENGTH // vocabulary.CPU_BLOCKS.tokens)
    tables = 1 if tied else 2
    grown = (temporaries(large) - temporaries(small)) / (4 * (large - small))
    assert grown < tables * 512 + kept + 100


def test_order_of_pairs_changes_nothing(whole):
    batch = make_batch(random_pairs(), 2)
    order = np.random.default_rng(2).permutation(PAIRS)
    shuffled = make_batch([random_pairs()[i] for i in order], 2)._replace(reference=batch.reference[order])
    assert_same_update(update(shuffled), whole("sigmoid"))


def test_only_microbatches_in_use_are_computed():
    # Poison in a microbatch beyond `count` would reach the gradient if it were computed, masked or not.
    batch = make_batch(random_pairs(4), 1, total=4)
    used = int(batch.count)
    assert used < batch.rows.tokens.shape[0]
    positions = batch.rows.positions.astype(np.float32)
    positions[used:] = np.nan

    def logps_fn(params, rows):
        logps, aux = make_logps_fn(CONFIG, pairs=4)(params, rows._replace(positions=jnp.zeros_like(rows.tokens)))
        return logps + rows.positions.sum() * 0, aux

    tx = optax.sgd(0.1)
    step = steps.make_train_step(logps_fn, losses.make_loss("sigmoid", {}), tx, has_aux=True)
    poisoned = batch._replace(rows=batch.rows._replace(positions=positions))
    state, metrics = jax.jit(step)(steps.init_state(params(), tx), poisoned)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, metrics)))


@pytest.mark.parametrize("layout_name", layout.LAYOUTS)
def test_answers_of_a_ranking_score_as_they_do_alone(layout_name):
    rng = np.random.default_rng(0)
    rankings = [
        Encoded.of(*(rng.integers(1, 64, rng.integers(1, 25)) for _ in range(1 + answers))) for answers in (4, 2, 3, 4)
    ]
    places = [(p, side) for p, ranking in enumerate(rankings) for side in range(len(ranking.answers))]
    none = np.array([], int)
    alone = [Encoded(rankings[p].prompt, rankings[p].answers[side], none) for p, side in places]

    def logps(pairs, name, **sizes):
        shape = packing.Shape(pairs=len(pairs), rows=len(pairs), row_length=256, microbatches=1, layout=name, **sizes)
        rows = jax.tree.map(lambda x: x[0], layout.collate(pairs, None, shape).rows)
        logps_fn = make_logps_fn(CONFIG, pairs=shape.pairs, answers=shape.answers)
        return np.asarray(jax.jit(logps_fn)(params(), rows)[0])

    found, expected = logps(rankings, layout_name, answers=4), np.zeros((4, 4))
    expected[tuple(zip(*places, strict=True))] = logps(alone, "repeated")[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert (found == 0).sum() == 3


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 8), (1, 4, 2), (2, 2, 2)])
def test_mesh_shape_changes_nothing(whole, sizes):
    mesh = sharding.make_mesh(*sizes)
    batch = make_batch(random_pairs(), 8)
    tx = optax.sgd(0.1)
    state = jax.device_put(
        steps.init_state(params(), tx), sharding.shardings(mesh, jax.eval_shape(lambda: steps.init_state(params(), tx)))
    )
    found = jax.jit(make_step(tx=tx, mesh=mesh))(state, sharding.put(batch, mesh))
    assert_same_update((found[0].params, found[1]), whole("sigmoid"))


def test_policy_equal_to_reference_gives_log_two_and_no_margin():
    batch = make_batch(random_pairs(), 2)
    logps_fn = make_logps_fn(CONFIG, pairs=PAIRS)
    logps, _ = jax.jit(steps.make_score_step(logps_fn, has_aux=True))(params(), batch)
    _, metrics = update(batch._replace(reference=np.asarray(logps)))
    assert float(metrics["loss"]) == pytest.approx(np.log(2), abs=1e-6)
    assert abs(float(metrics["rewards/margins"])) < 1e-5


@pytest.mark.slow
def test_reported_gradient_norm_is_that_of_the_mean_loss():
    batch = make_batch(random_pairs(), PAIRS)
    logps_fn = make_logps_fn(CONFIG, pairs=PAIRS)
    one = jax.tree.map(lambda x: jnp.asarray(x[0]), batch.rows)
    loss = lambda p: losses.sigmoid(logps_fn(p, one)[0], jnp.asarray(batch.reference)).mean()
    _, metrics = update(batch)
    assert float(metrics["grad_norm"]) == pytest.approx(
        float(optax.tree.norm(jax.jit(jax.grad(loss))(params()))), rel=1e-5
    )


def test_gradients_of_bfloat16_parameters_are_summed_in_float32():
    seen = []

    def update(updates, state, params=None):
        seen.append(jax.tree.leaves(updates))
        return updates, state

    spy = optax.GradientTransformation(lambda params: (), update)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    state, _ = jax.eval_shape(make_step(tx=spy), steps.init_state(low, spy), make_batch(random_pairs(), 1))
    assert {g.dtype for g in seen[0]} == {jnp.dtype("float32")}
    assert {p.dtype for p in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}


def test_small_updates_of_bfloat16_parameters_add_up():
    # A hundredth of a spacing each: rounded to nearest, all hundred would vanish.
    params = {"w": jnp.full((4000,), 1.0, jnp.bfloat16), "x": jnp.full((3,), -0.5, jnp.float32)}
    updates = {"w": jnp.full((4000,), 2.0**-7 / 100), "x": jnp.full((3,), 1e-3)}
    add = jax.jit(steps.apply_updates)
    moved = params
    for step in range(100):
        moved = add(moved, updates, jnp.int32(step))
    assert moved["w"].dtype == jnp.bfloat16 and set(np.unique(moved["w"].astype(np.float32))) <= {
        1 + n * 2.0**-7 for n in range(10)
    }
    # The mean of 4,000 sums of which each has a standard deviation of about one spacing.
    assert float(moved["w"].astype(jnp.float32).mean()) == pytest.approx(1 + 2.0**-7, abs=5 * 2.0**-7 / 4000**0.5)
    np.testing.assert_allclose(moved["x"], -0.4, rtol=1e-5)
    again, other = (add(params, updates, jnp.int32(step))["w"] for step in (0, 1))
    assert jnp.array_equal(again, add(params, updates, jnp.int32(0))["w"]) and not jnp.array_equal(again, other)


def test_rounding_depends_on_the_seed_of_the_step():
    table, tx = jnp.full((4000,), 1.0, jnp.bfloat16), optax.sgd(1.0)
    batch = Batch(
        rows=np.zeros((1, 1), np.int32),
        count=np.int32(1),
        present=np.ones((1, 1), bool),
        reference=np.zeros((1, 2), np.float32),
        lengths=np.ones((1, 2), np.int32),
    )
    # A gradient of less than a spacing for every entry, so that each is rounded up or down.
    logps_fn = lambda table, rows: table.astype(jnp.float32).sum() * jnp.array([[2.0**-10, 0.0]])

    def moved(**seed):
        step = steps.make_train_step(logps_fn, losses.make_loss("sigmoid", {"beta": 1.0}), tx, **seed)
        return jax.jit(step)(steps.init_state(table, tx), batch)[0].params

    assert 0 < (moved() != table).sum() < len(table)
    assert jnp.array_equal(moved(), moved(seed=0))
    assert jnp.array_equal(moved(seed=1), moved(seed=1)) and not jnp.array_equal(moved(seed=1), moved(seed=0))
    assert not jnp.array_equal(moved(seed=2**32), moved(seed=0))  # no bit of it is dropped


def test_reported_gap_is_the_largest_of_each_pairs_answers():
    policy = np.array([[-1.0, -2.0, 0.0], [-3.0, -4.0, -5.0], [-6.0, -7.0, -8.0]], np.float32)
    off = np.array([[0.5, -0.25, 9.0], [0.0, 0.125, -2.0], [7.0, 7.0, 7.0]], np.float32)
    batch = Batch(
        rows=np.zeros((2, 1), np.int32),
        count=np.int32(2),
        present=np.array([[True, False, False], [False, True, False]]),  # the last pair is padding
        reference=policy - off,
        lengths=np.array([[3, 2, 0], [1, 1, 1], [0, 0, 0]], np.int32),  # the first has two answers
    )
    tx, loss_fn = optax.sgd(0.1), losses.make_loss("plackett_luce", {})
    logps_fn = lambda scale, rows: scale * policy
    state, found = steps.init_state(jnp.ones(()), tx), {}
    for report_gap in (False, True):
        step = steps.make_train_step(logps_fn, loss_fn, tx, report_gap=report_gap)
        found[report_gap] = jax.jit(step)(state, batch)
    gap = found[True][1].pop("gap")
    assert gap.dtype == jnp.float32
    np.testing.assert_array_equal(gap, [0.5, 2.0, 0.0])
    # Nothing else changes.
    jax.tree.map(np.testing.assert_array_equal, found[True], found[False])


def test_bfloat16_sums_that_need_no_rounding_are_exact_and_infinities_stay():
    params = {"w": jnp.array([1.0, -2.0, 0.0, jnp.inf, 3e38], jnp.bfloat16)}
    moved = steps.apply_updates(params, {"w": jnp.array([0.5, -1.0, 0.0, 1.0, 0.0])}, jnp.int32(0))
    assert moved["w"].astype(jnp.float32).tolist()[:4] == [1.5, -3.0, 0.0, float("inf")]


# The model of README.md: a table of log-odds, no tokens at all; a pair is two indices into it.
TABLE = Batch(
    rows=np.array([[[0, 1], [0, 2], [3, 2]]]),
    count=np.int32(1),
    present=np.ones((1, 3), bool),
    reference=np.full((3, 2), np.log(0.25), np.float32),
    lengths=np.ones((3, 2), np.int32),
)
# The same pairs in two microbatches, and a padding pair.
TWO = Batch(
    rows=np.array([[[0, 1], [0, 0], [0, 0], [0, 0]], [[0, 0], [0, 2], [3, 2], [0, 0]]]),
    count=np.int32(2),
    present=np.array([[True, False, False, False], [False, True, True, False]]),
    reference=np.full((4, 2), np.log(0.25), np.float32),
    lengths=np.array([[1, 1], [1, 1], [1, 1], [0, 0]], np.int32),
)


def table_logps(table, rows):
    return jax.nn.log_softmax(table)[rows]


@functools.cache
def table_step(loss="sigmoid", **options):
    return jax.jit(steps.make_train_step(table_logps, losses.make_loss(loss), optax.sgd(1.0), **options))


def table_update(batch, **options):
    state, metrics = table_step(**options)(steps.init_state(jnp.arange(4.0), optax.sgd(1.0)), batch)
    return state.params, metrics


def test_any_model_that_scores_pairs_can_be_trained():
    # Preferring what it is told to takes the loss down.
    table, tx, batch, logps_fn = jnp.zeros(4), optax.sgd(1.0), TABLE, table_logps
    step = jax.jit(steps.make_train_step(logps_fn, losses.make_loss("sigmoid", {"beta": 1.0}), tx))
    state, first = step(steps.init_state(table, tx), batch)
    for _ in range(50):
        state, last = step(state, batch)
    assert float(first["loss"]) == pytest.approx(np.log(2), abs=1e-6) and float(last["loss"]) < 0.1
    assert float(last["rewards/accuracies"]) == 1 and int(state.step) == 51


FAULTS = [  # (fields, place, got, expected)
    ({"present": np.ones((3, 1), bool)}, "present", "[3, 1]", "[A=1, P]"),
    ({"present": np.ones(3, bool)}, "present", "[3]", "[A=1, P]"),
    ({"present": np.ones((1, 3))}, "present", "float64", "true or false"),
    ({"reference": np.zeros((1, 2), np.float32)}, "reference", "[1, 2]", "[P=3, K]"),
    ({"reference": np.zeros((3, 2), bool)}, "reference", "bool", "numbers"),
    ({"lengths": np.ones((3, 1), np.int32)}, "lengths", "[3, 1]", "[P=3, K=2]"),
    ({"lengths": np.ones((3, 2))}, "lengths", "float64", "whole numbers"),
    ({"weight": np.ones(())}, "weight", "[]", "[P=3]"),
    ({"margin": np.ones((3, 1))}, "margin", "[3, 1]", "[P=3]"),
    ({"count": np.ones(1, np.int32)}, "count", "[1]", "shape []"),
    ({"count": np.float32(1)}, "count", "float32", "whole numbers"),
    ({"rows": np.zeros((), np.int32)}, "rows", "[]", "[A, ...]"),
    ({"rows": {}}, "rows", "no array", "[A, ...]"),
    ({"crop": np.zeros(1, np.int32)}, "crop", "got an array", "functions that crop"),
    ({"reference_sums": {"shared_logps": np.zeros((2, 2))}}, "reference_sums['shared_logps']", "[2, 2]", "[P=3, K=2]"),
    ({"mismatched": TWO}, "mismatched.reference", "[4, 2]", "[P=3, K=2]"),
    ({"mismatched": TABLE._replace(lengths=np.ones(3, int))}, "mismatched.lengths", "[3]", "[P=3, K=2]"),
    # Values, which only concrete arrays show:
    ({"count": np.int32(2)}, "count", "got 2", "at most 1"),
    ({"lengths": np.full((3, 2), -1)}, "lengths", "pair 0 has [-1 -1]", "not below 0"),
    ({"weight": np.array([1.0, np.nan, 1.0])}, "weight", "pair 1 has nan", "finite"),
    ({"reference": np.full((3, 2), -np.inf)}, "reference", "pair 0", "finite"),
]
SHAPES = [fault for fault in FAULTS if not fault[2].startswith(("pair", "got"))]


@pytest.mark.parametrize(("fields", "place", "got", "expected"), FAULTS)
def test_batch_that_does_not_fit_together_is_refused(fields, place, got, expected):
    with pytest.raises(InputError) as error:
        check_batch(TABLE._replace(**fields))
    assert error.value.place == f"batch.{place}" and got in error.value.got and expected in error.value.expected


@pytest.mark.parametrize(("fields", "place"), [fault[:2] for fault in SHAPES])
def test_steps_refuse_shapes_when_they_are_traced(fields, place):
    batch, state = TABLE._replace(**fields), steps.init_state(jnp.zeros(4), optax.sgd(1.0))
    step = steps.make_train_step(table_logps, losses.make_loss("sigmoid"), optax.sgd(1.0))
    for traced in (lambda: jax.eval_shape(step, state, batch), lambda: jax.eval_shape(score, state.params, batch)):
        with pytest.raises(InputError) as error:
            traced()
        assert error.value.place == f"batch.{place}"


score = steps.make_score_step(table_logps)


def test_values_that_cannot_be_true_make_loss_and_gradient_nan():
    twice = TWO._replace(present=TWO.present | np.array([[False, True, False, False], [False] * 4]))
    with pytest.raises(InputError, match="batch.present: pair 1 is in microbatches 0, 1; expected each pair in one"):
        check_batch(twice)
    for batch in (twice, TWO._replace(count=np.int32(3)), TWO._replace(count=np.int32(-1))):
        params, metrics = table_update(batch)
        assert np.isnan(metrics["loss"]) and np.isnan(params).all() == (batch.count > 0)
        assert np.isnan(jax.jit(score)(params, batch)[0]).all()


def test_unused_microbatches_hold_no_pairs():
    used = TWO._replace(count=np.int32(1))
    assert_same_update(table_update(used), table_update(used._replace(present=TWO.present & [[True], [False]])))


@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_values_of_padding_pairs_reach_nothing(loss):
    batch = TWO._replace(weight=np.ones(4, np.float32), margin=np.ones(4, np.float32))
    padding = np.array([False, False, False, True])
    spoil = lambda values: np.where(padding.reshape(-1, *[1] * (values.ndim - 1)), np.nan, values).astype(values.dtype)
    spoilt = batch._replace(**{name: spoil(getattr(batch, name)) for name in ("reference", "weight", "margin")})
    spoilt = spoilt._replace(lengths=np.where(padding[:, None], -(2**31), batch.lengths).astype(np.int32))
    assert all(np.isnan(leaf[3]).all() for leaf in (spoilt.reference, spoilt.weight, spoilt.margin))
    assert_same_update(table_update(spoilt, loss=loss), table_update(batch, loss=loss))

    def logps_fn(table, rows):  # nan for the pairs that are not in the microbatch
        return jnp.where((rows == 0).all(1, keepdims=True), jnp.nan, table_logps(table, rows))

    tx, loss_fn = optax.sgd(1.0), losses.make_loss(loss)
    state, metrics = jax.jit(steps.make_train_step(logps_fn, loss_fn, tx))(steps.init_state(jnp.arange(4.0), tx), batch)
    assert_same_update((state.params, metrics), table_update(batch, loss=loss))


RESULTS = [  # of a logps_fn
    (lambda logps: logps[:, 0], {}, r"it returns log-probs as float32\[3\]; expected log-probs \[P=3, K=2\]"),
    (lambda logps: (logps, {}), {}, "it returns log-probs as a tuple; .*has_aux"),
    (lambda logps: logps, {"has_aux": True}, "it returns float32.*expected .log-probs"),
    (lambda logps: (logps, {"length": logps.sum()}), {"has_aux": True}, r"it returns length as float32\[\]"),
    (lambda logps: (logps, {"kl": logps}), {"has_aux": True}, "it returns 'kl'; expected another name"),
]


@pytest.mark.parametrize(("change", "options", "message"), RESULTS)
def test_results_of_another_shape_are_refused(change, options, message):
    logps_fn = lambda table, rows: change(table_logps(table, rows))
    step = steps.make_train_step(logps_fn, losses.make_loss("sigmoid"), optax.sgd(1.0), **options)
    score = steps.make_score_step(logps_fn, **options)
    state = steps.init_state(jnp.zeros(4), optax.sgd(1.0))
    for traced in (lambda: jax.eval_shape(step, state, TABLE), lambda: jax.eval_shape(score, state.params, TABLE)):
        with pytest.raises(InputError, match=f"^logps_fn: {message}"):
            traced()


def test_loss_reads_auxiliary_outputs_by_name():
    def with_entropy(policy, reference, *, lengths, entropy, beta=0.1):
        return losses.sigmoid(policy, reference, beta=beta) - 0.5 * entropy[:, 0]

    def logps_fn(table, rows):
        return table_logps(table, rows), {"entropy": -(table[rows] ** 2)}

    tx, state = optax.sgd(1.0), steps.init_state(jnp.arange(4.0), optax.sgd(1.0))
    slopes = []
    for loss_fn in (with_entropy, losses.make_loss(with_entropy), losses.make_loss("sigmoid")):
        step = steps.make_train_step(logps_fn, loss_fn, tx, has_aux=True)
        slopes.append(state.params - jax.jit(step)(state, TABLE)[0].params)
    np.testing.assert_allclose(slopes[0], slopes[1])
    np.testing.assert_allclose(slopes[0] - slopes[2], 0.5 * 2 * np.arange(4.0) * np.array([2, 0, 0, 1]) / 3, atol=1e-6)
    for loss_fn in (with_entropy, losses.make_loss(with_entropy)):
        with pytest.raises(InputError, match="^loss_fn: it reads 'entropy', and there is none; .*has_aux=True"):
            jax.eval_shape(steps.make_train_step(table_logps, loss_fn, tx), state, TABLE)
    with pytest.raises(InputError, match="^loss_fn: losses of shape"):
        jax.eval_shape(steps.make_train_step(table_logps, lambda *_, lengths: jnp.zeros(()), tx), state, TABLE)
    with pytest.raises(InputError, match="^batch.mismatched: got none"):
        jax.eval_shape(steps.make_train_step(table_logps, losses.make_loss("kto"), tx), state, TABLE)


def test_step_works_under_scan_and_vmap():
    step, state = table_step(), steps.init_state(jnp.arange(4.0), optax.sgd(1.0))
    other = TABLE._replace(rows=TABLE.rows[:, ::-1])
    batches, expected = [TABLE, other._replace(weight=None)], state
    for batch in batches:
        expected, last = step(expected, batch)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    found, metrics = jax.lax.scan(step, state, stacked)
    np.testing.assert_allclose(found.params, expected.params, rtol=1e-6)
    assert metrics["loss"].shape == (2,) and float(metrics["loss"][1]) == pytest.approx(float(last["loss"]), rel=1e-6)
    each, _ = jax.vmap(step, in_axes=(None, 0))(state, stacked)
    np.testing.assert_allclose(each.params[0], step(state, TABLE)[0].params, rtol=1e-6)

    def with_beta(beta):
        step = steps.make_train_step(table_logps, losses.make_loss("sigmoid", beta=beta), optax.sgd(1.0))
        return step(state, TWO)[0].params

    of_betas = jax.jit(jax.vmap(with_beta))(jnp.array([0.1, 0.5]))
    np.testing.assert_allclose(of_betas[0], table_update(TWO)[0], rtol=1e-5)
    assert np.abs(of_betas[1] - of_betas[0]).max() > 0.01


def test_a_tie_is_no_preference():
    policy = jnp.array([[-1.0, -1.0], [-1.0, -2.0]])
    lengths, present = jnp.full((2, 2), 3), jnp.ones(2, bool)
    metrics = pair_metrics(jnp.zeros(2), policy, policy, lengths, present)
    assert metrics["rewards/accuracies"] == 0.5 and metrics["rewards/margins"] == 0.5
