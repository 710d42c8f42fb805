"""Which parameters train, at what multiple of the learning rate, and with adapters beside which kernels.

A parameter that does not train is kept apart from those that do: no gradient of it is made, no optimizer state is held
for it, and no checkpoint has it. Of a leaf that holds all layers and trains in some of them, gradients and updates of
the others are dropped.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import trees
from dpo_jax.hf import tensors
from dpo_jax.hf.adapters import Adapters
from dpo_jax.hf.tensors import Tensor
from dpo_jax.models import decoder
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.quantized import leaf_of
from dpo_jax.trees import path_name
from dpo_jax.types import InputError


class Selection(NamedTuple):
    """By the paths of leaves, what training changes."""

    adapters: Adapters | None = None
    # Multiples of the learning rate: a number, or one for each layer (and expert) in leading axes; 1 where absent.
    rates: Mapping[str, np.ndarray] = MappingProxyType({})

    def trains(self, path: str) -> bool:
        """Whether any part of a leaf does."""
        return self.share(path) > 0

    def share(self, path: str) -> float:
        """Of a leaf's layers, and experts, those that do."""
        path = leaf_of(path)
        return float(np.mean(self.rates[path] != 0)) if path in self.rates else 1.0

    def shapes(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        """Of all leaves of a model, adapters among them, whatever they are held in."""
        beside = {} if self.adapters is None else tensors.leaf_shapes(self.adapters.table, config.stacks)
        return _shapes(config) | beside

    def counts(self, config: DecoderConfig) -> tuple[int, int]:
        """How many numbers are in the leaves of a model that train, and in those that do not."""
        sizes = {path: math.prod(shape) for path, shape in self.shapes(config).items()}
        training = sum(size for path, size in sizes.items() if self.trains(path))
        return training, sum(sizes.values()) - training

    def split(self, params: Mapping) -> tuple[dict, dict]:
        """The parameters that train, and those that do not."""
        leaves = trees.flatten(params)
        both = [{path: leaf for path, leaf in leaves.items() if self.trains(path) == kind} for kind in (True, False)]
        return trees.nest(both[0]), trees.nest(both[1])

    def wanted(self, grads: Any) -> Any:
        """Gradients without those of layers that do not train."""
        masks = {path: np.asarray(rate != 0, np.float32) for path, rate in self.rates.items() if not np.all(rate)}
        return scaled(masks, grads)

    def paced(self, updates: Any) -> Any:
        """Updates times the multiples of the learning rate."""
        return scaled(self.rates, updates)


EVERYTHING = Selection()


@functools.lru_cache(maxsize=2)
def _shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    params = trees.flatten(jax.eval_shape(lambda: decoder.init(jax.random.key(0), config)))
    return {path: leaf.shape for path, leaf in params.items()}


def scaled(factors: Mapping[str, np.ndarray], tree: Any) -> Any:
    """A tree of arrays by paths, each times its factor, where it has one."""

    def times(path: Any, leaf: Any) -> Any:
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
) -> Selection:
    """What trains of a model.

    Args:
      table: of its family.
      adapters: these alone train.
      freeze: a regular expression, searched for in names of tensors of the checkpoint: those do not train.
      layer_decay: the learning rate of the final norm and the head is multiplied by 1, that of the last block by
        `layer_decay`, and that of each block before it, and of the embeddings before the first, by as much again.
        Source: Clark et al. 2020 (ELECTRA), appendix A.
    Raises: InputError if `freeze` matches no tensor, or all of them.
    """
    shapes = tensors.leaf_shapes(table, config.stacks)
    rates = {path: np.ones(()) for path in shapes}
    if adapters is not None:
        rates = dict.fromkeys(shapes, np.zeros(()))
        shapes |= tensors.leaf_shapes(adapters.table, config.stacks)
    for path, frozen in frozen_parts(table, config, freeze).items() if freeze else ():
        rates[path] = (1.0 - frozen).reshape(*frozen.shape, *(1,) * (len(shapes[path]) - frozen.ndim))
    if layer_decay != 1:
        for path, shape in shapes.items():
            rates[path] = rates.get(path, 1.0) * decay_of(path, len(shape), config.layers, layer_decay)
    found = Selection(adapters, {path: np.asarray(rate) for path, rate in rates.items() if np.any(rate != 1)})
    if not any(map(found.trains, shapes)):
        raise InputError(
            "config.train.freeze",
            got=f"{freeze!r}, which matches every tensor",
            expected="some tensors that train",
            remedy="Narrow it.",
        )
    return found


def frozen_parts(table: Sequence[Tensor], config: DecoderConfig, freeze: str) -> dict[str, np.ndarray]:
    """Of every leaf that a tensor of a matching name fills a part of: 1 for such parts and 0 for the others."""
    found: dict[str, np.ndarray] = {}
    for tensor in table:
        stacks = tensor.stacks(config.stacks)
        for at in np.ndindex(*stacks):
            if not tensor.repeats and any(re.search(freeze, name) for name in tensor.called(at)):
                for leaf in tensor.leaves:
                    found.setdefault(leaf, np.zeros(stacks))[at] = 1
    if not found:
        names = sorted({tensor.names[0] for tensor in table if not tensor.repeats})
        raise InputError(
            "config.train.freeze",
            got=f"{freeze!r}, which matches no tensor",
            expected=f"a regular expression found in some of {', '.join(names)}",
            remedy="Correct it.",
        )
    return found


def decay_of(path: str, axes: int, layers: int, decay: float) -> np.ndarray:
    """The multiple of a leaf's learning rate, of so many axes."""
    if path.startswith("blocks/"):
        return decay ** (layers - np.arange(layers, dtype=np.float64)).reshape(-1, *(1,) * (axes - 1))
    return np.asarray(decay ** (layers + 1) if path.startswith(("embed/", "positions/")) else 1.0)
