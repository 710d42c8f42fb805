"""The compiled programs of a run and what they start from: mesh, shapes, weights, reference values, state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from jaxtyping import Int

from dpo_jax import losses, parallel, sharding
from dpo_jax.config import Config
from dpo_jax.data import packing
from dpo_jax.data.batches import PairSubset, ReferenceValues
from dpo_jax.data.layout import crop_rows
from dpo_jax.models.attention import choose as attention
from dpo_jax.models.config import DecoderConfig
from dpo_jax.reference import scoring_pass
from dpo_jax.reference.store import check_identity
from dpo_jax.run import checks, choices
from dpo_jax.run import inputs as run_inputs
from dpo_jax.run.inputs import Inputs
from dpo_jax.run.trainable import EVERYTHING, Selection
from dpo_jax.runtime.clocks import Stopwatch
from dpo_jax.runtime.xla import COMPILER_OPTIONS, Compiled, keep_compiled
from dpo_jax.scoring import compute_dtype
from dpo_jax.steps import TrainState, make_score_step, make_train_step
from dpo_jax.types import Batch

# Positions in a microbatch. On a CPU one short row at a time keeps temporaries in cache; an accelerator wants more.
CPU_POSITIONS, ACCELERATOR_POSITIONS = 1_536, 16_384


class Programs(NamedTuple):
    """Where a run computes, in which shapes, and its scoring program; a training run compiles one update besides."""

    model: DecoderConfig
    mesh: Any  # a sharding.AnyMesh; an abstract one where there are no devices
    rules: sharding.Rules
    selection: Selection  # of the parameters, those that train
    layout: str  # of pairs, one of layout.LAYOUTS
    dtype: Any
    attention: str  # the implementation that was chosen
    update_shape: packing.Shape
    score_shape: packing.Shape
    objective: losses.Objective
    scoring: Compiled | None  # params, batch on the mesh -> logps, token sums; None: there are no devices
    reference_scoring: Compiled | None  # the same for the reference pass, which may have to say more of each token
    watch: Stopwatch  # what starting goes into

    def score(self, params: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Log-probs [P, K] and sums over answers of a host batch, the whole of them on every process."""
        assert self.scoring is not None
        return self.scoring(params, sharding.put(batch, self.mesh))

    def score_reference(self, params: Any, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        """The same under the reference, with what is kept of each token, if the objective reads that."""
        assert self.reference_scoring is not None
        return self.reference_scoring(params, sharding.put(batch, self.mesh))


class Store(NamedTuple):
    """A place for reference log-probs, and all that decides them besides the pairs."""

    folder: Path
    identity: dict[str, Any]


def make_programs(
    config: Config,
    model: DecoderConfig,
    lengths: Int[np.ndarray, "N _"],
    *,
    selection: Selection = EVERYTHING,
    devices: Sequence[Any] | None = None,
    watch: Stopwatch | None = None,
) -> Programs:
    """Chooses shapes from data and devices, and builds the scoring program for the mesh.

    Args:
      lengths: token counts of prompt and answers of every pair that will be laid out.
      selection: what trains.
      devices: those of the mesh, which need not be there; None: all that there are, and what is compiled is kept.
      watch: told how long compiling and reading weights take.
    """
    watch = watch or Stopwatch()
    if devices is None:
        keep_compiled()
    mesh = sharding.make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor, devices)
    platform = mesh.devices.flat[0].platform
    made = _without_scoring(config, model, lengths, selection, mesh, platform, sharding.shards_here(mesh), watch)
    shape, tokens = made.score_shape, made.objective.reference_tokens

    def compiled(name: str, **asks: Any) -> Compiled:
        step = make_score_step(logps_of(config, made, shape, **asks), has_aux=True, crops=crops(shape))
        jitted = jax.jit(step, out_shardings=sharding.everywhere(mesh), compiler_options=COMPILER_OPTIONS)
        return Compiled(name, jitted, watch)

    score = compiled("scoring", sums=made.objective.sums)
    of_reference = score if tokens is None else compiled("scoring of the reference", tokens=tokens)
    return made._replace(scoring=score, reference_scoring=of_reference)


def without_devices(
    config: Config,
    model: DecoderConfig,
    lengths: Int[np.ndarray, "N _"],
    count: int,
    *,
    platform: str,
    selection: Selection = EVERYTHING,
) -> Programs:
    """The same for so many devices that are not there, and cannot be compiled for: without a scoring program."""
    sizes = sharding.mesh_shape((config.mesh.replica, config.mesh.fsdp, config.mesh.tensor), count)
    mesh = AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    return _without_scoring(config, model, lengths, selection, mesh, platform, None, Stopwatch())


def _without_scoring(
    config: Config,
    model: DecoderConfig,
    lengths: np.ndarray,
    selection: Selection,
    mesh: Any,
    platform: str,
    here: tuple[int, ...] | None,
    watch: Stopwatch,
) -> Programs:
    model, layout_name = checks.fit(config, model, lengths)
    positions = CPU_POSITIONS if platform == "cpu" else ACCELERATOR_POSITIONS
    choose = functools.partial(
        packing.choose_shape,
        lengths,
        layout=layout_name,
        row_length=config.data.row_length,
        shards=sharding.row_shards(mesh),
        here=here,
    )
    update_shape = choose(pairs=config.train.batch_pairs, rows=config.train.microbatch_rows, target_positions=positions)
    # Without a backward pass far more rows fit.
    score_shape = choose(
        pairs=scoring_pass.PART_PAIRS,
        rows=config.reference.microbatch_rows,
        target_positions=positions if platform == "cpu" else 4 * positions,
        field="reference.microbatch_rows",
    )
    kernel = attention.choose(
        config.model.attention, platform, head_dim=model.head_dim, row_length=update_shape.row_length
    )
    return Programs(
        model=model,
        mesh=mesh,
        rules=sharding.parse_rules(config.mesh.rules),
        selection=selection,
        layout=layout_name,
        dtype=compute_dtype(config.model.dtype, platform),
        attention=kernel,
        update_shape=update_shape,
        score_shape=score_shape,
        objective=choices.loss_of(config),
        scoring=None,
        reference_scoring=None,
        watch=watch,
    )


