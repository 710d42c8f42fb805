"""A script as a user writes it against the installed package: type checkers must find nothing in it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

import dpo_jax
from dpo_jax import Batch, InputError, TrainState, check_batch, init_state, load, losses, make_loss, make_train_step


def logps_fn(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Scores pairs by a table of log-odds."""
    return jax.nn.log_softmax(table)[rows]


def own(policy: jax.Array, reference: jax.Array, *, lengths: jax.Array, beta: float = 0.1) -> jax.Array:
    """Is DPO's loss, written by hand."""
    return losses.sigmoid(policy, reference, beta=beta)


def train(steps: int) -> float:
    """Trains the table and returns the last loss."""
    batch = Batch(
        rows=np.array([[[0, 1], [0, 2], [3, 2]]]),
        count=np.int32(1),
        present=np.ones((1, 3), bool),
        reference=np.full((3, 2), np.log(0.25), np.float32),
        lengths=np.ones((3, 2), np.int32),
    )
    check_batch(batch)
    loss_fn, tx = make_loss("sigmoid", beta=0.5), optax.adam(0.1)
    step = jax.jit(make_train_step(logps_fn, loss_fn, tx))
    state: TrainState = init_state(jnp.zeros(4), tx, loss_fn)
    last = 0.0
    for _ in range(steps):
        state, metrics = step(state, batch)
        last = float(metrics["loss"])
    return last


def score(path: str) -> float:
    """Returns the log-prob of an answer under a model."""
    model = load(path)
    chat = [{"role": "user", "content": "2 + 2 = "}]
    states = model.hidden([chat], ["4"])
    assert states[0].shape[1] == model.config.width
    return float(model.logps(["2 + 2 = "], ["4"])[0])


def refused() -> str:
    """Returns what an impossible option is refused with."""
    try:
        make_loss(own, {"beta": -1.0}, gamma=2.0)
    except InputError as error:
        return f"{error.place}: {error.got}; {error.expected}"
    return dpo_jax.__version__


each: jax.Array = dpo_jax.losses.ipo(jnp.zeros((3, 2)), jnp.zeros((3, 2)), lengths=jnp.ones((3, 2), int), beta=0.1)
