"""A feed-forward block of many experts, of which a router gives every token a few: none dropped, whatever it chooses.

    y[n] = sum_i w[n, i] down[e](act(x[n] gate[e]) * (x[n] up[e])),  e = experts[n, i]

The assignments of tokens to experts are sorted by expert, one a line. Then either `jax.lax.ragged_dot` multiplies all
lines at once, each by the matrices of its expert, or a loop does so block by block of one expert's lines. The first is
for TPUs. Elsewhere XLA makes of it one product of all lines with all experts, E times the work, and the loop does only
what is to be done.

    experts  0 0 0 0 0 1 1 3 3 3          blocks of 4, the lines that stand for no assignment as a dot:
    lines    0 1 2 3 4 5 6 7 8 9          0 0 0 0 | 0 . . . | 1 1 . . | 3 3 3 . | not in use

On a mesh every device works on its own tokens with its own part of every expert, so that it has as much to do as the
others whatever the router does, and no token moves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.models.layers import Across, affine

custom_vjp: Any = jax.custom_vjp  # its own annotations say nothing of what a function returns

CPU_BLOCK, LEAST_BLOCK = 128, 16  # lines; larger blocks waste more of an expert's last, smaller ones read more often
# By platform; `ragged_dot` elsewhere, which is TPUs. On GPUs XLA multiplies all lines with all experts as on CPUs
# (openxla/xla#40189), and products must be large to be fast.
BLOCKS = {"cpu": CPU_BLOCK, "gpu": 512}
KEPT = "experts"  # name, for remat policies, of the two products that the backward pass would else make again

_BY_GROUP_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


class Spread(NamedTuple):
    """Where rows and the experts' matrices lie on a mesh; each axis of it has one use or none."""

    mesh: Mesh
    rows: tuple[str, ...]
    width: str | None  # where D of the matrices lies, one of `rows`: each device gathers it, in the compute type
    hidden: str | None  # where F lies, none of `rows`: what `down` makes of the parts is summed
    scatter: Callable[[Array, str, int], Array]  # within a shard_map, the sum over an axis, a part to each, on a side


class _Plan(NamedTuple):
    """What is static."""

    activation: Callable[[Array], Array]
    block: int | None
    spread: Spread | None


