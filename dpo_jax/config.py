"""Configuration of a run: every field, its default, and the checks that need only the fields' values.

Recipes in `configs/` start from `base()` and set only what differs. `freeze` turns the ConfigDict that flags edit
into frozen dataclasses; nothing below this module sees a ConfigDict. Names that another module owns (losses,
optimizers, schedules, attention, formats) are checked there, before a device is touched, so that no list is kept twice.

    dpo-jax train --config=configs/NAME.py[:ARG] [--config.SECTION.FIELD=VALUE ...]
    dpo-jax train --config=RUN/config.json        the same run again: every field as it was, overrides included
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ml_collections import config_dict

from dpo_jax import aliases
from dpo_jax.fields import files, trl
from dpo_jax.losses.registry import OPTIONS
from dpo_jax.types import InputError, shown

_Section = TypeVar("_Section")


@dataclasses.dataclass(frozen=True)
class Model:
    path: str = ""  # Hugging Face folder or Hub id; required
    dtype: str = "auto"  # compute type: auto | float32 | bfloat16; auto: bfloat16 on accelerators, float32 on CPU
    param_dtype: str = "float32"  # float32 | bfloat16 (stochastic rounding); optimizer state and adapters stay float32
    remat: str = "dots"  # none | dots | block | offload: what the backward pass recomputes; see docs/performance.md
    attention: str = "auto"  # auto | xla | splash (TPU) | triton (GPU); auto: the platform's own if it fits, else xla


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    path: str = ""  # Hugging Face folder or Hub id; empty: model.path


@dataclasses.dataclass(frozen=True)
class Data:
    train: str = ""  # path or Hub id (owner/name:split), or several: "a.jsonl,b-*.parquet*0.5"; required to train
    eval: str = ""  # held-out pairs, without weights; several sets by name: "helpful=a.jsonl,harmless=b.jsonl"
    format: str = "auto"  # auto | plain | chat | hh | ranked | unpaired; auto: from each source's first rows
    columns: str = ""  # columns under other names: "prompt=question,chosen=answer_a"; "images=" leaves one out
    rankings: str = "all"  # pairs made from a ranking; all: every two answers; best: the best with each other answer
    turns: str = "assistant"  # assistant | last | all: what is scored of an answer of several turns
    on_template_loss: str = "error"  # error | warn: what to do where a chat template leaves out text of the data
    date: str = ""  # YYYY-MM-DD, the day that chat templates write; empty: the day on which the run began
    shuffle: bool = True  # true: a new order each epoch, drawn from seed; false: file order
    max_length: int = 1024  # tokens of prompt and answer together, >= 2; longer sequences are truncated
    max_prompt_length: int = 512  # tokens of the prompt in a pair that is truncated, >= 1 and < data.max_length
    truncate_prompt: str = "keep_end"  # keep_end | keep_start: which end of a long prompt is kept; error: refuse it
    on_bad_row: str = "error"  # error: stop at an unusable row; skip: drop it, count it and report it
    layout: str = "auto"  # shared: one prompt per pair; repeated: one per answer; auto: shared if the model allows
    row_length: int | None = None  # positions in a packed row, a multiple of 8; unset: from the pairs' lengths
    cache_dir: str = ""  # folder of tokenized data; empty: DPO_JAX_CACHE, or the user's cache folder


def _with_options(section: type[_Section]) -> type[_Section]:
    """Adds a field for every option of every loss, unset by default, in the order of `losses.registry.OPTIONS`."""
    for name, option in OPTIONS.items():
        section.__annotations__[name] = option.type | None
        setattr(section, name, None)
    return section


@dataclasses.dataclass(frozen=True)
@_with_options
class Loss:  # an unset option has the loss's own default, see docs/objectives.md
    name: str = "sigmoid"  # one of those in docs/objectives.md, several as "sigmoid*0.8,sft*0.2", or "module:function"

    if TYPE_CHECKING:

        def __getattr__(self, option: str) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Train:
    batch_pairs: int = 64  # pairs in every update (the global batch size), >= 1
    epochs: float = 1.0  # passes over the training pairs, > 0; not used if train.steps is set
    steps: int | None = None  # number of updates, >= 1; unset: from train.epochs
    microbatch_rows: int | None = None  # rows per microbatch, a multiple of replica x fsdp; unset: from data and device
    router_balance: float = 0.0  # weight of the load-balancing loss of a mixture of experts, >= 0; 0: none
    freeze: str = ""  # regex, searched in the checkpoint's tensor names: matching tensors are frozen; empty: none


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: int = 0  # rank of low-rank adapters; if > 0 only they train; 0: no adapters, or those of lora.path
    alpha: float | None = None  # adapters are scaled by alpha / rank, > 0; unset: twice the rank
    rank_stabilised: bool = False  # true: scale by alpha / sqrt(rank) instead (rsLoRA)
    targets: str = ""  # regex of full module names, e.g. .*\.(q|v)_proj; empty: all linear layers of the blocks
    path: str = ""  # PEFT folder or Hub id to start from; it sets rank, alpha, rank_stabilised and targets
    base: str = ""  # int8 | nf4: quantize the frozen matrices of the blocks (`quantize` extra); empty: no quantization


@dataclasses.dataclass(frozen=True)
class Sft:
    steps: int = 0  # updates of supervised fine-tuning on chosen answers before the reference pass, >= 0; 0: none
    batch_pairs: int = 64  # pairs in each fine-tuning update, >= 1
    learning_rate: float = 1e-5  # peak learning rate of fine-tuning, > 0; other optimizer fields are shared
    warmup_steps: int = 0  # fine-tuning updates of linear warm-up from zero, >= 0
    warmup_ratio: float = 0.0  # the same as a share of sft.steps, in [0, 1); only one of the two may be set


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: str = "adamw"  # adamw | adafactor | rmsprop | lion | sgd
    learning_rate: float = 1e-6  # peak learning rate, > 0
    schedule: str = "linear"  # constant | linear | cosine: decay after warm-up; linear and cosine end at min_lr_rate
    min_lr_rate: float = 0.0  # share of the peak at which linear and cosine end, in [0, 1]; 0: at zero
    warmup_steps: int = 0  # updates of linear warm-up from zero, >= 0
    warmup_ratio: float = 0.0  # the same as a share of all updates, in [0, 1); only one of the two may be set
    weight_decay: float = 0.0  # decoupled weight decay, of matrices only (no norms, no biases), >= 0
    clip_norm: float = 1.0  # gradients are clipped to this global norm, >= 0; 0: no clipping
    b1: float = 0.9  # adamw, lion: decay of the first moment; sgd: momentum; in [0, 1)
    b2: float = 0.999  # adamw, lion, rmsprop: decay of the second moment, in [0, 1)
    eps: float = 1e-8  # adamw, rmsprop: added to the denominator, > 0
    layer_decay: float = 1.0  # factor on the learning rate per block, counted from the head down, in (0, 1]; 1: none


@dataclasses.dataclass(frozen=True)
class Reference:
    path: str = ""  # folder of stored reference log-probs; empty: WORKDIR/reference
    microbatch_rows: int | None = None  # rows per microbatch, a multiple of replica x fsdp; unset: from data and device
    sync_steps: int = 0  # TR-DPO: updates between two syncs of the reference with the policy, >= 0; 0: never
    mixup_alpha: float = 1.0  # TR-DPO: weight of the policy in the new reference, in (0, 1]; 1: a copy of it


@dataclasses.dataclass(frozen=True)
class Eval:
    every_steps: int = 0  # updates between evaluations, >= 0; 0: only before the first update and after the last
    patience: int = 0  # evaluations without a better checkpoint.best (empty: eval/loss) that end the run; 0: never


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every_steps: int = 500  # updates between checkpoints, >= 1; the last step is always saved
    keep: int = 2  # newest checkpoints kept, >= 1
    best: str = ""  # METRIC:max or METRIC:min of evaluations: the best is kept besides and exported; empty: the last


@dataclasses.dataclass(frozen=True)
class Mesh:
    replica: int = 1  # data-parallel axis across slices: its size; one of the three may be -1, all remaining devices
    fsdp: int = -1  # axis over which rows, parameters and optimizer state are sharded: its size, or -1
    tensor: int = 1  # axis over which heads, MLP width and vocabulary are sharded: its size, or -1
    rules: str = ""  # "REGEX=AXIS,-,AXIS;...": axis of each dimension of matching parameters, tried before the defaults


@dataclasses.dataclass(frozen=True)
class Plan:
    architecture: str = ""  # `plan`: config.json of the model, if model.path is not at hand; empty: that of model.path
    pairs: int = 60_000  # `plan`, which reads no data: pairs to train on, >= 1
    prompt_tokens: int = 160  # `plan`: median tokens of a prompt, >= 1
    answer_tokens: int = 240  # `plan`: median tokens of an answer, >= 1


@dataclasses.dataclass(frozen=True)
class Log:
    every_steps: int = 1  # updates between lines of metrics.jsonl, >= 1
    tensorboard: bool = False  # true: write TensorBoard files to WORKDIR/tensorboard (`track` extra)
    wandb: str = ""  # Weights & Biases project (`track` extra); empty: off


@dataclasses.dataclass(frozen=True)
class Profile:
    steps: int = 0  # updates to trace for XProf into WORKDIR/profile, after two of warm-up, >= 0; 0: none


@dataclasses.dataclass(frozen=True)
class Export:
    dtype: str = ""  # float32 | bfloat16 | float16; empty: each tensor's type in model.path
    push_to_hub: str = ""  # id of a model on the Hub, owner/name, to which the export is uploaded; empty: none
    hub_private: bool = False  # true: a repository that the upload makes is private


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0  # seed of the data order, of new adapters and of the rounding of bfloat16 parameters, >= 0
    prepare: str = ""  # "module:function", called as f(workdir) before inputs are read, to make them; empty: none
    hooks: str = ""  # "module:function", called as f(step, metrics) with each logged update and evaluation; empty: none
    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    data: Data = Data()
    loss: Loss = Loss()
    train: Train = Train()
    lora: Lora = Lora()
    sft: Sft = Sft()
    optimizer: Optimizer = Optimizer()
    reference: Reference = Reference()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    mesh: Mesh = Mesh()
    plan: Plan = Plan()
    log: Log = Log()
    profile: Profile = Profile()
    export: Export = Export()


# Fields that may differ when a run resumes: they change what is recorded or how work is laid out, never the
# sequence of updates (beyond float rounding).
RESUMABLE = (
    "prepare hooks model.remat model.attention data.cache_dir train.microbatch_rows reference.path "
    "reference.microbatch_rows "
    "eval.every_steps checkpoint.every_steps checkpoint.keep mesh.replica mesh.fsdp mesh.tensor mesh.rules "
    "plan.architecture plan.pairs plan.prompt_tokens plan.answer_tokens log.every_steps log.tensorboard log.wandb "
    "profile.steps export.push_to_hub export.hub_private"
).split()

CODE = frozenset({"prepare", "hooks"})  # fields that name functions to call

# Fields that may change when a run resumes or goes on after its end, and whose changes are recorded: optimizer state
# and reference stay valid under them. The first ones decide no update.
DECIDE_NO_UPDATE = "data.eval eval.patience checkpoint.best".split()
CHANGEABLE = [
    *DECIDE_NO_UPDATE,
    *"train.steps train.epochs optimizer.learning_rate optimizer.schedule optimizer.min_lr_rate".split(),
    *"optimizer.warmup_steps optimizer.warmup_ratio".split(),
]

Rule = tuple[Callable[[Any], object], str]  # (test of a value, description of valid values)


def _within(low: float, high: float = math.inf) -> Rule:
    interval = f"in [{low}, {high})" if high < math.inf else f">= {low}"
    return lambda value: low <= value < high, f"a number {interval}"  # nan passes no comparison, so it is refused too


def _one_of(*names: str) -> Rule:
    return lambda value: value in names, "one of " + ", ".join(map(repr, names))


def _is_pattern(text: str) -> bool:
    try:
        return bool(re.compile(text))
    except re.error:
        return False


def _is_day(text: str) -> bool:
    try:
        return not text or datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


_POSITIVE: Rule = (lambda value: 0 < value < math.inf, "a number > 0")
_SHARE: Rule = (lambda value: 0 < value <= 1, "a number in (0, 1]")
_AXIS: Rule = (lambda value: value == -1 or value >= 1, "a number >= 1, or -1 for all remaining devices")
_RULES: tuple[tuple[str, Rule], ...] = (  # as the comments of the fields; an unset field (None) is not checked
    ("seed lora.rank sft.steps sft.warmup_steps optimizer.warmup_steps profile.steps", _within(0)),
    ("eval.every_steps eval.patience", _within(0)),
    ("optimizer.weight_decay optimizer.clip_norm train.router_balance", _within(0)),
    ("data.max_prompt_length train.batch_pairs train.steps train.microbatch_rows sft.batch_pairs", _within(1)),
    ("reference.microbatch_rows checkpoint.every_steps checkpoint.keep log.every_steps", _within(1)),
    ("plan.pairs plan.prompt_tokens plan.answer_tokens", _within(1)),
    ("data.max_length data.row_length", _within(2)),
    ("lora.alpha train.epochs sft.learning_rate optimizer.learning_rate optimizer.eps", _POSITIVE),
    ("reference.sync_steps", _within(0)),
    ("reference.mixup_alpha", _SHARE),
    ("optimizer.b1 optimizer.b2 optimizer.warmup_ratio sft.warmup_ratio", _within(0, 1)),
    ("optimizer.min_lr_rate", (lambda value: 0 <= value <= 1, "a number in [0, 1]")),
    ("optimizer.layer_decay", _SHARE),
    ("train.freeze lora.targets", (_is_pattern, "a regular expression")),
    ("mesh.replica mesh.fsdp mesh.tensor", _AXIS),
    ("model.dtype", _one_of("auto", "float32", "bfloat16")),  # float16 loses most gradients of the head to underflow
    ("model.param_dtype", _one_of("float32", "bfloat16")),
    ("lora.base", _one_of("", "int8", "nf4")),
    ("data.truncate_prompt", _one_of("keep_end", "keep_start", "error")),
    ("data.on_bad_row", _one_of("error", "skip")),
    ("data.rankings", _one_of("all", "best")),
    ("data.turns", _one_of("assistant", "last", "all")),
    ("data.on_template_loss", _one_of("error", "warn")),
    ("data.date", (_is_day, "a day as YYYY-MM-DD, or nothing")),
    ("data.layout", _one_of("auto", "shared", "repeated")),
    ("export.dtype", _one_of("", "float32", "bfloat16", "float16")),
    ("checkpoint.best", (re.compile(r"(\S+/\S+:(max|min))?").fullmatch, "METRIC:max or METRIC:min, or nothing")),
    ("prepare hooks", (re.compile(r"([\w.]+:\w+)?").fullmatch, "'module:function', or nothing")),
)
RULES: dict[str, Rule] = {name: rule for names, rule in _RULES for name in names.split()}
RULES |= {f"loss.{name}": (each.valid.holds, each.valid.expected) for name, each in OPTIONS.items() if each.valid}
Problems = dict[str, tuple[str, str, str]]  # dotted name of a field: got, expected, remedy (empty: change the value)
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def base() -> Any:  # a ConfigDict; its own annotations would make every `config.loss.beta = 0.1` a type error
    """Returns the default configuration as a locked ConfigDict with typed fields, so that flags can set unset ones."""
    return _thaw(Config())


def _thaw(config: object) -> config_dict.ConfigDict:
    """Returns the ConfigDict of a dataclass; the inverse of `freeze`."""
    fields: dict[str, object] = {}
    for name, (kind, _) in _kinds(type(config)).items():
        value, reference = getattr(config, name), config_dict.FieldReference  # placeholder(kind), with a value
        fields[name] = _thaw(value) if dataclasses.is_dataclass(value) else reference(value, field_type=kind)
    return config_dict.ConfigDict(fields).lock()


@functools.cache
def _kinds(section: type) -> dict[str, tuple[type, bool]]:
    """Returns the type of each field of a dataclass, and whether it may be None."""
    hints = typing.get_type_hints(section).items()
    return {name: ((typing.get_args(hint) or (hint,))[0], isinstance(hint, types.UnionType)) for name, hint in hints}


def flat(config: object, prefix: str = "") -> dict[str, object]:
    """Returns {dotted name: value} of every field."""
    values: dict[str, object] = {}
    for name in _kinds(type(config)):
        value = getattr(config, name)
        values |= flat(value, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else {f"{prefix}{name}": value}
    return values


def freeze(config: config_dict.ConfigDict) -> Config:
    """Returns the checked, immutable form of a ConfigDict. Raises: InputError that names every invalid field."""
    return _checked(config.to_dict())


def to_json(config: Config) -> str:
    """Returns all fields as JSON, which `from_json` reads."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, place: str) -> Config:
    """Returns the configuration that `to_json` wrote, without the code it names; missing fields have their default.

    Raises: InputError as `from_file` does, and for fields that do not fit together.
    """
    return _checked(dataclasses.asdict(from_file(text, place)), files.Source(place))


