"""Trainable parameters: which leaves train, with which learning-rate multipliers, and where adapters are added.

Frozen leaves are kept in a tree of their own: they have no gradient, no optimizer state, and no place in a checkpoint.
A leaf that holds all layers and trains in some of them is trainable; gradients and updates of its frozen layers are
masked.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dpo_jax import trees
from dpo_jax.hf import tensors
from dpo_jax.hf.adapters import Adapters
from dpo_jax.hf.tensors import Tensor
from dpo_jax.models import decoder
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.quantized import leaf_of
from dpo_jax.trees import path_name
from dpo_jax.types import InputError, listed

Leaf: TypeAlias = jax.Array | np.ndarray
Multipliers: TypeAlias = Mapping[str, np.ndarray]  # by the path of a leaf; arrays that broadcast against the leaf


class Trainable(NamedTuple):
    """Adapters of a run, and the learning-rate multiplier of each of its parameters; 0 is frozen."""

    adapters: Adapters | None = None
    # A number for a whole leaf, or one for each layer (and expert) in leading axes; leaves without have 1.
    multipliers: Multipliers = MappingProxyType({})

    def trains(self, path: str) -> bool:
        """Whether any part of a leaf trains."""
        return self.trained_fraction(path) > 0

    def trained_fraction(self, path: str) -> float:
        """Returns the fraction of a leaf's layers (and experts) that train, in [0, 1]."""
        path = leaf_of(path)
        return float(np.mean(self.multipliers[path] != 0)) if path in self.multipliers else 1.0

    def leaf_shapes(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every leaf of a model by its path, adapters included; kernels as if not quantized."""
        adapters = {} if self.adapters is None else tensors.leaf_shapes(self.adapters.table, config.stacks)
        return _model_shapes(config) | adapters

    def count_parameters(self, config: DecoderConfig) -> tuple[int, int]:
        """Returns the numbers of parameters in trainable leaves and in frozen leaves of a model."""
        sizes = {path: math.prod(shape) for path, shape in self.leaf_shapes(config).items()}
        trainable = sum(size for path, size in sizes.items() if self.trains(path))
        return trainable, sum(sizes.values()) - trainable

    def split(self, params: Mapping) -> tuple[dict, dict]:
        """Splits parameters into the trainable and the frozen leaves."""
        leaves = trees.flatten(params)
        both = [{path: leaf for path, leaf in leaves.items() if self.trains(path) == kind} for kind in (True, False)]
        return trees.nest(both[0]), trees.nest(both[1])

    def mask_gradients(self, grads: PyTree) -> PyTree:
        """Sets the gradients of frozen layers to 0."""
        masks = {path: np.asarray(x != 0, np.float32) for path, x in self.multipliers.items() if not np.all(x)}
        return scale_leaves(masks, grads)

    def scale_updates(self, updates: PyTree) -> PyTree:
        """Multiplies updates by the learning-rate multipliers."""
        return scale_leaves(self.multipliers, updates)


EVERYTHING = Trainable()


@functools.lru_cache(maxsize=2)
def _model_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    params = trees.flatten(jax.eval_shape(lambda: decoder.init(jax.random.key(0), config)))
    return {path: leaf.shape for path, leaf in params.items()}


def scale_leaves(factors: Multipliers, tree: PyTree) -> PyTree:
    """Multiplies each leaf of a tree that has a factor by it."""

    def times(path: tuple, leaf: Leaf) -> Leaf:
        factor = factors.get(path_name(path))
        return leaf if factor is None else leaf * jnp.asarray(factor, leaf.dtype)

    return jax.tree_util.tree_map_with_path(times, tree)


def select(
    table: Sequence[Tensor],
    config: DecoderConfig,
    *,
    adapters: Adapters | None = None,
    freeze: str = "",
    layer_decay: float = 1.0,
) -> Trainable:
    """Returns the trainable parameters of a model.

    Args:
      table: tensors of the model's family.
      adapters: if set, nothing but adapters trains.
      freeze: a regular expression; tensors of the checkpoint in whose names it is found are frozen.
      layer_decay: d, in (0, 1]. The learning rate of block i of L, from 0, is multiplied by d^(L - i), that of the
        embeddings by d^(L + 1), and that of the final norm and the head by 1.
        Source: Clark et al. 2020 (ELECTRA), appendix A.
    Raises: InputError if `freeze` matches no tensor, or all of them.
    """
    shapes = tensors.leaf_shapes(table, config.stacks)
    multipliers = {path: np.ones(()) for path in shapes}
    if adapters is not None:
        multipliers = dict.fromkeys(shapes, np.zeros(()))
        shapes |= tensors.leaf_shapes(adapters.table, config.stacks)
    for path, frozen in freeze_masks(table, config, freeze).items() if freeze else ():
        multipliers[path] = (1.0 - frozen).reshape(*frozen.shape, *(1,) * (len(shapes[path]) - frozen.ndim))
    if layer_decay != 1:
        for path, shape in shapes.items():
            decay = layer_decay_of(path, len(shape), config.layers, layer_decay)
            multipliers[path] = multipliers.get(path, 1.0) * decay
    trainable = Trainable(adapters, {path: np.asarray(x) for path, x in multipliers.items() if np.any(x != 1)})
    if not any(map(trainable.trains, shapes)):
        raise InputError(
            "config.train.freeze",
            got=f"{freeze!r}, which matches every tensor",
            expected="a pattern that leaves some tensors to train",
            remedy="Narrow it; --config.train.freeze= freezes nothing.",
        )
    return trainable


def freeze_masks(table: Sequence[Tensor], config: DecoderConfig, freeze: str) -> dict[str, np.ndarray]:
    """Returns masks over layers (and experts), 1 where frozen, of every leaf that has a tensor of a matching name.

    Raises: InputError if no name matches.
    """
    masks: dict[str, np.ndarray] = {}
    for tensor in table:
        stacks = tensor.stacks(config.stacks)
        for at in np.ndindex(*stacks):
            if not tensor.repeats and any(re.search(freeze, name) for name in tensor.called(at)):
                for leaf in tensor.leaves:
                    masks.setdefault(leaf, np.zeros(stacks))[at] = 1
    if not masks:
        names = sorted({re.sub(r"\{\w+\}", "N", tensor.names[0]) for tensor in table if not tensor.repeats})
        raise InputError(
            "config.train.freeze",
            got=f"{freeze!r}, which matches no tensor",
            expected=f"a regular expression found in the name of one, such as {listed(names)}",
            remedy="Correct it.",
        )
    return masks


def layer_decay_of(path: str, axes: int, layers: int, decay: float) -> np.ndarray:
    """Returns the learning-rate multiplier that layer decay gives a leaf, as an array that broadcasts against it.

    Args:
      axes: number of the leaf's axes.
      layers: number of the model's blocks.
    """
    if path.startswith("blocks/"):
        return decay ** (layers - np.arange(layers, dtype=np.float64)).reshape(-1, *(1,) * (axes - 1))
    return np.asarray(decay ** (layers + 1) if path.startswith(("embed/", "positions/")) else 1.0)