def route(
    x: Float[Array, "N D"],
    router: Float[Array, "D E"],
    *,
    top_k: int,
    normalize: bool,
    across: Across | None = None,
    spread: Spread | None = None,
) -> tuple[Float[Array, "N k"], Int[Array, "N k"], Float[Array, "N E"]]:
    """The experts of every token, their weights, and the probabilities of all.

    Args:
      router: of the type of x.
      normalize: weights sum to 1; otherwise they are the probabilities of the chosen.
      across, spread: how the router lies on a mesh, as in `affine`, and how rows do; None: on one device.
    Returns: weights in the type of x, experts from the likeliest on, and probabilities in float32 or wider.
    Source: Jiang et al. 2024 (Mixtral), section 2.1; without `normalize` Muennighoff et al. 2024 (OLMoE), section 2.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    probabilities = jax.nn.softmax(affine(x, router, None, across).astype(wide), axis=-1)
    experts = _likeliest(jax.lax.stop_gradient(probabilities), top_k, spread)
    # Picked by comparison, whose gradient is no scatter, and which XLA leaves where rows are.
    picked = experts[:, :, None] == jnp.arange(probabilities.shape[1])[None, None]
    weights = jnp.where(picked, probabilities[:, None], 0).sum(-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights.astype(x.dtype), experts, probabilities


def mixture(
    x: Float[Array, "N D"],
    weights: Float[Array, "N k"],
    experts: Int[Array, "N k"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    activation: Callable[[Array], Array],
    real: Bool[Array, "N"] | None = None,
    block: int | None = None,
    spread: Spread | None = None,
) -> Float[Array, "N D"]:
    """The weighted sum of what its experts make of each token, computed in the type of x.

    Args:
      weights, experts: of `route`.
      gate, up, down: cast to the type of x where they are used; their gradients are summed in float32 or wider.
      activation: elementwise.
      real: False for positions that no expert need see and whose result is 0; None: all are real.
      block: lines in a block of the loop, CPU_BLOCK on CPUs, fewer where an expert gets fewer on average, but at least
        LEAST_BLOCK; None: `ragged_dot`.
      spread: how tokens and matrices lie on a mesh; None: on one device.
    """
    if spread is not None and (spread.width not in (None, *spread.rows) or spread.hidden in spread.rows):
        raise ValueError(f"experts.Spread: width {spread.width!r}, hidden {spread.hidden!r}, rows {spread.rows}")
    if real is not None:
        experts = jnp.where(real[:, None], experts, len(gate))  # sorted behind the last expert, and left out
    return _mixture(_Plan(activation, block, spread), x, weights, experts, gate, up, down)


def _likeliest(probabilities, top_k, spread):
    def here(probabilities):
        return jax.lax.top_k(probabilities, top_k)[1]

    if spread is None:
        return here(probabilities)
    rows = PartitionSpec(spread.rows)  # left to itself, XLA gathers the rows of all devices on each
    return jax.shard_map(here, mesh=spread.mesh, in_specs=rows, out_specs=rows, check_vma=False)(probabilities)


def routing(
    probabilities: Float[Array, "N E"], experts: Int[Array, "N k"], counted: Bool[Array, "N"]
) -> dict[str, Float[Array, "N"]]:
    """What a router does with each token; the means over `counted` ones say how it spreads them.

    router_entropy: of its probabilities, in nats. router_load: how much its experts have to do, as a multiple of an
    even share: the mean is E sum_e s_e^2, with s_e the share of expert e, which is 1 if all have the same.
    router_balance: the mean is `balance_loss`, and so is its gradient, for shares have none.
    """
    count = probabilities.shape[1]
    share = jax.lax.stop_gradient(router_load(experts, counted, count)).astype(probabilities.dtype)
    entropy = -jnp.sum(probabilities * jnp.log(jnp.maximum(probabilities, jnp.finfo(probabilities.dtype).tiny)), -1)
    balance = count * experts.shape[1] * jnp.sum(probabilities * share[None], -1)
    return {
        "router_entropy": jax.lax.stop_gradient(entropy),
        "router_load": count * share[experts].mean(-1),
        "router_balance": balance,
    }


def router_load(experts: Int[Array, "N k"], real: Bool[Array, "N"] | None, count: int) -> Float[Array, "E"]:
    """The fraction of the real tokens' assignments that each of `count` experts gets; 0 where no token is real."""
    given = _assignments(experts, real, count)
    return given / jnp.maximum(given.sum(), 1)


def balance_loss(
    probabilities: Float[Array, "N E"], experts: Int[Array, "N k"], real: Bool[Array, "N"] | None
) -> Float[Array, ""]:
    """E sum_e f_e p_e: f_e the assignments to expert e per token, p_e its mean probability; k if both are even.

    Source: Fedus et al. 2022 (Switch), Eq. 4 to 6, with all k choices counted as transformers does. Of a model,
    transformers takes f and p as means over the tokens of all layers together, which is not the mean of this over them.
    """
    real = jnp.ones(len(probabilities), bool) if real is None else real
    tokens = jnp.maximum(real.sum(), 1)
    given = _assignments(experts, real, probabilities.shape[1]) / tokens
    mean = jnp.where(real[:, None], probabilities, 0).sum(0) / tokens
    return probabilities.shape[1] * jnp.sum(given.astype(mean.dtype) * mean)


def _assignments(experts, real, count):
    chosen = experts if real is None else jnp.where(real[:, None], experts, count)
    return _sizes(chosen.ravel(), count).astype(jnp.float32)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _mixture(plan, x, weights, experts, gate, up, down):
    return _forward(plan, x, weights, experts, gate, up, down)[0]


