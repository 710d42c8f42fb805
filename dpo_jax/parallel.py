"""The decoder on a mesh: (parameters, rows) -> hidden states, apart from the head that scores them.

Two records hold what its callers choose: `ModelOptions`, how the decoder is computed, and `Placement`, the mesh and the
rules by which parameters are sharded. `model_sharding` derives how every part of the model is sharded from them.
Parameters whose size grows with the vocabulary, embedding and head, are kept apart from the others throughout: their
gradients are added in place to running sums, see `accumulate`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from dpo_jax import accumulate
from dpo_jax.hf.adapters import Adapters, with_shared_factors
from dpo_jax.logprobs.vocabulary import HeadSharding
from dpo_jax.models import decoder, layers
from dpo_jax.models.attention.choose import AttentionSharding, make_attention
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.experts import BLOCKS, ExpertSharding, MixtureOptions
from dpo_jax.sharding import ROW_AXES, RULES, Rules, divides, partition, sum_scattered
from dpo_jax.trees import join
from dpo_jax.types import Rows

# {parent: leaf} of the parameters whose size grows with the vocabulary; their gradients are added in place.
VOCABULARY_LEAVES = {"embed": "embedding", "head": "embedding", "logits": "bias"}

Tree = Mapping[str, PyTree]  # nested dict of arrays
HiddenFn = Callable[["SplitParams", Rows], tuple[Array, dict[str, Array], Array | None]]


class ModelOptions(NamedTuple):
    """How a decoder is computed."""

    dtype: DTypeLike = jnp.float32  # compute type
    remat: str = "none"  # one of `decoder.REMAT`: what the backward pass recomputes
    attention: str = "xla"  # an implementation that `attention.choose.choose` returned
    adapters: Adapters | None = None  # LoRA factors that are among the parameters; None: there are none


class Placement(NamedTuple):
    """Devices that rows and parameters are sharded over."""

    mesh: Mesh | None = None  # None: one device of JAX's default platform
    rules: Rules = RULES  # path of a parameter -> its PartitionSpec

    @property
    def platform(self) -> str:
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform


DEFAULT_OPTIONS, ONE_DEVICE = ModelOptions(), Placement()


class ModelSharding(NamedTuple):
    """How each part of a model is sharded over a mesh; None: on one device, or nothing to do."""

    attention: AttentionSharding | None = None
    kernels: decoder.KernelShardings | None = None
    experts: ExpertSharding | None = None
    head: HeadSharding | None = None
    move_embedding_grad: Callable[[Array], Array] | None = None  # see `layers.lookup`
    pin_rows: Callable[[Array], Array] | None = None  # constrains hidden states [R, S, D] to the sharding of rows


class SplitParams(NamedTuple):
    """Parameters, and running sums of their gradients, with the vocabulary-sized ones apart."""

    vocabulary: dict[str, Array]  # {parent in VOCABULARY_LEAVES: leaf}
    body: dict[str, PyTree]  # the others, as a tree
    vocabulary_sums: dict[str, Array]  # empty: gradients are not accumulated
    body_sums: dict[str, PyTree]

    def join_sums(self, vocabulary_sums: Mapping[str, Array | None], trained: Tree) -> dict[str, PyTree]:
        """Joins new sums of the vocabulary-sized parameters among `trained` and those of the others to one tree."""
        names = [name for name in VOCABULARY_LEAVES if name in trained]
        return self.body_sums | {name: {VOCABULARY_LEAVES[name]: vocabulary_sums[name]} for name in names}


def split_vocabulary(tree: Tree) -> tuple[dict[str, Array], dict[str, PyTree]]:
    """Splits parameters, or sums of their gradients, into the vocabulary-sized leaves, by parent, and the others."""
    leaves = {name: tree[name][leaf] for name, leaf in VOCABULARY_LEAVES.items() if name in tree}
    return leaves, {name: tree[name] for name in tree if name not in VOCABULARY_LEAVES}


def split_params(params: Tree, sums: Tree | None, frozen: Tree | None) -> SplitParams:
    """Splits parameters by size and joins the frozen ones to those that train.

    Args:
      sums: running sums of the gradients of `params`, see `accumulate.collect`; None: not accumulated.
      frozen: parameters that are not among `params`, and get no gradient.
    """
    vocabulary, body = split_vocabulary(params)
    vocabulary_sums: dict[str, Array] = {}
    body_sums: dict[str, PyTree] = {}
    if sums is not None:
        vocabulary_sums, body_sums = split_vocabulary(sums)
        body, body_sums = accumulate.collect(body, body_sums)
    if frozen is not None:
        frozen_vocabulary, frozen_body = split_vocabulary(frozen)
        vocabulary, body = vocabulary | frozen_vocabulary, join(body, frozen_body)
    return SplitParams(vocabulary, body, vocabulary_sums, body_sums)


def make_hidden_fn(config: DecoderConfig, options: ModelOptions, platform: str, sharding: ModelSharding) -> HiddenFn:
    """Returns `hidden_fn(split_params, rows) -> (hidden [R, S, D], statistics, embedding_sum)` of a decoder.

    statistics are those of `decoder.hidden_states`, {name: [R, S]}. embedding_sum is the running sum of the embedding's
    gradient as it came, which the backward pass adds to; None: gradients are not accumulated.

    Args:
      platform: of the devices: cpu, gpu, tpu.
    """
    adapters = options.adapters
    block_options = decoder.BlockOptions(
        dtype=options.dtype,
        remat=options.remat,
        attend=make_attention(options.attention, platform=platform, sharding=sharding.attention),
        kernel_shardings=sharding.kernels,
        mixture=MixtureOptions(block=BLOCKS.get(platform), sharding=sharding.experts),
        adapter_scale=1.0 if adapters is None else adapters.scale,
    )

    def hidden_fn(params: SplitParams, rows: Rows) -> tuple[Float[Array, "R S D"], dict[str, Array], Array | None]:
        body = params.body if adapters is None else with_shared_factors(params.body, adapters)
        embedding, embedding_sum = params.vocabulary["embed"], params.vocabulary_sums.get("embed")
        x, embedding_sum = layers.lookup(embedding, rows.tokens, embedding_sum, sharding.move_embedding_grad)
        # Otherwise XLA propagates the column sharding of the embedding's gradient into every block.
        x = x if sharding.pin_rows is None else sharding.pin_rows(x)
        bounds = rows.positions, rows.key_start, rows.key_end
        # Rows leave out the last token of each sequence, which predicts nothing.
        hidden, statistics = decoder.hidden_states(body, config, x, *bounds, block_options, dropped_tokens=1)
        return hidden, statistics, embedding_sum

    return hidden_fn


def model_sharding(config: DecoderConfig, placement: Placement) -> ModelSharding:
    """Returns how a decoder and its head are sharded."""
    mesh, rules = placement
    if mesh is None or mesh.size == 1:
        return ModelSharding()
    tables = {
        name: partition(f"{name}/embedding", (config.vocab_size, config.width), mesh.shape, rules)
        for name in ("embed", "head")
    }
    head = HeadSharding(
        mesh,
        ROW_AXES,
        *tables["embed" if config.tie_embeddings else "head"],
        scatter=functools.partial(sum_scattered, mesh),
    )
    columns, move_grad = tables["embed"][1], None
    if columns in ROW_AXES:
        other_rows = tuple(axis for axis in ROW_AXES if axis != columns)
        by_columns = NamedSharding(mesh, PartitionSpec(other_rows, None, columns))
        move_grad = functools.partial(jax.lax.with_sharding_constraint, shardings=by_columns)
    by_rows = NamedSharding(mesh, PartitionSpec(ROW_AXES))
    return ModelSharding(
        attention=AttentionSharding(mesh, ROW_AXES, divides("tensor", mesh, config.heads, config.kv_heads)),
        kernels=functools.partial(kernel_sharding, config, mesh, rules),
        experts=expert_sharding(config, mesh, rules),
        head=head,
        move_embedding_grad=move_grad,
        pin_rows=functools.partial(jax.lax.with_sharding_constraint, shardings=by_rows),
    )


def kernel_sharding(
    config: DecoderConfig,
    mesh: Mesh,
    rules: Rules,
    path: str,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
) -> layers.KernelSharding | None:
    """Returns how a kernel [L, *inputs, *outputs] is used where the rules shard it; None: XLA partitions its product.

    Args:
      path: such as blocks/attention/q/kernel.
    """
    shape = config.layers, *inputs, *outputs
    spec = (*partition(path, shape, mesh.shape, rules), *(None for _ in shape))
    sides = spec[1 : 1 + len(inputs)], spec[1 + len(inputs) : len(shape)]
    # The product flattens each side to one axis, which is sharded as the first axis of the side is.
    if spec[0] is not None or any(axis is not None for side in sides for axis in side[1:]):
        return None
    scatter = functools.partial(sum_scattered, mesh)
    return layers.make_kernel_sharding(mesh, ROW_AXES, *(side[0] for side in sides), scatter=scatter)


def expert_sharding(config: DecoderConfig, mesh: Mesh, rules: Rules) -> ExpertSharding | None:
    """Returns how experts are used where the rules shard them; None: there are none.

    XLA reshards the sides that the rules shard over an axis which `experts.mixture` cannot use for them.
    """
    if not config.experts:
        return None
    shape = config.layers, config.experts, config.width, config.mlp_width
    _, _, width, hidden = (*partition("blocks/experts/up/kernel", shape, mesh.shape, rules), *(None,) * 4)[:4]
    return ExpertSharding(
        mesh,
        ROW_AXES,
        width if width in ROW_AXES else None,
        None if hidden in ROW_AXES else hidden,
        functools.partial(sum_scattered, mesh),
    )
