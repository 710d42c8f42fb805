"""Every objective in the update: how a batch is cut up, ordered, padded or spread over devices changes nothing.

The model is a vector: log-probs and further sums of an answer are features times parameters.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax import losses, metrics, steps
from dpo_jax.run import evaluate
from dpo_jax.types import Batch
from tests.support.loss_cases import CASES, SUMMED

ALL = CASES | SUMMED
PAIRS, FEATURES, STEPS = 12, 5, 3
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05))
# One compilation each is little, but there are many: all but what sees the whole batch is left to the slow tests.
WHOLE = {"aot", "beta_dpo", "kto", "sum"}
PLAIN = [case if case in WHOLE else pytest.param(case, marks=pytest.mark.slow) for case in ALL if "-" not in case]
# Each place and cut is a compilation; what modifies a loss does so by itself, wherever rows are.
SPREAD = [case for case in ALL if "-" not in case or case.startswith(("sigmoid-", "sum-"))]


@functools.cache
def data(answers=2, seed=0):
    """Features of log-probs and of each further sum, and what is stored of the reference, of every answer."""
    rng = np.random.default_rng(seed)
    shape = PAIRS, answers
    names = "logps", *losses.SUMS
    features = {name: rng.normal(size=(*shape, FEATURES)).astype(np.float32) for name in names}
    stored = {name: -rng.uniform(1, 3, shape).astype(np.float32) for name in ("reference", "shared_logps")}
    lengths = rng.integers(1, 9, shape).astype(np.int32)
    if answers > 2:
        lengths[::3, -1] = 0
    return features, stored, lengths


def make_batch(objective, *, microbatches=1, order=None, padding=0, answers=2, seed=0):
    """Twelve pairs in so many microbatches, by turns, with padding pairs among the last."""
    features, stored, lengths = data(answers, seed)
    order = np.arange(PAIRS) if order is None else order
    total = PAIRS + padding
    held = np.arange(total) % microbatches == np.arange(microbatches)[:, None]
    present = held & (np.arange(total) < PAIRS)

    def padded(array):
        out = np.zeros((total, *array.shape[1:]), array.dtype)
        out[:PAIRS] = array[order]
        return out

    rows = {name: np.where(present[:, :, None, None], padded(each), 0) for name, each in features.items()}
    batch = Batch(
        rows=rows,
        count=np.int32(microbatches),
        present=present,
        reference=padded(stored["reference"]),
        lengths=padded(lengths),
        reference_sums={"shared_logps": padded(stored["shared_logps"])},
    )
    if "kl" in objective.needs and seed == 0:
        others = make_batch(objective, microbatches=microbatches, order=order, padding=padding, seed=1)
        batch = batch._replace(mismatched=others._replace(reference_sums=None))
    return batch


def logps_fn(params, rows):
    found = {name: features @ params for name, features in rows.items()}
    return found.pop("logps"), found


def updates(case, *, mesh=None, **how):
    """Parameters, baselines and metrics after some updates."""
    name, options = ALL[case]
    objective = losses.make_loss(name, options)
    batch = make_batch(objective, answers=4 if name == "plackett_luce" else 2, **how)
    step = jax.jit(steps.make_train_step(logps_fn, objective, TX, has_aux=True))
    state = steps.init_state(jnp.linspace(-0.4, 0.4, FEATURES), TX, objective)
    if mesh is not None:
        spread = NamedSharding(mesh, PartitionSpec(None, "pairs"))
        state, batch = jax.device_put((state, batch), NamedSharding(mesh, PartitionSpec()))
        batch = batch._replace(rows=jax.tree.map(lambda x: jax.device_put(x, spread), batch.rows))
    rows = []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        rows.append(metrics)
    return jax.device_get((state.params, state.running, rows))


@functools.cache
def whole(case):
    return updates(case)


def assert_same(found, case):
    moved = np.abs(whole(case)[0] - np.linspace(-0.4, 0.4, FEATURES)).max()
    assert moved > 1e-4, "an update that moves nothing is the same however it is made"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, whole(case))


@pytest.mark.parametrize("case", PLAIN)
def test_microbatches_change_nothing(case):
    assert_same(updates(case, microbatches=4), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ALL if case in SPREAD or case.partition("-")[0] in WHOLE])
def test_microbatches_order_padding_and_mesh_change_nothing(case):
    order = np.random.default_rng(2).permutation(PAIRS)
    assert_same(updates(case, microbatches=3, order=order, padding=5), case)
    if case in SPREAD:
        mesh = Mesh(np.array(jax.devices()), ("pairs",))
        assert mesh.size == 8
        assert_same(updates(case, mesh=mesh, microbatches=2, padding=4), case)


# --- weights and margins of pairs -------------------------------------------------------------------------------------

COUNTS = np.array([2, 1, 3, 1, 1, 1, 1, 2, 0, 0, 0, 0])  # twelve pairs, of which four count nothing
MARGINS = np.random.default_rng(3).normal(size=PAIRS)
# Not of `aot`: a batch in which a pair stands twice is another distribution, which weights do not reach.
WEIGHTABLE = [
    case for case in ALL if ("-" not in case or case in SUMMED) and losses.make_loss(*ALL[case]).takes_weights
]
WEIGHED = ["sigmoid", "beta_dpo", "bco_pair", "kto", "sum"]


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def weighed_and_repeated(case, microbatches):
    """The same pairs with weights, in so many microbatches, and as often as their weights say, in one."""
    objective = losses.make_loss(*ALL[case])
    answers = 4 if case == "plackett_luce" else 2
    margin = MARGINS if objective.takes_margins else None
    order = np.repeat(np.arange(PAIRS), COUNTS)
    weighed = make_batch(objective, microbatches=microbatches, answers=answers)
    repeated = make_batch(objective, order=order, answers=answers)
    batches = (
        weighed._replace(weight=COUNTS.astype(float), margin=margin),
        repeated._replace(margin=None if margin is None else margin[order]),
    )
    return objective, jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, batches)


def trained(step, objective, batch):
    """Parameters and metrics after some updates, baselines apart: these hold sums, which grow with the weights."""
    state, rows = steps.init_state(jnp.linspace(-0.4, 0.4, FEATURES), TX, objective), []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        rows.append(metrics)
    return jax.device_get((state.params, rows))


def assert_equal_means(found, expected):
    assert found[1][0].keys() == expected[1][0].keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, expected)


@pytest.mark.parametrize(
    "case", [case if case in WEIGHED else pytest.param(case, marks=pytest.mark.slow) for case in WEIGHTABLE]
)
def test_a_pair_of_weight_two_is_the_pair_twice(x64, case):
    objective, (whole, repeated) = weighed_and_repeated(case, 1)
    weighed = weighed_and_repeated(case, 4)[1][0]
    step = jax.jit(steps.make_train_step(logps_fn, objective, TX, has_aux=True))
    expected = trained(step, objective, repeated)
    assert np.abs(expected[0] - np.linspace(-0.4, 0.4, FEATURES)).max() > 1e-4
    assert_equal_means(trained(step, objective, whole), expected)
    assert_equal_means(trained(step, objective, weighed), expected)
    # Only the ratios of weights count, however small they are.
    assert_equal_means(trained(step, objective, weighed._replace(weight=weighed.weight / 64)), expected)


def test_a_batch_without_weight_moves_nothing_and_stays_finite(x64):
    for case in ("sigmoid", "bco_pair"):
        objective, (weighed, _) = weighed_and_repeated(case, 4)
        nothing = weighed._replace(weight=np.zeros(PAIRS))
        params, rows = trained(
            jax.jit(steps.make_train_step(logps_fn, objective, TX, has_aux=True)), objective, nothing
        )
        np.testing.assert_array_equal(params, jnp.linspace(-0.4, 0.4, FEATURES))
        assert all(value == 0 for row in rows for value in row.values())


def test_loss_of_weighted_pairs_with_margins_equals_closed_form(x64):
    objective, (weighed, _) = weighed_and_repeated("sigmoid", 4)
    step = jax.jit(steps.make_train_step(logps_fn, objective, TX, has_aux=True))
    _, rows = trained(step, objective, weighed)
    start = np.linspace(-0.4, 0.4, FEATURES)
    ratios = weighed.rows["logps"].sum(0) @ start - weighed.reference
    each = np.log1p(np.exp(MARGINS - 0.1 * (ratios[:, 0] - ratios[:, 1])))
    assert rows[0]["loss"] == pytest.approx((COUNTS * each).sum() / COUNTS.sum(), rel=1e-12)


@pytest.mark.parametrize("case", ["sigmoid", "kto"])
def test_evaluation_counts_pairs_by_their_weights(x64, case):
    objective, batches = weighed_and_repeated(case, 1)
    summary = evaluate.make_summary(objective)

    def metrics(batch):
        logps, sums = (jax.tree.map(lambda x: x[0], each) for each in logps_fn(np.linspace(-0.4, 0.4, 5), batch.rows))
        other = batch.mismatched
        if other is not None:
            other = evaluate.Mismatched((other.rows["logps"] @ np.ones(5))[0], other.reference, other.lengths)
        compared = batch.reference, batch.reference_sums, batch.lengths, other, objective.start()
        return summary((logps, sums), *compared, batch.weight, batch.margin)

    weighed, repeated = map(metrics, batches)
    assert weighed.keys() == repeated.keys() and float(weighed["loss"]) != 0
    assert (float(metrics(batches[0]._replace(margin=None))["loss"]) == float(weighed["loss"])) == (case == "kto")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), weighed, repeated)


def test_metrics_of_each_part_of_a_mixture_are_those_of_its_pairs_alone(x64):
    objective, (batch, _) = weighed_and_repeated("sigmoid", 1)
    part = np.arange(batch.present.shape[1]) % 2
    start = np.linspace(-0.4, 0.4, FEATURES)

    @jax.jit
    def of_parts(batch):
        present = batch.present.any(0)
        compared = batch.reference, batch.lengths, present, {}, batch.weight, batch.margin
        scores = steps.Scores(batch.rows["logps"][0] @ start, {}, *compared)
        each, _ = steps.pair_losses(objective, scores, {})
        rewards = losses.rewards_of(objective, *scores[:1], *compared[:2])
        names = "even", "odd", "no"
        return each, rewards, steps.mixture_metrics(objective, each, scores, jnp.asarray(part), names, paired=True)

    each, rewards, found = jax.tree.map(np.asarray, of_parts(batch))
    margins = rewards[:, 0] - rewards[:, 1]
    for index, name in enumerate(("even", "odd")):
        here = batch.present.any(0) & (part == index)
        assert found[f"by_source/{name}/pairs"] == here.sum() > 0
        by_hand = {"loss": each, "rewards/margins": margins, "rewards/accuracies": margins > 0}
        for metric, values in by_hand.items():
            mean = np.average(values[here], weights=batch.weight[here])
            assert found[f"by_source/{name}/{metric}"] == pytest.approx(mean, rel=1e-9)
    kept = metrics.without_empty_parts({"loss": 0.0} | {name: float(value) for name, value in found.items()})
    assert "loss" in kept and len(kept) == 9 and not any("/no/" in name for name in kept)


@pytest.mark.slow
def test_weights_are_those_of_the_whole_mesh(x64):
    objective, (weighed, repeated) = weighed_and_repeated("sum", 2)
    mesh = Mesh(np.array(jax.devices()[:4]), ("pairs",))
    step = jax.jit(steps.make_train_step(logps_fn, objective, TX, has_aux=True))
    expected = trained(step, objective, repeated)
    placed = jax.device_put(weighed, NamedSharding(mesh, PartitionSpec()))
    spread = NamedSharding(mesh, PartitionSpec(None, "pairs"))
    placed = placed._replace(rows=jax.tree.map(lambda x: jax.device_put(x, spread), weighed.rows))
    assert_equal_means(trained(step, objective, placed), expected)


def test_whole_batch_is_more_than_its_microbatches_apart():
    # Or a loss that sorts, or follows the batch's mean, would say nothing of the above.
    for name in ("aot", "beta_dpo"):
        objective = losses.make_loss(name, {"beta": 0.5})
        batch = make_batch(objective)
        logps, _ = logps_fn(jnp.linspace(-0.4, 0.4, FEATURES), jax.tree.map(lambda x: x[0], batch.rows))
        running = objective.start()
        given = {"running": running} if "running" in objective.needs else {}

        def mean(chosen, objective=objective, logps=logps, batch=batch, given=given):
            each = logps[chosen], jnp.asarray(batch.reference)[chosen]
            lengths, present = jnp.asarray(batch.lengths)[chosen], jnp.ones(len(chosen), bool)
            return float(objective(*each, lengths=lengths, present=present, **given).mean())

        halves = np.arange(PAIRS).reshape(2, -1)
        assert abs(mean(np.arange(PAIRS)) - np.mean([mean(half) for half in halves])) > 1e-3


def test_baselines_are_those_of_all_updates_so_far():
    _, running, rows = whole("bco_pair")
    assert float(running["bco_pair"]["value"]) == rows[-1]["baseline/bco_pair"] != 0
    objective = losses.make_loss("bco_pair", {})
    batch = make_batch(objective)
    params, rewards = jnp.linspace(-0.4, 0.4, FEATURES), []
    state = steps.init_state(params, TX, objective)
    step = jax.jit(steps.make_train_step(logps_fn, objective, TX, has_aux=True))
    for row in rows:
        logps, _ = logps_fn(state.params, jax.tree.map(lambda x: x[0], batch.rows))
        rewards.append(0.1 * (np.asarray(logps) - batch.reference))
        state, _ = step(state, batch)
        assert row["baseline/bco_pair"] == pytest.approx(np.concatenate(rewards).mean(0).mean(), rel=1e-5)


def test_gradients_of_frozen_parts_reach_neither_the_norm_nor_the_optimizer():
    objective, trains = losses.make_loss("sigmoid", {}), np.array([1, 1, 0, 1, 0], np.float32)
    batch, params = make_batch(objective), jnp.linspace(-0.4, 0.4, FEATURES)
    sgd, adam = optax.sgd(1.0), optax.adam(0.1)
    step = steps.make_train_step(logps_fn, objective, sgd, has_aux=True)
    grads = params - jax.jit(step)(steps.init_state(params, sgd, objective), batch)[0].params
    step = steps.make_train_step(logps_fn, objective, adam, has_aux=True, mask_gradients=lambda grads: trains * grads)
    state, metrics = jax.jit(step)(steps.init_state(params, adam, objective), batch)
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(trains * grads), rel=1e-5)
    assert metrics["grad_norm"] < 0.95 * np.linalg.norm(grads)
    np.testing.assert_array_equal(np.asarray(state.opt_state[0].mu) != 0, trains != 0)
    np.testing.assert_array_equal(np.asarray(state.params != params), trains != 0)


def test_state_without_the_losss_baselines_is_an_error():
    objective = losses.make_loss("bco_pair", {})
    step = steps.make_train_step(logps_fn, objective, TX, has_aux=True)
    with pytest.raises(ValueError, match="Give the loss to init_state"):
        step(steps.init_state(jnp.zeros(FEATURES), TX), make_batch(objective))
