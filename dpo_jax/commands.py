"""The commands of the command line, a function each: `NAME(config, workdir, **flags)`."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import NamedTuple

from dpo_jax.config import Config, flat
from dpo_jax.export import export_model, upload
from dpo_jax.losses import Objective
from dpo_jax.plan.command import run_plan
from dpo_jax.reporting.console import describe_data
from dpo_jax.reporting.data_summary import show
from dpo_jax.run import checks, history, other_models, workdir
from dpo_jax.run.checkpoints import Checkpoints
from dpo_jax.run.choices import objective_of
from dpo_jax.run.evaluate import evaluate_sets, make_summaries
from dpo_jax.run.inputs import Inputs, load_inputs, read_inputs
from dpo_jax.run.programs import Programs, make_programs
from dpo_jax.run.reference_values import complete_store, reference_store
from dpo_jax.run.state import abstract_params, abstract_running, load_frozen
from dpo_jax.run.workdir import resolve_paths, store_folder
from dpo_jax.runtime import files, hosts
from dpo_jax.runtime.clocks import Stopwatch
from dpo_jax.runtime.files import Path
from dpo_jax.runtime.terminal import say
from dpo_jax.train import after_sft, from_sft, order_of, run, sync_of
from dpo_jax.trees import join
from dpo_jax.types import InputError

# Fields that determine the parameters of a checkpoint.
OF_PARAMETERS = (
    "model.path model.param_dtype train.freeze lora.rank lora.alpha lora.rank_stabilised lora.targets lora.path "
    "lora.base sft.steps"
).split()


def train(config: Config, folder: Path, *, watch: Stopwatch | None = None) -> None:
    """Trains, evaluates and exports, as `train.run`."""
    run(config, folder, watch)


def reference(config: Config, folder: Path) -> None:
    """Scores the reference into `reference.path`, as `score_reference`."""
    score_reference(config, folder)


def evaluate(
    config: Config,
    folder: Path | None,
    *,
    step: str | None = None,
    model: str | None = None,
    reference: str | None = None,
) -> None:
    """Prints metrics on data.eval as JSON: of a checkpoint, see `evaluate_checkpoint`, or of any model."""
    if folder is not None and not model:
        if reference:
            raise InputError(
                "--reference",
                got="given for a checkpoint of a run",
                expected="it beside --model, or no --workdir",
                remedy=f"Export the checkpoint, and give --model={folder / 'export'}.",
            )
        row = evaluate_checkpoint(config, folder, step=step or "")
    else:
        if step:
            raise InputError("--step", got="given with a model", expected="a run", remedy="Leave it or --model out.")
        row = evaluate_model(config, folder, model or config.model.path, reference or "")
    if hosts.first():
        print(json.dumps({name: value if math.isfinite(value) else None for name, value in row.items()}))


def inspect(config: Config, folder: Path, *, pairs: int = 3) -> None:
    """Prints the data as a model sees it; touches no device."""
    show(config, folder, pairs=pairs)


def plan(config: Config, _: Path | None, *, topology: str, sweep: bool = False, reference_in_step: bool = False) -> int:
    """Prints memory, time and cost of a run on a topology; returns the exit status, 3 where memory does not suffice."""
    if not topology:
        raise InputError(
            "--topology", got="not given", expected="chips to plan for", remedy="Give for example --topology=v5p-128."
        )
    return run_plan(config, topology, sweeping=sweep, reference_in_step=reference_in_step)


def export(config: Config, folder: Path, *, out: str = "", merge: bool = False, step: str | None = None) -> None:
    """Writes a checkpoint as a Hugging Face folder, as `export_checkpoint`."""
    export_checkpoint(config, folder, files.path(out, "--out") if out else None, merge=merge, step=step or "")


def score_reference(config: Config, folder: Path) -> None:
    """Runs only the reference pass, into `reference.path`. Raises: InputError as `train.run` does."""
    unresolved = workdir.dated(config, folder)
    config = resolve_paths(unresolved, folder)
    objective = checked_objective(config)
    if objective.reference_free:
        raise InputError(
            "config.loss.name",
            got=f"{config.loss.name!r}, which reads no reference",
            expected="a loss that does",
            remedy="Run dpo-jax train at once: it needs no reference pass.",
        )
    inputs = read_inputs(config, objective, folder, training=False)
    describe_data(inputs)
    programs = make_programs(config, objective, inputs.model, inputs.lengths, trainable=inputs.trainable)
    with hosts.listening():
        inputs = after_sft(unresolved, inputs, folder)
        complete_store(inputs, reference_store(inputs, programs, store_folder(config, folder)), programs)


def evaluate_checkpoint(config: Config, folder: Path, *, step: str = "") -> dict[str, float]:
    """Returns metrics of a checkpoint in `folder` on data.eval, with the step it was saved at.

    Args:
      step: which, as in `history.step_of`.
    Raises: InputError if there is no such checkpoint or no data.eval, or as `train.run` does.
    """
    config, inputs, programs, at = open_run(config, folder, step)
    params, running = restore(inputs, programs, folder, at)
    check_evaluated(config, f"--config={folder / 'config.json'} --config.data.eval=FILE")
    store = reference_store(inputs, programs, store_folder(config, folder))
    values, _ = complete_store(inputs, store, programs, only=other_models.NO_TRAINING_PAIRS)
    if config.reference.sync_steps:
        if "train" not in inputs.sets:
            raise InputError(
                "config.data.train",
                got="empty, and the reference syncs with the policy",
                expected="the pairs that the run trains on, which decide what each sync scored",
                remedy="Give them as --config.data.train=FILE.",
            )
        total = checks.updates_of(config, inputs.sets["train"])
        sync = sync_of(config, inputs, programs, store, order_of(config, inputs), total, folder)
        if sync is not None and sync.last(at):
            values = sync.stored(sync.last(at))
    return {"step": at} | evaluate_sets(inputs, programs, make_summaries(inputs), values, params, running)


def evaluate_model(config: Config, folder: Path | None, model: str, reference: str) -> dict[str, float]:
    """Returns metrics of any model on data.eval.

    Args:
      folder: of a run, whose reference is read unless another is given; None: no run.
      model: a Hugging Face folder, PEFT folder or Hub id.
      reference: another; empty: the run's, or none.
    Raises: InputError if the models cannot be compared, as `metrics_of_model` or as `train.run` does.
    """
    if folder is None:  # training pairs are not needed
        for name, value in flat(config).items():
            if name != "data.train" and isinstance(value, str) and "{workdir}" in value:
                expected, remedy = "a path without it, or --workdir", f"Give --workdir, or --config.{name}=PATH."
                raise InputError(f"config.{name}", got=repr(value), expected=expected, remedy=remedy)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=""))
    else:
        config = resolve_paths(workdir.dated(config, folder), folder)
    objective = checked_objective(config)
    check_evaluated(config, "--config.data.eval=FILE")
    for name, place in ((model, "--model"), (reference, "--reference")):
        if name:
            other_models.check_same_tokens(config, name, place)
    values = None
    if objective.reference_free:
        if reference:
            raise InputError(
                "--reference",
                got=f"given, and loss {config.loss.name!r} reads no reference",
                expected="a loss that does",
                remedy="Leave it out.",
            )
    elif reference:
        values = other_models.reference_of(other_models.config_for(config, reference, "--reference"), objective)
    elif folder is not None:
        inputs = load_inputs(config, objective, training=False)
        inputs = from_sft(inputs, folder) if config.sft.steps else inputs
        programs = make_programs(config, objective, inputs.model, inputs.lengths, trainable=inputs.trainable)
        store = reference_store(inputs, programs, store_folder(config, folder))
        values, _ = complete_store(inputs, store, programs, only=other_models.NO_TRAINING_PAIRS)
    return other_models.metrics_of_model(other_models.config_for(config, model, "--model"), objective, values)


def check_evaluated(config: Config, flag: str) -> None:
    """Raises InputError, with the flag that gives some, if the configuration has no pairs to evaluate on."""
    if not config.data.eval:
        remedy = f"Give them as {flag}."
        raise InputError("config.data.eval", got="empty", expected="pairs to evaluate on", remedy=remedy)


def export_checkpoint(config: Config, folder: Path, out: Path | None, *, merge: bool = False, step: str = "") -> None:
    """Writes a checkpoint in `folder` as a Hugging Face folder.

    Args:
      out: None: `folder`/export if the finished run exported that step there, else `folder`/export-STEP;
        `folder`/merged-STEP with `merge`.
      merge: write the whole model, adapters merged into it.
      step: which, as in `history.step_of`.
    Raises: InputError if there is no such checkpoint, `out` is the place of the export of another step, or there are no
      adapters to merge.
    """
    checks.check_upload(config)
    config, inputs, programs, at = open_run(config, folder, step)
    if merge and inputs.trainable.adapters is None:
        raise InputError(
            "--merge", got="a run without adapters", expected="one with lora.rank set", remedy="Leave --merge off."
        )
    params, _ = restore(inputs, programs, folder, at)
    final, is_final = folder / "export", history.read_end(folder).get("exported") == at
    out = out or (folder / f"merged-{at}" if merge else final if is_final else folder / f"export-{at}")
    if files.resolved(out) == files.resolved(final) and not is_final:
        raise InputError(
            str(out),
            got=f"the place of the finished run's export, and this is the state at step {at}",
            expected="another folder",
            remedy="Leave --out off, or finish the run.",
        )
    rows = [row for row in workdir.read_rows(folder / "eval.jsonl") if row["step"] == at]
    changes = history.read_changes(folder)
    export_model(config, inputs, params, out, rows, at, merge=merge, changes=changes)
    if is_final:
        upload(config, out)
    elif config.export.push_to_hub:
        say(f"note: not uploaded to {config.export.push_to_hub}, which is for the model at the run's end")


def checked_objective(config: Config) -> Objective:
    """Returns the objective of a configuration whose names are checked. Raises: InputError for any that is unknown."""
    checks.check_model_named(config)
    objective = objective_of(config.loss)
    checks.check_names(config, objective)
    return objective


class OpenRun(NamedTuple):
    """A run whose checkpoints are read: its configuration with paths resolved, inputs, programs, and a step."""

    config: Config
    inputs: Inputs
    programs: Programs
    step: int  # updates in the checkpoint that is meant


def open_run(config: Config, folder: Path, step: str) -> OpenRun:
    """Reads the inputs of the run in `folder`.

    Args:
      step: which checkpoint is meant, as in `history.step_of`.
    Raises: InputError if it has no such checkpoint, or the configuration names another model than the run's.
    """
    workdir.check(config, folder, fields=OF_PARAMETERS)
    config = resolve_paths(workdir.dated(config, folder), folder)
    objective = checked_objective(config)
    at = history.step_of(step, config, folder)
    inputs = load_inputs(config, objective, training=False)
    if config.sft.steps:
        inputs = from_sft(inputs, folder)
    programs = make_programs(config, objective, inputs.model, inputs.lengths, trainable=inputs.trainable)
    return OpenRun(config, inputs, programs, at)


def restore(inputs: Inputs, programs: Programs, folder: Path, step: int) -> tuple[dict, dict]:
    """Returns parameters and baselines of the checkpoint in `folder` after `step` updates."""
    with Checkpoints(folder / "checkpoints", keep=1, read_only=True) as checkpoints:
        try:
            trained, running = checkpoints.restore_params(
                step, abstract_params(programs)[0], abstract_running(programs)
            )
        except TypeError as error:  # orbax's, for another tree than the checkpoint's
            raise InputError(
                "config.loss.name",
                got=f"a loss whose running averages are not those of the checkpoint at step {step}",
                expected="the loss that the run was trained with, or one with the same running averages",
                remedy="Leave --config.loss.name out.",
            ) from error
    return join(trained, load_frozen(inputs.source, programs)), running
