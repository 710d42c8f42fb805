"""An update of every kind of model: its gradients are those of plain arithmetic, and no mesh changes them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import config as configs
from dpo_jax import losses, sharding, steps
from dpo_jax.data import layout, packing
from dpo_jax.hf import checkpoints
from dpo_jax.models import decoder
from dpo_jax.parallel import Placement
from dpo_jax.run import checks
from dpo_jax.scoring import make_logps_fn
from dpo_jax.types import Encoded, InputError
from tests.support.hf_folders import decoder_config
from tests.support.make_golden import JSON, write_folder

GOLDEN = json.loads(JSON.read_text())["cases"]
# What each adds to a decoder: a bias on logits and neighbors that turn; learned positions; norms after, soft caps and
# windows; norms over all heads; experts and a window; experts, and queries and keys cut.
KINDS = ["gptj-plain", "gpt2-all", "gemma2-all", "olmo2-all", "mixtral-all", "olmoe-all"]
PAIRS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@functools.cache
def model(name, folder):
    config = decoder_config(GOLDEN[name]["config"])
    write_folder(folder / name, GOLDEN[name])
    return config, jax.tree.map(jnp.asarray, checkpoints.load_params(folder / name, config))


def batch_of(config, rows=4):
    rng = np.random.default_rng(0)
    pairs = [Encoded.of(*(rng.integers(3, 41, rng.integers(2, 15)) for _ in range(3))) for _ in range(PAIRS)]
    lengths = np.array([pair.lengths for pair in pairs])
    _, name = checks.fit(configs.Config(), config, lengths)
    shape = packing.Shape(pairs=PAIRS, rows=rows, row_length=64, microbatches=8 // rows, layout=name)
    return layout.collate(pairs, np.full((PAIRS, 2), -40.0), shape)


def update(config, params, batch, *, mesh=None, penalties=None):
    tx = optax.sgd(1.0)
    logps_fn = make_logps_fn(config, pairs=PAIRS, placement=Placement(mesh))
    step = steps.make_train_step(
        logps_fn, losses.make_loss("sigmoid", {}), tx, has_aux=True, in_place=True, penalties=penalties or {}
    )
    state = steps.init_state(params, tx)
    if mesh is not None:
        state = jax.device_put(state, sharding.shardings(mesh, state))
        batch = sharding.put(batch, mesh)
    state, metrics = jax.jit(step)(state, batch)
    return jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state.params, params), metrics


def assert_same(one, other, tolerance=2e-5):
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * np.abs(b).max() + 1e-7, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in KINDS[1:]] + KINDS[:1])
def test_gradients_equal_those_of_all_logits_at_once(name, folder):
    """Hand-written backward passes and sums carried through them, against differentiating softmax over everything."""
    config, params = model(name, folder)
    batch = jax.tree.map(jnp.asarray, batch_of(config, rows=8))
    rows = jax.tree.map(lambda x: x[0], batch.rows)
    given = rows.positions, rows.key_start, rows.key_end

    def logps(params):
        x = jnp.take(params["embed"]["embedding"], rows.tokens, axis=0)
        hidden, _ = decoder.hidden_states(params, config, x, *given, dropped_tokens=1)
        at_source = jnp.take_along_axis(
            jax.nn.log_softmax(decoder.logits(params, config, hidden)), rows.source[..., None], 1
        )
        picked = jnp.take_along_axis(at_source, rows.target[..., None], 2)[..., 0]
        into = jnp.where(rows.slot < 0, 2 * PAIRS, rows.slot).ravel()
        return jax.ops.segment_sum(picked.ravel(), into, 2 * PAIRS + 1)[:-1].reshape(PAIRS, 2)

    def loss(params):
        return losses.make_loss("sigmoid", {})(logps(params), batch.reference, lengths=batch.lengths).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    change, metrics = update(config, params, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert_same(change, jax.tree.map(lambda x: -np.asarray(x), gradient), 1e-4)


@functools.cache
def on_one_device(name, folder):
    """The update of a kind of model that every mesh is compared with."""
    config, params = model(name, folder)
    penalties = {"router_balance": 0.1} if config.experts else {}
    return update(config, params, batch_of(config), penalties=penalties)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_mesh_changes_nothing(name, sizes, folder):
    config, params = model(name, folder)
    batch = batch_of(config)
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    penalties = {"router_balance": 0.1} if config.experts else {}
    ours, metrics = update(config, params, batch, mesh=mesh, penalties=penalties)
    theirs, expected = on_one_device(name, folder)
    assert_same(ours, theirs)
    for each in expected:
        np.testing.assert_allclose(metrics[each], expected[each], rtol=2e-5, atol=1e-5, err_msg=each)


@pytest.mark.slow
def test_router_metrics_and_what_weighs_the_balance(folder):
    config, params = model("mixtral-all", folder)
    batch = batch_of(config)
    change, metrics = update(config, params, batch)
    even = {"router_load": 1.0, "router_entropy": np.log(config.experts), "router_balance": config.experts_per_token}
    for side in ("chosen", "rejected"):
        assert 1 <= metrics[f"router_load/{side}"] < config.experts
        assert 0 < metrics[f"router_entropy/{side}"] < even["router_entropy"]
        assert metrics[f"router_balance/{side}"] > even["router_balance"]
    indifferent = jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if "router" in str(path) else x, params)
    _, metrics = update(config, indifferent, batch)
    np.testing.assert_allclose(metrics["router_entropy/chosen"], even["router_entropy"], rtol=1e-5)
    np.testing.assert_allclose(metrics["router_balance/chosen"], even["router_balance"], rtol=1e-5)

    balanced, _ = update(config, params, batch, penalties={"router_balance": 3.0})
    expected = jax.grad(lambda params: -3.0 * balance_of(config, params, batch))(params)
    assert_same(
        jax.tree.map(np.subtract, balanced, change)["blocks"]["experts"]["router"],
        expected["blocks"]["experts"]["router"],
        1e-3,
    )


def balance_of(config, params, batch):
    """The mean over answer tokens of what `router_balance` is the mean of."""
    total = 0.0
    logps_fn = make_logps_fn(config, pairs=PAIRS)
    for i in range(int(batch.count)):
        rows = jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), batch.rows)
        total += logps_fn(params, rows)[1]["router_balance"].sum()
    return total / batch.lengths.sum()


def test_balance_without_experts_and_positions_that_were_never_learned_are_refused():
    lengths = np.array([[40, 20, 25]])
    llama, gpt2 = (decoder_config(GOLDEN[f"{name}-plain"]["config"]) for name in ("llama", "gpt2"))
    train = configs.Train(router_balance=0.1)
    with pytest.raises(InputError, match="router_balance: got 0.1, and the model has no experts"):
        checks.fit(configs.Config(train=train), llama, lengths)
    with pytest.raises(InputError, match="max_length: sequences of up to 65 tokens, and the model has learned 64 pos"):
        checks.fit(configs.Config(), gpt2, lengths)
    assert checks.fit(configs.Config(), gpt2, lengths - 1)[1] == "shared"


def test_prompts_cannot_be_shared_beyond_a_window():
    mistral = decoder_config(GOLDEN["mistral-all"]["config"])
    shared = configs.Config(data=configs.Data(layout="shared"))
    with pytest.raises(
        InputError, match="layout: 'shared', and sequences of 6 tokens, longer than the model's attention window"
    ):
        checks.fit(shared, mistral, np.array([[2, 3, 4]]))
    assert checks.fit(shared, mistral, np.array([[2, 3, 3]]))[1] == "shared"
