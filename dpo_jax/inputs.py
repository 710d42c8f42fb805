"""What a run reads before it touches a device: recipe inputs, tokenizer, architecture and tokenised pairs."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from dpo_jax import hosts, losses, optim, sharding
from dpo_jax.config import Config
from dpo_jax.data.order import epoch_size, share
from dpo_jax.data.pairs import PairSet, load
from dpo_jax.data.specials import disagreements, unended
from dpo_jax.data.tokenize import identity, load_tokenizer
from dpo_jax.data.unrelated import UnrelatedPairs
from dpo_jax.models import adapters as low_rank
from dpo_jax.models import decoder, hf_files, hf_io, quantised
from dpo_jax.models.attention import IMPLEMENTATIONS
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.weights import Tensor
from dpo_jax.selection import EVERYTHING, Selection, select
from dpo_jax.types import InputError, check_choice


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
    train_unrelated: UnrelatedPairs | None = None  # prompts with answers of others, where the objective asks for them
    eval_unrelated: UnrelatedPairs | None = None
    warnings: tuple[str, ...] = ()  # a line each: what does not fit between tokenizer, model and pairs, if not meant so

    @property
    def sets(self) -> list[PairSet]:
        """The sets of pairs that there are."""
        return [pairs for pairs in (self.train, self.eval) if pairs is not None]

    @property
    def unrelated(self) -> list[UnrelatedPairs]:
        """Those of each set of pairs, in the same order; none if the objective does not ask."""
        return [pairs for pairs in (self.train_unrelated, self.eval_unrelated) if pairs is not None]

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
        return np.concatenate([pairs.lengths for pairs in [*self.sets, *self.unrelated]])


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


def check_names(config: Config) -> None:
    """Raises InputError for any name or option that no module knows."""
    if loss_of(config).reference_free and config.reference.sync_steps:
        raise InputError(
            "config.reference.sync_steps",
            got=f"got {config.reference.sync_steps}, and loss {config.loss.name!r} reads no reference",
            expected="0",
            remedy="Unset it or choose a loss that reads one.",
        )
    optimizer_of(config, total_steps=1)
    decoder.check_remat(config.model.remat)
    sharding.parse_rules(config.mesh.rules)
    quantised.check_available(config.lora.base)
    check_choice("config.model.attention", config.model.attention, IMPLEMENTATIONS)


def loss_of(config: Config) -> losses.Objective:
    """The configured objective with its options bound."""
    options = {k: v for k, v in dataclasses.asdict(config.loss).items() if k != "name" and v is not None}
    return losses.make_loss(config.loss.name, options)


def optimizer_of(config: Config, *, total_steps: int, selection: Selection = EVERYTHING) -> Any:
    """The configured optimizer and its learning-rate schedule over `total_steps` updates."""
    options = {name: value for name, value in dataclasses.asdict(config.optimizer).items() if name != "layer_decay"}
    paced = selection.paced if selection.rates else None
    return optim.make_optimizer(**options, total_steps=total_steps, paced=paced)


def selection_of(config: Config, table: Sequence[Tensor], model: DecoderConfig) -> Selection:
    """What trains of a model of this table. Raises: InputError for patterns or an adapter that do not fit it."""
    lora, adapters = config.lora, None
    if lora.path:
        adapters = low_rank.read(hf_io.resolve(lora.path), table, model.stacks)
    elif lora.rank:
        alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
        chosen = low_rank.choose(table, model.stacks, lora.targets)
        adapters = low_rank.Adapters(lora.rank, alpha, lora.rank_stabilised, chosen)
    freeze, decay = config.train.freeze, config.optimizer.layer_decay
    return select(table, model, adapters=adapters, freeze=freeze, layer_decay=decay)


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

    Of several processes the first goes first, so that what it prepares and tokenises is there for the others.
    Raises: InputError as `load_inputs`, if the weights are not those of config.json (their names and shapes), or if
      processes read different models or data.
    """
    with hosts.first_alone("inputs") as alone:
        if alone:
            prepare(config, workdir)
        found = load_inputs(config, training=training)
    hf_io.check_weights(found.base, found.model)
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
    folder = hf_io.resolve(config.model.path)
    model, hf_config = hf_io.read_config(folder)
    generation = folder / hf_files.GENERATION
    files = {"config": hf_config, "generation": hf_files.read_json(generation) if generation.is_file() else {}}
    tokenizer_folder = hf_io.resolve(config.tokenizer.path) if config.tokenizer.path else folder
    hf_io.check_tokenizer(tokenizer_folder)  # transformers would make an empty one by the model's type
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
    unrelated = {name: each.unrelated(room) for name, each in asked.items() if each is not None}
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
        train_unrelated=unrelated.get("train"),
        eval_unrelated=unrelated.get("eval"),
        selection=selection_of(config, hf_io.family_table(folder, model)[0], model),
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


