"""The training run: from configuration to exported model, in the order in which it happens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

import dpo_jax
from dpo_jax import aliases, trees
from dpo_jax.config import Config, Export, Loss, Sft
from dpo_jax.cost.flops import peak_flops
from dpo_jax.data.batches import ReferenceValues
from dpo_jax.data.order import epoch_size, make_order, reached
from dpo_jax.export import export_model, upload
from dpo_jax.hf.folders import check_replaceable, is_export
from dpo_jax.reporting import console, trackers
from dpo_jax.reporting.step_log import StepLog
from dpo_jax.run import checks, history, self_check, workdir
from dpo_jax.run.checkpoints import Checkpoints
from dpo_jax.run.choices import objective_of, optimizer_of, warmup_of
from dpo_jax.run.evaluate import evaluate_sets, make_summaries
from dpo_jax.run.goodput import Account
from dpo_jax.run.history import History
from dpo_jax.run.inputs import Inputs, named_function, read_inputs
from dpo_jax.run.loop import Schedule, run_loop
from dpo_jax.run.programs import Programs, make_programs, make_update
from dpo_jax.run.reference_sync import ReferenceSync, sync_stretches
from dpo_jax.run.reference_values import Store, complete_store, reference_store
from dpo_jax.run.state import abstract_params, abstract_running, first_state
from dpo_jax.run.update_batches import Prepared, UpdateBatches
from dpo_jax.run.workdir import resolve_paths, store_folder
from dpo_jax.runtime import files, hosts
from dpo_jax.runtime.clocks import Clock, Profile, Stopwatch
from dpo_jax.runtime.files import Path
from dpo_jax.runtime.terminal import Progress, say
from dpo_jax.steps import TrainState
from dpo_jax.types import InputError, counted

WARM_UP = 2  # updates before a profile begins


def run(config: Config, folder: Path, watch: Stopwatch | None = None) -> None:
    """Trains, evaluates and exports; resumes where an earlier call stopped, or goes on after the end of the run.

    A field in `config.CHANGEABLE` may have another value than at the earlier call; the change is printed and recorded.

    Args:
      folder: the working folder, created if it is missing.
      watch: measures what the time until the first update goes into; None: one that starts now.
    Raises: InputError for an invalid configuration, data, checkpoint or working folder, before any device is touched
      and before anything but the recipe's own inputs is written; `hosts.Stopped` if it was asked to stop, once its
      state is saved.
    """
    watch = watch or Stopwatch()
    unresolved = workdir.dated(config, folder)
    config = resolve_paths(unresolved, folder)
    checks.check_model_named(config)
    objective = objective_of(config.loss)
    checks.check_names(config, objective)
    checks.check_upload(config)
    trackers.check_available(tensorboard=config.log.tensorboard, wandb=config.log.wandb)
    files.check_writable(folder)
    named_function(config.hooks, "hooks")
    workdir.check(unresolved, folder)
    check_replaceable(folder / "export")
    with watch.part("data"):
        inputs = read_inputs(config, objective, folder, training=True)
    total = checks.updates_of(config, inputs.sets["train"])
    changes = history.changes_of(unresolved, folder)
    step = workdir.check_data(
        inputs.digests,
        folder,
        other_eval=lambda step: "data.eval" in changes or history.changes_evaluation(folder, step),
    )
    checks.check_goes_on(config, changes, step, total)
    history.check_goal(config, inputs)
    console.describe_data(inputs)
    console.describe_warmup(warmup_of(config.optimizer, total), total)
    if is_complete(config, folder, changes, step, total):
        return
    with watch.part("devices and shapes"):
        programs = make_programs(
            config, objective, inputs.model, inputs.lengths, trainable=inputs.trainable, watch=watch
        )
    with hosts.listening():
        with watch.part("supervised stage"):
            inputs = after_sft(unresolved, inputs, folder)
        with watch.part("digest of weights"):
            store = reference_store(inputs, programs, store_folder(config, folder))
        if changes:
            say(f"changed at step {step or 0}: {history.shown(changes)}")
        history.record_changes(changes, folder, step or 0)
        workdir.claim(unresolved, folder)
        account = Account(watch)
        with account.told():
            train(config, inputs, programs, store, folder, total, account)


def is_complete(
    config: Config, folder: Path, changes: Mapping[str, Sequence[object]], step: int | None, total: int
) -> bool:
    """Whether the run has nothing left to do under this configuration, which is then printed.

    Args:
      changes: of the configuration since the last call; those that only later updates would show are named.
      step: of the newest checkpoint.
    """
    end = history.read_end(folder)
    if step is None or end.get("step") != step or {"data.eval", "checkpoint.best"} & changes.keys():
        return False
    if step < total and not history.read_history(config, folder, before=step + 1, kept=[end["exported"]]).over:
        return False
    say(f"{folder} is complete at step {step}, {end['reason']}; the model is in {folder / 'export'}")
    if changes:
        further = "raise train.steps or train.epochs" if step == total else "raise eval.patience, or set it to 0"
        say(f"note: no update is left for a change ({history.shown(changes)}); {further}")
    if config.export.push_to_hub:
        say(f"note: nothing is uploaded again; dpo-jax export --workdir={folder} uploads the model")
    return True


def after_sft(unresolved: Config, inputs: Inputs, folder: Path) -> Inputs:
    """Runs supervised fine-tuning in its own working folder `WORKDIR/sft`, unless finished or `sft.steps` is 0.

    Args:
      unresolved: the configuration before `{workdir}` is replaced.
    Returns: the inputs, starting from the model it exported.
    """
    if not unresolved.sft.steps:
        return inputs
    say(f"first: supervised fine-tuning on the chosen answers, in {folder / 'sft'}")
    files.make_folder(folder / "sft")
    # Paths are relative to the stage's own folder, so that both folders can be moved together.
    config = resolve_paths(unresolved, "{workdir}/..")
    stage = dataclasses.replace(
        config,
        loss=Loss(name="sft"),
        reference=dataclasses.replace(config.reference, sync_steps=0, mixup_alpha=1.0),
        eval=dataclasses.replace(config.eval, patience=0),
        checkpoint=dataclasses.replace(config.checkpoint, best=""),
        train=dataclasses.replace(config.train, batch_pairs=config.sft.batch_pairs, steps=config.sft.steps),
        optimizer=dataclasses.replace(
            config.optimizer,
            learning_rate=config.sft.learning_rate,
            warmup_steps=config.sft.warmup_steps,
            warmup_ratio=config.sft.warmup_ratio,
        ),
        sft=Sft(),
        prepare="",
        hooks="",
        # The next stage starts from this export, so it must not round the parameters.
        export=Export(dtype=config.model.param_dtype if inputs.trainable.adapters is None else "float32"),
    )
    run(stage, folder / "sft")
    say("then: preference optimization")
    return from_sft(inputs, folder)


def from_sft(inputs: Inputs, folder: Path) -> Inputs:
    """Returns the inputs, starting from the model in `WORKDIR/sft/export`. Raises: InputError if it is missing."""
    exported = folder / "sft" / "export"
    if not is_export(exported):
        raise InputError(
            str(exported), got="no such folder", expected="the fine-tuned model", remedy="Run dpo-jax train first."
        )
    return inputs.starting_from(exported)


def train(
    config: Config,
    inputs: Inputs,
    programs: Programs,
    store: Store | None,
    folder: Path,
    total: int,
    account: Account,
) -> None:
    """Scores the reference, makes the updates with evaluations and checkpoints between them, and exports."""
    watch = programs.watch
    with contextlib.ExitStack() as opened:
        order = order_of(config, inputs)
        with watch.part("reference"):
            only = {"train": pairs_of_first_reference(config, inputs, order, total)}
            values, params = complete_store(inputs, store, programs, only=only)
        tx, learning_rate = optimizer_of(config.optimizer, total_steps=total, trainable=inputs.trainable)
        checkpoints = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep, best=lambda: evaluations.kept)
        opened.callback(checkpoints.close)
        with watch.part("weights"):
            state, frozen = first_state(inputs.source, programs, tx, checkpoints, params)
            jax.block_until_ready((state, frozen))
        del params  # trainable parameters are donated to the state: from here on memory holds one model
        start = int(jax.device_get(state.step))
        every = config.eval.every_steps, config.checkpoint.every_steps
        schedule = Schedule(start, total, *every, save_evaluated=bool(config.checkpoint.best))
        before = start + keeps_evaluation(schedule, folder)
        evaluations = history.read_history(config, folder, before=before, kept=checkpoints.all_steps())
        sync = sync_of(config, inputs, programs, store, order, total, folder)
        if sync is not None and sync.last(start):
            values = sync.stored(sync.last(start))
        spent = checkpoints.record(start).get("time", {}) if start else {}
        outputs = open_outputs(opened, config, programs, folder, schedule, account, spent)
        console.describe_run(programs, state.params, frozen, start, total)
        between = Between(
            inputs=inputs,
            programs=programs,
            store=store,
            frozen=frozen,
            values=values,
            sync=sync,
            batches=UpdateBatches(inputs, programs, order, values.get("train")),
            outputs=outputs,
            checkpoints=checkpoints,
            evaluations=evaluations,
            record={"config": dataclasses.asdict(config), "data": inputs.digests, "version": dpo_jax.__version__},
            learning_rate=learning_rate,
        )
        mixture = inputs.sets["train"].mixture
        compiled = make_update(programs, tx, state, paired=inputs.paired, mixture=mixture)
        stretches = sync_stretches(start, total, config.reference.sync_steps)
        batches = opened.enter_context(contextlib.closing(between.batches.stream(stretches)))

        def update(state: TrainState, prepared: Prepared) -> tuple[TrainState, Mapping[str, jax.Array]]:
            return compiled(state, frozen, prepared.batch)

        state = run_loop(state, schedule, batches, update, between)
        with watch.part("save"):
            checkpoints.close()  # waits for the last
    last, best, params = int(jax.device_get(state.step)), evaluations.kept, state.params
    if best is not None and best != last:
        del state, params  # before the best is read: memory holds one model
        with Checkpoints(folder / "checkpoints", keep=1, read_only=True) as kept:
            params, _ = kept.restore_params(best, abstract_params(programs)[0], abstract_running(programs))
    with watch.part("export"):
        finish(config, inputs, trees.join(params, frozen), folder, evaluations, End(last, total, best or last))


class End(NamedTuple):
    """Numbers of updates at a run's end."""

    step: int  # made
    total: int  # of the configuration; more than `step` if the run ended early
    exported: int  # before the state that is exported


