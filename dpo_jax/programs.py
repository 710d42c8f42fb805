"""The compiled programs of a run and what they start from: mesh, shapes, weights, reference values, state."""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float

from dpo_jax import inputs as run_inputs
from dpo_jax import losses, reference, scoring, sharding
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.config import Config
from dpo_jax.data import layout
from dpo_jax.data.pairs import cache_folder
from dpo_jax.inputs import Inputs
from dpo_jax.models import attention, decoder, hf_io
from dpo_jax.steps import TrainState, init_state, make_score_step, make_train_step
from dpo_jax.trackers import say
from dpo_jax.types import Batch

# Positions in a microbatch. On a CPU one short row at a time keeps temporaries in cache; an accelerator wants more.
CPU_POSITIONS, ACCELERATOR_POSITIONS = 1_536, 16_384

# XLA may leave out the rounding of bfloat16 intermediates, and does so in other places where a gradient is wanted too.
# The update would then score the reference's own weights unlike the reference pass did: 0.15 nats apart in a trial.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


class Programs(NamedTuple):
    """Where a run computes, in which shapes, and its scoring program; a training run compiles one update besides."""

    mesh: Mesh
    dtype: Any
    attention: str  # the implementation that was chosen
    update_shape: layout.Shape
    score_shape: layout.Shape
    score: Callable[[Any, Batch], tuple[jax.Array, dict[str, jax.Array]]]  # params, host batch -> logps, token sums


class Compiled:
    """A jitted function that is compiled at its first call and then once and for all: other shapes are an error."""

    def __init__(self, name: str, function: Any, report: Callable[[str], None]):
        self._name, self._function, self._report, self._program = name, function, report, None

    def __call__(self, *args: Any) -> Any:
        if self._program is None:
            started = time.perf_counter()
            self._program = self._function.lower(*args).compile()
            memory = self._program.memory_analysis()
            size = f", {memory.temp_size_in_bytes:,} bytes of temporaries a device" if memory is not None else ""
            self._report(f"compiled {self._name} in {time.perf_counter() - started:.1f} s{size}")
            give_back_freed()
        return self._program(*args)


class Store(NamedTuple):
    """A place for reference log-probs, and all that decides them besides the pairs."""

    folder: Path
    identity: dict[str, Any]


def give_back_freed() -> None:
    """Has glibc give freed memory back to the system: the compiler frees hundreds of MiB, which it would hold on to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def keep_compiled() -> None:
    """Has JAX keep compiled programs in the user's cache, unless a folder is set already or its cache is turned off."""
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] is None and settings["jax_enable_compilation_cache"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("xla")))


def make_programs(config: Config, inputs: Inputs) -> Programs:
    """Chooses shapes from data and backend, and builds the scoring program for the mesh."""
    keep_compiled()
    mesh = sharding.make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)
    accelerated = jax.default_backend() != "cpu"
    positions = ACCELERATOR_POSITIONS if accelerated else CPU_POSITIONS
    choose = functools.partial(
        layout.choose_shape,
        inputs.lengths,
        layout=config.data.layout,
        row_length=config.data.row_length,
        shards=sharding.row_shards(mesh),
    )
    update_shape = choose(pairs=config.train.batch_pairs, rows=config.train.microbatch_rows, target_positions=positions)
    # Without a backward pass far more rows fit.
    score_shape = choose(
        pairs=reference.PART_PAIRS,
        rows=config.reference.microbatch_rows,
        target_positions=4 * positions if accelerated else positions,
        field="reference.microbatch_rows",
    )
    dtype = scoring.compute_dtype(config.model.dtype)
    kernel = attention.choose(
        config.model.attention,
        mesh.devices.flat[0].platform,
        head_dim=inputs.model.head_dim,
        row_length=update_shape.row_length,
    )
    logps_fn = scoring.make_logps_fn(
        inputs.model, pairs=score_shape.pairs, dtype=dtype, remat=config.model.remat, attention=kernel, mesh=mesh
    )
    step = make_score_step(logps_fn, has_aux=True, crops=crops(score_shape))
    program = Compiled("scoring", jax.jit(step, compiler_options=COMPILER_OPTIONS), say)
    return Programs(mesh, dtype, kernel, update_shape, score_shape, lambda p, b: program(p, sharding.put(b, mesh)))


