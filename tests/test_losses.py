"""Closed-form values, numbers obtained from other trainers' own code, gradients and extremes of every objective."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.losses import LOSSES, make_loss
from dpo_jax.types import InputError

POLICY = np.array([[-3, -5], [-2.5, -3.5], [-4, -6], [-1.5, -2.5]])
REFERENCE = np.array([[-2.8, -3.2], [-2.3, -2.7], [-3.8, -4.2], [-1.4, -1.8]])
LENGTHS = np.array([[2, 3], [3, 3], [4, 6], [5, 2]])
POLICY_B = np.array([[-0.5, -0.1], [-10, -30], [-1, -21]])
REFERENCE_B = np.array([[-0.5, -0.1], [-10.1, -20.1], [-0.1, -0.1]])


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def per_pair(name, options, policy=POLICY, reference=REFERENCE, lengths=LENGTHS):
    return make_loss(name, options)(jnp.asarray(policy), jnp.asarray(reference), lengths=jnp.asarray(lengths))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sigmoid", {"beta": 0.1}, 0.6399704),
        ("sigmoid", {"beta": 0.5}, 0.4627280),
        ("sigmoid", {"beta": 0.1, "label_smoothing": 0.1}, 0.6509704),
        ("hinge", {"beta": 0.1}, 0.89),
        ("ipo", {"beta": 0.1}, 21.91535),
        ("ipo", {"beta": 0.1, "average": False}, 15.46),
    ],
)
def test_loss_equals_what_other_trainers_compute(x64, name, options, expected):
    # Means over four pairs, from TRL, the original implementation and LLaMA-Factory; hinge and ipo in closed form.
    assert float(per_pair(name, options).mean()) == pytest.approx(expected, abs=1e-6)


def test_ipo_averaged_equals_each_pair_by_hand(x64):
    np.testing.assert_allclose(per_pair("ipo", {}), [20.25, 23.04, 22.5625, 21.8089], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"), [("sigmoid", [0.693147, 0.313262, 0.126928]), ("hinge", [1.0, 0.0, 0.0])]
)
def test_loss_equals_torchtune(x64, name, expected):
    found = per_pair(name, {}, POLICY_B, REFERENCE_B, np.ones((3, 2), int))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_sigmoid_gradient_equals_closed_form(x64):
    # d/da of -log S(beta (a - b)) is -beta S(-beta (a - b)); the mean over four pairs divides it by 4.
    grad = jax.grad(lambda p: per_pair("sigmoid", {}, policy=p).sum())(jnp.asarray(POLICY))
    margin = (POLICY - REFERENCE)[:, 0] - (POLICY - REFERENCE)[:, 1]
    np.testing.assert_allclose(grad[:, 0], -0.1 / (1 + np.exp(0.1 * margin)), rtol=1e-9)
    np.testing.assert_allclose(grad[:2, 0], [-0.0460085, -0.0485004], atol=1e-6)
    np.testing.assert_allclose(grad[:, 1], -grad[:, 0], rtol=1e-9)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_sigmoid_is_log_two_where_policy_equals_reference(beta, label_smoothing):
    found = per_pair("sigmoid", {"beta": beta, "label_smoothing": label_smoothing}, policy=REFERENCE)
    np.testing.assert_allclose(found, np.log(2), rtol=1e-6)


def test_label_smoothing_changes_the_loss():
    assert abs(float((per_pair("sigmoid", {"label_smoothing": 0.1}) - per_pair("sigmoid", {})).mean())) > 1e-3


def test_sft_mean_is_the_mean_over_answer_tokens(x64):
    # Uniform over 16 words, answers of 2 and 6 tokens: log 16 a token, whatever the pairs' lengths.
    lengths = np.array([[2, 1], [6, 9]])
    logps = -np.log(16) * lengths
    assert float(per_pair("sft", {}, logps, logps, lengths).mean()) == pytest.approx(np.log(16), rel=1e-12)
    # A padding pair, of length 0, changes neither the sum nor what it is divided by.
    padded = per_pair("sft", {}, np.vstack([logps, [[0, 0]]]), np.zeros((3, 2)), np.vstack([lengths, [[0, 0]]]))
    assert float(padded.sum() / 2) == pytest.approx(np.log(16), rel=1e-12)


def test_sft_and_sigmoid_add_up_to_torchtune_value(x64):
    # log 2 + 0.5 * NLL of two tokens over a uniform vocabulary of 16.
    logps = np.full((1, 2), -2 * np.log(16))
    dpo = per_pair("sigmoid", {}, logps, logps, np.full((1, 2), 2))
    nll = per_pair("sft", {}, logps, logps, np.full((1, 2), 2)) * 2
    assert float((dpo + 0.5 * nll).mean()) == pytest.approx(3.465736, abs=1e-6)


OPTIONS = [
    ("sigmoid", {}),
    ("sigmoid", {"beta": 0.5, "label_smoothing": 0.2}),
    ("hinge", {}),
    ("ipo", {}),
    ("ipo", {"average": False}),
    ("sft", {}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_gradient_equals_finite_differences(x64, name, options):
    grad = jax.grad(lambda p: per_pair(name, options, policy=p).mean())(jnp.asarray(POLICY))
    for at in itertools.product(range(4), range(2)):
        step = np.zeros_like(POLICY)
        step[at] = 1e-6
        up, down = (per_pair(name, options, policy=POLICY + s).mean() for s in (step, -step))
        assert float(grad[at]) == pytest.approx(float(up - down) / 2e-6, abs=1e-6)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_no_gradient_flows_into_the_reference(name, options):
    grad = jax.grad(lambda r: per_pair(name, options, reference=r).sum())(jnp.asarray(REFERENCE))
    assert not np.any(grad)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_extreme_log_ratios_stay_finite(name, options):
    extremes = np.array(list(itertools.product([-1e4, 0, 1e4], repeat=2)), np.float32)
    fn = lambda p: per_pair(name, options, p, np.zeros((9, 2), np.float32), np.ones((9, 2), int)).sum()
    value, grad = jax.value_and_grad(fn)(jnp.asarray(extremes))
    assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_pairs_do_not_see_each_other(name, options):
    # Reversing the pairs reverses the losses.
    order = [3, 2, 1, 0]
    found = per_pair(name, options, POLICY[order], REFERENCE[order], LENGTHS[order])
    np.testing.assert_allclose(found, per_pair(name, options)[::-1], rtol=1e-6)


def test_unknown_loss_lists_the_known():
    with pytest.raises(InputError, match="'sgimoid'; expected one of sigmoid, hinge, ipo, sft"):
        make_loss("sgimoid", {})


@pytest.mark.parametrize(("name", "option"), [("hinge", "label_smoothing"), ("sft", "beta"), ("sigmoid", "average")])
def test_option_of_another_loss_is_an_error(name, option):
    with pytest.raises(InputError, match=f"config.loss.{option}.*{name!r} has no such option"):
        make_loss(name, {option: 0.1})


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": -1.0}, {"label_smoothing": 0.5}])
def test_option_out_of_range_is_an_error(options):
    with pytest.raises(InputError, match=f"config.loss.{next(iter(options))}: got"):
        make_loss("sigmoid", options)


def test_every_loss_has_a_test_above():
    assert {name for name, _ in OPTIONS} == set(LOSSES) and losses.REFERENCE_FREE <= set(LOSSES)