def from_file(text: str, place: str, *, overridden: Collection[str] = ()) -> Config:
    """Returns the fields of a YAML or JSON file, without the code it names; the others have their default.

    Only a recipe or the command line may name code to run, not a data file: the fields in CODE are returned empty, and
    a user's own loss is refused. Whether the fields fit together is not checked, because flags may change them.

    Args:
      overridden: dotted names of the fields that the command line sets; these may name code.
    Raises: InputError, with `place` for the file, for a field that is unknown or out of its range.
    """
    config = record_from_json(text, place)
    config = dataclasses.replace(config, **dict.fromkeys(CODE - {*overridden}, ""))
    if ":" in config.loss.name and "loss.name" not in overridden:
        name = config.loss.name
        raise InputError(
            f"{place}: config.loss.name",
            got=f"{name!r}, which names code, in a data file",
            expected="a loss of docs/objectives.md, or code that a recipe or the command line names",
            remedy=f"Give the recipe with --config, or this file and --config.loss.name={name}.",
        )
    return config


def record_from_json(text: str, place: str) -> Config:
    """Returns the configuration that `to_json` wrote, with the code it names: to compare with another, never to run.

    A `place` that ends in .yaml or .yml is one of YAML. Dotted names stand for fields of sections.

    Raises: InputError, with `place` for the file.
    """
    return _checked(*files.parse(text, place), complete=False)