def crops(shape: packing.Shape) -> list[Callable[[Any], Any]]:
    """Of a shape, the functions that cut a microbatch."""
    return [functools.partial(crop_rows, crop=crop) for crop in shape.crops]


def make_update(config: Config, programs: Programs, tx: Any, state: TrainState, *, paired: bool = True) -> Compiled:
    """The jitted update(state, batch on the mesh): the state is donated and stays where it is on the mesh.

    Args:
      state: arrays, or their shapes and places.
      paired: whether pairs have both their answers.
    """
    return jit_update("update", update_step(config, programs, tx, paired=paired)[0], programs, state)


def update_step(config: Config, programs: Programs, tx: Any, *, paired: bool = True) -> tuple[Any, Any]:
    """The update(state, frozen, batch) as a pure function, and what it scores by."""
    shape = programs.update_shape
    logps_fn = logps_of(config, programs, shape, sums=programs.objective.sums)
    balance = config.train.router_balance

    def update(state: TrainState, frozen: Any, batch: Batch) -> Any:
        step = make_train_step(
            functools.partial(logps_fn, frozen=frozen),
            programs.objective,
            tx,
            has_aux=True,
            adds=True,
            crops=crops(shape),
            penalties={"router_balance": balance} if balance else {},
            wanted=programs.selection.wanted,
            paired=paired,
        )
        return step(state, batch)

    return update, logps_fn


def logps_of(config: Config, programs: Programs, shape: packing.Shape, **asks: Any) -> Callable[..., Any]:
    """The `logps_fn` of a run, for batches of a shape.

    Args:
      asks: what it should say besides, as `scoring.make_logps_fn` has it.
    """
    return parallel.make_logps_fn(
        programs.model,
        pairs=shape.pairs,
        answers=shape.answers,
        dtype=programs.dtype,
        remat=config.model.remat,
        attention=programs.attention,
        mesh=programs.mesh,
        rules=programs.rules,
        adapters=programs.selection.adapters,
        **asks,
    )


def jit_update(name: str, step: Any, programs: Programs, state: TrainState) -> Compiled:
    """A function of a state, and more, to a state and metrics, jitted as an update is."""
    places = jax.tree.map(lambda x: x.sharding, state), sharding.everywhere(programs.mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=places, compiler_options=COMPILER_OPTIONS)
    return Compiled(name, jitted, programs.watch)


def reference_values(
    inputs: Inputs,
    store: Store,
    programs: Programs,
    params: Callable[[], Any],
    report: Callable[[int, int], None] = lambda done, total: None,
    *,
    only: Sequence[np.ndarray] | None = None,
) -> tuple[list[ReferenceValues], scoring_pass.Pass]:
    """What the reference says of every set of pairs, scored now only where neither data nor store have it.

    Args:
      params: of the reference; called only where something has to be scored.
      only: of each set, the pairs wanted; None: all, and values that came with the data are used.
    Raises: InputError if the store holds values of another identity.
    """
    chosen = only or [np.arange(len(pairs)) for pairs in inputs.sets]
    sets: list[Any] = [*inputs.sets, *inputs.mismatched]
    if only is not None:
        sets = [PairSubset(pairs, chosen[i % len(chosen)]) for i, pairs in enumerate(sets)]
    tokens = programs.objective.reference_tokens
    done = scoring_pass.run_pass(
        *store,
        [(pairs, pairs.lengths, pairs.keys, pairs.reference) for pairs in sets],
        lambda batch: programs.score_reference(params(), batch),
        shape=programs.score_shape,
        layout=programs.layout,
        report=report,
        tokens=tokens,
    )
    known = []
    for i, (pairs, at) in enumerate(zip(inputs.sets, chosen, strict=True)):
        place = np.full(len(pairs), -1)
        place[at] = np.arange(len(at))
        values = None if done.tokens is None else done.tokens[i]
        sums = {} if values is None else {"shared_logps": values.shared_logps()}
        mismatched = done.values[len(chosen) + i] if inputs.mismatched else None
        known.append(ReferenceValues(place, done.values[i], sums, values if tokens else None, mismatched))
    return known, done


def reference_store(config: Config, inputs: Inputs, workdir: Path, programs: Programs) -> Store | None:
    """Where this run's reference log-probs are kept, and under what identity; None for a loss that reads none.

    Reads all weights, for their digest. Raises: InputError if there is a store of another identity.
    """
    if programs.objective.reference_free:
        return None
    folder = Path(config.reference.path) if config.reference.path else workdir / "reference"
    dtype, platform = np.dtype(programs.dtype).name, scoring_pass.platform()
    identity = run_inputs.reference_identity(
        config, inputs, layout=programs.layout, dtype=dtype, attention=programs.attention, platform=platform
    )
    check_identity(folder, identity)
    return Store(folder, identity)
