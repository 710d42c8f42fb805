"""Programs of a run, built once from its configuration: mesh, batch shapes, and the steps that score and update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from jax.typing import DTypeLike
from jaxtyping import Float, Int, PyTree, UInt32

from dpo_jax import sharding
from dpo_jax.accumulate import Crop
from dpo_jax.config import Config
from dpo_jax.data import packing
from dpo_jax.data.layout import crop_rows
from dpo_jax.losses import Objective
from dpo_jax.models.attention import choose
from dpo_jax.models.config import DecoderConfig
from dpo_jax.optim import Optimizer
from dpo_jax.parallel import ModelOptions, Placement
from dpo_jax.reference.scoring_pass import PART_PAIRS
from dpo_jax.run.checks import fit
from dpo_jax.run.trainable import EVERYTHING, Trainable
from dpo_jax.runtime.clocks import Stopwatch
from dpo_jax.runtime.terminal import waiting
from dpo_jax.runtime.xla import COMPILER_OPTIONS, Compiled, keep_compiled
from dpo_jax.scoring import compute_dtype, make_logps_fn
from dpo_jax.steps import TrainState, make_score_step, make_train_step, rounding_key
from dpo_jax.types import AnyArray, Batch

# Positions in a microbatch. On a CPU one short row at a time keeps temporaries in cache; an accelerator wants more.
CPU_POSITIONS, ACCELERATOR_POSITIONS = 1_536, 16_384


class Programs(NamedTuple):
    """Mesh, batch shapes, types and scoring programs of a run."""

    model: DecoderConfig
    objective: Objective
    trainable: Trainable  # which parameters train
    mesh: Any  # a sharding.AnyMesh; an abstract one where there are no devices
    rules: sharding.Rules
    update_shape: packing.Shape
    score_shape: packing.Shape
    dtype: DTypeLike  # compute type
    param_dtype: str  # of parameters
    quantize: str  # form of frozen matrices of blocks: int8, nf4; empty: as `param_dtype`
    attention: str  # the chosen implementation
    remat: str
    router_balance: float  # weight of the load-balancing loss; 0: none
    seed: int
    watch: Stopwatch  # measures compiling and reading weights
    scoring: Compiled | None = None  # (params, batch on the mesh) -> (logps, token sums); None: there are no devices
    reference_scoring: Compiled | None = None  # of the reference pass; returns token values if they are read

    @property
    def layout(self) -> str:
        """Layout of each pair, one of `data.layout.LAYOUTS`."""
        return self.update_shape.layout

    def score(self, params: PyTree, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns log-probs [P, K] and sums over answers of a host batch, replicated on every process."""
        assert self.scoring is not None
        return self.scoring(params, sharding.put(batch, self.mesh))

    def score_reference(self, params: PyTree, batch: Batch) -> tuple[jax.Array, dict[str, PyTree]]:
        """Like `score`, with the values of single tokens instead of sums, if the objective reads them."""
        assert self.reference_scoring is not None
        return self.reference_scoring(params, sharding.put(batch, self.mesh))


def make_programs(
    config: Config,
    objective: Objective,
    model: DecoderConfig,
    lengths: Int[np.ndarray, "N _"],
    *,
    trainable: Trainable = EVERYTHING,
    devices: Sequence[Any] | None = None,
    watch: Stopwatch | None = None,
) -> Programs:
    """Chooses shapes from data and devices, and builds the scoring programs for the mesh.

    Args:
      lengths: token counts of prompt and answers of every pair that will be laid out.
      trainable: which parameters train.
      devices: devices of the mesh, possibly absent ones; None: all of this machine, and compiled programs are cached.
      watch: measures compiling and reading weights.
    """
    if devices is None:
        keep_compiled()
    mesh = sharding.make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor, devices)
    local_shards = sharding.shards_here(mesh)
    with waiting("choosing batch shapes"):
        place = mesh, mesh.devices.flat[0].platform, local_shards
        programs = _without_scoring(config, objective, model, lengths, trainable, place)
    programs = programs if watch is None else programs._replace(watch=watch)
    shape, tokens = programs.score_shape, objective.reference_tokens

    def compiled(name: str, **outputs: Any) -> Compiled:
        step = make_score_step(logps_of(programs, shape, **outputs), has_aux=True, crops=crops(shape))
        jitted = jax.jit(step, out_shardings=sharding.replicated(mesh), compiler_options=COMPILER_OPTIONS)
        return Compiled(name, jitted, programs.watch)

    score = compiled("scoring", sums=objective.sums)
    of_reference = score if tokens is None else compiled("scoring of the reference", tokens=tokens)
    return programs._replace(scoring=score, reference_scoring=of_reference)


def without_devices(
    config: Config,
    objective: Objective,
    model: DecoderConfig,
    lengths: Int[np.ndarray, "N _"],
    count: int,
    *,
    platform: str,
    trainable: Trainable = EVERYTHING,
) -> Programs:
    """Like `make_programs`, for `count` absent devices: nothing is compiled."""
    sizes = sharding.mesh_shape((config.mesh.replica, config.mesh.fsdp, config.mesh.tensor), count)
    mesh = AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    return _without_scoring(config, objective, model, lengths, trainable, (mesh, platform, None))


