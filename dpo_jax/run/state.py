"""Training state and parameters of a run: loaded onto the mesh from initial weights or a checkpoint, or as shapes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from dpo_jax import losses, sharding, trees
from dpo_jax.hf import adapters, checkpoints, peft
from dpo_jax.hf.checkpoints import Read
from dpo_jax.models import quantized
from dpo_jax.run.checkpoints import Checkpoints
from dpo_jax.run.inputs import Source
from dpo_jax.run.programs import Programs
from dpo_jax.scoring import DTYPES
from dpo_jax.steps import TrainState, init_state


def load_params(source: Source, programs: Programs, *, only: Callable[[str], bool] = lambda leaf: True) -> dict:
    """Reads the initial weights, each device's shard from the bytes that hold it, and adapters at their start.

    Args:
      only: whether the leaf of a path is read; the tree has no others.
    """
    model, chosen = programs.model, programs.trainable.adapters

    def place(path: str, shape: tuple[int, ...], read: Read) -> PyTree:
        spec = sharding.partition(path, shape, programs.mesh.shape, programs.rules)
        array = sharding.from_parts(shape, NamedSharding(programs.mesh, spec), read)
        if not is_quantized(programs, path):
            return array
        encoded = {path: quantized.encode(array, programs.quantize)}
        return jax.device_put(encoded, sharding.shardings(programs.mesh, encoded, programs.rules))[path]

    with programs.watch.part("weights"):
        params = checkpoints.load_params(source.folder, model, dtype=programs.param_dtype, place=place, only=only)
        if chosen is not None and any(map(only, chosen.leaves)):
            if source.adapters is not None:
                leaves = peft.load(source.adapters, chosen, model.stacks, place=place)
            else:
                leaves = adapters.first_values(chosen, model.stacks, seed=source.seed, place=place)
            params = trees.join(params, trees.nest(leaves))
        return jax.block_until_ready(params)


def is_quantized(programs: Programs, path: str) -> bool:
    """Whether the leaf of a path is held quantized."""
    return bool(programs.quantize and quantized.KERNEL.fullmatch(path))


def first_state(
    source: Source,
    programs: Programs,
    tx: optax.GradientTransformation,
    checkpoints: Checkpoints,
    params: PyTree | None,
) -> tuple[TrainState, dict]:
    """Returns the newest checkpoint's state, or the one before the first update, and the frozen parameters.

    Args:
      params: the initial weights if they are loaded already; those that train are donated.
    """
    like, trainable = abstract_state(programs, tx), programs.trainable
    step = checkpoints.latest_step()
    if step is not None:
        frozen = trainable.split(params)[1] if params is not None else load_frozen(source, programs)
        return checkpoints.restore(step, like), frozen
    params, frozen = trainable.split(load_params(source, programs) if params is None else params)

    def first(params: PyTree) -> TrainState:
        return init_state(params, tx, programs.objective)

    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(first, out_shardings=places, donate_argnums=0)(params), frozen


def load_frozen(source: Source, programs: Programs) -> dict:
    """Reads the initial weights that do not train."""
    return load_params(source, programs, only=lambda leaf: not programs.trainable.trains(leaf))


def abstract_state(programs: Programs, tx: optax.GradientTransformation) -> TrainState:
    """Returns shapes, types and shardings of a training state, without any array."""
    params, _ = abstract_params(programs)
    return placed(programs, jax.eval_shape(lambda params: init_state(params, tx, programs.objective), params))


def abstract_running(programs: Programs) -> dict:
    """Returns shapes and shardings of the objective's baselines, without any array."""
    return placed(programs, jax.eval_shape(lambda: losses.start_of(programs.objective)))


def abstract_params(programs: Programs) -> tuple[dict, dict]:
    """Returns shapes, types and shardings of the parameters that train, and of the frozen ones, without any array."""
    trainable, dtype = programs.trainable, DTYPES[programs.param_dtype]
    leaves: dict[str, PyTree] = {}
    for path, shape in trainable.leaf_shapes(programs.model).items():
        leaf = jax.ShapeDtypeStruct(shape, np.float32 if adapters.is_factor(path) else dtype)
        if is_quantized(programs, path):
            leaf = jax.eval_shape(lambda x: quantized.encode(x, programs.quantize), leaf)
        leaves[path] = leaf
    train, frozen = trainable.split(trees.nest(leaves))
    return placed(programs, train), placed(programs, frozen)


def placed(programs: Programs, tree: PyTree) -> PyTree:
    """Returns a tree of shapes with the sharding of each on the mesh."""
    places = sharding.shardings(programs.mesh, tree, programs.rules)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)
