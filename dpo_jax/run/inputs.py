"""What a run reads before it touches a device: recipe inputs, tokenizer, architecture and tokenized pairs."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.config import Config
from dpo_jax.data.dataset import PairSet, load
from dpo_jax.data.mismatched import MismatchedPairs
from dpo_jax.data.special_tokens import disagreements, unended
from dpo_jax.data.tokenize import identity, load_tokenizer
from dpo_jax.hf import checkpoints, folders, peft
from dpo_jax.models.config import DecoderConfig
from dpo_jax.run.checks import check_kind, check_pairs, fit
from dpo_jax.run.choices import loss_of, selection_of
from dpo_jax.run.trainable import Selection
from dpo_jax.runtime import hosts
from dpo_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything read from disk but the weights."""

    name: str  # the model as the configuration names it: a folder or a Hub id
    base: Path  # its folder
    folder: Path  # the one whose weights it starts from, the same unless a stage came before
    tokenizer_folder: Path
    model: DecoderConfig
    tokenizer: Any
    train: PairSet | None
    eval: PairSet | None
    selection: Selection  # what trains
    train_mismatched: MismatchedPairs | None = None  # prompts with answers of others, where the objective asks for them
    eval_mismatched: MismatchedPairs | None = None
    warnings: tuple[str, ...] = ()  # a line each: what does not fit between tokenizer, model and pairs, if not meant so

    @property
    def sets(self) -> list[PairSet]:
        """The sets of pairs that there are."""
        return [pairs for pairs in (self.train, self.eval) if pairs is not None]

    @property
    def mismatched(self) -> list[MismatchedPairs]:
        """Those of each set of pairs, in the same order; none if the objective does not ask."""
        return [pairs for pairs in (self.train_mismatched, self.eval_mismatched) if pairs is not None]

    @property
    def paired(self) -> bool:
        """Whether pairs have both their answers."""
        return all(pairs.kind != "unpaired" for pairs in self.sets)

    @property
    def digests(self) -> dict[str, str | None]:
        """Of each set of pairs, what tells it from any other; None where there is none."""
        sets = {"train": self.train, "eval": self.eval}
        return {name: None if pairs is None else pairs.digest for name, pairs in sets.items()}

    @property
    def lengths(self) -> np.ndarray:
        """Token counts [N, 1 + K] of everything that is laid out."""
        return np.concatenate([pairs.lengths for pairs in [*self.sets, *self.mismatched]])


