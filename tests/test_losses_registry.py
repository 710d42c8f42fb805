"""The registry of losses: entries complete, defaults and ranges those of the functions, and what objectives read."""

import inspect
import json
import math

import jax.numpy as jnp
import pytest

from dpo_jax import losses
from dpo_jax.losses import LOSSES, REGISTRY, make_loss, options_of, synonyms
from dpo_jax.losses.common import FRACTION, POSITIVE, Range
from dpo_jax.losses.registry import GIVEN, OPTIONS
from dpo_jax.types import InputError
from tests.support.loss_cases import TAKES, random_given

OWN = [(name, option) for name, entry in REGISTRY.items() for option in entry.options]
# Functions of a user's own, found by name.
HERE = __name__


def without_beta(policy, reference, *, lengths):
    return policy[:, 1] - policy[:, 0]


@pytest.mark.parametrize("name", REGISTRY)
def test_entry_is_complete(name):
    entry = REGISTRY[name]
    assert entry.name == name == entry.function.__name__ and LOSSES[name] is entry.function
    assert getattr(losses, name) is entry.function
    assert entry.title and (len(entry.paper) == 10 or name == "sft")
    assert entry.paper in (inspect.getdoc(entry.function) or "")
    assert "paired" in entry.kinds and entry.answers_read in ("all", "chosen")
    assert entry.ranges.keys() <= entry.options.keys()


@pytest.mark.parametrize("name", REGISTRY)
def test_docstring_has_every_parameter_and_an_example(name):
    text = inspect.getdoc(LOSSES[name]) or ""
    arguments = text.partition("Args:\n")[2].partition("Returns:")[0]
    documented = [line.partition(":")[0].strip() for line in arguments.splitlines() if line.startswith("  ")]
    names = {each for line in documented for each in line.split(", ")}
    assert names >= set(inspect.signature(LOSSES[name]).parameters), name
    assert f">>> print({name}(" in text or f'>>> print(f"{{{name}(' in text


@pytest.mark.parametrize(("name", "option"), OWN)
def test_default_is_that_of_the_function(name, option):
    parameter = inspect.signature(LOSSES[name]).parameters[option]
    assert REGISTRY[name].options[option] == parameter.default is not parameter.empty
    assert option in OPTIONS and name in TAKES[option]
    assert parameter.annotation == ("Number" if OPTIONS[option].type is float else OPTIONS[option].type.__name__)
    assert make_loss(name, {}).options[option] == parameter.default


@pytest.mark.parametrize(("name", "option"), OWN)
def test_function_refuses_what_is_outside_the_range_of_the_registry(name, option):
    valid = REGISTRY[name].range_of(option)
    if OPTIONS[option].type is bool:
        assert valid is None
        return
    assert isinstance(valid, Range)
    logps, lengths = jnp.zeros((1, 2)), jnp.ones((1, 2), int)
    given = random_given(make_loss(name, {}).needs & {"kl", "sequence_kl"}, 1)

    def call(value):
        return LOSSES[name](logps, logps, lengths=lengths, **given, **{option: value})

    inside = [valid.low + 1e-3] + ([] if valid.low_open else [valid.low])
    outside = [valid.low - 1e-3, math.nan, math.inf] + ([valid.low] if valid.low_open else [])
    if valid.high < math.inf:
        inside += [valid.high - 1e-3] + ([] if valid.high_open else [valid.high])
        outside += [valid.high + 1e-3] + ([valid.high] if valid.high_open else [])
    for value in inside:
        assert call(value).shape == (1,)
    for value in outside:
        with pytest.raises(InputError, match=f"^{option}: got"):
            call(value)
        assert not valid.holds(value)


def test_ranges_are_written_as_intervals():
    assert (str(POSITIVE), POSITIVE.expected) == ("> 0", "a number > 0")
    assert (str(FRACTION), FRACTION.expected) == ("[0, 1]", "a number in [0, 1]")
    assert str(Range(0, 0.5, low_open=True, high_open=True)) == "(0, 0.5)"
    assert not any(POSITIVE.holds(value) for value in (0, -1, math.nan, math.inf))


def test_every_option_has_one_line_of_help():
    for option in OPTIONS.values():
        assert option.help and "\n" not in option.help and option.default == "unset"
        assert option.valid is None or str(option.valid) in option.help
    assert OPTIONS["tau"].help.startswith("discopop: ") and OPTIONS["tau"].help.endswith("; unset: 0.05")
    assert "unset: 0.1 (" in OPTIONS["beta"].help and "sppo_hard 0.001" in OPTIONS["beta"].help


@pytest.mark.parametrize(
    ("name", "answers"),
    [("sft", "chosen"), ("sigmoid", "all"), ("sigmoid,sft", "all"), (f"{HERE}:without_beta", "all")]
    + [(f"{HERE}:without_beta,sft", "all"), ("cpo", "all"), ("kto", "all")],
)
def test_objective_says_which_answers_it_reads(name, answers):
    objective = make_loss(name, {})
    assert objective.answers_read == answers
    if name.endswith("without_beta"):
        assert objective.beta is None and objective.kinds == {"paired"} and not objective.reference_free


def test_given_names_every_input_of_a_loss():
    for name, loss in LOSSES.items():
        required = {each for each, p in inspect.signature(loss).parameters.items() if p.default is p.empty}
        assert required - {"policy", "reference", "lengths"} <= set(GIVEN), name


def test_old_spelling_warns():
    with pytest.warns(DeprecationWarning, match="desensitized"):
        assert losses.desensitised is losses.desensitized
    with pytest.raises(AttributeError):
        losses.no_such_loss  # noqa: B018


def test_options_of_an_own_loss_are_the_parameters_with_a_default():
    def own(logps, reference_logps, *, lengths, beta=0.2):
        return beta * (logps - reference_logps).sum(1)

    assert options_of(own) == {"beta": 0.2}


def test_other_names_of_a_loss_are_refused_with_what_to_give_instead():
    for name, part in [
        ("dpo", "Its name here is sigmoid: --config.loss.name=sigmoid on the"),
        ("TR-DPO", "Its name here is sigmoid: --config.loss.name=sigmoid --config.reference.sync_steps=512"),
        ("IPO", "Its name here is ipo: "),
        ("simgoid", "Did you mean sigmoid?"),
        ("grpo", "writes answers while it trains"),
        ("unheard", "module:function"),
    ]:
        with pytest.raises(InputError) as caught:
            make_loss(name, {})
        assert part in caught.value.remedy and "expected one of sigmoid, robust" in str(caught.value)


def test_what_stands_for_another_name_is_an_objective():
    for name, settings in synonyms.SETTINGS.items():
        fields = dict(each.split("=", 1) for each in settings.split())
        loss = fields.pop("loss.name")
        texts = {key.removeprefix("loss."): text for key, text in fields.items() if key.startswith("loss.")}
        options = {key: text if OPTIONS[key].type is str else json.loads(text) for key, text in texts.items()}
        assert name not in REGISTRY and make_loss(loss, options).names <= REGISTRY.keys(), name
