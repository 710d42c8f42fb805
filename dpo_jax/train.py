"""The training run: from configuration to exported model, in the order in which it happens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dpo_jax
from dpo_jax import card, losses, programs, sharding, trackers, workdir
from dpo_jax import config as configs
from dpo_jax import inputs as run_inputs
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.config import Config
from dpo_jax.data import layout
from dpo_jax.data.order import epoch_size, make_order
from dpo_jax.evaluate import evaluate, make_summary
from dpo_jax.inputs import Inputs
from dpo_jax.models import hf_files, hf_io
from dpo_jax.report import before_and_after, describe_data, describe_run, one_line
from dpo_jax.trackers import say
from dpo_jax.types import InputError


def run(config: Config, folder: Path) -> None:
    """Trains, evaluates and exports; goes on where an earlier call with the same configuration stopped.

    Args:
      folder: the working folder, made if there is none.
    Raises: InputError for whatever cannot be used in configuration, data, checkpoint or working folder, before any
      device is touched and before anything but the recipe's own inputs is written.
    """
    given, config = config, run_inputs.resolve_paths(config, folder)
    run_inputs.check_names(config)
    trackers.check_available(tensorboard=config.log.tensorboard, wandb=config.log.wandb)
    workdir.check(given, folder)
    hf_files.check_replaceable(folder / "export")
    run_inputs.prepare(config, folder)
    inputs = run_inputs.load_inputs(config, training=True)
    total = run_inputs.check_lengths(config, inputs)
    step = workdir.check_data(inputs.digests, folder)
    describe_data(config, inputs)
    # Nothing but the run that is done writes there: the command `export` keeps away until it is.
    if (folder / "export").exists() and step == total:
        say(f"{folder} is complete at step {total}; the model is in {folder / 'export'}")
        return
    built = programs.make_programs(config, inputs)
    config, inputs = after_sft(given, config, inputs, folder)
    store = programs.reference_store(config, inputs, folder, built)
    workdir.claim(given, folder)
    train(config, inputs, folder, built, store, total)


def after_sft(given: Config, config: Config, inputs: Inputs, folder: Path) -> tuple[Config, Inputs]:
    """Runs supervised fine-tuning in `WORKDIR/sft`, a working folder of its own, unless it is done or not asked for.

    Args:
      given: the configuration as it was before `{workdir}` was filled in.
    Returns: configuration and inputs that go on from the model it exported.
    """
    if not config.sft.steps:
        return config, inputs
    say(f"first: supervised fine-tuning on the chosen answers, in {folder / 'sft'}")
    workdir.make(folder / "sft")
    # Seen from the stage's own folder, so that both can be moved, or called by another path, together.
    given = run_inputs.resolve_paths(given, Path("{workdir}") / "..")
    stage = dataclasses.replace(
        given,
        loss=configs.Loss(name="sft"),
        train=dataclasses.replace(config.train, batch_pairs=config.sft.batch_pairs, steps=config.sft.steps),
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=config.sft.learning_rate, warmup_steps=config.sft.warmup_steps
        ),
        sft=configs.Sft(),
        prepare="",
        # The next stage starts from this export, so nothing may be rounded away in between.
        export=configs.Export(dtype=config.model.param_dtype),
    )
    run(stage, folder / "sft")
    say("then: preference optimization")
    return from_sft(config, inputs, folder)


def from_sft(config: Config, inputs: Inputs, folder: Path) -> tuple[Config, Inputs]:
    """Configuration and inputs that go on from the model in `WORKDIR/sft/export`.

    Raises: InputError if it should be there and is not.
    """
    if not config.sft.steps:
        return config, inputs
    exported = folder / "sft" / "export"
    if not exported.exists():
        raise InputError(
            str(exported), got="no such folder", expected="the model after sft.steps", remedy="Run train again first."
        )
    model = dataclasses.replace(config.model, path=str(exported))
    return dataclasses.replace(config, model=model), dataclasses.replace(inputs, folder=exported)


def train(
    config: Config, inputs: Inputs, folder: Path, built: programs.Programs, store: programs.Store | None, total: int
) -> None:
    """Reference pass, updates, evaluations, checkpoints and export."""
    assert inputs.train is not None
    # What the run computes with.
    shape, mesh = built.update_shape, built.mesh
    reference, params = reference_of(config, inputs, store, built)
    tx, schedule = run_inputs.optimizer_of(config, total_steps=total)
    loss_fn = run_inputs.loss_of(config)
    rate, summary = jax.jit(schedule), make_summary(loss_fn)
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep)
    state = programs.first_state(config, inputs, mesh, tx, checkpoints, params)
    del params  # donated to the state: from here on one model is held
    update = programs.make_update(config, inputs, built, loss_fn, tx, state)
    start = int(state.step)
    order = make_order(
        inputs.train.source,
        inputs.train.weights,
        batch_pairs=shape.pairs,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )
    epoch = epoch_size(inputs.train.source, inputs.train.weights)
    record = {"config": dataclasses.asdict(config), "data": inputs.digests, "version": dpo_jax.__version__}

    # Where it writes; what an interrupted run logged after its last checkpoint is dropped, and comes again.
    logs = {name: trackers.JsonlWriter(folder / name) for name in ("metrics.jsonl", "eval.jsonl")}
    for log in logs.values():
        log.truncate_after(start - 1)
    others = trackers.open_trackers(
        folder, tensorboard=config.log.tensorboard, wandb=config.log.wandb, config=record["config"], resume_step=start
    )
    describe_run(config, inputs, built, state.params, start, total)
    progress = trackers.Progress(total, start=start)
    clock = Clock(start)
    closing = contextlib.ExitStack()
    for resource in (checkpoints, *others, *logs.values(), progress):
        closing.callback(resource.close)

    def write(name: str, step: int, row: dict[str, float]) -> None:
        for writer in (logs[name], *others):
            writer.write(step, row)

    def evaluate_at(step: int) -> None:
        if inputs.eval is None:
            return
        row = evaluate(
            functools.partial(built.score, state.params),
            summary,
            inputs.eval,
            inputs.eval.lengths,
            reference[1],
            shape=built.score_shape,
            layout=config.data.layout,
        )
        write("eval.jsonl", step, row)
        progress.say(f"step {step}: {one_line(row)}")

    # A step's metrics are fetched when the next is under way, so that the device does not wait for the host.
    pending: list[tuple[int, dict[str, Any], dict[str, float]]] = []

    def flush() -> None:
        while pending:
            step, metrics, row = pending.pop()
            row = {name: float(value) for name, value in jax.device_get(metrics).items()} | row
            step_time = clock.per_step(step + 1)
            write("metrics.jsonl", step, row | {"step_time_s": step_time, "pairs_per_s": shape.pairs / step_time})
            progress.update(step + 1, row | {"pairs_per_s": shape.pairs / step_time})

    with closing:
        for step in range(start, total + 1):
            if step in (0, total) or (config.eval.every_steps and step % config.eval.every_steps == 0):
                flush()
                with clock.paused(state):
                    evaluate_at(step)
            if step == total:
                break
            chosen = order(step)
            pairs = [inputs.train[i] for i in chosen.tolist()]
            batch = layout.collate(pairs, reference[0][chosen], shape, layout=config.data.layout)
            state, metrics = update(state, sharding.put(batch, mesh))
            flush()
            if step % config.log.every_steps == 0 or step + 1 == total:
                counts = layout.work_counts(batch, inputs.train.lengths[chosen], shape, config.data.layout)
                place = {"epoch": step * shape.pairs / epoch, "learning_rate": float(rate(step))}
                pending.append((step, metrics, place | counts))
            if (step + 1) % config.checkpoint.every_steps == 0 or step + 1 == total:
                flush()
                with clock.paused(state):
                    checkpoints.save(step + 1, state, record)
    export(config, inputs, state.params, folder / "export", workdir.read_rows(folder / "eval.jsonl"), total)
    before_and_after(workdir.read_rows(folder / "eval.jsonl"))


def reference_of(
    config: Config, inputs: Inputs, store: programs.Store | None, built: programs.Programs
) -> tuple[list[np.ndarray], Any | None]:
    """Stored reference log-probs of training and evaluation pairs, and the weights if they had to be loaded."""
    if store is None:
        return programs.no_reference(inputs), None
    with trackers.Counter("reference pass", unit="pairs") as counter:
        done, params = programs.reference_values(config, inputs, store, built, counter.update)
    say(
        f"reference: {done.given} pairs came with values, {done.stored} were in "
        f"{store.folder}, {done.scored} scored in {done.forward_passes} forward passes"
    )
    return done.values, params


class Clock:
    """Seconds per update, what happens between updates left out."""

    def __init__(self, step: int):
        self._at, self._step = time.perf_counter(), step

    def per_step(self, step: int) -> float:
        """Mean seconds of the updates since the last call, `step` of them made in all."""
        now = time.perf_counter()
        mean = (now - self._at) / max(1, step - self._step)
        self._at, self._step = now, step
        return mean

    @contextlib.contextmanager
    def paused(self, running: Any) -> Iterator[None]:
        """Leaves out what runs inside, once the updates that make `running` are done."""
        jax.block_until_ready(running)
        started = time.perf_counter()
        yield
        self._at += time.perf_counter() - started


def export(
    config: Config, inputs: Inputs, params: Any, out: Path, evaluations: list[dict[str, float]], steps: int
) -> None:
    """Writes a Hugging Face folder with a model card."""
    data = {
        split: (spec, len(pairs))
        for split, spec, pairs in (
            ("train", config.data.train, inputs.train),
            ("eval", config.data.eval, inputs.eval),
        )
        if pairs is not None
    }
    text = card.model_card(config, inputs.name, data=data, steps=steps, final=evaluations[-1] if evaluations else {})
    hf_io.export(
        params, base=inputs.base, out=out, dtype=config.export.dtype, tokenizer=inputs.tokenizer_folder, card=text
    )
    say(f"exported to {out}")


# --- the other commands: parts of the same line -------------------------------------------------------------------


def score_reference(config: Config, folder: Path) -> None:
    """The reference pass alone, into `reference.path`. Raises: InputError as `run` does."""
    given, config = config, run_inputs.resolve_paths(config, folder)
    run_inputs.check_names(config)
    if config.loss.name in losses.REFERENCE_FREE:
        raise InputError(
            "config.loss.name",
            got=f"{config.loss.name!r}, which reads no reference",
            expected="a loss that does",
            remedy="Train without a reference pass.",
        )
    run_inputs.prepare(config, folder)
    inputs = run_inputs.load_inputs(config, training=False)
    describe_data(config, inputs)
    built = programs.make_programs(config, inputs)
    config, inputs = after_sft(given, config, inputs, folder)
    reference_of(config, inputs, programs.reference_store(config, inputs, folder, built), built)


def evaluate_checkpoint(config: Config, folder: Path) -> dict[str, float]:
    """Metrics of the newest checkpoint in `folder` on data.eval, with the step it was saved at.

    Raises: InputError if there is no checkpoint or no data.eval, or as `run` does.
    """
    config, inputs, built, step, params = open_checkpoint(config, folder)
    if inputs.eval is None:
        raise InputError("config.data.eval", got="empty", expected="a path or Hub id", remedy="Name the pairs.")
    reference, _ = reference_of(config, inputs, programs.reference_store(config, inputs, folder, built), built)
    row = evaluate(
        functools.partial(built.score, params),
        make_summary(run_inputs.loss_of(config)),
        inputs.eval,
        inputs.eval.lengths,
        reference[-1],
        shape=built.score_shape,
        layout=config.data.layout,
    )
    return {"step": step} | row


def export_checkpoint(config: Config, folder: Path, out: Path | None) -> None:
    """Writes the newest checkpoint in `folder` as a Hugging Face folder.

    Args:
      out: None: `folder`/export, or `folder`/export-STEP until the run has made that itself.
    Raises: InputError if there is no checkpoint, or `out` is the place of an export that is still to come.
    """
    config, inputs, _, step, params = open_checkpoint(config, folder)
    final = folder / "export"
    out = out or (final if final.exists() else folder / f"export-{step}")
    if out.resolve() == final.resolve() and not final.exists():
        raise InputError(
            str(out),
            got=f"the place of the finished run's export, and the run is at step {step}",
            expected="another folder",
            remedy="Leave --out off, or finish the run.",
        )
    rows = [row for row in workdir.read_rows(folder / "eval.jsonl") if row["step"] == step]
    export(config, inputs, params, out, rows, step)


def open_checkpoint(config: Config, folder: Path) -> tuple[Config, Inputs, programs.Programs, int, Any]:
    """Configuration, inputs, programs, step and parameters of the newest checkpoint in `folder`.

    Raises: InputError if there is none, or the configuration names another model than the run's.
    """
    workdir.check(config, folder, fields=("model.path", "model.param_dtype", "sft.steps"))
    config = run_inputs.resolve_paths(config, folder)
    run_inputs.check_names(config)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1, read_only=True)
    step = checkpoints.latest_step()
    if step is None:
        raise InputError(
            str(folder / "checkpoints"), got="no checkpoint", expected="one of a training run", remedy="Train first."
        )
    config, inputs = from_sft(config, run_inputs.load_inputs(config, training=False), folder)
    built = programs.make_programs(config, inputs)
    params = checkpoints.restore_params(step, programs.abstract_params(config, inputs, built.mesh))
    checkpoints.close()
    return config, inputs, built, step, params
