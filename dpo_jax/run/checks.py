"""Checks of a configuration against the names that exist, the model and the data, before a device is touched."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from dpo_jax import sharding
from dpo_jax.config import Config
from dpo_jax.data.dataset import PairSet
from dpo_jax.data.order import epoch_size, share
from dpo_jax.hf import hub
from dpo_jax.losses import REGISTRY, Objective
from dpo_jax.models import decoder, quantized
from dpo_jax.models.attention.choose import IMPLEMENTATIONS
from dpo_jax.models.config import DecoderConfig
from dpo_jax.run.choices import optimizer_of
from dpo_jax.runtime import hosts
from dpo_jax.types import InputError, check_choice, listed

# Kinds of data, for messages.
KINDS = {
    "paired": "pairs of a chosen and a rejected answer",
    "unpaired": "answers labeled good or bad",
    "ranked": "whole rankings",
}


def check_names(config: Config, objective: Objective) -> None:
    """Raises InputError for any unknown name or option, or a reference sync of an objective that reads no reference."""
    if objective.reference_free and config.reference.sync_steps:
        raise InputError(
            "config.reference.sync_steps",
            got=f"got {config.reference.sync_steps}, and loss {config.loss.name!r} reads no reference",
            expected="0",
            remedy="Leave it out, or choose a loss that reads one.",
        )
    optimizer_of(config.optimizer, total_steps=1)
    decoder.check_remat(config.model.remat)
    sharding.parse_rules(config.mesh.rules)
    quantized.check_available(config.lora.base)
    check_choice("config.model.attention", config.model.attention, IMPLEMENTATIONS)


def check_upload(config: Config) -> None:
    """Raises InputError on process 0 unless the Hub would take an export, where `export.push_to_hub` asks for it."""
    if config.export.push_to_hub and hosts.first():
        hub.check_access(config.export.push_to_hub)


def check_model_named(config: Config) -> None:
    """Raises InputError if `model.path` is empty; only the command `plan` works without it."""
    if not config.model.path:
        raise InputError(
            "config.model.path",
            got="empty",
            expected="a Hugging Face folder or Hub id",
            remedy="Set it in the file of --config or give --config.model.path=VALUE.",
        )


def fit(config: Config, model: DecoderConfig, lengths: Int[np.ndarray, "N _"]) -> tuple[DecoderConfig, str]:
    """Returns the model for sequences no longer than these, and the layout of pairs, one of `layout.LAYOUTS`.

    Args:
      lengths: token counts of prompt and answers of every pair that will be laid out.
    Raises: InputError if a sequence has positions that the model lacks, or if `data.layout` is shared and a
      sequence exceeds the model's attention window, or the length from which its rotary frequencies change.
    """
    longest = int((lengths[:, 0] + lengths[:, 1:].max(1)).max())
    if model.learned_positions and longest > model.max_positions:
        raise InputError(
            "config.data.max_length",
            got=f"sequences of up to {longest} tokens, and the model has learned {model.max_positions} positions",
            expected=f"at most {model.max_positions}",
            remedy="Lower it, or use a model with more.",
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
            got=f"'shared', and sequences of {longest} tokens, longer than the model's attention window or than "
            "its rotary frequencies are made for",
            expected="auto or repeated",
            remedy="Change it, or lower --config.data.max_length.",
        )
    if config.data.layout == "auto":
        return model, "repeated" if model.needs_whole_sequences else "shared"
    return model, config.data.layout


def check_goes_on(config: Config, changes: Mapping[str, object], step: int | None, total: int) -> None:
    """Raises InputError if a run cannot go on from a step under a changed configuration.

    Args:
      changes: by the dotted names of fields.
      step: of the newest checkpoint; None: there is none.
      total: updates that the configuration asks for.
    """
    if step is not None and step > total:
        raise InputError(
            f"config.train.{'epochs' if config.train.steps is None else 'steps'}",
            got=f"{total} updates, and the run has made {step}",
            expected=f"at least {step}",
            remedy="Raise it, or give another --workdir; dpo-jax export --step=N writes an earlier checkpoint.",
        )
    if step and "data.eval" in changes and config.reference.sync_steps:
        raise InputError(
            "config.data.eval",
            got="other pairs than the run's, and the reference syncs with the policy",
            expected="those that the run began with: the reference that would score others is gone",
            remedy="Leave the change out, and evaluate on others afterwards, without this reference.",
        )


def place_of(name: str) -> str:
    """Names the field of a set of pairs, for messages: `config.data.eval, helpful` of the set `eval/helpful`."""
    return f"config.data.{name}".replace("/", ", ")


def check_pairs(pairs: PairSet, name: str, *, sft_steps: int) -> None:
    """Raises InputError if the pairs have reference log-probs or weights that the run would ignore."""
    provided = pairs.report["reference_given"]
    if provided and sft_steps:
        raise InputError(
            "config.sft.steps",
            got=f"got {sft_steps}, and {provided} pairs with reference log-probs, of the model before those steps",
            expected="0, or pairs without them: the reference is the model after those steps",
            remedy="Leave these out with --config.data.columns=ref_chosen_logps=,ref_rejected_logps=, or give "
            "--config.sft.steps=0.",
        )
    counts = np.bincount(pairs.source, minlength=len(pairs.names)).tolist()
    for source, weight, count in zip(pairs.names, pairs.weights, counts, strict=True):
        if name != "train" and weight != 1:
            raise InputError(
                place_of(name),
                got=f"weight {weight:g} of {source}",
                expected="no weights: an evaluation takes every pair once",
                remedy="Leave the weight off.",
            )
        if count and not share(count, weight):
            raise InputError(
                "config.data.train",
                got=f"weight {weight:g} of {source} leaves none of its pairs in an epoch",
                expected="a weight that leaves at least one",
                remedy="Raise the weight or leave the file out.",
            )


def check_kind(pairs: PairSet, name: str, objective: Objective, loss: str) -> None:
    """Raises InputError for pairs of a kind that the objective, configured as `loss`, cannot be trained on."""
    if pairs.kind not in objective.kinds:
        readers = [each for each, entry in REGISTRY.items() if pairs.kind in entry.kinds]
        raise InputError(
            place_of(name),
            got=f"{KINDS[pairs.kind]}, and loss {loss!r}",
            expected=" or ".join(KINDS[kind] for kind in sorted(objective.kinds)) + " for this loss",
            remedy=f"Give another --config.loss.name (such data are for {listed(readers)}), or other options or data: "
            "docs/objectives.md says what goes with what.",
        )


def check_weights_and_margins(pairs: PairSet, name: str, objective: Objective, loss: str) -> None:
    """Raises InputError for weights or margins of pairs that the objective, configured as `loss`, cannot use."""
    place, report = place_of(name), pairs.report
    readers = ", ".join(each for each, entry in REGISTRY.items() if entry.takes_margins)
    others = ", ".join(each for each, entry in REGISTRY.items() if not entry.takes_weights)
    if report["margins_given"] and not objective.takes_margins:
        raise InputError(
            place,
            got=f"{report['margins_given']} pairs with a margin, and loss {loss!r} reads none",
            expected=f"no column margin, or losses that read it: {readers}",
            remedy='Leave the column out with --config.data.columns="margin=", or give another --config.loss.name.',
        )
    if pairs.pair_weights is None:
        return
    if not objective.takes_weights:
        raise InputError(
            place,
            got=f"{report['weights_given']} pairs with a weight, and loss {loss!r} compares whole batches without them",
            expected=f"no column weight, or other losses than {others}; one of your own that reads `present` must read "
            "`weight` too",
            remedy='Leave the column out with --config.data.columns="weight=", or give another --config.loss.name.',
        )
    if not pairs.pair_weights.any():
        raise InputError(
            place,
            got="all weights are 0",
            expected="one above 0",
            remedy='Correct the column weight, or leave it out with --config.data.columns="weight=".',
        )


def updates_of(config: Config, pairs: PairSet) -> int:
    """Returns the number of updates on these pairs: `train.steps`, or the whole batches in `train.epochs` epochs.

    Raises: InputError if an epoch has fewer pairs than a batch of any stage.
    """
    size = epoch_size(pairs.source, pairs.weights)
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