def finish(config: Config, inputs: Inputs, params: PyTree, folder: Path, evaluations: History, end: End) -> None:
    """Exports parameters, and prints and records how the run ended."""
    since, rows = history.evaluated_since(folder), workdir.read_rows(folder / "eval.jsonl")
    rows = [row for row in rows if since <= row["step"] <= end.exported]  # of the pairs that the run has now
    changes, last = history.read_changes(folder), [row for row in rows if row["step"] == end.exported]
    export_model(config, inputs, params, folder / "export", last, end.exported, changes=changes)
    upload(config, folder / "export")
    reason = f"all {end.total} updates made"
    if end.step < end.total:
        reason = f"before {end.total}: no better {evaluations.goal} in {counted(config.eval.patience, 'evaluations')}"
    if end.exported != end.step:
        reason += f"; exported is the best, step {end.exported}"
    say(f"ended at step {end.step}, {reason}")
    history.record_end(folder, step=end.step, total=end.total, exported=end.exported, reason=reason)
    console.before_and_after(rows)


def keeps_evaluation(schedule: Schedule, folder: Path) -> bool:
    """Whether an evaluation after `schedule.start` updates is kept: that of an end beyond which the run now goes."""
    return not schedule.evaluates(schedule.start) and not history.changes_evaluation(folder, schedule.start)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Logs, trackers, progress line and clocks of a run."""

    write: Callable[[str, int, Mapping[str, float]], None]  # (file, step, row): to that log and to every tracker
    flush: Callable[[], None]  # returns once every row is where it is read from
    progress: Progress
    clock: Clock
    steps: StepLog
    profile: Profile
    account: Account


def open_outputs(
    opened: contextlib.ExitStack,
    config: Config,
    programs: Programs,
    folder: Path,
    schedule: Schedule,
    account: Account,
    spent: Mapping[str, float],
) -> Outputs:
    """Opens the outputs of a run, which `opened` closes, and begins its account of time.

    Rows that an interrupted run logged after its last checkpoint are dropped, since the run writes them again.

    Args:
      spent: fields of the account when the checkpoint was made that the run goes on from.
    """
    start, total, kept = schedule.start, schedule.total, keeps_evaluation(schedule, folder)
    writers: dict[str, list[trackers.Tracker]] = {}  # by file; empty except on process 0
    last: dict[str, dict[str, float]] = {}  # row that an earlier call wrote, by file
    if hosts.first():
        for name in ("metrics.jsonl", "eval.jsonl"):
            log = trackers.JsonlWriter(folder / name)
            opened.callback(log.close)
            last[name] = log.truncate_after(start if name == "eval.jsonl" and kept else start - 1)
            writers[name] = [log]
        more_writers = trackers.open_trackers(
            folder,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            config=dataclasses.asdict(config),
            resume_step=start,
        )
        hook = named_function(config.hooks, "hooks")
        more_writers += [] if hook is None else [trackers.HookWriter(hook)]
        for tracker in more_writers:
            opened.callback(tracker.close)
        writers = {name: [*logs, *more_writers] for name, logs in writers.items()}
    account.begin(spent, last.get("metrics.jsonl", {}))
    progress, clock = Progress(total, start=start), Clock(start)
    profile = Profile(folder / "profile", start + WARM_UP, config.profile.steps)
    opened.callback(progress.close)
    opened.callback(profile.close)
    peak = peak_flops(programs.mesh.devices.flat[0].device_kind, np.dtype(programs.dtype).name)

    def write(name: str, step: int, row: Mapping[str, float]) -> None:
        for writer in writers.get(name, ()):
            writer.write(step, row)

    steps = StepLog(
        lambda step, row: write("metrics.jsonl", step, {**row, **account.fields()}),
        progress,
        clock,
        every=config.log.every_steps,
        total=total,
        examples=programs.update_shape.pairs,
        peak_flops=None if peak is None else peak * programs.mesh.size,
    )

    def flush() -> None:
        steps.flush()
        for writer in {id(each): each for group in writers.values() for each in group}.values():
            writer.flush()

    return Outputs(write, flush, progress, clock, steps, profile, account)


@dataclasses.dataclass
class Between:
    """Evaluation, checkpoints, reference syncs and logging between the updates of a run; see `loop.Between`."""

    inputs: Inputs
    programs: Programs
    store: Store | None
    frozen: PyTree  # parameters that do not train
    values: dict[str, ReferenceValues]  # current reference log-probs of each set of pairs
    sync: ReferenceSync | None  # None: the reference is never synced
    batches: UpdateBatches
    outputs: Outputs
    checkpoints: Checkpoints
    evaluations: History
    record: dict[str, object]  # saved with each checkpoint
    learning_rate: Callable[[int], float]

    def __post_init__(self):
        self._summaries = make_summaries(self.inputs)
        pairs = self.inputs.sets["train"]
        self._epoch_pairs = epoch_size(pairs.source, pairs.weights)
        self._compiled = False

    def evaluate(self, done: int, state: TrainState) -> bool:
        """Evaluates on data.eval, if there is one, and logs a row of eval.jsonl; returns whether the run ends early."""
        self.outputs.flush()
        if not self.inputs.eval_sets:
            return False
        with self.outputs.clock.paused(state), self.programs.watch.part("evaluation"):
            row = evaluate_sets(
                self.inputs,
                self.programs,
                self._summaries,
                self.values,
                trees.join(state.params, self.frozen),
                state.running,
            )
            self.outputs.write("eval.jsonl", done, row)
            self.outputs.flush()
            for line in console.evaluation_lines(row):
                self.outputs.progress.say(f"step {done}: {line}")
        self.evaluations.add(done, row)
        return self.evaluations.over

    def save(self, done: int, state: TrainState) -> None:
        """Copies the state off the devices; a checkpoint is written of it in the background."""
        self.outputs.flush()  # first: a run that resumes from the checkpoint does not write those rows again
        with self.outputs.clock.paused(state), self.programs.watch.part("save"):
            self.checkpoints.save(done, state, self.record | {"time": self.outputs.account.fields()})

    def before(self, done: int, state: TrainState) -> None:
        """Syncs the reference if a sync is due, and starts or ends a profile."""
        if self.sync is not None and self.sync.due(done):
            self.save(done, state)  # an interruption would lose the policy that the reference syncs with
            with self.outputs.clock.paused(state), self.programs.watch.part("reference"):
                self.values = self.sync.refresh(done, state.params, functools.partial(trees.join, other=self.frozen))
                self.batches.sync(self.values["train"])
            self.outputs.progress.say(f"step {done}: the reference is synced with the policy")
        self.outputs.profile.at(done, state)

    def after(self, done: int, prepared: Prepared, metrics: Mapping[str, jax.Array], waited_s: float) -> None:
        """Logs the update before this one, and runs the self-check if policy and reference had the same weights."""
        if not self._compiled:
            watch = self.programs.watch
            with watch.part("first update"):
                jax.block_until_ready(metrics)
            watch.add("first batch", waited_s)
            say(f"first update done after {watch}")
            self._compiled = True
        step, gap = done - 1, metrics.get("gap")
        if gap is not None and self.store is not None and self._starts_at_reference(step):
            self_check.check_start(
                np.asarray(jax.device_get(gap)),
                prepared.indices,
                self.values["train"],
                self.inputs,
                self.programs,
                self.store if not step or self.sync is None else self.sync.store_at(step),
                synced=step,
            )
        row = {
            "epoch": step * self.programs.update_shape.pairs / self._epoch_pairs,
            "learning_rate": self.learning_rate(step),
            **prepared.counts,
        }
        shown = {name: value for name, value in metrics.items() if name != "gap"}
        self.outputs.steps.add(done, shown, row, flops=prepared.flops, waited_s=waited_s)

    def _starts_at_reference(self, step: int) -> bool:
        """Whether policy and reference have the same weights at an update."""
        return step == 0 or (self.sync is not None and self.sync.due(step) and self.sync.mixup_alpha == 1)


def order_of(config: Config, inputs: Inputs) -> Callable[[int], np.ndarray]:
    """Returns the function from an update's number to the indices of its pairs."""
    pairs, batch_pairs, shuffle = inputs.sets["train"], config.train.batch_pairs, config.data.shuffle
    return make_order(pairs.source, pairs.weights, batch_pairs=batch_pairs, seed=config.seed, shuffle=shuffle)


def pairs_of_first_reference(
    config: Config, inputs: Inputs, order: Callable[[int], np.ndarray], total: int
) -> np.ndarray:
    """Returns the indices of the training pairs that updates under the initial reference read."""
    updates = min(total, config.reference.sync_steps or total)
    return reached(order, range(updates), len(inputs.sets["train"]))


def sync_of(
    config: Config,
    inputs: Inputs,
    programs: Programs,
    store: Store | None,
    order: Callable[[int], np.ndarray],
    total: int,
    folder: Path,
) -> ReferenceSync | None:
    """Returns the object that syncs the reference with the policy (TR-DPO); None if it never does."""
    reference = config.reference
    if store is None or not reference.sync_steps:
        return None
    return ReferenceSync(
        inputs=inputs,
        programs=programs,
        store=store,
        order=order,
        total_steps=total,
        sync_steps=reference.sync_steps,
        mixup_alpha=reference.mixup_alpha,
        run_digest=functools.partial(workdir.run_digest, config, inputs.digests["train"], history.read_changes(folder)),
    )


__getattr__ = aliases.forward(
    __name__,
    {name: f"dpo_jax.commands.{name}" for name in ("score_reference", "evaluate_checkpoint", "export_checkpoint")},
)
