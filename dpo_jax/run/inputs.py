"""Inputs of a run, read before a device is touched: tokenizer, architecture, pairs, place of the initial weights."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from dpo_jax.config import Config, Data
from dpo_jax.data.dataset import PairSet, ReadingRules, load
from dpo_jax.data.mismatched import MismatchedPairs
from dpo_jax.data.notices import left_out, unread, untemplated
from dpo_jax.data.special_tokens import disagreements, unended
from dpo_jax.data.specs import sets_of
from dpo_jax.data.tokenize import TokenizationRules, identity, load_tokenizer
from dpo_jax.hf import folders, peft
from dpo_jax.hf.checkpoints import check_tokenizer, check_weights, family_table, read_config, resolve
from dpo_jax.losses import Objective
from dpo_jax.models.config import DecoderConfig
from dpo_jax.run.checks import check_kind, check_pairs, check_weights_and_margins, fit, place_of
from dpo_jax.run.choices import trainable_of
from dpo_jax.run.trainable import Trainable
from dpo_jax.runtime import hosts
from dpo_jax.runtime.files import Path
from dpo_jax.runtime.reading import copied
from dpo_jax.types import InputError

SPLITS = {"train": "train", "eval": "test"}  # the split that data.train and data.eval read by default


def specs_of(data: Data) -> dict[str, str]:
    """Returns the specification of each set of pairs: `train`, and `eval` or, of named sets, `eval/NAME`."""
    of_eval = sets_of(data.eval) if data.eval else {}
    named = {f"eval/{name}" if name else "eval": spec for name, spec in of_eval.items()}
    return ({"train": data.train} if data.train else {}) | named


@dataclasses.dataclass(frozen=True)
class Source:
    """Place of the initial weights, which are the reference's too."""

    folder: Path  # Hugging Face folder of the model
    adapters: Path | None  # PEFT folder that adapters start from; None: drawn from `seed`
    seed: int

    def adapters_digest(self, trainable: Trainable) -> dict[str, str]:
        """Returns the digest of the initial adapters by name; empty where they start without effect or are absent."""
        if self.adapters is None or trainable.adapters is None:
            return {}
        return {"adapters": peft.digest(self.adapters, trainable.adapters)}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything that is read from disk except the weights."""

    name: str  # the model as the configuration names it: a folder or a Hub id
    base: Path  # its folder
    source: Source  # of the initial weights, from `base` unless a stage of fine-tuning came before
    tokenizer_folder: Path
    tokenizer: Any
    model: DecoderConfig
    objective: Objective
    trainable: Trainable  # which parameters train
    sets: dict[str, PairSet]  # "train" and "eval", or "eval/NAME" of named sets: those that the configuration names
    mismatched: dict[str, MismatchedPairs]  # by the same names; empty if the objective reads none
    data_rules: dict[str, str | int]  # settings that decide a pair's tokens, as the reference store's identity has them
    date: str = ""  # YYYY-MM-DD, the day that chat templates write; empty: today
    warnings: tuple[str, ...] = ()  # a line each: disagreements between tokenizer, model and pairs

    @property
    def paired(self) -> bool:
        """Whether every pair has both its answers."""
        return all(pairs.kind != "unpaired" for pairs in self.sets.values())

    @property
    def eval_sets(self) -> dict[str, PairSet]:
        """The sets that evaluations are made on, by name; the name is the first part of their metrics' names."""
        return {name: pairs for name, pairs in self.sets.items() if name != "train"}

    @property
    def digests(self) -> dict[str, str | None]:
        """Digest of each set of pairs, equal for equal sets; None where data.train or data.eval is empty."""
        digests = {name: pairs.digest for name, pairs in self.sets.items()}
        return ({} if self.eval_sets else {"eval": None}) | {"train": None} | digests

    @property
    def lengths(self) -> np.ndarray:
        """Token counts [N, 1 + K] of prompt and answers of everything that is laid out."""
        return np.concatenate([pairs.lengths for pairs in [*self.sets.values(), *self.mismatched.values()]])

    def starting_from(self, exported: Path) -> Inputs:
        """Returns these inputs with initial weights, or initial adapters, from an earlier stage's export."""
        place = {"folder": exported} if self.trainable.adapters is None else {"adapters": exported}
        return dataclasses.replace(self, source=dataclasses.replace(self.source, **place))


def prepare(name: str, workdir: Path) -> None:
    """Calls the recipe's own `prepare`, "module:function", with the working folder; does nothing for an empty name."""
    make = named_function(name, "prepare")
    if make is not None:
        make(workdir)


def named_function(name: str, field: str) -> Callable[..., object] | None:
    """Returns the function that a field names as "module:function"; None for an empty name.

    Raises: InputError if it cannot be imported.
    """
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"config.{field}",
            got=f"{name!r} cannot be imported ({error})",
            expected="module:function, in a module that Python finds from here",
            remedy="Correct it, or leave it empty.",
        ) from error


