"""TODO run.state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from dpo_jax import losses, sharding, trees
from dpo_jax.config import Config
from dpo_jax.hf import adapters as low_rank
from dpo_jax.hf import checkpoints as hf_io
from dpo_jax.hf import peft
from dpo_jax.models import quantized
from dpo_jax.run.checkpoints import Checkpoints
from dpo_jax.run.programs import Programs
from dpo_jax.scoring import DTYPES
from dpo_jax.steps import TrainState, init_state
from dpo_jax.trees import join


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
        made = {path: quantized.encode(array, config.lora.base)}
        return jax.device_put(made, sharding.shardings(programs.mesh, made, programs.rules))[path]

    with programs.watch.part("weights"):
        params = hf_io.load_params(folder, model, dtype=config.model.param_dtype, place=place, only=only)
        if adapters is not None and any(map(only, adapters.leaves)):
            if config.lora.path:
                beside = peft.load(hf_io.resolve(config.lora.path), adapters, model.stacks, place=place)
            else:
                beside = low_rank.first_values(adapters, model.stacks, seed=config.seed, place=place)
            params = join(params, trees.nest(beside))
        return jax.block_until_ready(params)


def held_in_few_bits(config: Config, path: str) -> bool:
    """Whether a leaf is, by `lora.base`."""
    return bool(config.lora.base and quantized.KERNEL.fullmatch(path))


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
    selection, dtype = programs.selection, DTYPES[config.model.param_dtype]
    leaves: dict[str, Any] = {}
    for path, shape in selection.shapes(programs.model).items():
        leaf = jax.ShapeDtypeStruct(shape, np.float32 if low_rank.is_factor(path) else dtype)
        few = held_in_few_bits(config, path)
        leaves[path] = jax.eval_shape(lambda x: quantized.encode(x, config.lora.base), leaf) if few else leaf
    train, frozen = selection.split(trees.nest(leaves))
    return placed(programs, train), placed(programs, frozen)


def placed(programs: Programs, tree: Any) -> Any:
    """A tree of shapes with the place of each on the mesh."""
    places = sharding.shardings(programs.mesh, tree, programs.rules)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)