def changed(old: Config, new: Config, fields: Sequence[str] | None = None) -> list[str]:
    """Lists the fields that differ between two configurations, each as `optimizer.b1: 0.9 -> 0.95`.

    Args:
      fields: dotted names of the fields to compare; None: all that must be equal when a run resumes.
    """
    before, after = flat(old), flat(new)
    fields = [name for name in before if name not in RESUMABLE + CHANGEABLE] if fields is None else fields
    names = [name for name in fields if before[name] != after[name]]

    def value(of: object) -> str:
        return "unset" if of is None else shown(of, 200)

    return [f"{name}: {value(before[name])} -> {value(after[name])}" for name in names]


_NO_FILE = files.Source()


def _checked(fields: Mapping[str, object], source: files.Source = _NO_FILE, *, complete: bool = True) -> Config:
    """Returns the configuration of these fields.

    Args:
      source: the file that they are from, if any.
      complete: whether they must fit together; not where flags may still change them.
    """
    problems: Problems = {}
    config = _section(Config, fields, "", problems)
    for name, value in flat(config).items():
        is_valid, expected = RULES.get(name, (lambda _: True, ""))
        if value is not None and name not in problems and not is_valid(value):
            _refuse(problems, name, value, expected)
    if complete:
        _check_relations(config, problems)
    change = "Correct it in the file." if source.path else "Set it in the file of --config or give --config.{}=VALUE."
    errors = [
        InputError(source.place(name), got=got, expected=expected, remedy=remedy or change.format(name))
        for name, (got, expected, remedy) in problems.items()
    ]
    if errors:
        listing = "They are:" + "".join(f"\n  {error}" for error in errors)
        several = InputError(source.place(), got=f"{len(errors)} problems", expected="none", remedy=listing)
        raise several if len(errors) > 1 else errors[0]
    return config