def fit(config: Config, model: DecoderConfig, lengths: Int[np.ndarray, "N _"]) -> tuple[DecoderConfig, str]:
    """The model for sequences no longer than these, and how pairs are laid out: one of `layout.LAYOUTS`.

    Args:
      lengths: token counts of prompt and answers of every pair that will be laid out.
    Raises: InputError if a sequence has positions that the model lacks, or if prompts are to be shared and the model
      attends through a window, or turns by the length of a sequence, that some of these exceed.
    """
    longest = int((lengths[:, 0] + lengths[:, 1:].max(1)).max())
    if model.learned_positions and longest > model.max_positions:
        raise InputError(
            "config.data.max_length",
            got=f"sequences of up to {longest} tokens, and the model has learned {model.max_positions} positions",
            expected=f"at most {model.max_positions}",
            remedy="Lower it, or take a model with more.",
        )
    if config.train.router_balance and not model.experts:
        raise InputError(
            "config.train.router_balance",
            got=f"got {config.train.router_balance}, and the model has no experts",
            expected="0",
            remedy="Leave it out.",
        )
    model = model.for_length(longest)
    if config.data.layout == "shared" and model.needs_whole_sequences:
        raise InputError(
            "config.data.layout",
            got=f"'shared', and the model has windows, or turns by a sequence's length, that {longest} tokens exceed",
            expected="auto or repeated",
            remedy="Change it, or lower data.max_length.",
        )
    if config.data.layout == "auto":
        return model, "repeated" if model.needs_whole_sequences else "shared"
    return model, config.data.layout


def check_pairs(config: Config, pairs: PairSet, split: str) -> None:
    """Raises InputError for what a set of pairs has and the run could only ignore."""
    given = pairs.report["reference_given"]
    if given and config.sft.steps:
        raise InputError(
            "config.sft.steps",
            got=f"got {config.sft.steps}, and {given} pairs bring reference log-probs, of the model before those steps",
            expected="0, or pairs without: the reference is the model after them",
            remedy="Take the columns ref_chosen_logps and ref_rejected_logps away, or set sft.steps to 0.",
        )
    counts = np.bincount(pairs.source, minlength=len(pairs.names)).tolist()
    for name, weight, count in zip(pairs.names, pairs.weights, counts, strict=True):
        if split == "test" and weight != 1:
            raise InputError(
                "config.data.eval",
                got=f"weight {weight:g} of {name}",
                expected="no weights: an evaluation takes every pair once",
                remedy="Leave the weight off.",
            )
        if count and not share(count, weight):
            raise InputError(
                "config.data.train",
                got=f"weight {weight:g} of {name} leaves none of its pairs in an epoch",
                expected="a weight that leaves at least one",
                remedy="Raise the weight or leave the file out.",
            )


def check_kind(config: Config, objective: losses.Objective, pairs: PairSet, split: str) -> None:
    """Raises InputError for pairs of a kind that the objective cannot be trained on."""
    if pairs.kind not in objective.kinds:
        raise InputError(
            f"config.data.{'train' if split == 'train' else 'eval'}",
            got=f"{pairs.kind} data, and loss {config.loss.name!r}",
            expected=f"{' or '.join(sorted(objective.kinds))} data for it",
            remedy="Change loss.name, or its options, or the data: docs/objectives.md says what goes with what.",
        )


def check_lengths(config: Config, inputs: Inputs) -> int:
    """Returns the number of updates: `train.steps`, or the whole batches in `train.epochs` epochs.

    Raises: InputError if an epoch has fewer pairs than a batch of any stage.
    """
    assert inputs.train is not None
    size = epoch_size(inputs.train.source, inputs.train.weights)
    batches = {"train": config.train.batch_pairs} | ({"sft": config.sft.batch_pairs} if config.sft.steps else {})
    for section, batch_pairs in batches.items():
        if batch_pairs > size:
            raise InputError(
                f"config.{section}.batch_pairs",
                got=f"got {batch_pairs}, and an epoch has {size} pairs",
                expected=f"at most {size}",
                remedy="Lower it, or give more pairs.",
            )
    if config.train.steps is not None:
        return config.train.steps
    return max(1, int(config.train.epochs * size) // config.train.batch_pairs)


def start_of_adapters(config: Config, inputs: Inputs) -> dict[str, str]:
    """The digest of the adapters in `lora.path`; nothing without such, for others have no effect at their start."""
    adapters = inputs.selection.adapters if config.lora.path else None
    return {} if adapters is None else {"adapters": low_rank.digest(hf_io.resolve(config.lora.path), adapters)}


def reference_identity(
    config: Config, inputs: Inputs, *, layout: str, dtype: str, attention: str, platform: str
) -> dict[str, Any]:
    """All that decides a pair's stored log-probs besides its own token ids."""
    data = config.data
    return {
        **start_of_adapters(config, inputs),
        **({} if (tokens := loss_of(config).reference_tokens) is None else {"tokens": tokens}),
        **({"base": config.lora.base} if config.lora.base else {}),
        "weights": hf_io.digest(inputs.folder, mine=hosts.mine, gather=hosts.merged("weights")),
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