def resolve_paths(config: Config, workdir: Path) -> Config:
    """Puts the working folder where text fields say `{workdir}`.

    Raises: InputError if `data.train` or `data.eval` say so and would read a part of its path as something else.
    """
    if {*",*"} & {*str(workdir)} and "{workdir}" in config.data.train + config.data.eval:
        raise InputError(
            "--workdir",
            got=f"{str(workdir)!r}, and the data lie in it",
            expected="a path without ',' and '*', which separate and weigh data",
            remedy="Name another.",
        )

    def fill(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes = {field.name: fill(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **changes)
        return value.replace("{workdir}", str(workdir)) if isinstance(value, str) else value

    return fill(config)


def prepare(config: Config, workdir: Path) -> None:
    """Calls the recipe's own `prepare`, if it names one."""
    if not config.prepare:
        return
    module, _, function = config.prepare.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            "config.prepare",
            got=f"{config.prepare!r} cannot be imported ({error})",
            expected="module:function",
            remedy="Correct it, or leave it empty.",
        ) from error
    make(workdir)


def read_inputs(config: Config, workdir: Path, *, training: bool) -> Inputs:
    """What `load_inputs` returns, once the recipe has made its own inputs, if it does.

    Of several processes the first goes first, so that what it prepares and tokenizes is there for the others.
    Raises: InputError as `load_inputs`, if the weights are not those of config.json (their names and shapes), or if
      processes read different models or data.
    """
    with hosts.first_alone("inputs") as alone:
        if alone:
            prepare(config, workdir)
        found = load_inputs(config, training=training)
    checkpoints.check_weights(found.base, found.model)
    facts = {"model": dataclasses.asdict(found.model), "tokenizer": identity(found.tokenizer), **found.digests}
    facts |= start_of_adapters(config, found)
    hosts.agree("data and model", facts)
    return found


def load_inputs(config: Config, *, training: bool) -> Inputs:
    """Reads and checks everything that needs no device; without rejected answers where the loss compares none.

    Args:
      config: with its paths resolved.
      training: whether there must be pairs to train on.
    """
    folder = checkpoints.resolve(config.model.path)
    model, hf_config = checkpoints.read_config(folder)
    generation = folder / folders.GENERATION
    files = {"config": hf_config, "generation": folders.read_json(generation) if generation.is_file() else {}}
    tokenizer_folder = checkpoints.resolve(config.tokenizer.path) if config.tokenizer.path else folder
    checkpoints.check_tokenizer(tokenizer_folder)  # transformers would make an empty one by the model's type
    tokenizer = load_tokenizer(str(tokenizer_folder))
    if training and not config.data.train:
        raise InputError(
            "config.data.train", got="is empty", expected="a path or Hub id", remedy="Name the training pairs."
        )

    def pairs(spec: str, split: str) -> PairSet | None:
        if not spec:
            return None
        data = config.data
        found = load(
            spec,
            split=split,
            format=data.format,
            tokenizer=tokenizer,
            vocab_size=model.vocab_size,
            max_length=data.max_length,
            max_prompt_length=data.max_prompt_length,
            truncate_prompt=data.truncate_prompt,
            on_bad_row=data.on_bad_row,
            rankings="whole" if "plackett_luce" in objective.names else data.rankings,
            cache_dir=data.cache_dir,
        )
        check_pairs(config, found, split)
        check_kind(config, objective, found, split)
        return found.without_rejected() if objective.beta is None else found

    objective = loss_of(config)
    sets = {"train": pairs(config.data.train, "train"), "eval": pairs(config.data.eval, "test")}
    answers = max((each.lengths.shape[1] - 1 for each in sets.values() if each is not None), default=2)
    sets = {name: None if each is None else each.widened(answers) for name, each in sets.items()}
    asked = sets if "kl" in objective.needs else {}
    room = config.data.max_length
    mismatched = {name: each.mismatched(room) for name, each in asked.items() if each is not None}
    warnings = disagreements(tokenizer, vocab_size=model.vocab_size, **files)
    for name, each in sets.items():
        if each is not None:
            warnings += unended(name, each, tokenizer, max_length=config.data.max_length, **files)
    found = Inputs(
        name=config.model.path,
        base=folder,
        folder=folder,
        tokenizer_folder=tokenizer_folder,
        model=model,
        tokenizer=tokenizer,
        **sets,
        train_mismatched=mismatched.get("train"),
        eval_mismatched=mismatched.get("eval"),
        selection=selection_of(config, checkpoints.family_table(folder, model)[0], model),
        warnings=tuple(warnings),
    )
    if not found.sets:
        raise InputError(
            "config.data",
            got="neither train nor eval names a file",
            expected="at least one of them",
            remedy="Name the pairs.",
        )
    fit(config, model, found.lengths)
    return found


def start_of_adapters(config: Config, inputs: Inputs) -> dict[str, str]:
    """The digest of the adapters in `lora.path`; nothing without such, for others have no effect at their start."""
    adapters = inputs.selection.adapters if config.lora.path else None
    return {} if adapters is None else {"adapters": peft.digest(checkpoints.resolve(config.lora.path), adapters)}


def reference_identity(
    config: Config, inputs: Inputs, *, layout: str, dtype: str, attention: str, platform: str
) -> dict[str, Any]:
    """All that decides a pair's stored log-probs besides its own token ids."""
    data = config.data
    return {
        **start_of_adapters(config, inputs),
        **({} if (tokens := loss_of(config).reference_tokens) is None else {"tokens": tokens}),
        **({"base": config.lora.base} if config.lora.base else {}),
        "weights": checkpoints.digest(inputs.folder, mine=hosts.mine, gather=hosts.merged("weights")),
        **identity(inputs.tokenizer),
        "format": data.format,
        "max_length": data.max_length,
        "max_prompt_length": data.max_prompt_length,
        "truncate_prompt": data.truncate_prompt,
        "layout": layout,
        "dtype": dtype,
        "param_dtype": config.model.param_dtype,
        "attention": attention,
        "platform": platform,
    }
