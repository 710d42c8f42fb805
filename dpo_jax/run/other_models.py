"""Evaluation of any model on data.eval: against another model, a run's reference, or none."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping

import numpy as np

from dpo_jax import losses
from dpo_jax.config import Config, Lora, Optimizer, Sft
from dpo_jax.data.batches import ReferenceValues
from dpo_jax.data.tokenize import identity, load_tokenizer
from dpo_jax.hf import folders
from dpo_jax.hf.checkpoints import resolve
from dpo_jax.losses import Objective
from dpo_jax.run.evaluate import evaluate_sets, make_summaries
from dpo_jax.run.inputs import Inputs, load_inputs
from dpo_jax.run.programs import Programs, make_programs
from dpo_jax.run.reference_values import complete_store, reference_store
from dpo_jax.run.state import load_params
from dpo_jax.runtime import files
from dpo_jax.runtime.reading import copied
from dpo_jax.types import InputError

NO_TRAINING_PAIRS = {"train": np.arange(0)}  # indices of the pairs to score, by set; those of evaluations are all
# cpo's rewards are beta times the log-probs of the policy, and it reads no reference.
WITHOUT_REFERENCE = ("cpo", {"beta": 1.0})


def config_for(config: Config, model: str, place: str) -> Config:
    """Returns a configuration that reads a model as it is, with the data, tokenizer and computation of another.

    Args:
      model: a Hugging Face folder or Hub id, or a PEFT folder, whose own base model is read then.
      place: flag or field that names it, for errors.
    """
    folder = resolve(model, place)
    base, lora = model, Lora()
    if not (folder / folders.CONFIG).is_file() and (folder / folders.ADAPTER_CONFIG).is_file():
        base, lora = folders.read_json(folder / folders.ADAPTER_CONFIG).get("base_model_name_or_path"), Lora(path=model)
        if not base:
            raise InputError(
                str(folder),
                got="an adapter that does not name its model",
                expected="base_model_name_or_path in adapter_config.json",
                remedy=f"Leave {place} off, and give --config.model.path=MODEL --config.lora.path={model}.",
            )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=base),
        tokenizer=dataclasses.replace(config.tokenizer, path=config.tokenizer.path or config.model.path),
        train=dataclasses.replace(config.train, freeze="", router_balance=0.0),
        optimizer=Optimizer(),
        lora=lora,
        sft=Sft(),
    )


def metrics_of_model(
    config: Config, objective: Objective, values: Mapping[str, ReferenceValues] | None
) -> dict[str, float]:
    """Returns the metrics of the model of a configuration on data.eval.

    Args:
      values: reference log-probs by set; None: there is no reference. Unless the objective reads none, metrics are then
        those of the log-probs alone: `logps/margins`, chosen minus rejected in nats, and `logps/accuracies`, the share
        of pairs where that is above 0; there is no loss.
    """
    raw = values is None and not objective.reference_free
    inputs, programs = opened(config, losses.make_loss(*WITHOUT_REFERENCE) if raw else objective)
    params = load_params(inputs.source, programs)
    running = losses.start_of(inputs.objective)
    row = evaluate_sets(inputs, programs, make_summaries(inputs), values or {}, params, running)
    return of_logps(row) if raw else row


def of_logps(row: Mapping[str, float]) -> dict[str, float]:
    """Returns a row whose rewards are log-probs under their own names, without loss."""
    row = {
        name: value for name, value in row.items() if not name.endswith(("/loss", "rewards/chosen", "rewards/rejected"))
    }
    return {name.replace("rewards/", "logps/"): value for name, value in row.items()}


def reference_of(config: Config, objective: Objective) -> dict[str, ReferenceValues]:
    """Returns log-probs of all sets under the model of a configuration, stored in `reference.path` if that is set."""
    inputs, programs = opened(config, objective)
    with contextlib.ExitStack() as stack:
        folder = config.reference.path or stack.enter_context(tempfile.TemporaryDirectory())
        store = reference_store(inputs, programs, files.path(folder, "config.reference.path"))
        return complete_store(inputs, store, programs, only=NO_TRAINING_PAIRS)[0]


def opened(config: Config, objective: Objective) -> tuple[Inputs, Programs]:
    """Returns inputs and programs of the model of a configuration. Raises: InputError as `load_inputs`."""
    inputs = load_inputs(config, objective, training=False)
    return inputs, make_programs(config, objective, inputs.model, inputs.lengths, trainable=inputs.trainable)


def check_same_tokens(config: Config, model: str, place: str) -> None:
    """Raises InputError if a model has a tokenizer of its own that differs from the configuration's."""
    ours = resolve(config.tokenizer.path or config.model.path, "config.tokenizer.path")
    theirs = resolve(model, place)
    if not (theirs / "tokenizer.json").is_file():
        return  # that of an adapter is its model's
    one, other = (load_tokenizer(str(copied(each, folders.is_small))) for each in (ours, theirs))
    if identity(one)["tokenizer"] != identity(other)["tokenizer"]:
        raise InputError(
            place,
            got=f"{model!r}, whose tokenizer is not that of {str(ours)!r}",
            expected="models that read the same token ids",
            remedy="Compare models with one tokenizer.",
        )