def crops(shape: layout.Shape) -> list[Callable[[Any], Any]]:
    """Of a shape, the functions that cut a microbatch."""
    return [functools.partial(layout.crop_rows, crop=crop) for crop in shape.crops]


def make_update(
    config: Config, inputs: Inputs, programs: Programs, loss_fn: losses.Loss, tx: Any, state: TrainState
) -> Any:
    """The jitted update: the state is donated and stays where it is on the mesh."""
    shape = programs.update_shape
    logps_fn = scoring.make_logps_fn(
        inputs.model,
        pairs=shape.pairs,
        dtype=programs.dtype,
        remat=config.model.remat,
        attention=programs.attention,
        mesh=programs.mesh,
    )
    step = make_train_step(
        logps_fn, loss_fn, tx, beta=losses.reward_scale(loss_fn), has_aux=True, adds=True, crops=crops(shape)
    )
    places = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, None), compiler_options=COMPILER_OPTIONS)
    return Compiled("update", jitted, say)


def load_params(config: Config, inputs: Inputs, mesh: Mesh) -> Any:
    """The model's weights, each leaf moved to its place on the mesh as soon as it is read."""

    def put(path: str, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, sharding.partition(path, array.shape, mesh.shape)))

    return hf_io.load_params(inputs.folder, inputs.model, dtype=config.model.param_dtype, put=put)


def reference_values(
    config: Config, inputs: Inputs, store: Store, programs: Programs, report: Callable[[int, int], None]
) -> tuple[reference.Pass, Any | None]:
    """Reference log-probs of every set of pairs, scored now only where neither data nor store have them.

    Returns: the pass, and the weights if they had to be loaded.
    Raises: InputError if the store holds values of another identity.
    """
    loaded: list[Any] = []

    def score(batch: Batch) -> Any:
        if not loaded:
            loaded.append(load_params(config, inputs, programs.mesh))
        return programs.score(loaded[0], batch)

    done = reference.run_pass(
        *store,
        [(pairs, pairs.lengths, pairs.keys, pairs.reference) for pairs in inputs.sets],
        score,
        shape=programs.score_shape,
        layout=config.data.layout,
        report=report,
    )
    return done, loaded[0] if loaded else None


def reference_store(config: Config, inputs: Inputs, workdir: Path, programs: Programs) -> Store | None:
    """Where this run's reference log-probs are kept, and under what identity; None for a loss that reads none.

    Reads all weights, for their digest. Raises: InputError if there is a store of another identity.
    """
    if config.loss.name in losses.REFERENCE_FREE:
        return None
    folder = Path(config.reference.path) if config.reference.path else workdir / "reference"
    dtype, platform = np.dtype(programs.dtype).name, reference.platform()
    identity = run_inputs.reference_identity(
        config, inputs, dtype=dtype, attention=programs.attention, platform=platform
    )
    reference.check_identity(folder, identity)
    return Store(folder, identity)


def no_reference(inputs: Inputs) -> list[Float[np.ndarray, "N 2"]]:
    """Zeros in place of reference values, for losses that read none."""
    return [np.zeros((len(pairs), 2)) for pairs in inputs.sets]


def first_state(
    config: Config, inputs: Inputs, mesh: Mesh, tx: Any, checkpoints: Checkpoints, params: Any | None
) -> TrainState:
    """The newest checkpoint's state, or the one before the first update; every leaf in its place on the mesh.

    Args:
      params: the initial weights if they are loaded already; donated.
    """
    step = checkpoints.latest_step()
    if step is None:
        params = load_params(config, inputs, mesh) if params is None else params

        def first(params: Any) -> TrainState:
            return init_state(params, tx)

        places = sharding.shardings(mesh, jax.eval_shape(first, params))
        return jax.jit(first, out_shardings=places, donate_argnums=0)(params)
    params = abstract_params(config, inputs, mesh)
    return checkpoints.restore(step, placed(mesh, jax.eval_shape(lambda p: init_state(p, tx), params)))


def abstract_params(config: Config, inputs: Inputs, mesh: Mesh) -> Any:
    """Shapes, types and placement of the parameters, without any array."""
    dtype = scoring.DTYPES[config.model.param_dtype]
    return placed(mesh, jax.eval_shape(lambda: decoder.init(jax.random.key(0), inputs.model, dtype=dtype)))


def placed(mesh: Mesh, tree: Any) -> Any:
    """A tree of shapes with the place of each on the mesh."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, sharding.shardings(mesh, tree)
    )