def _forward(plan, x, weights, experts, gate, up, down):
    forward = _everywhere(_forward_here, plan, "rrrwwd", "rkk")
    y, *products = forward(x, weights, experts, gate, up, down)
    products = [checkpoint_name(product, KEPT) for product in products]
    return y, (x, weights, experts, gate, up, down, *products)


def _backward(plan, saved, grad):
    backward = _everywhere(_backward_here, plan, "rrrwwdkkr", "rrwwd")
    to_x, to_weights, *to_kernels = backward(*saved, grad)
    return to_x, to_weights, None, *to_kernels


_mixture.defvjp(_forward, _backward)


def _everywhere(function, plan, takes, gives) -> Any:
    """`function` on each device's share: r lies as rows do, k as rows and F, w as gate and up, d as down."""
    here = functools.partial(function, plan)
    if plan.spread is None:
        return here
    mesh, rows, width, hidden, _ = plan.spread
    specs = {"r": (rows,), "k": (rows, hidden), "w": (None, width, hidden), "d": (None, hidden, width)}
    return jax.shard_map(
        here,
        mesh=mesh,
        in_specs=tuple(PartitionSpec(*specs[letter]) for letter in takes),
        out_specs=tuple(PartitionSpec(*specs[letter]) for letter in gives),
        check_vma=False,
    )


class _Lines(NamedTuple):
    """Assignments sorted by expert, one a line, and of every expert's as many lines as fill whole blocks."""

    assignment: Int[Array, "S"]  # of each line, of the N * k; out of bounds where it stands for none
    place: Int[Array, "N k"]  # the line of each assignment; out of bounds if it is left out
    sizes: Int[Array, "E"]  # assignments to each expert
    expert: Int[Array, "M"]  # of each block
    blocks: Int[Array, ""]  # in use, the first ones

    @property
    def block(self) -> int:
        return self.assignment.size // self.expert.size

    @property
    def token(self) -> Int[Array, "S"]:
        return self.assignment // self.place.shape[1]


def _sizes(chosen, count):
    return jnp.sum(chosen[None] == jnp.arange(count)[:, None], axis=1, dtype=jnp.int32)


def _block_size(plan, assignments: int, count: int) -> int | None:
    """Lines in a block, the power of two that holds an expert's average if that is within bounds."""
    if plan.block is None:
        return None
    return min(plan.block, max(LEAST_BLOCK, 2 ** math.ceil(math.log2(max(1, assignments / count)))))