def _without_scoring(
    config: Config,
    objective: Objective,
    model: DecoderConfig,
    lengths: np.ndarray,
    trainable: Trainable,
    place: tuple[Any, str, tuple[int, ...] | None],  # mesh, platform, shards of this process (None: all)
) -> Programs:
    mesh, platform, local_shards = place
    model, layout = fit(config, model, lengths)
    positions = CPU_POSITIONS if platform == "cpu" else ACCELERATOR_POSITIONS
    choose_shape = functools.partial(
        packing.choose_shape,
        lengths,
        layout=layout,
        row_length=config.data.row_length,
        shards=sharding.row_shards(mesh),
    )
    batch_pairs, rows = config.train.batch_pairs, config.train.microbatch_rows
    update_shape = choose_shape(pairs=batch_pairs, rows=rows, target_positions=positions)
    # Without a backward pass far more rows fit.
    score_shape = choose_shape(
        pairs=PART_PAIRS,
        rows=config.reference.microbatch_rows,
        target_positions=positions if platform == "cpu" else 4 * positions,
        field="reference.microbatch_rows",
    )
    attention = choose.choose(
        config.model.attention, platform, head_dim=model.head_dim, row_length=update_shape.row_length
    )
    return Programs(
        model=model,
        objective=objective,
        trainable=trainable,
        mesh=mesh,
        rules=sharding.parse_rules(config.mesh.rules),
        update_shape=dataclasses.replace(update_shape, local_shards=local_shards),
        score_shape=dataclasses.replace(score_shape, local_shards=local_shards),
        dtype=compute_dtype(config.model.dtype, platform),
        param_dtype=config.model.param_dtype,
        quantize=config.lora.base,
        attention=attention,
        remat=config.model.remat,
        router_balance=config.train.router_balance,
        seed=config.seed,
        watch=Stopwatch(),
    )


def crops(shape: packing.Shape) -> list[Crop]:
    """Returns the functions that crop a microbatch's rows to each size of a shape."""
    return [functools.partial(crop_rows, crop=crop) for crop in shape.crops]


def make_update(
    programs: Programs,
    tx: Optimizer,
    state: TrainState,
    *,
    paired: bool = True,
    mixture: Sequence[str] = (),
) -> Compiled:
    """Returns the jitted update(state, frozen, batch on the mesh): the state is donated and keeps its sharding.

    The numbers of objective and optimizer are arguments of the program: a run with others finds it in JAX's cache.

    Args:
      state: arrays, or their shapes and shardings.
      paired: whether pairs have both their answers.
      mixture: names of the parts of a mixture, for metrics of each.
    """
    step = update_step(programs, tx, paired=paired, mixture=mixture)[0]
    return jit_update("update", step, programs, state, numbers_of(programs, tx))


class Numbers(NamedTuple):
    """Numbers of an update that are arguments of its program, as host arrays."""

    values: Float[AnyArray, "n"]  # the leaves of `number_tree`
    rounding_key: UInt32[AnyArray, "2"]  # data of the key of `steps.rounding_key`


def number_tree(programs: Programs, tx: Optimizer) -> dict[str, PyTree]:
    """Returns the numbers of the objective, the optimizer and the penalties by name."""
    balance = programs.router_balance
    penalties = {"router_balance": balance} if balance else {}
    return {"objective": programs.objective.numbers, "optimizer": tx.numbers, "penalties": penalties}


def numbers_of(programs: Programs, tx: Optimizer) -> Numbers:
    """Returns the numbers of an update as its program takes them."""
    values = np.array(jax.tree.leaves(number_tree(programs, tx)), np.float32)
    return Numbers(values, np.asarray(jax.random.key_data(rounding_key(programs.seed))))


def update_step(
    programs: Programs, tx: Optimizer, *, paired: bool = True, mixture: Sequence[str] = ()
) -> tuple[Callable[..., PyTree], Callable[..., PyTree]]:
    """Returns the update(state, frozen, batch, numbers) as a pure function, and the `logps_fn` that it scores by."""
    shape = programs.update_shape
    logps_fn = logps_of(programs, shape, sums=programs.objective.sums)
    names = jax.tree.structure(number_tree(programs, tx))

    def update(state: TrainState, frozen: PyTree, batch: Batch, numbers: Numbers) -> PyTree:
        values = names.unflatten(list(numbers.values))
        step = make_train_step(
            functools.partial(logps_fn, frozen=frozen),
            programs.objective.with_numbers(values["objective"]),
            tx.with_numbers(values["optimizer"]),
            has_aux=True,
            in_place=True,
            crops=crops(shape),
            penalties=values["penalties"],
            mask_gradients=programs.trainable.mask_gradients,
            paired=paired,
            seed=jax.random.wrap_key_data(numbers.rounding_key),
            report_gap=not programs.objective.reference_free,
            mixture=mixture,
        )
        return step(state, batch)

    return update, logps_fn


def logps_of(programs: Programs, shape: packing.Shape, **outputs: Any) -> Callable[..., PyTree]:
    """Returns the `logps_fn` of a run for batches of a shape.

    Args:
      outputs: `sums` or `tokens` of `scoring.make_logps_fn`.
    """
    return make_logps_fn(
        programs.model,
        pairs=shape.pairs,
        answers=shape.answers,
        options=ModelOptions(programs.dtype, programs.remat, programs.attention, programs.trainable.adapters),
        placement=Placement(programs.mesh, programs.rules),
        **outputs,
    )


def jit_update(
    name: str, step: Callable[..., PyTree], programs: Programs, state: TrainState, numbers: Numbers
) -> Compiled:
    """Jits `step(state, ..., numbers) -> (state, metrics)`: the state is donated and keeps its sharding.

    Returns: the step without its last argument, which is always `numbers`.
    """
    mesh = programs.mesh
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state)):
        numbers = sharding.put_replicated(numbers, mesh)  # once, not at every step
    else:
        place = sharding.replicated(mesh)
        numbers = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), numbers)
    places = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=places, compiler_options=COMPILER_OPTIONS)
    return Compiled(name, jitted, programs.watch, (numbers,))