def _refuse(problems: Problems, name: str, value: object, expected: str) -> None:
    problems[name] = "empty" if value == "" else shown(value), expected, ""


def _check_relations(config: Config, problems: Problems) -> None:
    data, mesh = config.data, config.mesh
    if not config.model.path and not config.plan.architecture and "model.path" not in problems:
        _refuse(problems, "model.path", "", "a Hugging Face folder or Hub id")
    if data.max_prompt_length >= data.max_length and "data.max_length" not in problems:
        expected = f"a number < config.data.max_length, which is {data.max_length}"
        _refuse(problems, "data.max_prompt_length", data.max_prompt_length, expected)
    if config.eval.every_steps > 0 and not data.eval:
        _refuse(problems, "eval.every_steps", config.eval.every_steps, "0 where config.data.eval is empty")
    for name, value, nothing in (
        ("eval.patience", config.eval.patience, "0"),
        ("checkpoint.best", config.checkpoint.best, "empty"),
    ):
        if value and not config.eval.every_steps and name not in problems:
            _refuse(problems, name, value, f"{nothing} where config.eval.every_steps is 0")
    for section in ("optimizer", "sft"):
        each = getattr(config, section)
        if each.warmup_steps and each.warmup_ratio and f"{section}.warmup_ratio" not in problems:
            problems[f"{section}.warmup_ratio"] = (
                str(each.warmup_ratio),
                f"0 where config.{section}.warmup_steps is set, which is {each.warmup_steps}",
                f"Leave one of the two out; --config.{section}.warmup_steps=0 takes the recipe's away.",
            )
    lora = config.lora
    if lora.path and lora != Lora(path=lora.path, base=lora.base):
        _refuse(problems, "lora.path", lora.path, "empty, or the only field of lora that is set besides base")
    elif not (lora.rank or lora.path or lora == Lora() or any(name.startswith("lora.") for name in problems)):
        _refuse(problems, "lora.rank", lora.rank, "a number >= 1 where other fields of lora are set")
    if (lora.rank or lora.path) and config.train.freeze:
        _refuse(
            problems,
            "train.freeze",
            config.train.freeze,
            "empty where adapters train: they freeze everything else",
        )
    reference = config.reference
    if (
        reference.mixup_alpha != 1
        and "reference.mixup_alpha" not in problems
        and not (reference.sync_steps and not lora.rank and not lora.path)
    ):
        expected = "1, unless reference.sync_steps is set and all parameters train"
        _refuse(problems, "reference.mixup_alpha", reference.mixup_alpha, expected)
    if (mesh.replica, mesh.fsdp, mesh.tensor).count(-1) > 1:
        got = f"replica {mesh.replica}, fsdp {mesh.fsdp}, tensor {mesh.tensor}"
        problems["mesh"] = got, "at most one axis of -1", "Give the other axes a size."