def _sort(experts: Int[Array, "N k"], count: int, block: int | None) -> _Lines:
    """The lines; `block` None: each expert's follow the last one's at once, and there are no blocks."""
    chosen, total = experts.ravel(), experts.size
    order = jnp.argsort(chosen, stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(total, dtype=order.dtype), unique_indices=True)
    sizes = _sizes(chosen, count)
    ends = jnp.cumsum(sizes)
    if block is None:
        assignment = jnp.where(jnp.arange(total) < ends[-1], order, total)
        place = jnp.where(chosen < count, rank, total)
        return _Lines(assignment, place.reshape(experts.shape), sizes, sizes[:0], sizes.sum())
    starts, needed = ends - sizes, (sizes + block - 1) // block
    until = jnp.cumsum(needed)
    first = until - needed
    used = min(count, total)  # as many blocks as there can be: each expert has one that may be of one line
    index = jnp.arange(used + (total - used) // block)
    expert = jnp.minimum(jnp.sum(until[None] <= index[:, None], axis=1, dtype=jnp.int32), count - 1)
    rank_of_line = (starts[expert] + (index - first[expert]) * block)[:, None] + jnp.arange(block)[None]
    filled = rank_of_line < ends[expert][:, None]
    assignment = jnp.where(filled, order[jnp.minimum(rank_of_line, total - 1)], total).ravel()
    own = jnp.minimum(chosen, count - 1)
    place = jnp.where(chosen < count, first[own] * block + rank - starts[own], assignment.size)
    return _Lines(assignment, place.reshape(experts.shape), sizes, expert, until[-1])


def _forward_here(plan, x, weights, experts, gate, up, down):
    kernels = _gathered(plan, x.dtype, gate, up, down)
    lines = _sort(experts, len(gate), _block_size(plan, experts.size, len(gate)))
    gated, upped, out = (_forward_ragged if plan.block is None else _forward_blocks)(plan, lines, x, kernels)
    y = _per_token(out, lines, weights).astype(x.dtype)
    return _summed_over_hidden(plan, y), gated, upped


def _backward_here(plan, x, weights, experts, gate, up, down, gated, upped, grad):
    kernels = _gathered(plan, x.dtype, gate, up, down)
    lines = _sort(experts, len(gate), _block_size(plan, experts.size, len(gate)))
    ways = _backward_ragged if plan.block is None else _backward_blocks
    weight = _take(weights.ravel(), lines.assignment)
    to_line, to_weight, *parts = ways(plan, lines, (x, grad, weight, gated, upped), kernels)
    to_x = _per_token(to_line, lines, jnp.ones_like(weights)).astype(x.dtype)
    to_weights = _take(to_weight, lines.place).astype(weights.dtype)
    to_kernels = [
        _summed_over_rows(plan, part, turned).astype(kernel.dtype)
        for part, kernel, turned in zip(parts, (gate, up, down), (_turned(plan), _turned(plan), False), strict=True)
    ]
    return *_summed_over_hidden(plan, (to_x, to_weights)), *to_kernels


def _forward_lines(plan, x, kernels, times):
    """x gate, x up, and down's result, of lines; `times` multiplies lines by the matrices of their experts."""
    gate, up, down = kernels
    gated, upped = times(x, gate), times(x, up)
    return gated, upped, times(plan.activation(gated) * upped, down)


def _backward_lines(plan, by_line, kernels, back, outer):
    """Gradients of lines and of matrices.

    Args:
      by_line: the token's x, the gradient of its result, the weight of the line in it, and the forward pass's products.
      back, outer: the products with a matrix transposed, and of lines with lines, of `times`.
    """
    (x, grad, weight, gated, upped), (gate, up, down) = by_line, kernels
    wide = jnp.promote_types(x.dtype, jnp.float32)
    hidden, pull = jax.vjp(lambda gated, upped: plan.activation(gated) * upped, gated, upped)
    to_hidden = back(grad, down).astype(wide)  # of the result before it is weighted, which so need not be kept
    to_weight = jnp.sum(to_hidden * hidden.astype(wide), axis=-1)
    weight = weight[:, None].astype(wide)
    to_gated, to_upped = pull((to_hidden * weight).astype(x.dtype))
    to_x = back(to_gated, gate) + back(to_upped, up)
    turned = _turned(plan)
    to_gate, to_up = (outer(to, x) if turned else outer(x, to) for to in (to_gated, to_upped))
    return to_x, to_weight, to_gate, to_up, outer(hidden, (grad.astype(wide) * weight).astype(x.dtype))


def _forward_ragged(plan, lines, x, kernels):
    times = functools.partial(jax.lax.ragged_dot, group_sizes=lines.sizes)
    return _forward_lines(plan, _take(x, lines.token), kernels, times)


def _backward_ragged(plan, lines, by_line, kernels):
    x, grad, *rest = by_line
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def back(lines_of, kernel):
        return jax.lax.ragged_dot(lines_of, jnp.swapaxes(kernel, 1, 2), lines.sizes)

    def outer(one, other):
        return jax.lax.ragged_dot_general(one, other, lines.sizes, _BY_GROUP_OUTER, preferred_element_type=wide)

    x, grad = (_take(array, lines.token) for array in (x, grad))
    return _backward_lines(plan, (x, grad, *rest), kernels, back, outer)


def _forward_blocks(plan, lines, x, kernels):
    def one_block(i, carry):
        mine = [_of(kernel, lines.expert[i]) for kernel in kernels]
        states = _take(x, _block(lines.token, i, lines.block))
        made = _forward_lines(plan, states, mine, jnp.matmul)
        return tuple(_put(array, part, i, lines.block) for array, part in zip(carry, made, strict=True))

    size, (_, width, hidden) = lines.assignment.size, kernels[0].shape
    empty = tuple(jnp.zeros((size, columns), x.dtype) for columns in (hidden, hidden, width))
    return jax.lax.fori_loop(0, lines.blocks, one_block, empty)


def _backward_blocks(plan, lines, by_line, kernels):
    x, grad, *rest = by_line
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def back(block, kernel):
        return jnp.einsum("bo,io->bi", block, kernel)

    def outer(one, other):
        return jnp.einsum("bi,bo->io", one, other, preferred_element_type=wide)

    def one_block(i, carry):
        to_line, to_weight, *totals = carry
        expert = lines.expert[i]
        token = _block(lines.token, i, lines.block)
        states = [_take(array, token) for array in (x, grad)] + [_block(array, i, lines.block) for array in rest]
        mine = [_of(kernel, expert) for kernel in kernels]
        line, weight, *parts = _backward_lines(plan, states, mine, back, outer)
        totals = [total.at[expert].add(part) for total, part in zip(totals, parts, strict=True)]
        return _put(to_line, line, i, lines.block), _put(to_weight, weight, i, lines.block), *totals

    size, turned = lines.assignment.size, _turned(plan)
    shapes = [kernel.shape for kernel in kernels]
    shapes = [(shape[0], shape[2], shape[1]) if turned else shape for shape in shapes[:2]] + shapes[2:]
    start = jnp.zeros((size, x.shape[1]), x.dtype), jnp.zeros(size, wide), *(jnp.zeros(s, wide) for s in shapes)
    return jax.lax.fori_loop(0, lines.blocks, one_block, start)


def _per_token(by_line, lines, weights):
    """The weighted sum of each token's lines, float32 or wider; never read are lines that stand for no assignment."""
    wide = jnp.promote_types(by_line.dtype, jnp.float32)
    sums = [
        _take(by_line, lines.place[:, i]).astype(wide) * weights[:, i, None].astype(wide)
        for i in range(weights.shape[1])  # one after the other, or an array of all the lines again is made of them
    ]
    return sum(sums[1:], sums[0])


def _turned(plan) -> bool:
    """Whether gradients of gate and up are made as [E, F, D]: what is scattered stands last, as in `across_mesh`."""
    return plan.spread is not None and plan.spread.width is not None


def _gathered(plan, dtype, gate, up, down):
    """The matrices in the compute type, with all of D."""
    kernels = [kernel.astype(dtype) for kernel in (gate, up, down)]
    if not _turned(plan):
        return kernels
    sides = zip(kernels, (1, 1, 2), strict=True)
    return [jax.lax.all_gather(kernel, plan.spread.width, axis=side, tiled=True) for kernel, side in sides]


def _summed_over_hidden(plan, tree):
    return tree if plan.spread is None or plan.spread.hidden is None else jax.lax.psum(tree, plan.spread.hidden)


def _summed_over_rows(plan, part, turned):
    """A device's part of a matrix's gradient, of which `part` is what its own tokens add."""
    if plan.spread is None:
        return part
    if plan.spread.width is not None:
        part = plan.spread.scatter(part, plan.spread.width, 2)
    part = jax.lax.psum(part, tuple(axis for axis in plan.spread.rows if axis != plan.spread.width))
    return jnp.swapaxes(part, 1, 2) if turned else part


def _take(array, index):
    return jnp.take(array, index, axis=0, mode="fill", fill_value=0)


def _of(kernel, expert):
    return jax.lax.dynamic_index_in_dim(kernel, expert, keepdims=False)


def _block(array, i, size):
    return jax.lax.dynamic_slice_in_dim(array, i * size, size)


def _put(array, block, i, size):
    return jax.lax.dynamic_update_slice_in_dim(array, block, i * size, axis=0)
