"""Low-rank adapters (LoRA): their parameters, their initial values, merging them. Folders of them: `peft`.

A frozen kernel W [I, O] gets two trained factors, A [I, r] and B [r, O]:

    y = x W + scale (x A) B,  scale = alpha / r, or alpha / sqrt(r) if rank-stabilized

A starts uniform in +-1/sqrt(I) and B at 0, so y is at first exactly that of the kernel alone. Kernels that the
checkpoint stores as one tensor share an A, as in PEFT; its leaf is next to the first of them.
Sources: Hu et al. 2021 (LoRA, arXiv 2106.09685), Eq. 3; Kalajdzievski 2023 (arXiv 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from dpo_jax import trees
from dpo_jax.hf.checkpoints import Place, whole
from dpo_jax.hf.tensors import Sizes, Tensor, leaf_shapes
from dpo_jax.models import quantized
from dpo_jax.types import InputError

PREFIX = "base_model.model."  # PEFT's, of every name
KERNEL = re.compile(r"blocks/(attention|mlp)/\w+/kernel")  # leaves that can have an adapter


class Adapters(NamedTuple):
    """The adapters of a model: rank, scale, and the linear maps that have one."""

    rank: int
    alpha: float
    rank_stabilized: bool
    tensors: tuple[Tensor, ...]  # linear maps of the checkpoint that have an adapter

    @property
    def scale(self) -> float:
        """Returns the factor of A B: alpha / r, or alpha / sqrt(r) if rank-stabilized."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def table(self) -> list[Tensor]:
        """Returns every adapter's tensors as PEFT stores them, with the leaves that hold them."""
        both = [each.low_rank(PREFIX + module_of(each), self.rank) for each in self.tensors if each.low_rank]
        return [tensor for pair in both for tensor in pair]

    @property
    def leaves(self) -> list[str]:
        """Returns the paths of all leaves A and B."""
        return [leaf for tensor in self.table for leaf in tensor.leaves]

    @property
    def first_factors(self) -> dict[str, str]:
        """Returns {module path: path of the leaf A that its kernel uses} for every kernel with an adapter."""
        parents = [[leaf.rpartition("/")[0] for leaf in each.leaves] for each in self.tensors]
        return {parent: f"{group[0]}/lora_a" for group in parents for parent in group}


def is_factor(path: str) -> bool:
    """Returns whether a leaf, by its path, is an A or a B."""
    return path.endswith(("/lora_a", "/lora_b"))


def module_of(tensor: Tensor) -> str:
    """Returns the name, with `{layer}`, of the transformers module whose weight a tensor is."""
    return tensor.names[0].removesuffix(".weight")


def in_layer_n(tensors: Sequence[Tensor]) -> str:
    """Joins the names of modules for a message, with N for the number of a layer."""
    return ", ".join(module_of(each).replace("{layer}", "N") for each in tensors)


def choose(table: Sequence[Tensor], sizes: Sizes, targets: str) -> tuple[Tensor, ...]:
    """Returns the tensors that get adapters.

    Args:
      table, sizes: the tensors of the model's family, and the numbers of its layers and experts.
      targets: a regular expression, matched in full against names of modules, such as
        model.layers.0.self_attn.q_proj; empty: all linear maps in blocks but those of experts and routers.
    Raises: InputError if it matches none, or a module in some of the layers only.
    """
    able = [each for each in table if each.low_rank and all(KERNEL.fullmatch(leaf) for leaf in each.leaves)]
    if not targets:
        return tuple(able)
    chosen, partly = [], []
    for each in able:
        names = [module_of(each).format(layer=layer) for layer in range(sizes["layer"])]
        matched = [name for name in names if re.fullmatch(targets, name)]
        if matched:
            (chosen if len(matched) == len(names) else partly).append(each)
    if partly or not chosen:
        raise InputError(
            "config.lora.targets",
            got=f"{targets!r}, which matches "
            + (f"{in_layer_n(partly)} in some of the layers only" if partly else "no module that can have adapters"),
            expected=f"a regular expression that matches some of {in_layer_n(able)}, in every layer N",
            remedy=rf"Correct it; it has to match a whole name, as .*\.{module_of(able[0]).rpartition('.')[2]} does.",
        )
    return tuple(chosen)


def with_shared_factors(params: Mapping, adapters: Adapters) -> dict:
    """Returns parameters with an A next to every kernel that has an adapter; kernels that share one get one array."""
    leaves = trees.flatten(params)
    return trees.nest(leaves | {f"{parent}/lora_a": leaves[a] for parent, a in adapters.first_factors.items()})


def merge(params: Mapping, adapters: Adapters) -> dict:
    """Returns parameters without adapters: each kernel becomes W + scale A B, in float32 or wider."""
    leaves = trees.flatten(quantized.decoded(params))
    for parent, a in adapters.first_factors.items():
        leaves[f"{parent}/kernel"] = _merged(
            leaves[f"{parent}/kernel"], leaves[a], leaves[f"{parent}/lora_b"], adapters.scale
        )
    return trees.nest({path: leaf for path, leaf in leaves.items() if not is_factor(path)})


@jax.jit
def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float | jax.Array) -> jax.Array:
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    product = jax.lax.dot_general(
        a.astype(wide), b.astype(wide), (((a.ndim - 1,), (1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST
    )
    return kernel.astype(wide) + scale * product


def first_values(adapters: Adapters, sizes: Sizes, *, seed: int, place: Place = whole) -> dict:
    """Returns the initial leaves by path, float32; each depends on the seed and its path alone.

    Args:
      sizes: the numbers of the model's layers and experts.
      place: as for `checkpoints.load_params`.
    """

    def drawn(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("lora_b"):
            return np.zeros(shape, np.float32)
        bound = 1 / math.sqrt(math.prod(shape[1:-1]))
        rng = np.random.default_rng([seed, xxhash.xxh3_64_intdigest(path.encode())])
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    shapes = leaf_shapes(adapters.table, sizes)
    return {path: place(path, shape, drawn(path, shape).__getitem__) for path, shape in shapes.items()}