def _section(section: type[_Section], fields: Mapping[str, Any], prefix: str, problems: Problems) -> _Section:
    """Builds an instance of a dataclass; an invalid field keeps its default and is added to `problems`."""
    kinds, values = _kinds(section), {}
    problems.update({f"{prefix}{name}": _unknown(name, kinds) for name in fields if name not in kinds})
    for name, (kind, optional) in kinds.items():
        value = fields.get(name, getattr(section(), name))
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            values[name] = _section(kind, value, f"{prefix}{name}.", problems)
        elif type(value) is kind or (kind is float and type(value) is int) or (optional and value is None):
            values[name] = float(value) if kind is float and value is not None else value  # 1 means 1.0
        else:
            expected = type_name(kind) + (", or nothing" if optional else "")
            _refuse(problems, f"{prefix}{name}", value, expected)
    return section(**values)


def type_name(kind: type) -> str:
    """Returns what values of a field of this type are, for messages."""
    return _TYPE_NAMES.get(kind, "an object with the fields of the section")


def _unknown(name: str, valid: Iterable[str], typed: Callable[[str], str] = str) -> tuple[str, str, str]:
    """Returns got, expected and remedy for a name that is no field.

    Args:
      typed: how a dotted field is written where the name was found.
    """
    last = name.rpartition(".")[2]
    elsewhere = [field for field in flat(Config()) if field.endswith(f".{last}")]
    close = difflib.get_close_matches(name, valid, n=3)
    meant = elsewhere if len(elsewhere) == 1 else close
    theirs = "" if len(elsewhere) == 1 else trl.remedy(last, typed)
    remedy = theirs or (f"Did you mean {' or '.join(map(typed, meant or elsewhere))}?" if meant or elsewhere else "")
    return f"no field {name!r}", "one of " + ", ".join(valid), remedy or "Remove it."


__getattr__ = aliases.forward(
    __name__, {name: f"dpo_jax.flags.{name}" for name in ("define_flags", "parse_flags", "from_flags", "load")}
)
