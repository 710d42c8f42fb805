"""The compiled programs of a run and what they start from: mesh, shapes, weights, reference values, state."""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jaxtyping import Int

from dpo_jax import inputs as run_inputs
from dpo_jax import losses, reference, scoring, sharding
from dpo_jax.batches import Known, Some
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.config import Config
from dpo_jax.data import layout, packing
from dpo_jax.data.pairs import cache_folder
from dpo_jax.inputs import Inputs
from dpo_jax.models import adapters as low_rank
from dpo_jax.models import attention, hf_io, quantised
from dpo_jax.models.config import DecoderConfig
from dpo_jax.scoring import join
from dpo_jax.selection import EVERYTHING, Selection
from dpo_jax.steps import TrainState, init_state, make_score_step, make_train_step
from dpo_jax.trackers import Stopwatch, say
from dpo_jax.types import Batch

# Positions in a microbatch. On a CPU one short row at a time keeps temporaries in cache; an accelerator wants more.
CPU_POSITIONS, ACCELERATOR_POSITIONS = 1_536, 16_384

# XLA may leave out the rounding of bfloat16 intermediates, and does so in other places where a gradient is wanted too.
# The update would then score the reference's own weights unlike the reference pass did: 0.15 nats apart in a trial.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


class Compiled:
    """A jitted function that is compiled at its first call and then once and for all: other shapes are an error."""

    def __init__(self, name: str, function: Any, watch: Stopwatch):
        self._name, self._function, self._watch, self._program = name, function, watch, None

    def compile(self, *args: Any, options: dict[str, Any] | None = None) -> Any:
        """The compiled program for arguments like these, of which shapes, types and places are enough.

        Args:
          options: of the compiler, besides those of the function.
        """
        if self._program is None:
            started = time.perf_counter()
            with self._watch.part("compile"):
                self._program = self._function.lower(*args).compile(options)
            memory = self._program.memory_analysis()
            size = f", {memory.temp_size_in_bytes:,} bytes of temporaries a device" if memory is not None else ""
            say(f"compiled {self._name} in {time.perf_counter() - started:.1f} s{size}")
            give_back_freed()
        return self._program

    def __call__(self, *args: Any) -> Any:
        return self.compile(*args)(*args)


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
    model, layout_name = run_inputs.fit(config, model, lengths)
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
        pairs=reference.PART_PAIRS,
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
        dtype=scoring.compute_dtype(config.model.dtype, platform),
        attention=kernel,
        update_shape=update_shape,
        score_shape=score_shape,
        objective=run_inputs.loss_of(config),
        scoring=None,
        reference_scoring=None,
        watch=watch,
    )


