"""TODO commands."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from dpo_jax import trees
from dpo_jax.config import Config
from dpo_jax.export import export
from dpo_jax.reporting.console import describe_data
from dpo_jax.run import checks, choices, programs, workdir
from dpo_jax.run import inputs as run_inputs
from dpo_jax.run.checkpoints import Checkpoints
from dpo_jax.run.evaluate import evaluate, make_summary
from dpo_jax.run.inputs import Inputs
from dpo_jax.run.state import abstract_params, abstract_running, load_frozen
from dpo_jax.runtime import hosts
from dpo_jax.train import after_sft, following_of, from_sft, reference_of
from dpo_jax.types import InputError

# Fields that say what a checkpoint's parameters are.
OF_PARAMETERS = (
    "model.path model.param_dtype train.freeze lora.rank lora.alpha lora.rank_stabilised lora.targets lora.path "
    "lora.base sft.steps"
).split()


def score_reference(config: Config, folder: Path) -> None:
    """The reference pass alone, into `reference.path`. Raises: InputError as `run` does."""
    given, config = config, run_inputs.resolve_paths(config, folder)
    checks.check_names(config)
    if choices.loss_of(config).reference_free:
        raise InputError(
            "config.loss.name",
            got=f"{config.loss.name!r}, which reads no reference",
            expected="a loss that does",
            remedy="Train without a reference pass.",
        )
    inputs = run_inputs.read_inputs(config, folder, training=False)
    describe_data(config, inputs)
    built = programs.make_programs(config, inputs.model, inputs.lengths, selection=inputs.selection)
    config, inputs = after_sft(given, config, inputs, folder)
    with hosts.listening():
        reference_of(config, inputs, programs.reference_store(config, inputs, folder, built), built)


def evaluate_checkpoint(config: Config, folder: Path) -> dict[str, float]:
    """Metrics of the newest checkpoint in `folder` on data.eval, with the step it was saved at.

    Raises: InputError if there is no checkpoint or no data.eval, or as `run` does.
    """
    config, inputs, built, step, params, running = open_checkpoint(config, folder)
    if inputs.eval is None:
        raise InputError("config.data.eval", got="empty", expected="a path or Hub id", remedy="Name the pairs.")
    store = programs.reference_store(config, inputs, folder, built)
    known, _ = reference_of(config, inputs, store, built)
    if config.reference.sync_steps:
        following = following_of(config, inputs, built, store, checks.check_lengths(config, inputs))
        if following is not None and following.last(step):
            known = following.stored(following.last(step))
    row = evaluate(
        functools.partial(built.score, params),
        make_summary(built.objective, paired=inputs.paired),
        inputs.eval,
        inputs.eval.lengths,
        known[-1] if known else None,
        shape=built.score_shape,
        layout=built.layout,
        running=running,
        mismatched=inputs.eval_mismatched,
    )
    return {"step": step} | row


def export_checkpoint(config: Config, folder: Path, out: Path | None, *, merge: bool = False) -> None:
    """Writes the newest checkpoint in `folder` as a Hugging Face folder.

    Args:
      out: None: `folder`/export, or `folder`/export-STEP until the run has made that itself; `folder`/merged-STEP with
        `merge`.
      merge: write the whole model, adapters merged into it.
    Raises: InputError if there is no checkpoint, `out` is the place of an export that is still to come, or there are no
      adapters to merge.
    """
    config, inputs, _, step, params, _ = open_checkpoint(config, folder)
    if merge and inputs.selection.adapters is None:
        raise InputError(
            "--merge", got="a run without adapters", expected="one with lora.rank", remedy="Leave --merge off."
        )
    final = folder / "export"
    out = out or (folder / f"merged-{step}" if merge else final if final.exists() else folder / f"export-{step}")
    if out.resolve() == final.resolve() and not final.exists():
        raise InputError(
            str(out),
            got=f"the place of the finished run's export, and the run is at step {step}",
            expected="another folder",
            remedy="Leave --out off, or finish the run.",
        )
    rows = [row for row in workdir.read_rows(folder / "eval.jsonl") if row["step"] == step]
    export(config, inputs, params, out, rows, step, merge=merge)


def open_checkpoint(config: Config, folder: Path) -> tuple[Config, Inputs, programs.Programs, int, Any, Any]:
    """Configuration, inputs, programs, step, parameters and baselines of the newest checkpoint in `folder`.

    Raises: InputError if there is none, or the configuration names another model than the run's.
    """
    workdir.check(config, folder, fields=OF_PARAMETERS)
    config = run_inputs.resolve_paths(config, folder)
    checks.check_names(config)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1, read_only=True)
    step = checkpoints.latest_step()
    if step is None:
        raise InputError(
            str(folder / "checkpoints"), got="no checkpoint", expected="one of a training run", remedy="Train first."
        )
    config, inputs = from_sft(config, run_inputs.load_inputs(config, training=False), folder)
    built = programs.make_programs(config, inputs.model, inputs.lengths, selection=inputs.selection)
    trained, running = abstract_params(config, built)[0], abstract_running(built)
    params, running = checkpoints.restore_params(step, trained, running)
    checkpoints.close()
    whole = trees.join(params, load_frozen(config, inputs.folder, built))
    return config, inputs, built, step, whole, running
