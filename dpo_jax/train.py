"""The training run: from configuration to exported model, in the order in which it happens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import resource
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import dpo_jax
from dpo_jax import card, feed, hosts, programs, scoring, sharding, trackers, workdir
from dpo_jax import config as configs
from dpo_jax import inputs as run_inputs
from dpo_jax.batches import Known, make_batch
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.config import Config
from dpo_jax.data import layout
from dpo_jax.data.order import epoch_size, make_order
from dpo_jax.data.pairs import PairSet
from dpo_jax.evaluate import evaluate, make_summary
from dpo_jax.flops import forward_flops, peak_flops, shares_of, train_flops
from dpo_jax.following import Following, stretches
from dpo_jax.inputs import Inputs
from dpo_jax.models import adapters as low_rank
from dpo_jax.models import hf_files, hf_io
from dpo_jax.report import before_and_after, describe_data, describe_run, one_line
from dpo_jax.steps import scores_first
from dpo_jax.trackers import say
from dpo_jax.types import Batch, InputError

WARM_UP = 2  # updates before a profile begins
# Fields that say what a checkpoint's parameters are.
OF_PARAMETERS = (
    "model.path model.param_dtype train.freeze lora.rank lora.alpha lora.rank_stabilised lora.targets lora.path "
    "lora.base sft.steps"
).split()


def run(config: Config, folder: Path) -> None:
    """Trains, evaluates and exports; goes on where an earlier call with the same configuration stopped.

    Args:
      folder: the working folder, made if there is none.
    Raises: InputError for whatever cannot be used in configuration, data, checkpoint or working folder, before any
      device is touched and before anything but the recipe's own inputs is written; `hosts.Stopped` where it was asked
      to stop and has saved its state.
    """
    watch = trackers.Stopwatch()
    given, config = config, run_inputs.resolve_paths(config, folder)
    run_inputs.check_names(config)
    trackers.check_available(tensorboard=config.log.tensorboard, wandb=config.log.wandb)
    workdir.check(given, folder)
    hf_files.check_replaceable(folder / "export")
    with watch.part("data"):
        inputs = run_inputs.read_inputs(config, folder, training=True)
    total = run_inputs.check_lengths(config, inputs)
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
    tx, schedule = run_inputs.optimizer_of(config, total_steps=total, selection=inputs.selection)
    rate, summary = jax.jit(schedule), make_summary(built.objective, paired=inputs.paired)
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep)
    with watch.part("weights"):
        state, frozen = programs.first_state(config, inputs.folder, built, tx, checkpoints, params)
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
    progress = trackers.Progress(total, start=start)
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
            functools.partial(built.score, scoring.join(state.params, frozen)),
            summary,
            inputs.eval,
            inputs.eval.lengths,
            known[-1] if known else None,
            shape=built.score_shape,
            layout=built.layout,
            running=state.running,
            unrelated=inputs.eval_unrelated,
        )
        write("eval.jsonl", step, row)
        progress.say(f"step {step}: {one_line(row)}")

    def make(step: int) -> Made:
        chosen = order(step)
        stored, others = known[0] if known else None, inputs.train_unrelated
        batch = make_batch(chosen, train_pairs, stored, shape, layout=layout_name, unrelated=others)
        counts = layout.work_counts(batch, train_pairs.lengths[chosen], shape, layout_name)
        flops = train_flops(built.model, train_pairs.lengths[chosen], layout_name, shares)
        if scores_first(built.objective, len(batch.present)):
            counts["positions_computed"] *= 2  # forward only at first; the tokens and their FLOPs are the same
        if others is not None:
            scored = layout.work_counts(batch.unrelated, others.lengths[chosen], shape, layout_name)
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
            with contextlib.closing(feed.ahead(make, steps)) as made:
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
                    known = following.refresh(step, state.params, functools.partial(scoring.join, other=frozen))
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
    params = scoring.join(state.params, frozen)
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
) -> tuple[list[Known], Any | None]:
    """What the reference says of training and evaluation pairs, and the weights if they had to be loaded."""
    if store is None:
        return [], None
    started = time.perf_counter()
    loaded: list[Any] = []

    def weights() -> Any:
        if not loaded:
            loaded.append(programs.load_params(config, inputs.folder, built))
        return loaded[0]

    with trackers.Counter("reference pass", unit="pairs") as counter:
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


class Faults:
    """Memory pages of this process that were touched for the first time: large temporaries made anew are slow."""

    def __init__(self):
        self._seen = resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def since(self) -> int:
        """How many since the last call."""
        before, self._seen = self._seen, resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return self._seen - before


class Profile:
    """Traces `steps` updates from `first` on with XProf, into a folder that TensorBoard's profile plugin reads."""

    def __init__(self, folder: Path, first: int, steps: int):
        self._folder, self._first, self._last, self._on = folder, first, first + steps, False

    def at(self, step: int, running: Any) -> None:
        """Starts or stops before update `step`, once the updates that make `running` are done."""
        if step == self._first < self._last:
            jax.block_until_ready(running)
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        if self._on and step == self._last:
            jax.block_until_ready(running)
            self.close()

    def close(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            say(f"profile: in {self._folder}")
            self._on = False


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
    config: Config,
    inputs: Inputs,
    params: Any,
    out: Path,
    evaluations: list[dict[str, float]],
    steps: int,
    *,
    merge: bool = False,
) -> None:
    """Writes a Hugging Face folder with a model card.

    Args:
      merge: write the model with adapters merged into it, and not the adapters alone.
    """
    data = {
        split: (spec, len(pairs))
        for split, spec, pairs in (
            ("train", config.data.train, inputs.train),
            ("eval", config.data.eval, inputs.eval),
        )
        if pairs is not None
    }
    final = evaluations[-1] if evaluations else {}
    adapters = inputs.selection.adapters
    text = card.model_card(config, inputs.name, data=data, steps=steps, final=final, adapters=adapters, merged=merge)
    together: dict[str, Any] = {
        "tokenizer": inputs.tokenizer_folder,
        "card": text,
        "hosts": hf_files.Hosts(hosts.index(), hosts.count(), hosts.wait),
    }
    if adapters is None or merge:
        params = params if adapters is None else low_rank.merge(params, adapters)
        hf_io.export(params, base=inputs.base, out=out, dtype=config.export.dtype, **together)
    else:
        table, _ = hf_io.family_table(inputs.base, inputs.model)
        dtype = config.export.dtype or "float32"
        low_rank.save(params, adapters, table, inputs.model.stacks, base=inputs.name, out=out, dtype=dtype, **together)
    hosts.wait("export")  # it is in place once the first is through
    say(f"exported to {out}")


# --- the other commands: parts of the same line -------------------------------------------------------------------


def score_reference(config: Config, folder: Path) -> None:
    """The reference pass alone, into `reference.path`. Raises: InputError as `run` does."""
    given, config = config, run_inputs.resolve_paths(config, folder)
    run_inputs.check_names(config)
    if run_inputs.loss_of(config).reference_free:
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
        following = following_of(config, inputs, built, store, run_inputs.check_lengths(config, inputs))
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
        unrelated=inputs.eval_unrelated,
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
    run_inputs.check_names(config)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1, read_only=True)
    step = checkpoints.latest_step()
    if step is None:
        raise InputError(
            str(folder / "checkpoints"), got="no checkpoint", expected="one of a training run", remedy="Train first."
        )
    config, inputs = from_sft(config, run_inputs.load_inputs(config, training=False), folder)
    built = programs.make_programs(config, inputs.model, inputs.lengths, selection=inputs.selection)
    trained, running = programs.abstract_params(config, built)[0], programs.abstract_running(built)
    params, running = checkpoints.restore_params(step, trained, running)
    checkpoints.close()
    whole = scoring.join(params, programs.load_frozen(config, inputs.folder, built))
    return config, inputs, built, step, whole, running
