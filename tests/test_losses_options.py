"""Every loss with every option of its own and every modifier: gradients, extremes, and that each option acts."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from dpo_jax import config, losses
from dpo_jax.losses import LOSSES, make_loss
from dpo_jax.losses.common import POSITIVE, check, check_switch
from dpo_jax.losses.registry import GIVEN
from dpo_jax.types import InputError
from tests.support.loss_cases import (
    BESIDE,
    CASES,
    OPTIONS,
    PENDING,
    SUMMED,
    TAKES,
    TOGGLES,
    VALUES,
    beside,
    random_given,
)

ALL = CASES | SUMMED
# Where gradients flow, besides the policy's log-probs; the reference's numbers, baselines and weights take none.
TRAINED = {"shared_logps", "sequence_kl"}
# Sums that hold a weight or a beta' within them: that they are the sums of their losses is compared instead.
HELD_WITHIN = {"sum-mpo", "sum-baselines"}


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@functools.cache
def objective_of(case):
    """Makes the objective of a case once for all tests."""
    return make_loss(*ALL[case])


def random_inputs(objective, answers=2):
    """Returns log-probs, lengths and the objective's further inputs for four pairs, away from every kink."""
    rng = np.random.default_rng(1)
    policy, reference = (-rng.uniform(1.0, 4.0, (4, answers)) for _ in range(2))
    lengths = rng.integers(1, 6, (4, answers))
    return *map(jnp.asarray, (policy, reference, lengths)), random_given(objective.needs)


# --- gradients -------------------------------------------------------------------------------------------------------


def held(name, options, policy, reference, lengths, given):
    """The objective with all that carries no gradient computed once, from these inputs, and then left as it is."""
    if "," in name or not (options.get("wpo") or name == "beta_dpo"):
        return make_loss(name, options)
    weights = np.ones(4)
    if options.get("wpo"):
        each = (policy - given["log_collision"]) / lengths
        weights = np.exp(each.sum(1))
    rest = {option: value for option, value in options.items() if option not in ("wpo", "nll_weight", "nll_average")}
    if name == "beta_dpo":
        h = policy - reference
        if "ld_alpha" in options:
            shared = given["shared_logps"] - given["reference_shared_logps"]
            h = shared + options["ld_alpha"] * (h - shared)
        elif options.get("divergence") == "forward_kl":
            h = 1 - np.exp(-h)
        elif options.get("divergence") == "js_divergence":
            h = np.log(2 / (1 + np.exp(-h)))
        elif "divergence" in options:
            alpha = options.get("divergence_alpha", 0.5)
            h = (1 - np.exp(-alpha * h)) / alpha
        ahead = (h[:, 0] - h[:, 1]).mean() - given["running"]["beta_dpo"]["value"]
        rest["beta"] = max(1e-3, rest.get("beta", 0.1) * (1 + rest.pop("sensitivity", 0.6) * float(ahead)))
        name = "sigmoid"
    inner = make_loss(name, rest)

    def loss(policy, reference, *, lengths, **given):
        nll = -policy[:, 0] / (lengths[:, 0] if options.get("nll_average", True) else 1)
        inside = {need: given[need] for need in inner.needs}
        return weights * inner(policy, reference, lengths=lengths, **inside) + options.get("nll_weight", 0) * nll

    return loss


