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

from dpo_jax import losses, steps
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
@pytest.mark.parametrize("case", ALL)
def test_microbatches_order_padding_and_mesh_change_nothing(case):
    order = np.random.default_rng(2).permutation(PAIRS)
    assert_same(updates(case, microbatches=3, order=order, padding=5), case)
    if case in SPREAD:
        mesh = Mesh(np.array(jax.devices()), ("pairs",))
        assert mesh.size == 8
        assert_same(updates(case, mesh=mesh, microbatches=2, padding=4), case)


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
