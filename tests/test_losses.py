"""Closed-form values of objectives, and numbers obtained from other trainers' own code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import config, losses
from dpo_jax.losses import LOSSES, make_loss
from dpo_jax.run.choices import objective_of
from dpo_jax.types import InputError

POLICY = np.array([[-3, -5], [-2.5, -3.5], [-4, -6], [-1.5, -2.5]])
REFERENCE = np.array([[-2.8, -3.2], [-2.3, -2.7], [-3.8, -4.2], [-1.4, -1.8]])
LENGTHS = np.array([[2, 3], [3, 3], [4, 6], [5, 2]])
POLICY_B = np.array([[-0.5, -0.1], [-10, -30], [-1, -21]])
REFERENCE_B = np.array([[-0.5, -0.1], [-10.1, -20.1], [-0.1, -0.1]])
ONES = np.ones((3, 2), int)


@pytest.fixture(autouse=True)
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def per_pair(name, options, policy=POLICY, reference=REFERENCE, lengths=LENGTHS, **given):
    return make_loss(name, options)(jnp.asarray(policy), jnp.asarray(reference), lengths=jnp.asarray(lengths), **given)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sigmoid", {"beta": 0.1}, 0.6399704),
        ("sigmoid", {"beta": 0.5}, 0.4627280),
        ("sigmoid", {"beta": 0.1, "label_smoothing": 0.1}, 0.6509704),
        ("robust", {"beta": 0.1, "label_smoothing": 0.1}, 0.6262204),
        ("hinge", {"beta": 0.1}, 0.89),
        ("ipo", {"beta": 0.1}, 21.91535),
        ("ipo", {"beta": 0.1, "average": False}, 15.46),
        ("nca_pair", {"beta": 0.1}, 1.3600430),
        ("apo_zero", {"beta": 0.1}, 0.9725649),
        ("apo_down", {"beta": 0.1}, 0.9681699),
        ("discopop", {"beta": 0.1}, 0.8601421),
    ],
)
def test_loss_equals_what_other_trainers_compute(name, options, expected):
    # Means over four pairs, from TRL, the original implementation and LLaMA-Factory; hinge and ipo in closed form.
    assert float(per_pair(name, options).mean()) == pytest.approx(expected, abs=1e-6)


def test_ipo_averaged_equals_each_pair_by_hand():
    np.testing.assert_allclose(per_pair("ipo", {}), [20.25, 23.04, 22.5625, 21.8089], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"), [("sigmoid", [0.693147, 0.313262, 0.126928]), ("hinge", [1.0, 0.0, 0.0])]
)
def test_loss_equals_torchtune(name, expected):
    np.testing.assert_allclose(per_pair(name, {}, POLICY_B, REFERENCE_B, ONES), expected, atol=1e-6)


def test_rewards_equal_what_other_trainers_report():
    rewards = losses.rewards_of(make_loss("sigmoid", {}), *map(jnp.asarray, (POLICY, REFERENCE, LENGTHS)))
    assert rewards is not None
    np.testing.assert_allclose(rewards.mean(0), [-0.0175, -0.1275], atol=1e-6)
    assert float((rewards[:, 0] - rewards[:, 1]).mean()) == pytest.approx(0.11, abs=1e-6)


def test_sigmoid_gradient_equals_closed_form():
    # d/da of -log S(beta (a - b)) is -beta S(-beta (a - b)).
    grad = jax.grad(lambda p: per_pair("sigmoid", {}, policy=p).sum())(jnp.asarray(POLICY))
    margin = (POLICY - REFERENCE)[:, 0] - (POLICY - REFERENCE)[:, 1]
    np.testing.assert_allclose(grad[:, 0], -0.1 / (1 + np.exp(0.1 * margin)), rtol=1e-9)
    np.testing.assert_allclose(grad[:2, 0], [-0.0460085, -0.0485004], atol=1e-6)
    np.testing.assert_allclose(grad[:, 1], -grad[:, 0], rtol=1e-9)


def test_negative_log_likelihood_of_uniform_words_adds_to_the_loss():
    # log 2 + 0.5 * NLL of two tokens over a uniform vocabulary of 16, as torchtune has it.
    logps = np.full((1, 2), -2 * np.log(16))
    found = per_pair("sigmoid", {"nll_weight": 0.5, "nll_average": False}, logps, logps, np.full((1, 2), 2))
    assert float(found.mean()) == pytest.approx(3.465736, abs=1e-6)


def test_sft_mean_is_the_mean_over_answer_tokens():
    # Uniform over 16 words, answers of 2 and 6 tokens: log 16 a token, whatever the pairs' lengths.
    lengths = np.array([[2, 1], [6, 9]])
    logps = -np.log(16) * lengths
    assert float(per_pair("sft", {}, logps, logps, lengths).mean()) == pytest.approx(np.log(16), rel=1e-12)
    # A padding pair, of length 0, changes neither the sum nor what it is divided by.
    padded = per_pair("sft", {}, np.vstack([logps, [[0, 0]]]), np.zeros((3, 2)), np.vstack([lengths, [[0, 0]]]))
    assert float(padded.sum() / 2) == pytest.approx(np.log(16), rel=1e-12)


# --- where the policy is the reference -------------------------------------------------------------------------------

LOG2 = np.log(2)
START = {
    "sigmoid": LOG2,
    "robust": LOG2,
    "hinge": 1,
    "ipo": 25,
    "sigmoid_norm": LOG2,
    "exo_pair": -LOG2 - (np.log(1 - 1e-3) + np.log(1e-3)) / 2,
    "nca_pair": 2 * LOG2,
    "sppo_hard": 5e5,
    "apo_zero": 1,
    "apo_down": 1,
    "discopop": (LOG2 + 1) / 2,
    "dpo_positive": LOG2,
    "tdpo1": LOG2,
    "tdpo2": LOG2,
    "plackett_luce": LOG2,
    "bco_pair": 2 * LOG2,
    "beta_dpo": LOG2,
    "aot": LOG2,
    "aot_unpaired": LOG2,
    "kto": 0.5,
}


def at_start(name, options):
    objective = make_loss(name, options)
    zero = jnp.zeros(())
    known = {"present": jnp.ones(4, bool), "kl": zero, "running": objective.start(), "sequence_kl": jnp.zeros((4, 2))}
    given = {need: known[need] for need in objective.needs}
    return objective(jnp.asarray(REFERENCE), jnp.asarray(REFERENCE), lengths=jnp.asarray(LENGTHS), **given)


@pytest.mark.parametrize("name", START)
def test_loss_where_policy_equals_reference_is_as_documented(name):
    np.testing.assert_allclose(at_start(name, {}), START[name], rtol=1e-12)


def test_every_loss_with_a_reference_has_a_value_where_policy_equals_it():
    assert set(START) == set(LOSSES) - losses.REFERENCE_FREE


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("name", ["sigmoid", "robust", "sigmoid_norm", "aot", "aot_unpaired"])
def test_logistic_loss_is_log_two_where_policy_equals_reference(name, beta, label_smoothing):
    np.testing.assert_allclose(at_start(name, {"beta": beta, "label_smoothing": label_smoothing}), LOG2, rtol=1e-12)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sigmoid_norm", "hinge"])
def test_divergence_changes_nothing_where_policy_equals_reference(name, divergence):
    # Nor may it where answers are divided by their lengths, in which a constant of f' would not cancel.
    np.testing.assert_allclose(at_start(name, {"divergence": divergence}), START[name], rtol=1e-12)


# --- each pair by itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"aot", "aot_unpaired", "beta_dpo"}))
def test_pairs_do_not_see_each_other(name):
    # Reversing the pairs reverses the losses.
    rng, order = np.random.default_rng(0), [3, 2, 1, 0]
    divergences = rng.uniform(0, 2, (4, 2))

    def found(order):
        objective = make_loss(name, {})
        known = {"present": jnp.ones(4, bool), "kl": jnp.asarray(0.1), "running": objective.start()}
        known["sequence_kl"] = jnp.asarray(divergences[order])
        given = {need: known[need] for need in objective.needs}
        return per_pair(name, {}, POLICY[order], REFERENCE[order], LENGTHS[order], **given)

    np.testing.assert_allclose(found(order), found([0, 1, 2, 3])[::-1], rtol=1e-12)
    assert np.ptp(found(order)) > 1e-3


# --- what make_loss refuses ------------------------------------------------------------------------------------------


def test_unknown_loss_lists_the_known():
    with pytest.raises(InputError, match=f"'sgimoid'; expected one of {', '.join(LOSSES)}"):
        make_loss("sgimoid", {})


@pytest.mark.parametrize("name", ["sigmoid*0", "sigmoid*-1", "sigmoid*x", "sigmoid*inf", "sigmoid*nan"])
def test_weight_that_is_none_is_an_error(name):
    with pytest.raises(InputError, match=r"make_loss\(name=...\): weight"):
        make_loss(name, {})


def own(policy, reference, *, lengths, entropy, logits=None, beta=0.5):
    del reference, lengths, logits
    return beta * (policy[:, 1] - policy[:, 0]) + entropy[:, 0]


def test_function_is_an_objective_with_its_own_inputs_and_options():
    policy = jnp.array([[-1.0, -3.0]])
    entropy = jnp.array([[7.0, 8.0]])
    objective = make_loss(own, beta=0.25)
    assert objective.needs == {"entropy"} and objective.beta == 0.25 and objective.names == {"own"}
    assert objective(policy, policy, lengths=jnp.ones((1, 2), int), entropy=entropy) == 0.25 * -2 + 7
    named = make_loss("sigmoid", beta=0.3)
    assert make_loss(losses.sigmoid, {"beta": 0.3}).options == named.options and named.names == {"sigmoid"}


def test_errors_name_what_was_called():
    with pytest.raises(InputError, match=r"^make_loss\(gamma=...\): is set, and loss 'own' has no such option"):
        make_loss(own, gamma=2.0)
    with pytest.raises(InputError, match=r"^make_loss\(name=...\): <lambda> takes policy, reference"):
        make_loss(lambda policy, reference: policy[:, 0])
    with pytest.raises(InputError, match=r"^config.loss.name: .*test_losses:own has the parameter 'entropy'"):
        objective_of(config.Loss(name=f"{__name__}:own"))
    with pytest.raises(InputError, match=r"^config.loss.gamma: is set, and loss 'sigmoid' has no such option"):
        objective_of(dataclasses.replace(config.Loss(), gamma=2.0))


def test_loss_named_twice_is_an_error():
    with pytest.raises(InputError, match="each loss once"):
        make_loss("sigmoid,sigmoid*2", {})


def test_ranking_loss_does_not_add_to_losses_of_pairs():
    with pytest.raises(InputError, match=r"make_loss\(name="):
        make_loss("plackett_luce,sigmoid", {})
    assert make_loss("plackett_luce,sft", {}).kinds == {"paired", "ranked"}


def test_sum_takes_the_data_that_all_its_losses_take():
    assert make_loss("kto,sft", {}).kinds == make_loss("bco_pair,apo_zero", {}).kinds == {"paired", "unpaired"}
    assert make_loss("kto,sigmoid", {}).kinds == make_loss("bco_pair,sft", {"wpo": True}).kinds == {"paired"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sigmoid", {"beta": 0.0}),
        ("sigmoid", {"beta": -1.0}),
        ("sigmoid", {"label_smoothing": 0.5}),
        ("sigmoid", {"label_smoothing": -0.1}),
        ("robust", {"label_smoothing": 0.5}),
        ("exo_pair", {"label_smoothing": 0.0}),
        ("discopop", {"tau": 0.0}),
        ("discopop", {"tau": 1.5}),
        ("dpo_positive", {"penalty": -1.0}),
        ("simpo", {"gamma": -0.1}),
        ("tdpo2", {"kl_weight": -0.1}),
        ("beta_dpo", {"sensitivity": -0.1}),
        ("kto", {"desirable_weight": 0.0}),
        ("kto", {"undesirable_weight": 0.0}),
        ("sigmoid", {"divergence": "kl"}),
        ("sigmoid", {"divergence_alpha": 0.0, "divergence": "alpha_divergence"}),
        ("sigmoid", {"divergence_alpha": 1.0, "divergence": "alpha_divergence"}),
        ("sigmoid", {"ld_alpha": 1.1}),
        ("sigmoid", {"ld_alpha": -0.1}),
        ("sigmoid", {"wpo": 1.0}),
        ("sigmoid", {"nll_weight": -1.0}),
        ("cpo", {"nll_weight": -1.0}),
        ("orpo", {"nll_weight": -1.0}),
    ]
    + [(name, {"beta": 0.0}) for name in sorted(LOSSES.keys() - {"sft", "sigmoid"})],
)
def test_option_out_of_range_is_an_error(name, options):
    with pytest.raises(InputError, match=rf"make_loss\({next(iter(options))}=...\): got"):
        make_loss(name, options)


def test_no_gradient_flows_into_the_kl_estimate():
    policy, lengths, present = jnp.asarray(REFERENCE) + 1.0, jnp.asarray(LENGTHS), jnp.ones(4, bool)
    value, gradient = jax.value_and_grad(lambda x: losses.estimate_kl(x, jnp.asarray(REFERENCE), lengths, present))(
        policy
    )
    assert value > 0 and not np.any(gradient)


# --- margins of the data (ODPO) --------------------------------------------------------------------------------------

MARGIN = np.array([0.5, 0.0, 2.0, -0.7])
SEQUENCE_KL = np.array([[0.3, 1.2], [0.1, 0.4], [2.0, 0.5], [0.0, 0.0]])
(A, B), (D_W, D_L), (LOGP_W, LOGP_L), (N_W, N_L) = ((POLICY - REFERENCE).T, SEQUENCE_KL.T, POLICY.T, LENGTHS.T)
# The number that each loss makes of a pair, from which the margin is subtracted. 0.132: beta' of these four pairs.
LOGITS = {
    "sigmoid": 0.1 * (A - B),
    "robust": 0.1 * (A - B),
    "hinge": 0.1 * (A - B),
    "sigmoid_norm": 5 * (A / N_W - B / N_L),
    "dpo_positive": 0.1 * (A - B - 50 * np.maximum(0, -A)),
    "tdpo1": 0.1 * (A - B - (D_L - D_W)),
    "tdpo2": 0.1 * (A - B - 0.5 * (D_L - D_W)),
    "beta_dpo": 0.1 * (1 + 0.6 * (A - B).mean()) * (A - B),
    "simpo": 2 * (LOGP_W / N_W - LOGP_L / N_L) - 1,
    "cpo": 0.1 * (LOGP_W - LOGP_L),
}


def with_margin(name, policy=POLICY, margin=MARGIN):
    objective = make_loss(name, {})
    known = {
        "present": jnp.ones(4, bool),
        "sequence_kl": jnp.asarray(SEQUENCE_KL),
        "running": {"beta_dpo": {"value": 0.0}},
    }
    given = {need: known[need] for need in objective.needs}
    return per_pair(name, {}, policy=policy, margin=jnp.asarray(margin), **given)


def test_losses_that_read_margins_are_these():
    assert {name for name, entry in losses.REGISTRY.items() if entry.takes_margins} == LOGITS.keys()


@pytest.mark.parametrize("name", LOGITS)
def test_margin_is_subtracted_from_the_logit(name):
    z = LOGITS[name] - MARGIN
    against, favoring = np.log1p(np.exp(z)), np.log1p(np.exp(-z))
    expected = {
        "robust": (0.9 * favoring - 0.1 * against) / 0.8,
        "hinge": np.maximum(0, 1 - z),
        "cpo": favoring - LOGP_W / N_W,
    }.get(name, favoring)
    np.testing.assert_allclose(with_margin(name), expected, rtol=1e-12)


def test_gradient_with_a_margin_equals_closed_form_and_none_flows_past_it():
    # d/da of -log S(beta (a - b) - m) is -beta S(m - beta (a - b)).
    grad = jax.grad(lambda p: with_margin("sigmoid", policy=p).sum())(jnp.asarray(POLICY))
    np.testing.assert_allclose(grad[:, 0], -0.1 / (1 + np.exp(LOGITS["sigmoid"] - MARGIN)), rtol=1e-9)
    np.testing.assert_allclose(grad[:, 1], -grad[:, 0], rtol=1e-9)


def test_margin_moves_the_optimum_and_no_reward():
    # A pair that has reached the margin has the loss of a pair without one that is at 0.
    reached = POLICY + np.stack([(MARGIN - LOGITS["sigmoid"]) / 0.1, np.zeros(4)], 1)
    np.testing.assert_allclose(with_margin("sigmoid", policy=reached), np.log(2), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "takes"), [("sigmoid*0.8,sft*0.2", True), ("sft", True), ("sigmoid,bco_pair", False), ("ipo", False)]
)
def test_sum_takes_margins_if_all_that_compare_answers_do(name, takes):
    assert make_loss(name, {}).takes_margins == takes