@pytest.mark.parametrize("case", ALL)
def test_gradient_equals_finite_differences_and_is_zero_elsewhere(x64, case):
    name, options = ALL[case]
    objective = objective_of(case)
    policy, reference, lengths, given = random_inputs(objective, 4 if name == "plackett_luce" else 2)
    flows = {each: value for each, value in given.items() if each in TRAINED}
    still = {each: value for each, value in given.items() if each not in TRAINED and each != "present"}
    flat, unravel = ravel_pytree({"policy": policy, **flows})

    def total(loss, flat, reference=reference, still=still):
        moved = unravel(flat)
        rest = {**given, **still, **{each: moved[each] for each in flows}}
        return loss(moved["policy"], reference, lengths=lengths, **rest).sum()

    value_and_grads = jax.value_and_grad(lambda *moved: total(objective, *moved), argnums=(0, 1, 2))
    value, (grad, *none) = value_and_grads(flat, reference, still)
    assert np.any(grad) and not any(np.any(leaf) for leaf in jax.tree.leaves(none))
    if case in HELD_WITHIN:
        return
    frozen = held(name, options, policy, reference, lengths, given)
    steps = jnp.asarray(1e-5 * np.eye(len(flat)))
    ends = jax.vmap(lambda step: total(frozen, flat + step))(jnp.concatenate([steps, -steps]))
    expected = (ends[: len(flat)] - ends[len(flat) :]) / 2e-5
    if name == "tdpo2":  # the chosen answers' divergence is only a mark to reach
        zeros = unravel(jnp.zeros_like(flat))
        still = ravel_pytree(zeros | {"sequence_kl": zeros["sequence_kl"].at[:, 0].set(1)})[0] == 1
        assert not np.any(grad[still]) and np.all(expected[still])
        expected = jnp.where(still, 0, expected)
    np.testing.assert_allclose(total(frozen, flat), value, rtol=1e-12)
    np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-7 * max(1.0, np.abs(expected).max()))


def test_cases_read_everything_that_a_step_gives():
    assert frozenset().union(*(objective_of(case).needs for case in ALL)) == set(GIVEN) - {"baseline"}


# --- extremes --------------------------------------------------------------------------------------------------------

NINE = np.array(list(itertools.product([-1e4, 0, 1e4], repeat=2)))


@pytest.mark.parametrize("case", ALL)
def test_extreme_log_ratios_stay_finite(case):
    # All nine combinations of log-ratios, of log-probs of either sign and of ones of 0, -1e4 and -2e4.
    objective = objective_of(case)
    reference = jnp.repeat(jnp.array([[0.0, 0.0], [-1e4, -1e4]]), 9, axis=0)
    policy = jnp.concatenate([NINE, NINE]) + reference
    known = random_given(objective.needs, 18) | {
        "shared_logps": policy[::-1],
        "reference_shared_logps": reference,
        "sequence_kl": jnp.concatenate([jnp.abs(NINE), jnp.abs(NINE[::-1, ::-1])]),
        "log_collision": jnp.where(reference == 0, policy, 0),  # weights of 1, and of next to nothing
    }
    flows = {each: known[each] for each in sorted(objective.needs & TRAINED)}

    def losses_of(policy, flows):
        given = {need: {**known, **flows}[need] for need in objective.needs}
        each = objective(policy, reference, lengths=jnp.ones((18, 2), int), **given)
        return each.sum(), each

    (_, each), grads = jax.value_and_grad(losses_of, argnums=(0, 1), has_aux=True)(policy, flows)
    assert each.dtype == jnp.float32 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((each, grads)))


def test_extreme_answers_of_a_ranking_stay_finite():
    objective = make_loss("plackett_luce", {"beta": 1.0})
    every = np.array(list(itertools.product([-1e4, 0, 1e4], repeat=4)), np.float32)
    lengths = jnp.asarray(np.random.default_rng(0).integers(0, 2, every.shape))
    fn = lambda policy: objective(policy, jnp.zeros_like(policy), lengths=lengths).sum()
    value, grad = jax.jit(jax.value_and_grad(fn))(jnp.asarray(every))  # op by op, the scan compiles many programs
    assert np.isfinite(value) and np.isfinite(grad).all()


# --- numbers may be traced -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ALL)
def test_every_number_may_be_traced_and_is_read(case):
    objective = objective_of(case)
    name, options = ALL[case]
    bound = {each for each, value in options.items() if isinstance(value, float)}
    assert bound <= set().union(*objective.numbers.values())
    policy, reference, lengths, given = random_inputs(objective, 4 if name == "plackett_luce" else 2)
    of_numbers = lambda numbers: objective.with_numbers(numbers)(policy, reference, lengths=lengths, **given)
    program = jax.make_jaxpr(of_numbers)(objective.numbers).jaxpr
    read = {str(each) for equation in program.eqns for each in equation.invars}
    assert {str(each) for each in program.invars} <= read


