"""Fields, their ranges, and the ways a configuration comes in: recipe, flags, config.json."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from dpo_jax import config
from dpo_jax.fields import trl
from dpo_jax.flags import define_flags, from_flags, load, parse_flags
from dpo_jax.losses.registry import OPTIONS
from dpo_jax.types import InputError

ROOT = Path(__file__).parents[1]
RECIPE = """
from dpo_jax import config as fields

def get_config(arg: str = ""):
    config = fields.base()
    config.model.path = "model"
    config.optimizer.learning_rate = 2e-5
    {line}
    return config
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe with one more line and returns its path."""

    def write(line: str = "pass") -> str:
        path = tmp_path / "recipe.py"
        path.write_text(RECIPE.format(line=line))
        return str(path)

    return write


def usable():
    fields = config.base()
    fields.model.path = "model"
    return fields


def test_every_field_has_a_trailing_comment_and_nothing_else_is_a_field():
    source = inspect.getsource(config).partition("RESUMABLE =")[0]
    sections = re.findall(r"^class (\w+):(?:  # .*)?\n((?:    .*\n)+)", source, re.MULTILINE)
    assert {name for name, _ in sections} >= {"Config", "Loss", "Export"}
    for name, body in sections:
        declared = [field.name for field in dataclasses.fields(getattr(config, name))]
        documented = re.findall(r"^    (\w+): \S.* = \S.*  # \S.*$", body, re.MULTILINE)
        documented += re.findall(r"^    (\w+): (?:[A-Z]\w+) = [A-Z]\w+\(\)$", body, re.MULTILINE)  # sections
        documented += [each for each, option in OPTIONS.items() if name == "Loss" and option.help]
        assert sorted(documented) == sorted(declared), name


def test_options_of_losses_are_optional_fields_in_a_fixed_order():
    """The order and the types are those of every config.json written so far; new options may stand between them."""
    numbers = "beta label_smoothing tau penalty gamma kl_weight sensitivity desirable_weight undesirable_weight"
    types = dict.fromkeys([*numbers.split(), "divergence_alpha", "ld_alpha", "nll_weight"], float)
    types |= dict.fromkeys(["average", "wpo", "nll_average"], bool) | {"kl_tokens": int, "divergence": str}
    order = "beta label_smoothing average tau penalty gamma kl_weight kl_tokens sensitivity desirable_weight "
    order += "undesirable_weight divergence divergence_alpha ld_alpha wpo nll_weight nll_average"
    name, *options = dataclasses.fields(config.Loss)
    assert (name.name, name.default) == ("name", "sigmoid")
    assert [option.name for option in options if option.name in types] == order.split()
    assert {option.name: option.type for option in options}.items() >= {
        each: types[each] | None for each in types
    }.items()
    assert all(option.default is None for option in options)


def test_rules_and_resumable_name_fields_that_exist():
    names = set(config.flat(config.Config()))
    assert set(config.RULES) <= names
    assert set(config.RESUMABLE) | set(config.CHANGEABLE) <= names and not set(config.RESUMABLE) & set(
        config.CHANGEABLE
    )
    assert not {"model.path", "tokenizer.path", "seed", "optimizer.learning_rate"} & set(config.RESUMABLE)
    assert not {"model.path", "seed", "train.batch_pairs", "loss.beta", "optimizer.b1"} & set(config.CHANGEABLE)


def test_every_number_has_a_rule():
    """A number without a range would let a sign error through."""
    optional = {"train.steps": 1, "train.microbatch_rows": 1, "reference.microbatch_rows": 1, "data.row_length": 2}
    values = config.flat(config.Config()) | optional | {"loss.beta": 1.0, "loss.label_smoothing": 0.0}
    numbers = {name for name, value in values.items() if isinstance(value, int | float) and value not in (True, False)}
    assert numbers <= set(config.RULES)


def test_base_is_locked_and_freezes_to_the_defaults():
    fields = usable()
    with pytest.raises(AttributeError):
        fields.loss.bta = 0.1
    expected = dataclasses.replace(config.Config(), model=config.Model(path="model"))
    assert config.freeze(fields) == expected


BAD = [
    ("seed", -1, "a number >= 0"),
    ("prepare", "no colon", "'module:function'"),
    ("hooks", "no.colon", "'module:function'"),
    ("model.path", "", "a Hugging Face folder or Hub id"),
    ("model.dtype", "bf16", "'bfloat16'"),
    ("model.param_dtype", "float16", "'float32', 'bfloat16'"),
    ("data.max_length", 1, "a number >= 2"),
    ("data.max_prompt_length", 0, "a number >= 1"),
    ("data.max_prompt_length", 1024, "which is 1024"),
    ("data.truncate_prompt", "keep_middle", "'keep_end', 'keep_start', 'error'"),
    ("data.on_bad_row", "drop", "'error', 'skip'"),
    ("data.turns", "user", "'assistant', 'last', 'all'"),
    ("data.on_template_loss", "skip", "'error', 'warn'"),
    ("data.date", "29.11.2026", "a day as YYYY-MM-DD"),
    ("data.rankings", "whole", "'all', 'best'"),
    ("data.layout", "packed", "'shared', 'repeated'"),
    ("data.row_length", 1, "a number >= 2"),
    ("loss.beta", 0.0, "a number > 0"),
    ("loss.label_smoothing", 0.5, "a number in [0, 0.5)"),
    ("loss.label_smoothing", -0.1, "a number in [0, 0.5)"),
    ("loss.tau", 0.0, "a number in (0, 1]"),
    ("loss.tau", 1.5, "a number in (0, 1]"),
    ("loss.penalty", -1.0, "a number >= 0"),
    ("loss.gamma", -0.1, "a number >= 0"),
    ("loss.kl_weight", -0.1, "a number >= 0"),
    ("loss.kl_tokens", 0, "a number >= 1"),
    ("loss.sensitivity", -0.1, "a number >= 0"),
    ("loss.desirable_weight", 0.0, "a number > 0"),
    ("loss.undesirable_weight", -1.0, "a number > 0"),
    ("loss.divergence", "kl", "'reverse_kl', 'forward_kl'"),
    ("loss.divergence_alpha", 0.0, "a number in (0, 1)"),
    ("loss.divergence_alpha", 1.0, "a number in (0, 1)"),
    ("loss.ld_alpha", -0.1, "a number in [0, 1]"),
    ("loss.ld_alpha", 1.1, "a number in [0, 1]"),
    ("loss.nll_weight", float("nan"), "a number >= 0"),
    ("train.batch_pairs", 0, "a number >= 1"),
    ("train.epochs", 0.0, "a number > 0"),
    ("train.epochs", float("nan"), "a number > 0"),
    ("train.steps", 0, "a number >= 1"),
    ("train.microbatch_rows", 0, "a number >= 1"),
    ("sft.steps", -1, "a number >= 0"),
    ("sft.batch_pairs", 0, "a number >= 1"),
    ("sft.learning_rate", 0.0, "a number > 0"),
    ("sft.warmup_steps", -1, "a number >= 0"),
    ("sft.warmup_ratio", 1.0, "a number in [0, 1)"),
    ("optimizer.learning_rate", float("inf"), "a number > 0"),
    ("optimizer.warmup_steps", -1, "a number >= 0"),
    ("optimizer.warmup_ratio", -0.1, "a number in [0, 1)"),
    ("optimizer.min_lr_rate", 1.5, "a number in [0, 1]"),
    ("optimizer.weight_decay", -0.1, "a number >= 0"),
    ("train.router_balance", -0.1, "a number >= 0"),
    ("optimizer.clip_norm", -1.0, "a number >= 0"),
    ("optimizer.b1", 1.0, "a number in [0, 1)"),
    ("optimizer.b2", -0.5, "a number in [0, 1)"),
    ("optimizer.eps", 0.0, "a number > 0"),
    ("optimizer.layer_decay", 0.0, "a number in (0, 1]"),
    ("optimizer.layer_decay", 1.5, "a number in (0, 1]"),
    ("train.freeze", "layers.(", "a regular expression"),
    ("lora.rank", -1, "a number >= 0"),
    ("lora.base", "int4", "'int8', 'nf4'"),
    ("lora.alpha", 0.0, "a number > 0"),
    ("lora.targets", "(", "a regular expression"),
    ("reference.microbatch_rows", 0, "a number >= 1"),
    ("reference.sync_steps", -1, "a number >= 0"),
    ("reference.mixup_alpha", 0.0, "a number in (0, 1]"),
    ("reference.mixup_alpha", 1.5, "a number in (0, 1]"),
    ("eval.every_steps", -1, "a number >= 0"),
    ("eval.every_steps", 10, "0 where config.data.eval is empty"),
    ("checkpoint.every_steps", 0, "a number >= 1"),
    ("checkpoint.keep", 0, "a number >= 1"),
    ("checkpoint.best", "eval/loss", "METRIC:max or METRIC:min"),
    ("checkpoint.best", "eval/loss:min", "empty where config.eval.every_steps is 0"),
    ("eval.patience", -1, "a number >= 0"),
    ("eval.patience", 2, "0 where config.eval.every_steps is 0"),
    ("mesh.replica", 0, "or -1"),
    ("mesh.fsdp", -2, "or -1"),
    ("mesh.tensor", 0, "or -1"),
    ("plan.pairs", 0, "a number >= 1"),
    ("plan.prompt_tokens", 0, "a number >= 1"),
    ("plan.answer_tokens", 0, "a number >= 1"),
    ("log.every_steps", 0, "a number >= 1"),
    ("profile.steps", -1, "a number >= 0"),
    ("export.dtype", "int8", "'float32', 'bfloat16', 'float16'"),
]


@pytest.mark.parametrize("name, value, expected", BAD, ids=[f"{name}={value}" for name, value, _ in BAD])
def test_freeze_refuses_a_value_out_of_range(name, value, expected):
    fields = usable()
    fields.update_from_flattened_dict({name: value})
    with pytest.raises(InputError) as caught:
        config.freeze(fields)
    assert caught.value.place == f"config.{name}"
    assert expected in caught.value.expected
    assert f"--config.{name}=" in caught.value.remedy


@pytest.mark.parametrize("section", ["optimizer", "sft"])
def test_warmup_is_given_once(section):
    fields = usable()
    fields.update_from_flattened_dict({f"{section}.warmup_steps": 5, f"{section}.warmup_ratio": 0.1})
    with pytest.raises(InputError, match=rf"{section}.warmup_ratio: 0.1; expected 0 where .*_steps is set"):
        config.freeze(fields)


def test_every_rule_is_tested():
    assert set(config.RULES) <= {name for name, _, _ in BAD}


def test_freeze_accepts_the_edges_of_ranges():
    fields = usable()
    edges = {"data.max_length": 2, "data.max_prompt_length": 1, "loss.label_smoothing": 0.0, "optimizer.b1": 0.0}
    edges |= {"loss.tau": 1.0, "loss.ld_alpha": 0.0, "loss.kl_tokens": 1, "reference.mixup_alpha": 1.0}
    edges |= {"mesh.fsdp": 1, "mesh.tensor": -1, "prepare": "dpo_jax.quickstart:make", "sft.steps": 0}
    fields.update_from_flattened_dict(edges)
    assert config.flat(config.freeze(fields)).items() >= edges.items()


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("seed", 1.0, "a whole number"),
        ("seed", True, "a whole number"),
        ("train.epochs", "1", "a number"),
        ("train.epochs", True, "a number"),
        ("train.steps", 1.5, "a whole number, or nothing"),
        ("data.shuffle", 1, "true or false"),
        ("model.path", None, "text"),
        ("loss", 0.1, "an object with the fields of the section"),
    ],
)
def test_freeze_refuses_a_value_of_another_type(name, value, expected):
    fields = usable().to_dict()
    section, _, leaf = name.rpartition(".")
    (fields[section] if section else fields)[leaf] = value
    with pytest.raises(InputError) as caught:
        config.freeze(config.config_dict.ConfigDict(fields))
    assert caught.value.place == f"config.{name}"
    assert caught.value.expected.startswith(expected)


def test_a_whole_number_becomes_a_float_from_a_recipe_and_from_json():
    fields = usable()
    fields.loss.beta = 1
    text = '{"model": {"path": "m"}, "loss": {"beta": 1}}'
    for beta in (config.freeze(fields).loss.beta, config.from_json(text, "config.json").loss.beta):
        assert beta == 1.0 and type(beta) is float


def test_freeze_names_an_unknown_field_and_the_valid_ones():
    fields = usable()
    with fields.unlocked():
        fields.loss.bta = 0.1
    with pytest.raises(InputError) as caught:
        config.freeze(fields)
    names = ", ".join(field.name for field in dataclasses.fields(config.Loss))
    expected = f"config.loss.bta: no field 'bta'; expected one of {names}. Did you mean beta or tau?"
    assert str(caught.value) == expected


def test_freeze_reports_all_problems_at_once():
    fields = usable()
    fields.loss.beta = -1.0
    fields.mesh.replica = -1
    fields.data.max_length = 512
    with fields.unlocked():
        fields.optimizer.momentum = 0.9
    with pytest.raises(InputError) as caught:
        config.freeze(fields)
    message = str(caught.value)
    assert message.startswith("config: 4 problems")
    for place in ("config.loss.beta: -1.0", "config.mesh: ", "config.data.max_prompt_length", "optimizer.momentum"):
        assert place in message


def test_json_round_trip_is_exact():
    fields = usable()
    changes = {"loss.beta": 0.3, "train.steps": 7, "optimizer.learning_rate": 5e-7, "data.shuffle": False}
    fields.update_from_flattened_dict(changes)
    frozen = config.freeze(fields)
    assert config.from_json(config.to_json(frozen), "config.json") == frozen
    assert frozen != config.freeze(usable())


@pytest.mark.parametrize(
    "text, got",
    [
        ("{", "Expecting property name"),
        ("[1]", "[1]"),
        ('{"model": {"path": "m"}, "sed": 1}', "no field 'sed'"),
        ('{"model": {"path": "m"}, "train": {"steps": "9"}}', "'9'"),
    ],
)
def test_from_json_refuses_what_no_run_wrote(text, got):
    with pytest.raises(InputError) as caught:
        config.from_json(text, "runs/a/config.json")
    assert caught.value.place.startswith("runs/a/config.json") and "--config." not in caught.value.remedy
    assert got in caught.value.got


def test_from_json_keeps_the_default_of_a_field_that_an_older_run_did_not_have():
    assert config.from_json('{"model": {"path": "m"}}', "old.json").loss == config.Loss()


def test_changed_lists_what_may_not_differ():
    old = config.freeze(usable())
    fields = usable()
    fields.update_from_flattened_dict({"optimizer.b1": 0.95, "loss.beta": 0.2, "mesh.tensor": 2, "log.wandb": "p"})
    assert config.changed(old, config.freeze(fields)) == ["loss.beta: unset -> 0.2", "optimizer.b1: 0.9 -> 0.95"]
    fields.model.path = "another"
    assert "model.path: 'model' -> 'another'" in config.changed(old, config.freeze(fields))
    assert config.changed(old, old) == []


def test_flags_override_a_recipe(recipe):
    overrides = ["loss.beta=0.3", "train.steps=4", "data.shuffle=false", "model.dtype=float32", "optimizer.b2=0.95"]
    loaded = load(recipe(), overrides)
    assert loaded.optimizer == config.Optimizer(learning_rate=2e-5, b2=0.95)
    assert (loaded.loss.beta, loaded.train.steps, loaded.data.shuffle) == (0.3, 4, False)


def test_the_recipe_gets_what_stands_after_the_colon(recipe):
    path = recipe("config.tokenizer.path = arg or 'nothing'")
    for argument in ("a:b", "gs://bucket/model"):
        assert load(f"{path}:{argument}").tokenizer.path == argument
    assert load(path).tokenizer.path == "nothing"


def test_config_json_reproduces_a_run_and_can_be_overridden(recipe, tmp_path):
    first = load(recipe(), ["loss.beta=0.3", "train.steps=4"])
    (tmp_path / "config.json").write_text(config.to_json(first))
    source = str(tmp_path / "config.json")
    assert load(source) == first
    again = load(source, ["loss.beta=0.2", "train.steps=5", "train.microbatch_rows=2"])
    assert config.changed(first, again) == ["loss.beta: 0.3 -> 0.2"]


@pytest.mark.parametrize(
    "text",
    [
        "model: {path: m}\noptimizer:\n  learning_rate: 1e-6  # no dot: text in YAML 1.1\ndata.date: 2024-01-31\n"
        "train: {steps: 5}\nloss.beta: .2\ndata.shuffle: False\nlora.targets: off\nloss.average:\n",
        '{"model.path": "m", "optimizer": {"learning_rate": 1e-6}, "data": {"date": "2024-01-31", "shuffle": false},'
        '"train.steps": 5, "loss": {"beta": 0.2}, "lora.targets": "off"}',
    ],
    ids=["yaml", "json"],
)
def test_a_file_of_fields_sets_those_that_differ_and_flags_come_last(tmp_path, text):
    path = tmp_path / ("fields.json" if text.startswith("{") else "fields.yaml")
    path.write_text(text)
    expected = config.Config(
        model=config.Model(path="m"),
        data=config.Data(date="2024-01-31", shuffle=False),
        loss=dataclasses.replace(config.Loss(), beta=0.2),
        train=config.Train(steps=5),
        lora=config.Lora(rank=2, targets="off"),
    )
    # Alone the file would be refused: lora.targets without a rank.
    assert load(str(path), ["lora.rank=2"]) == expected
    with pytest.raises(InputError, match=r"^config\.lora\.rank: 0; .* --config\.lora\.rank=VALUE"):
        load(str(path))


@pytest.mark.parametrize(
    "text, parts",
    [
        ("loss:\n\tbeta: 1", [":2: broken YAML (", "spaces, not tabs"]),
        ("loss:\n  beta: 1\n  beta: 2", [":3: 'loss.beta' twice"]),
        ("loss.beta: 1\nloss: {beta: 2}", [":2: 'loss.beta' twice"]),
        ("\ndata: {shuffle: no}", [":2: config.data.shuffle: 'no'; expected true or false"]),
        ("seed: 1\nloss.beta: -1", [":2: config.loss.beta: -1", "expected a number > 0. Correct it in the file."]),
        ("loss: {bta: 1}", [":1: config.loss.bta: no field 'bta'", "Did you mean beta or tau?"]),
        ("beta: 1", [":1: config.beta: no field 'beta'", "Did you mean loss.beta?"]),
        ("train:\n  per_device_train_batch_size: 8", [":2: ", "is train.batch_pairs here"]),
        ("data.train: [a.jsonl]", [":1: config.data.train: a list", "as one text"]),
        ("seed: !!python/object:os.system x", ["the tag 'tag:yaml.org,2002:python/object:os.system'"]),
        ("data: &a {train: {b: *a}}", ["a section within 'data'"]),
        ("- a", [":1: a list in place of fields"]),
        ("a: 1\n---\nb: 2", [":2: broken YAML (", "another document"]),
        ("loss.name: module:function", ["which names code, in a data file"]),
    ],
)
def test_a_file_of_fields_that_cannot_be_used_is_an_input_error_with_its_line(tmp_path, text, parts):
    path = tmp_path / "fields.yml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load(str(path), ["model.path=m"])
    assert str(caught.value).startswith(str(path)) and all(part in str(caught.value) for part in parts), caught.value


def test_a_file_of_fields_takes_no_argument_and_no_key_twice(tmp_path):
    path = tmp_path / "fields.json"
    path.write_text('{"loss": {"beta": 1, "beta": 2}}')
    for argument, part in [("", "'beta' twice"), (":large", "'large' after the name of a file of fields")]:
        with pytest.raises(InputError, match=part):
            load(str(path) + argument)


def test_options_of_trl_lead_to_fields_that_exist():
    known = config.flat(config.Config())
    for name, (ours, _) in trl.OPTIONS.items():
        fields = [each.partition("=")[0] for each in ours.split() if not each.startswith("--")]
        assert set(fields) <= set(known), name
    assert trl.OPTIONS["max_steps"].ours == "train.steps" and len(trl.OPTIONS) > 150


@pytest.mark.parametrize("form", ["lora", "full"])
def test_chat_recipe_trains_adapters_or_the_whole_model(form, monkeypatch):
    source = str(ROOT / "configs" / "chat.py")
    chosen = load(f"{source}:{form}" if form == "full" else source, ["model.path=m", "data.train=a.jsonl"])
    assert bool(chosen.lora.rank) == (form == "lora") and chosen.data.format == "chat"
    with pytest.raises(InputError, match="'adapters' after the colon; expected lora or full"):
        load(f"{source}:adapters")


def test_flags_take_dashes_spaces_and_no_prefix(recipe):
    argv = ["dpo-jax", "train", "-config", recipe(), "--config.loss.beta", "0.3", "--noconfig.data.shuffle", "more"]
    values = flags.FlagValues()
    define_flags(argv, values)
    assert parse_flags(argv, values) == ["dpo-jax", "train", "more"]
    loaded = from_flags(values)
    assert (loaded.loss.beta, loaded.data.shuffle) == (0.3, False)


@pytest.mark.parametrize(
    "override, parts",
    [
        (
            "loss.bta=1",
            ["--config.loss.bta", "loss.beta, loss.label_smoothing", "Did you mean --config.loss.beta=VALUE or"],
        ),
        ("los.beta=1", ["--config.los.beta", "sft, optimizer", "Did you mean --config.loss.beta=VALUE?"]),
        ("loss=1", ["--config.loss: 'loss' is a section of fields", "loss.name, loss.beta"]),
        ("beta=1", ["--config.beta: no field 'beta'", "Did you mean --config.loss.beta=VALUE?"]),
        ("steps=1", ["Did you mean --config.sft.steps=VALUE or --config.train.steps=VALUE?"]),
        ("bf16=1", ["TRL's bf16 is --config.model.dtype=VALUE here: "]),
        ("train.learning_rate=1", ["TRL's learning_rate is --config.optimizer.learning_rate=VALUE here"]),
        ("output_dir=a", ["TRL's output_dir is --workdir here"]),
        ("padding_free=1", ["TRL's padding_free has nothing to set here: pairs are always packed"]),
        ("loss.beta=abc", ["--config.loss.beta: got 'abc'; expected a number."]),
        ("train.steps=1.5", ["--config.train.steps: got '1.5'; expected a whole number."]),
        ("data.shuffle=maybe", ["--config.data.shuffle: got 'maybe'; expected true or false."]),
        ("loss.beta=0", ["config.loss.beta: 0.0; expected a number > 0"]),
    ],
)
def test_an_override_that_cannot_be_used_is_an_input_error(recipe, override, parts):
    with pytest.raises(InputError) as caught:
        load(recipe(), [override])
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    "line, parts",
    [
        ("config.loss.bta = 1", ["recipe.py:8: no field 'bta'", "average, beta", "Did you mean beta or tau?"]),
        ("config.los.beta = 1", ["recipe.py:8: no field 'los'", "Did you mean loss"]),
        ("config.sft.update({'rate': 1})", ["recipe.py:8: no field 'rate'", "warmup_steps"]),
        ("config.loss.beta = 'high'", ["recipe.py:8: beta = 'high'; expected a number. "]),
        ("config.loss.beta = 1 / 0", ["recipe.py:8: ZeroDivisionError"]),
        ("config.loss.beta = = 1", ["recipe.py", "SyntaxError", "line 8"]),
        ("return None", ["recipe.py", "get_config returns nothing", "config.base()"]),
        ("import ml_collections; return ml_collections.ConfigDict({'seed': 1})", ["recipe.py", "returns seed: 1"]),
    ],
)
def test_a_recipe_that_fails_is_an_input_error_with_its_line(recipe, line, parts):
    with pytest.raises(InputError) as caught:
        load(recipe(line))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_what_a_recipe_says_of_its_argument_comes_through_as_it_is(recipe):
    with pytest.raises(InputError, match=r"^arg: 7b; expected 1b or 3b\. Choose\.$"):
        load(recipe("raise fields.InputError('arg', got='7b', expected='1b or 3b', remedy='Choose.')") + ":7b")


def test_a_source_that_is_no_configuration_is_an_input_error(tmp_path, recipe):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "plain.py").write_text("def get_config(): pass")
    for source, part in [
        (str(tmp_path / "missing.py"), "no such file"),
        (str(tmp_path / "missing.json"), "no such file"),
        (str(tmp_path / "empty.py"), "no function get_config"),
        (str(tmp_path / "plain.py") + ":arg", "takes 0 positional arguments"),
        ("", "no such file"),
    ]:
        with pytest.raises(InputError, match=part):
            load(source)


def test_a_field_that_may_be_unset_is_unset_by_none(recipe):
    source = recipe("config.train.steps = 3; config.data.row_length = 512; config.loss.average = True")
    found = load(source, ["train.steps=None", "loss.average=None", "data.max_length=900"])
    assert (found.train.steps, found.loss.average, found.data.row_length, found.data.max_length) == (
        None,
        None,
        512,
        900,
    )
    for name in ("seed", "loss.name", "train.batch_pairs", "optimizer.b1"):
        with pytest.raises(InputError, match=rf"--config\.{name}: None; expected a value\. .* the default is"):
            load(source, [f"{name}=None"])


def test_a_missing_or_unknown_flag_is_an_input_error(recipe):
    for argv, part in [
        (["x", "--config.loss.beta=1"], "not given, but --config.loss.beta is"),
        (["x", f"--config={recipe()}", "--wrkdir=a"], "--wrkdir: no such flag"),
        (["x", f"--config={recipe()}", "--confg=a"], "Did you mean --config?"),
        (["x", f"--config={recipe()}", "--epochs=3"], r"Did you mean --config\.train\.epochs=VALUE\?"),
        (["x", f"--config={recipe()}", "--max_steps=3"], r"TRL's max_steps is --config\.train\.steps=VALUE here"),
        (["x", f"--config={recipe()}", "--config=b"], "--config: given 2 times"),
        (["x", f"--config={recipe()}", "--flagfile=/no/such"], "flagfile"),
        (["x", f"--config={recipe()}", "--config."], "no field ''"),
    ]:
        values = flags.FlagValues()
        with pytest.raises(InputError, match=part):
            define_flags(argv, values)
            parse_flags(argv, values)
    values = flags.FlagValues()
    define_flags(["x"], values)
    parse_flags(["x"], values)
    with pytest.raises(InputError, match="--config: not given"):
        from_flags(values)


def test_flags_of_a_real_command_line(recipe):
    """The same through sys.argv and absl's global flags, as the command line uses them."""
    script = (
        "from dpo_jax import flags; flags.define_flags(); rest = flags.parse_flags();"
        "print(rest[1:], flags.from_flags().loss.beta)"
    )
    argv = [sys.executable, "-c", script, "train", f"--config={recipe()}", "--config.loss.beta=0.25"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['train'] 0.25"
