"""Where the best policy is known in closed form, training reaches it: few prompts, few answers, a table of logits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.losses import make_loss

PROMPTS, ANSWERS, BETA = 3, 4, 0.5
RNG = np.random.default_rng(0)
REFERENCE = jax.nn.log_softmax(jnp.asarray(RNG.normal(size=(PROMPTS, ANSWERS))), axis=1)
REWARDS = RNG.uniform(-0.6, 0.6, (PROMPTS, ANSWERS))


@pytest.fixture(autouse=True)
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def trained(total):
    """The policy [prompts, answers] at which `total` of log-probabilities is least, from the reference."""
    value = jax.jit(lambda logits: total(jax.nn.log_softmax(logits, axis=1)))
    optimizer = optax.lbfgs()
    logits = jnp.asarray(REFERENCE, jnp.float64)
    state = optimizer.init(logits)
    value_and_grad = optax.value_and_grad_from_state(value)

    @jax.jit
    def step(logits, state):
        loss, grad = value_and_grad(logits, state=state)
        updates, state = optimizer.update(grad, state, logits, value=loss, grad=grad, value_fn=value)
        return optax.apply_updates(logits, updates), state

    for _ in range(200):
        logits, state = step(logits, state)
    assert float(jnp.abs(jax.grad(value)(logits)).max()) < 1e-6
    return np.asarray(jax.nn.softmax(logits, axis=1))


def of_pairs(objective, preference):
    """The mean loss over every ordered pair of answers to a prompt, each as often as it is preferred."""
    rows = [(x, i, j) for x in range(PROMPTS) for i, j in itertools.permutations(range(ANSWERS), 2)]
    x, i, j = map(np.array, zip(*rows, strict=True))
    often, lengths = jnp.asarray(preference[x, i, j]), jnp.ones((len(rows), 2), int)
    reference = jnp.asarray(np.stack([REFERENCE[x, i], REFERENCE[x, j]], axis=1), jnp.float64)

    def total(logps):
        policy = jnp.stack([logps[x, i], logps[x, j]], axis=1)
        return (often * objective(policy, reference, lengths=lengths)).sum()

    return total


def bradley_terry():
    return 1 / (1 + np.exp(REWARDS[:, None, :] - REWARDS[:, :, None]))  # [x, i, j]: i is preferred to j


def distance(policy, optimum):
    """The largest total variation of a prompt."""
    return 0.5 * np.abs(policy - optimum).sum(1).max()


def normalized(weights):
    return weights / weights.sum(1, keepdims=True)


def by_divergence(inverse, low, high):
    """ref * f'^-1((r - lambda) / beta), with the lambda of each prompt at which it is a distribution."""
    low, high = np.full(PROMPTS, low), np.full(PROMPTS, high)
    reference = np.exp(np.asarray(REFERENCE))
    for _ in range(200):
        middle = (low + high) / 2
        mass = (reference * inverse((REWARDS - middle[:, None]) / BETA)).sum(1)
        low, high = np.where(mass > 1, middle, low), np.where(mass > 1, high, middle)
    return reference * inverse((REWARDS - low[:, None]) / BETA)


def exponential():
    return normalized(np.exp(REFERENCE) * np.exp(REWARDS / BETA))


TOP = REWARDS.max()
# Of each divergence, the inverse of f' and where the multiplier may lie, so that it is defined.
INVERSES = {
    "forward_kl": (lambda y: 1 / (1 - y), TOP - BETA + 1e-9, 9.0),
    "js_divergence": (lambda y: np.exp(y) / (2 - np.exp(y)), TOP - BETA * np.log(2) + 1e-9, 9.0),
    "alpha_divergence": (lambda y: (1 - 0.5 * y) ** -2.0, TOP - 2 * BETA + 1e-9, 9.0),
}


def test_policy_reaches_reference_times_exponential_of_reward():
    objective = make_loss("sigmoid", {"beta": BETA})
    assert distance(trained(of_pairs(objective, bradley_terry())), exponential()) < 1e-3


@pytest.mark.parametrize("divergence", INVERSES)
def test_divergence_has_its_own_optimum(divergence):
    objective = make_loss("sigmoid", {"beta": BETA, "divergence": divergence})
    optimum = by_divergence(*INVERSES[divergence])
    np.testing.assert_allclose(optimum.sum(1), 1, rtol=1e-6)
    assert distance(optimum, exponential()) > 1e-2, "or any divergence would do"
    assert distance(trained(of_pairs(objective, bradley_terry())), optimum) < 1e-3


def test_ipo_reaches_reference_times_exponential_of_win_rate():
    # Its optimum is ref * exp(E_j[p(i > j)] / tau), j uniform over all answers, i itself among them (p = 1/2).
    preference = RNG.uniform(0.2, 0.8, (PROMPTS, ANSWERS, ANSWERS))
    preference = (preference + 1 - preference.transpose(0, 2, 1)) / 2
    optimum = normalized(np.exp(REFERENCE) * np.exp(preference.mean(2) / BETA))
    objective = make_loss("ipo", {"beta": BETA, "average": False})
    assert distance(trained(of_pairs(objective, preference)), optimum) < 1e-3


def test_rankings_reach_the_optimum_of_pairs():
    objective, orders = make_loss("plackett_luce", {"beta": BETA}), list(itertools.permutations(range(ANSWERS)))
    weights = np.exp(REWARDS)

    def chance(x, order):
        left = [weights[x, list(order[k:])].sum() for k in range(ANSWERS)]
        return np.prod([weights[x, i] / total for i, total in zip(order, left, strict=True)])

    rows = [(x, order) for x in range(PROMPTS) for order in orders]
    often = jnp.asarray([chance(*row) for row in rows])
    x, order = np.array([row[0] for row in rows])[:, None], np.array([row[1] for row in rows])
    reference, lengths = jnp.asarray(REFERENCE, jnp.float64)[x, order], jnp.ones((len(rows), ANSWERS), int)
    total = lambda logps: (often * objective(logps[x, order], reference, lengths=lengths)).sum()
    assert distance(trained(total), exponential()) < 1e-3