@pytest.mark.parametrize("case", [*SUMMED, "sigmoid-alpha_divergence", "robust", "exo_pair"])
def test_traced_numbers_give_the_same_losses(x64, case):
    objective = objective_of(case)
    policy, reference, lengths, given = random_inputs(objective)
    stacked = jax.tree.map(lambda x: jnp.array([x, 1.1 * x]), objective.numbers)
    of_numbers = lambda numbers: objective.with_numbers(numbers)(policy, reference, lengths=lengths, **given)
    found = jax.jit(jax.vmap(of_numbers))(stacked)
    np.testing.assert_allclose(found[0], objective(policy, reference, lengths=lengths, **given), rtol=1e-12)
    assert np.abs(found[1] - found[0]).max() > 1e-6


def test_losses_can_be_mapped_over_beta_and_differentiated_by_it():
    policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-11.0, -12.0]])
    ones = jnp.ones((1, 2), int)
    mapped = jax.vmap(lambda beta: losses.sigmoid(policy, reference, beta=beta))(jnp.array([0.1, 0.3]))
    np.testing.assert_allclose(mapped[:, 0], np.log1p(np.exp([-0.3, -0.9])), rtol=1e-6)
    slope = jax.jit(jax.grad(lambda beta: make_loss("sigmoid", beta=beta)(policy, reference, lengths=ones)[0]))(0.1)
    np.testing.assert_allclose(slope, -3 / (1 + np.exp(0.3)), rtol=1e-5)
    inside = jax.jit(lambda: losses.sigmoid(policy, reference, beta=jnp.asarray(0.1)))  # concrete within a trace
    np.testing.assert_allclose(inside(), mapped[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "option", "value", "beside"),
    [
        ("sigmoid", "nll_average", True, {"nll_weight": 0.5}),
        ("sigmoid", "wpo", True, {}),
        ("tdpo2", "kl_tokens", 8, {}),
    ],
)
def test_option_that_chooses_code_cannot_be_traced(name, option, value, beside):
    traced = jax.jit(lambda value: make_loss(name, beside, **{option: value}) and value)
    with pytest.raises(InputError, match=rf"make_loss\({option}=...\): got a traced .*because it chooses code"):
        traced(value)


@pytest.mark.parametrize("value", [np.ones(3), "0.1", True, None])
def test_number_of_each_pair_and_what_is_no_number_are_refused(value):
    with pytest.raises(InputError, match="^beta: got .*expected a number > 0"):
        check("beta", value, POSITIVE)


def test_traced_array_and_unknown_divergence_are_refused():
    with pytest.raises(InputError, match="^beta: got a traced .*not an array"):
        jax.jit(lambda beta: check("beta", beta, POSITIVE))(jnp.ones(3))
    with pytest.raises(InputError, match="^average: got a traced .*because it chooses code"):
        jax.jit(lambda average: check_switch("average", average))(True)
    with pytest.raises(InputError, match="^divergence: got 'kl'"):
        losses.f_scores(jnp.zeros((3, 2)), divergence="kl")


# --- every option acts, or is refused --------------------------------------------------------------------------------


def loss_and_gradient(name, options):
    return _loss_and_gradient(name, tuple(options.items()))


@functools.cache
def _loss_and_gradient(name, options):
    options = dict(options)
    objective = make_loss(name, options)
    policy, reference, lengths, given = random_inputs(objective)
    each, pull = jax.vjp(lambda policy: objective(policy, reference, lengths=lengths, **given), policy)
    return np.concatenate([each, *pull(jnp.ones_like(each))[0]])


@pytest.mark.parametrize(
    ("name", "option", "value"), TOGGLES, ids=[f"{name}-{option}-{value}" for name, option, value in TOGGLES]
)
def test_option_changes_the_loss_or_its_gradient(x64, name, option, value):
    without = beside(name, option)
    apart = np.abs(loss_and_gradient(name, without | {option: value}) - loss_and_gradient(name, without))
    assert apart.max() > 1e-4


