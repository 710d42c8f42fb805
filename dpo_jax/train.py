"""The training run: from configuration to exported model, in the order in which it happens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import dpo_jax
from dpo_jax import config as configs
from dpo_jax import sharding, trees
from dpo_jax.config import Config
from dpo_jax.cost.flops import forward_flops, peak_flops, shares_of, train_flops
from dpo_jax.data import layout
from dpo_jax.data.batches import ReferenceValues, make_batch
from dpo_jax.data.dataset import PairSet
from dpo_jax.data.order import epoch_size, make_order
from dpo_jax.export import export
from dpo_jax.hf import folders
from dpo_jax.reporting import trackers
from dpo_jax.reporting.console import before_and_after, describe_data, describe_run, one_line
from dpo_jax.run import checks, choices, programs, workdir
from dpo_jax.run import inputs as run_inputs
from dpo_jax.run.checkpoints import Checkpoints
from dpo_jax.run.evaluate import evaluate, make_summary
from dpo_jax.run.inputs import Inputs
from dpo_jax.run.reference_sync import Following, stretches
from dpo_jax.run.state import first_state, load_params
from dpo_jax.runtime import clocks, hosts, prefetch, terminal
from dpo_jax.runtime.clocks import Clock, Faults, Profile
from dpo_jax.runtime.terminal import say
from dpo_jax.steps import scores_first
from dpo_jax.types import Batch, InputError

WARM_UP = 2  # updates before a profile begins


def run(config: Config, folder: Path) -> None:
    """Trains, evaluates and exports; goes on where an earlier call with the same configuration stopped.

    Args:
      folder: the working folder, made if there is none.
    Raises: InputError for whatever cannot be used in configuration, data, checkpoint or working folder, before any
      device is touched and before anything but the recipe's own inputs is written; `hosts.Stopped` where it was asked
      to stop and has saved its state.
    """
    watch = clocks.Stopwatch()
    given, config = config, run_inputs.resolve_paths(config, folder)
    checks.check_names(config)
    trackers.check_available(tensorboard=config.log.tensorboard, wandb=config.log.wandb)
    workdir.check(given, folder)
    folders.check_replaceable(folder / "export")
    with watch.part("data"):
        inputs = run_inputs.read_inputs(config, folder, training=True)
    total = checks.check_lengths(config, inputs)
    step = workdir.check_data(inputs.digests, folder)
    describe_data(config, inputs)
    # Nothing but the run that is done writes there: the command `export` keeps away until it is.
    if (folder / "export").exists() and step == total:
        say(f"{folder} is complete at step {total}; the model is in {folder / 'export'}")
        return
    built = programs.make_programs(config, inputs.model, inputs.lengths, selection=inputs.selection, watch=watch)
    config, inputs = after_sft(given, config, inputs, folder)
    with watch.part("digest of weights"):
        store = programs.reference_store(config, inputs, folder, built)
    workdir.claim(given, folder)
    with hosts.listening():
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
        reference=dataclasses.replace(config.reference, sync_steps=0, mixup_alpha=1.0),
        train=dataclasses.replace(config.train, batch_pairs=config.sft.batch_pairs, steps=config.sft.steps),
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=config.sft.learning_rate, warmup_steps=config.sft.warmup_steps
        ),
        sft=configs.Sft(),
        prepare="",
        # The next stage starts from this export, so nothing may be rounded away in between.
        export=configs.Export(dtype=config.model.param_dtype if inputs.selection.adapters is None else "float32"),
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
    if inputs.selection.adapters is not None:
        return dataclasses.replace(config, lora=configs.Lora(path=str(exported), base=config.lora.base)), inputs
    model = dataclasses.replace(config.model, path=str(exported))
    return dataclasses.replace(config, model=model), dataclasses.replace(inputs, folder=exported)


def train(
    config: Config, inputs: Inputs, folder: Path, built: programs.Programs, store: programs.Store | None, total: int
) -> None:
    """Reference pass, updates, evaluations, checkpoints and export."""
    train_pairs, layout_name = inputs.train, built.layout
    assert train_pairs is not None
    # What the run computes with.
    shape, mesh, watch = built.update_shape, built.mesh, built.watch
    with watch.part("reference"):
        known, params = reference_of(config, inputs, store, built)
    tx, schedule = choices.optimizer_of(config, total_steps=total, selection=inputs.selection)
    rate, summary = jax.jit(schedule), make_summary(built.objective, paired=inputs.paired)
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep)
    with watch.part("weights"):
        state, frozen = first_state(config, inputs.folder, built, tx, checkpoints, params)
        jax.block_until_ready((state, frozen))
    del params  # what trains is donated to the state: from here on one model is held
    update = programs.make_update(config, built, tx, state, paired=inputs.paired)
    start = int(state.step)
    order = order_of(config, train_pairs)
    following = following_of(config, inputs, built, store, total)
    if following is not None and following.last(start):
        known = following.stored(following.last(start))
    epoch = epoch_size(train_pairs.source, train_pairs.weights)
    peak = peak_flops(mesh.devices.flat[0].device_kind, np.dtype(built.dtype).name)
    peak = None if peak is None else peak * mesh.size
    shares = shares_of(built.model, built.selection.shapes(built.model), built.selection.share)
    record = {"config": dataclasses.asdict(config), "data": inputs.digests, "version": dpo_jax.__version__}

    # Where it writes; what an interrupted run logged after its last checkpoint is dropped, and comes again.
    logs: dict[str, trackers.JsonlWriter] = {}
    others: list[trackers.Tracker] = []
    if hosts.first():
        logs = {name: trackers.JsonlWriter(folder / name) for name in ("metrics.jsonl", "eval.jsonl")}
        others = trackers.open_trackers(
            folder,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            config=record["config"],
            resume_step=start,
        )
    for log in logs.values():
        log.truncate_after(start - 1)
    describe_run(config, built, state.params, frozen, start, total)
    progress = terminal.Progress(total, start=start)
    clock, faults = Clock(start), Faults()
    profile = Profile(folder / "profile", start + WARM_UP, config.profile.steps)
    closing = contextlib.ExitStack()
    for each in (checkpoints, *others, *logs.values(), progress, profile):
        closing.callback(each.close)

    def write(name: str, step: int, row: dict[str, float]) -> None:
        for writer in (logs[name], *others) if logs else ():
            writer.write(step, row)

    def save(step: int) -> None:
        flush()
        with clock.paused(state):
            checkpoints.save(step, state, record)

    def evaluate_at(step: int) -> None:
        if inputs.eval is None:
            return
        row = evaluate(
            functools.partial(built.score, trees.join(state.params, frozen)),
            summary,
            inputs.eval,
            inputs.eval.lengths,
            known[-1] if known else None,
            shape=built.score_shape,
            layout=built.layout,
            running=state.running,
            mismatched=inputs.eval_mismatched,
        )
        write("eval.jsonl", step, row)
        progress.say(f"step {step}: {one_line(row)}")

    def make(step: int) -> Made:
        chosen = order(step)
        stored, others = known[0] if known else None, inputs.train_mismatched
        batch = make_batch(chosen, train_pairs, stored, shape, layout=layout_name, mismatched=others)
        counts = layout.work_counts(batch, train_pairs.lengths[chosen], shape, layout_name)
        flops = train_flops(built.model, train_pairs.lengths[chosen], layout_name, shares)
        if scores_first(built.objective, len(batch.present)):
            counts["positions_computed"] *= 2  # forward only at first; the tokens and their FLOPs are the same
        if others is not None:
            scored = layout.work_counts(batch.mismatched, others.lengths[chosen], shape, layout_name)
            counts = {name: count + scored[name] for name, count in counts.items()}
            flops += forward_flops(built.model, others.lengths[chosen], layout_name, shares)
        return Made(sharding.put(batch, mesh), counts, flops)

    # A step's metrics are fetched when the next is under way, so that the device does not wait for the host.
    pending: list[tuple[int, dict[str, Any], dict[str, float], float]] = []

    def flush() -> None:
        while pending:
            step, metrics, row, flops = pending.pop()
            row = {name: float(value) for name, value in jax.device_get(metrics).items()} | row
            step_time = clock.per_step(step + 1)
            row |= {"step_time_s": step_time, "pairs_per_s": shape.pairs / step_time}
            row |= {"tokens_real/s": row["tokens_real"] / step_time, "flops/s": flops / step_time}
            row["minor_faults"] = faults.since()
            if peak is not None:
                row["mfu"] = flops / step_time / peak
            write("metrics.jsonl", step, row)
            progress.update(step + 1, row)

    def stretch_by_stretch() -> Generator[tuple[Made, float], None, None]:
        # Batches are made ahead, but never of a reference that is still to come.
        for steps in stretches(start, total, config.reference.sync_steps):
            with contextlib.closing(prefetch.ahead(make, steps)) as made:
                yield from made

    with closing:
        made = closing.enter_context(contextlib.closing(stretch_by_stretch()))
        waited = 0.0
        for step in range(start, total + 1):
            if step in (0, total) or (config.eval.every_steps and step % config.eval.every_steps == 0):
                flush()
                with clock.paused(state):
                    evaluate_at(step)
            if step == total:
                break
            if hosts.asked_to_stop():
                save(step)
                raise hosts.Stopped(f"asked to stop, and saved at step {step} of {total}")
            if following is not None and following.due(step):
                save(step)  # or the policy that the reference takes in would be gone if this were interrupted
                with clock.paused(state):
                    known = following.refresh(step, state.params, functools.partial(trees.join, other=frozen))
                progress.say(f"step {step}: the reference has taken the policy in")
            profile.at(step, state)
            (batch, counts, flops), seconds = next(made)
            waited += seconds
            state, metrics = update(state, frozen, batch)
            if step == start:
                jax.block_until_ready(metrics)
                say(f"first update done after {watch}")
            flush()
            if step % config.log.every_steps == 0 or step + 1 == total:
                place = {"epoch": step * shape.pairs / epoch, "learning_rate": float(rate(step)), "data_wait_s": waited}
                pending.append((step, metrics, place | counts, flops))
                waited = 0.0
            if (step + 1) % config.checkpoint.every_steps == 0 or step + 1 == total:
                save(step + 1)
    params = trees.join(state.params, frozen)
    export(config, inputs, params, folder / "export", workdir.read_rows(folder / "eval.jsonl"), total)
    before_and_after(workdir.read_rows(folder / "eval.jsonl"))


def order_of(config: Config, pairs: PairSet) -> Callable[[int], np.ndarray]:
    """The pairs of each update."""
    batch_pairs, data = config.train.batch_pairs, config.data
    return make_order(pairs.source, pairs.weights, batch_pairs=batch_pairs, seed=config.seed, shuffle=data.shuffle)


def following_of(
    config: Config, inputs: Inputs, built: programs.Programs, store: programs.Store | None, total: int
) -> Following | None:
    """How the reference follows the policy; None where it stays as it is."""
    if store is None or inputs.train is None or not config.reference.sync_steps:
        return None
    return Following(config, inputs, built, store, order_of(config, inputs.train), total)


def reference_of(
    config: Config, inputs: Inputs, store: programs.Store | None, built: programs.Programs
) -> tuple[list[ReferenceValues], Any | None]:
    """What the reference says of training and evaluation pairs, and the weights if they had to be loaded."""
    if store is None:
        return [], None
    started = time.perf_counter()
    loaded: list[Any] = []

    def weights() -> Any:
        if not loaded:
            loaded.append(load_params(config, inputs.folder, built))
        return loaded[0]

    with terminal.Counter("reference pass", unit="pairs") as counter:
        known, done = programs.reference_values(inputs, store, built, weights, counter.update)
    speed = f", {done.scored / (time.perf_counter() - started):.1f} pairs/s in all" if done.scored else ""
    say(
        f"reference: {done.given} pairs came with values, {done.stored} were in "
        f"{store.folder}, {done.scored} scored in {done.forward_passes} forward passes{speed}"
    )
    return known, loaded[0] if loaded else None


class Made(NamedTuple):
    """What the thread that feeds the device has ready for a step."""

    batch: Batch  # on the mesh
    counts: dict[str, int]
    flops: float


# --- the other commands: parts of the same line -------------------------------------------------------------------