def crops(shape: packing.Shape) -> list[Callable[[Any], Any]]:
    """Of a shape, the functions that cut a microbatch."""
    return [functools.partial(layout.crop_rows, crop=crop) for crop in shape.crops]


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
    return scoring.make_logps_fn(
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


def load_params(
    config: Config, folder: Path, programs: Programs, *, only: Callable[[str], bool] = lambda leaf: True
) -> dict:
    """The weights in a folder, each device's part of a leaf read from the bytes that hold it, and adapters at their
    start.

    Args:
      only: of a leaf's path, whether it is wanted.
    """
    model, adapters = programs.model, programs.selection.adapters

    def place(path: str, shape: tuple[int, ...], read: Callable[[Any], np.ndarray]) -> Any:
        spec = sharding.partition(path, shape, programs.mesh.shape, programs.rules)
        array = sharding.from_parts(shape, NamedSharding(programs.mesh, spec), read)
        if not held_in_few_bits(config, path):
            return array
        made = {path: quantised.encode(array, config.lora.base)}
        return jax.device_put(made, sharding.shardings(programs.mesh, made, programs.rules))[path]

    with programs.watch.part("weights"):
        params = hf_io.load_params(folder, model, dtype=config.model.param_dtype, place=place, only=only)
        if adapters is not None and any(map(only, adapters.leaves)):
            if config.lora.path:
                beside = low_rank.load(hf_io.resolve(config.lora.path), adapters, model.stacks, place=place)
            else:
                beside = low_rank.first_values(adapters, model.stacks, seed=config.seed, place=place)
            params = join(params, hf_io.nest(beside))
        return jax.block_until_ready(params)


def held_in_few_bits(config: Config, path: str) -> bool:
    """Whether a leaf is, by `lora.base`."""
    return bool(config.lora.base and quantised.KERNEL.fullmatch(path))


def reference_values(
    inputs: Inputs,
    store: Store,
    programs: Programs,
    params: Callable[[], Any],
    report: Callable[[int, int], None] = lambda done, total: None,
    *,
    only: Sequence[np.ndarray] | None = None,
) -> tuple[list[Known], reference.Pass]:
    """What the reference says of every set of pairs, scored now only where neither data nor store have it.

    Args:
      params: of the reference; called only where something has to be scored.
      only: of each set, the pairs wanted; None: all, and values that came with the data are used.
    Raises: InputError if the store holds values of another identity.
    """
    chosen = only or [np.arange(len(pairs)) for pairs in inputs.sets]
    sets: list[Any] = [*inputs.sets, *inputs.unrelated]
    if only is not None:
        sets = [Some(pairs, chosen[i % len(chosen)]) for i, pairs in enumerate(sets)]
    tokens = programs.objective.reference_tokens
    done = reference.run_pass(
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
        unrelated = done.values[len(chosen) + i] if inputs.unrelated else None
        known.append(Known(place, done.values[i], sums, values if tokens else None, unrelated))
    return known, done


def reference_store(config: Config, inputs: Inputs, workdir: Path, programs: Programs) -> Store | None:
    """Where this run's reference log-probs are kept, and under what identity; None for a loss that reads none.

    Reads all weights, for their digest. Raises: InputError if there is a store of another identity.
    """
    if programs.objective.reference_free:
        return None
    folder = Path(config.reference.path) if config.reference.path else workdir / "reference"
    dtype, platform = np.dtype(programs.dtype).name, reference.platform()
    identity = run_inputs.reference_identity(
        config, inputs, layout=programs.layout, dtype=dtype, attention=programs.attention, platform=platform
    )
    reference.check_identity(folder, identity)
    return Store(folder, identity)


def first_state(
    config: Config, folder: Path, programs: Programs, tx: Any, checkpoints: Checkpoints, params: Any | None
) -> tuple[TrainState, dict]:
    """The newest checkpoint's state, or the one before the first update, and the parameters that do not train; every
    leaf in its place on the mesh.

    Args:
      folder: of the initial weights.
      params: these if they are loaded already; what trains of them is donated.
    """
    like, selection = abstract_state(config, programs, tx), programs.selection
    step = checkpoints.latest_step()
    if step is not None:
        frozen = selection.split(params)[1] if params is not None else load_frozen(config, folder, programs)
        return checkpoints.restore(step, like), frozen
    params, frozen = selection.split(load_params(config, folder, programs) if params is None else params)

    def first(params: Any) -> TrainState:
        return init_state(params, tx, programs.objective)

    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(first, out_shardings=places, donate_argnums=0)(params), frozen


def load_frozen(config: Config, folder: Path, programs: Programs) -> dict:
    """Of the weights in a folder, those that do not train."""
    selection = programs.selection
    return load_params(config, folder, programs, only=lambda leaf: not selection.trains(leaf))


def abstract_state(config: Config, programs: Programs, tx: Any) -> TrainState:
    """Shapes, types and places of a training state, without any array."""
    params, _ = abstract_params(config, programs)
    return placed(programs, jax.eval_shape(lambda params: init_state(params, tx, programs.objective), params))


def abstract_running(programs: Programs) -> dict:
    """Shapes and places of the objective's baselines, without any array."""
    return placed(programs, jax.eval_shape(lambda: losses.start_of(programs.objective)))


def abstract_params(config: Config, programs: Programs) -> tuple[dict, dict]:
    """Shapes, types and places of the parameters that train, and of those that do not, without any array."""
    selection, dtype = programs.selection, scoring.DTYPES[config.model.param_dtype]
    leaves: dict[str, Any] = {}
    for path, shape in selection.shapes(programs.model).items():
        leaf = jax.ShapeDtypeStruct(shape, np.float32 if low_rank.is_factor(path) else dtype)
        few = held_in_few_bits(config, path)
        leaves[path] = jax.eval_shape(lambda x: quantised.encode(x, config.lora.base), leaf) if few else leaf
    train, frozen = selection.split(hf_io.nest(leaves))
    return placed(programs, train), placed(programs, frozen)


def placed(programs: Programs, tree: Any) -> Any:
    """A tree of shapes with the place of each on the mesh."""
    places = sharding.shardings(programs.mesh, tree, programs.rules)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)