@pytest.mark.parametrize("option", OPTIONS)
def test_option_of_other_losses_is_an_error(option):
    for name, value in itertools.product(sorted(LOSSES.keys() - TAKES[option]), VALUES[option]):
        refused = "divergence" if option == "divergence_alpha" else option
        with pytest.raises(InputError, match=rf"make_loss\({refused}="):
            make_loss(name, BESIDE.get(option, {}) | {option: value})


@pytest.mark.parametrize("option", sorted(PENDING))
def test_option_of_what_scores_is_an_error_where_nothing_asks_for_it(option):
    assert make_loss("tdpo2", {option: 1}).reference_tokens == 1 != make_loss("tdpo2", {}).reference_tokens
    for name in LOSSES.keys() - {"tdpo1", "tdpo2"}:
        with pytest.raises(InputError, match=rf"make_loss\({option}="):
            make_loss(name, {option: 1})


def test_every_field_of_the_configuration_is_an_option_of_some_loss():
    fields = {each.name for each in dataclasses.fields(config.Loss)} - {"name"}
    assert set(TAKES) == set(VALUES) == fields - PENDING and all(TAKES.values()) and all(VALUES.values())
    assert set().union(*TAKES.values()) <= set(LOSSES)


def test_every_option_of_a_function_is_a_field_of_the_configuration():
    fields = {each.name for each in dataclasses.fields(config.Loss)}
    for name, loss in LOSSES.items():
        own = losses.options_of(loss).keys()
        assert own <= fields and own <= {option for option, names in TAKES.items() if name in names}


@pytest.mark.parametrize("option", sorted(BESIDE))
def test_option_that_says_how_another_is_meant_is_an_error_alone(option):
    with pytest.raises(InputError, match=rf"make_loss\({option}=...\): is set alone"):
        make_loss("sigmoid", {option: VALUES[option][0]})


def test_divergence_alpha_of_another_divergence_is_an_error():
    with pytest.raises(InputError, match=r"make_loss\(divergence_alpha=...\): is set alone"):
        make_loss("sigmoid", {"divergence": "forward_kl", "divergence_alpha": 0.3})


@pytest.mark.parametrize(
    ("names", "option", "value"),
    [
        ("sigmoid,apo_zero", "divergence", "forward_kl"),
        ("sigmoid,kto", "ld_alpha", 0.5),
        ("sigmoid,aot", "wpo", True),
        ("sigmoid,orpo", "wpo", True),
    ],
)
def test_modifier_that_one_loss_of_a_sum_does_not_take_is_an_error(names, option, value):
    with pytest.raises(InputError, match=rf"make_loss\({option}=...\): is set, and does not combine with"):
        make_loss(names, {option: value})


def test_modifiers_leave_the_likelihood_within_a_sum_as_it_is(x64):
    # sft compares no answers: the sum takes what sigmoid takes, and the likelihood stays that of whole answers.
    for options in ({"ld_alpha": 0.3}, {"wpo": True}, {"divergence": "forward_kl"}):
        together = loss_and_gradient("sigmoid*0.8,sft*0.2", options)
        apart = 0.8 * loss_and_gradient("sigmoid", options) + 0.2 * loss_and_gradient("sft", {})
        np.testing.assert_allclose(together, apart, rtol=1e-12)


@pytest.mark.parametrize("case", SUMMED)
def test_sum_is_the_weighted_sum_of_its_losses(x64, case):
    name, options = SUMMED[case]
    around = {option: value for option, value in options.items() if option.startswith("nll")}
    total = loss_and_gradient(name, options)
    for part in name.split(","):
        each, _, weight = part.partition("*")
        taken = {option: value for option, value in options.items() if each in TAKES[option] and option not in around}
        total = total - float(weight or 1) * loss_and_gradient(each, taken)
    likelihood = loss_and_gradient("sft", around) - loss_and_gradient("sft", {}) if around else np.zeros(())
    np.testing.assert_allclose(total, np.broadcast_to(likelihood, total.shape), atol=1e-12)


def test_cases_name_every_loss():
    assert {name for name, _ in CASES.values()} == set(LOSSES)
