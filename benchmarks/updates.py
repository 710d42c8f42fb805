"""Builds the update of a configuration from its parts, for benchmarks that change one part or inspect the program."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import memory, minor_faults, reset_peak
from dpo_jax.config import Config, freeze
from dpo_jax.data import layout
from dpo_jax.hf import checkpoints
from dpo_jax.models.config import DecoderConfig
from dpo_jax.parallel import ModelOptions
from dpo_jax.run import choices, programs
from dpo_jax.run import inputs as run_inputs
from dpo_jax.run import state as state_module
from dpo_jax.run.reference_values import reference_store, score_missing
from dpo_jax.run.workdir import resolve_paths
from dpo_jax.runtime import xla
from dpo_jax.scoring import make_logps_fn
from dpo_jax.steps import init_state, make_score_step, make_train_step
from dpo_jax.types import Batch, Encoded


class Parts(NamedTuple):
    """The parts from which a run builds its update."""

    config: Config
    inputs: run_inputs.Inputs
    programs: programs.Programs
    pairs: list[list[Encoded]]  # pairs of each step, in file order


def read(chosen: Any, work: Path) -> Parts:
    """Reads the inputs of a configuration and chooses shapes as a run does."""
    config = resolve_paths(freeze(chosen), work)
    objective = choices.objective_of(config.loss)
    inputs = run_inputs.load_inputs(config, objective, training=True)
    assert config.train.steps is not None
    train, size = inputs.sets["train"], config.train.batch_pairs
    pairs = [[train[i] for i in range(at * size, (at + 1) * size)] for at in range(config.train.steps)]
    return Parts(config, inputs, programs.make_programs(config, objective, inputs.model, inputs.lengths), pairs)


def load_params(parts: Parts) -> Any:
    """Loads the weights of the model onto the default device."""
    dtype = parts.config.model.param_dtype

    def on_device(path: str, shape: tuple[int, ...], read: Any) -> jax.Array:
        return jnp.array(read((slice(None),) * len(shape)))

    return checkpoints.load_params(parts.inputs.source.folder, parts.inputs.model, dtype=dtype, place=on_device)


def reference_values(parts: Parts, work: Path) -> list[np.ndarray]:
    """Reference log-probs [P, 2] of the pairs of each step."""
    store = reference_store(parts.inputs, parts.programs, work / "reference")
    assert store is not None
    weights = functools.cache(lambda: state_module.load_params(parts.inputs.source, parts.programs))
    values, _ = score_missing(parts.inputs, store, parts.programs, weights)
    return np.split(values["train"].logps, len(parts.pairs))


def packed_batches(parts: Parts, reference: Sequence[np.ndarray] | None) -> list[Batch]:
    """Packs the batch of each step as a run does, with reference log-probs if they are given."""
    collate = functools.partial(layout.collate, shape=parts.programs.update_shape)
    values = reference or [None] * len(parts.pairs)
    return [collate(pairs, each) for pairs, each in zip(parts.pairs, values, strict=True)]


def make_update(
    parts: Parts, *, model: DecoderConfig | None = None, crops: bool = True, reference_inside: bool = False
) -> tuple[Any, Any]:
    """Returns the jitted, not yet compiled update(state, frozen, batch), which donates the state, and its optimizer.

    Args:
      model: replaces the model of the configuration.
      crops: whether batches say to which size each microbatch is cropped.
      reference_inside: whether the update scores the reference, whose parameters are `frozen`; else `frozen` is None.
    """
    config, shape = parts.config, parts.programs.update_shape
    options = ModelOptions(parts.programs.dtype, config.model.remat, parts.programs.attention)
    logps_fn = make_logps_fn(model or parts.inputs.model, pairs=shape.pairs, options=options)
    cut = programs.crops(shape) if crops else []
    tx, _ = choices.optimizer_of(config.optimizer, total_steps=config.train.steps or 1)
    train = make_train_step(logps_fn, parts.inputs.objective, tx, has_aux=True, in_place=True, crops=cut)
    score = make_score_step(logps_fn, has_aux=True, crops=cut)

    def update(state: Any, frozen: Any, batch: Batch) -> Any:
        if reference_inside:
            batch = batch._replace(reference=score(frozen, batch)[0])
        return train(state, batch)

    return jax.jit(update, donate_argnums=0, compiler_options=xla.COMPILER_OPTIONS), tx


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes as reported by the compiler; `total_bytes` counts donated buffers once."""
    found = compiled.memory_analysis()
    parts = {name: getattr(found, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}
    total = parts["argument"] + parts["output"] + parts["temp"] - parts["alias"]
    return {f"{name}_bytes": size for name, size in parts.items()} | {"total_bytes": total}


def lengths_of(pairs: Sequence[Encoded]) -> np.ndarray:
    """Token counts [P, 3] of pairs: prompt, chosen, rejected."""
    return np.array([pair.lengths for pair in pairs])


def positions_of(parts: Parts, batches: Sequence[Batch]) -> list[int]:
    """Number of positions that the update computes for each packed batch."""
    shape = parts.programs.update_shape
    both = zip(batches, parts.pairs, strict=True)
    return [layout.work_counts(batch, lengths_of(pairs), shape)["positions_computed"] for batch, pairs in both]


def time_steps(update: Any, tx: Any, params: Any, frozen: Any, batches: Sequence[Batch]) -> dict[str, Any]:
    """Runs one update per batch; compiles all their shapes before the first one.

    Args:
      params: the initial parameters; donated.
    Returns: losses, step times, page faults per step, peak memory of the process in total and during the steps, and the
      memory of the largest program as reported by the compiler.
    """
    state = jax.jit(lambda params: init_state(params, tx), donate_argnums=0)(params)
    del params
    compiled: dict[Any, Any] = {}
    for batch in batches:
        if batch.rows.tokens.shape not in compiled:
            compiled[batch.rows.tokens.shape] = update.lower(state, frozen, batch).compile()
    peak_before = memory("VmHWM")
    reset_peak()
    found, times, faults = [], [], []
    for batch in batches:
        before, started = minor_faults(), time.perf_counter()
        state, metrics = jax.block_until_ready(compiled[batch.rows.tokens.shape](state, frozen, batch))
        times.append(time.perf_counter() - started)
        faults.append(minor_faults() - before)
        found.append(float(metrics["loss"]))
    largest = max((memory_of(each) for each in compiled.values()), key=lambda each: each["total_bytes"])
    return {
        "losses": found,
        "step_times_s": times,
        "faults_per_step": float(np.median(faults[1:])),
        "peak_bytes": max(peak_before, memory("VmHWM")),
        "step_peak_bytes": memory("VmHWM"),
        "memory": largest,
    }