def read_inputs(config: Config, objective: Objective, workdir: Path, *, training: bool) -> Inputs:
    """Calls the recipe's `prepare`, then reads and checks the inputs as `load_inputs` does.

    Process 0 goes first; the others reuse what it prepared and tokenized.

    Raises: InputError as `load_inputs`, if the weights are not those of config.json (their names and shapes), or if
      processes read different models or data.
    """
    with hosts.first_alone("inputs") as alone:
        if alone:
            prepare(config.prepare, workdir)
        inputs = load_inputs(config, objective, training=training)
    check_weights(inputs.base, inputs.model)
    facts = {"model": dataclasses.asdict(inputs.model), "tokenizer": identity(inputs.tokenizer), **inputs.digests}
    hosts.agree("data and model", facts | inputs.source.adapters_digest(inputs.trainable))
    return inputs


def load_inputs(config: Config, objective: Objective, *, training: bool) -> Inputs:
    """Reads and checks everything that needs no device; without rejected answers where the objective reads none.

    Args:
      config: with its paths resolved.
      training: requires pairs to train on.
    """
    base = resolve(config.model.path, "config.model.path")
    model, hf_config = read_config(base)
    generation = base / folders.GENERATION
    files = {"config": hf_config, "generation": folders.read_json(generation) if generation.is_file() else {}}
    tokenizer_folder = resolve(config.tokenizer.path, "config.tokenizer.path") if config.tokenizer.path else base
    tokenizer_folder = copied(tokenizer_folder, folders.is_small)
    check_tokenizer(tokenizer_folder)  # transformers would make an empty one by the model's type
    tokenizer = load_tokenizer(str(tokenizer_folder))
    if training and not config.data.train:
        raise InputError(
            "config.data.train",
            got="empty",
            expected="a file, folder or Hub id",
            remedy="Give the training pairs as --config.data.train=FILE.",
        )
    sets = read_sets(config, objective, tokenizer, model.vocab_size)
    max_length = config.data.max_length
    others = sets if "kl" in objective.needs else {}
    mismatched = {name: pairs.mismatched(max_length, place=place_of(name)) for name, pairs in others.items()}
    warnings = disagreements(tokenizer, vocab_size=model.vocab_size, **files)
    for name, pairs in sets.items():
        warnings += left_out(name, pairs.report) + unread(name, pairs.report) + untemplated(name, pairs, tokenizer)
        warnings += unended(name, pairs, tokenizer, max_length=max_length, **files)
    rules = ("format", "max_length", "max_prompt_length", "truncate_prompt")
    inputs = Inputs(
        name=config.model.path,
        base=base,
        source=Source(base, resolve(config.lora.path, "config.lora.path") if config.lora.path else None, config.seed),
        tokenizer_folder=tokenizer_folder,
        tokenizer=tokenizer,
        model=model,
        objective=objective,
        trainable=trainable_of(config, family_table(base, model)[0], model),
        sets=sets,
        mismatched=mismatched,
        date=config.data.date,
        data_rules={name: getattr(config.data, name) for name in rules},
        warnings=tuple(warnings),
    )
    fit(config, model, inputs.lengths)
    return inputs


def read_sets(config: Config, objective: Objective, tokenizer: Any, vocab_size: int) -> dict[str, PairSet]:
    """Reads the sets of pairs that the configuration names, all as wide as the one with the longest rankings.

    Raises: InputError if there is none, or one that the objective or the run cannot use.
    """
    data, sets = config.data, {}
    rankings = "whole" if "plackett_luce" in objective.names else data.rankings
    for name, spec in specs_of(data).items():
        pairs = load(
            spec,
            split=SPLITS[name.partition("/")[0]],
            reading=ReadingRules(
                data.format, data.on_bad_row, rankings, data.turns, data.date, data.on_template_loss, data.columns
            ),
            tokenizer=tokenizer,
            tokenization=TokenizationRules(vocab_size, data.max_length, data.max_prompt_length, data.truncate_prompt),
            cache_dir=data.cache_dir,
        )
        check_pairs(pairs, name, sft_steps=config.sft.steps)
        check_kind(pairs, name, objective, config.loss.name)
        check_weights_and_margins(pairs, name, objective, config.loss.name)
        sets[name] = pairs.without_rejected() if objective.answers_read == "chosen" else pairs
    if not sets:
        raise InputError(
            "config.data",
            got="both train and eval are empty",
            expected="a file, folder or Hub id in one of them",
            remedy="Give the pairs as --config.data.train=FILE.",
        )
    answers = max(pairs.lengths.shape[1] - 1 for pairs in sets.values())
    return {name: pairs.widened(answers) for name, pairs in sets.items()}
