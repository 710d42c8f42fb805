"""Dropless mixture of experts: a router assigns each token to a few of many feed-forward blocks, and drops none.

    y[n] = sum_i w[n, i] down[e](act(x[n] gate[e]) * (x[n] up[e])),  e = experts[n, i]

The assignments of tokens to experts are sorted by expert, one per line. Then either `jax.lax.ragged_dot` multiplies all
lines at once, each by the matrices of its expert, or a loop multiplies block by block, each block of a single expert's
lines. The first is for TPUs. On other platforms XLA expands it to one product of all lines with all experts, E times
the work, while the loop does no more than needed.

    experts  0 0 0 0 0 1 1 3 3 3          blocks of 4, with a dot for each padding line:
    lines    0 1 2 3 4 5 6 7 8 9          0 0 0 0 | 0 . . . | 1 1 . . | 3 3 3 . | unused

On a mesh every device computes its own tokens with its own part of every expert, so the work is balanced whatever the
router chooses, and no token moves.
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

from dpo_jax.models.layers import KernelSharding, Scatter, affine

custom_vjp: Any = jax.custom_vjp  # its own annotations lose the return type

# Lines. Larger blocks waste more of each expert's last block, smaller ones read the matrices more often.
CPU_BLOCK, LEAST_BLOCK = 128, 16
# Lines in a block by platform; TPUs, which are not listed, use `ragged_dot`. For CPUs and GPUs XLA compiles that to a
# product of all lines with all experts (openxla/xla#40189). On GPUs products must be large to be fast.
BLOCKS = {"cpu": CPU_BLOCK, "gpu": 512}
SAVED = "experts"  # checkpoint name of the two products that remat policies may save

_BY_GROUP_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


class ExpertSharding(NamedTuple):
    """Mesh axes over which rows and the experts' matrices are sharded; each axis is used once at most."""

    mesh: Mesh
    rows: tuple[str, ...]
    width: str | None  # axis of D, one of `rows`: each device gathers the matrices along it, in the compute type
    hidden: str | None  # axis of F, none of `rows`: the partial results of `down` are summed over it
    scatter: Scatter  # reduce-scatter within a shard_map


class MixtureOptions(NamedTuple):
    """Static options of `mixture`."""

    activation: Callable[[Array], Array] = jax.nn.silu  # elementwise
    # Lines in a block of the loop; fewer where an expert gets fewer on average, but at least LEAST_BLOCK.
    block: int | None = CPU_BLOCK  # None: `ragged_dot`
    sharding: ExpertSharding | None = None  # None: on one device


def route(
    x: Float[Array, "N D"],
    router: Float[Array, "D E"],
    *,
    top_k: int,
    normalize: bool,
    router_sharding: KernelSharding | None = None,
    sharding: ExpertSharding | None = None,
) -> tuple[Float[Array, "N k"], Int[Array, "N k"], Float[Array, "N E"]]:
    """Chooses the experts of every token.

    Args:
      router: of the type of x.
      normalize: weights sum to 1; otherwise they are the probabilities of the chosen experts.
      router_sharding, sharding: how the router's kernel and the rows are sharded over a mesh; None: on one device.
    Returns: weights in the type of x, experts from the likeliest on, and probabilities in float32 or wider.
    Source: Jiang et al. 2024 (Mixtral), section 2.1; without `normalize` Muennighoff et al. 2024 (OLMoE), section 2.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    probabilities = jax.nn.softmax(affine(x, router, None, router_sharding).astype(wide), axis=-1)
    experts = _top_experts(jax.lax.stop_gradient(probabilities), top_k, sharding)
    # Selected by comparison: its gradient is no scatter, and XLA keeps it sharded as rows are.
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
    options: MixtureOptions,
    *,
    real: Bool[Array, "N"] | None = None,
) -> Float[Array, "N D"]:
    """Weighted sum of the outputs of each token's experts, computed in the type of x.

    Args:
      weights, experts: from `route`.
      gate, up, down: cast to the type of x where they are used; their gradients are summed in float32 or wider.
      real: False for positions that are not computed and whose result is 0; None: all are real.
    Raises: ValueError for a sharding that would give wrong sums.
    """
    sharding = options.sharding
    if sharding is not None and (sharding.width not in (None, *sharding.rows) or sharding.hidden in sharding.rows):
        raise ValueError(
            f"experts.ExpertSharding: width {sharding.width!r}, hidden {sharding.hidden!r}, rows {sharding.rows}"
        )
    if real is not None:
        experts = jnp.where(real[:, None], experts, len(gate))  # sorted after the last expert, and so not computed
    return _mixture(options, x, weights, experts, gate, up, down)


def _top_experts(probabilities, top_k, sharding):
    def top(probabilities):
        return jax.lax.top_k(probabilities, top_k)[1]

    if sharding is None:
        return top(probabilities)
    rows = PartitionSpec(sharding.rows)  # automatic partitioning would gather all rows on every device
    return jax.shard_map(top, mesh=sharding.mesh, in_specs=rows, out_specs=rows, check_vma=False)(probabilities)


def routing(
    probabilities: Float[Array, "N E"], experts: Int[Array, "N k"], counted: Bool[Array, "N"]
) -> dict[str, Float[Array, "N"]]:
    """Router statistics of each token, to be averaged over `counted` tokens.

    router_entropy: entropy of the probabilities, in nats. router_load: load of the token's experts as a multiple of an
    even share; its mean is E sum_e s_e^2, with s_e the share of expert e, and 1 if all shares are equal.
    router_balance: its mean and the gradient of its mean are those of `balance_loss`; shares have no gradient.
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
    """Fraction of the real tokens' assignments that each of `count` experts gets; 0 if no token is real."""
    assigned = _assignments(experts, real, count)
    return assigned / jnp.maximum(assigned.sum(), 1)


def balance_loss(
    probabilities: Float[Array, "N E"], experts: Int[Array, "N k"], real: Bool[Array, "N"] | None
) -> Float[Array, ""]:
    """Load-balancing loss E sum_e f_e p_e: f_e assignments to expert e per token, p_e its mean probability; k if even.

    Source: Fedus et al. 2022 (Switch), Eq. 4 to 6, with all k choices counted as transformers does. For a whole model,
    transformers takes f and p as means over the tokens of all layers together, which differs from the mean over layers.
    """
    real = jnp.ones(len(probabilities), bool) if real is None else real
    tokens = jnp.maximum(real.sum(), 1)
    assigned = _assignments(experts, real, probabilities.shape[1]) / tokens
    mean = jnp.where(real[:, None], probabilities, 0).sum(0) / tokens
    return probabilities.shape[1] * jnp.sum(assigned.astype(mean.dtype) * mean)


def _assignments(experts, real, count):
    chosen = experts if real is None else jnp.where(real[:, None], experts, count)
    return _sizes(chosen.ravel(), count).astype(jnp.float32)


class _Saved(NamedTuple):
    """Arrays that the forward pass saves for the backward pass."""

    x: Float[Array, "N D"]
    weights: Float[Array, "N k"]
    experts: Int[Array, "N k"]
    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]
    gated: Float[Array, "S F"]  # x . gate of each line
    upped: Float[Array, "S F"]  # x . up of each line


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _mixture(options, x, weights, experts, gate, up, down):
    return _forward(options, x, weights, experts, gate, up, down)[0]


def _forward(options, x, weights, experts, gate, up, down):
    forward = _on_each_device(_forward_local, options, "rrrwwd", "rkk")
    y, *products = forward(x, weights, experts, gate, up, down)
    products = [checkpoint_name(product, SAVED) for product in products]
    return y, _Saved(x, weights, experts, gate, up, down, *products)


def _backward(options, saved, grad):
    backward = _on_each_device(_backward_local, options, (_Saved._make("rrrwwdkk"), "r"), "rrwwd")
    to_x, to_weights, *to_kernels = backward(saved, grad)
    return to_x, to_weights, None, *to_kernels


_mixture.defvjp(_forward, _backward)


def _on_each_device(function, options, inputs, outputs) -> Callable:
    """Runs `function` on each device's shard of inputs and outputs, whose letters name their sharding:
    r: as rows; k: rows and F; w: as gate and up; d: as down."""
    local = functools.partial(function, options)
    if options.sharding is None:
        return local
    mesh, rows, width, hidden, _ = options.sharding
    specs = {"r": (rows,), "k": (rows, hidden), "w": (None, width, hidden), "d": (None, hidden, width)}
    in_specs, out_specs = jax.tree.map(lambda letter: PartitionSpec(*specs[letter]), (tuple(inputs), tuple(outputs)))
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


class _Lines(NamedTuple):
    """Assignments sorted by expert, one per line; in blocks, each expert's lines are padded to whole blocks."""

    assignment: Int[Array, "S"]  # index of each line's assignment among the N * k; out of bounds for a padding line
    place: Int[Array, "N k"]  # line of each assignment; out of bounds if it is not computed
    sizes: Int[Array, "E"]  # assignments to each expert
    expert: Int[Array, "M"]  # expert of each block
    blocks: Int[Array, ""]  # number of blocks in use, the first ones

    @property
    def block(self) -> int:
        return self.assignment.size // self.expert.size

    @property
    def token(self) -> Int[Array, "S"]:
        return self.assignment // self.place.shape[1]


def _sizes(chosen, count):
    return jnp.sum(chosen[None] == jnp.arange(count)[:, None], axis=1, dtype=jnp.int32)


def _block_size(options: MixtureOptions, assignments: int, count: int) -> int | None:
    """Lines in a block: the power of two that holds an expert's average load, from LEAST_BLOCK to `options.block`."""
    if options.block is None:
        return None
    return min(options.block, max(LEAST_BLOCK, 2 ** math.ceil(math.log2(max(1, assignments / count)))))


def _sort(experts: Int[Array, "N k"], count: int, block: int | None) -> _Lines:
    """Sorts assignments into lines; with `block` None there is no padding between experts, and there are no blocks."""
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
    used = min(count, total)  # at most this many experts have a partly filled block, which bounds the blocks
    index = jnp.arange(used + (total - used) // block)
    expert = jnp.minimum(jnp.sum(until[None] <= index[:, None], axis=1, dtype=jnp.int32), count - 1)
    rank_of_line = (starts[expert] + (index - first[expert]) * block)[:, None] + jnp.arange(block)[None]
    filled = rank_of_line < ends[expert][:, None]
    assignment = jnp.where(filled, order[jnp.minimum(rank_of_line, total - 1)], total).ravel()
    own = jnp.minimum(chosen, count - 1)
    place = jnp.where(chosen < count, first[own] * block + rank - starts[own], assignment.size)
    return _Lines(assignment, place.reshape(experts.shape), sizes, expert, until[-1])


def _forward_local(options, x, weights, experts, gate, up, down):
    kernels = _gather(options, x.dtype, gate, up, down)
    lines = _sort(experts, len(gate), _block_size(options, experts.size, len(gate)))
    gated, upped, out = (_forward_ragged if options.block is None else _forward_blocks)(options, lines, x, kernels)
    y = _per_token(out, lines, weights).astype(x.dtype)
    return _sum_over_hidden(options, y), gated, upped


def _backward_local(options, saved, grad):
    x, weights, experts, gate, up, down, gated, upped = saved
    kernels = _gather(options, x.dtype, gate, up, down)
    lines = _sort(experts, len(gate), _block_size(options, experts.size, len(gate)))
    backward = _backward_ragged if options.block is None else _backward_blocks
    weight = _take(weights.ravel(), lines.assignment)  # [S]
    by_line = _ByLine(x, grad, weight, gated, upped)  # x and grad still by token, [N, D]
    to_line, to_weight, *parts = backward(options, lines, by_line, kernels)
    to_x = _per_token(to_line, lines, jnp.ones_like(weights)).astype(x.dtype)  # [N, D] dL/dx = sum over a token's lines
    to_weights = _take(to_weight, lines.place).astype(weights.dtype)  # [N, k] dL/dw
    transposed = _transposed(options), _transposed(options), False
    to_kernels = [  # [E, D, F], [E, D, F], [E, F, D]: dL/dgate, dL/dup, dL/ddown, of the tokens of all devices
        _sum_over_rows(options, part, swap).astype(kernel.dtype)
        for part, kernel, swap in zip(parts, (gate, up, down), transposed, strict=True)
    ]
    return *_sum_over_hidden(options, (to_x, to_weights)), *to_kernels


class _ByLine(NamedTuple):
    """Inputs of the backward pass of n lines of the same or of several experts."""

    x: Float[Array, "n D"]  # of the line's token
    grad: Float[Array, "n D"]  # gradient of the token's result
    weight: Float[Array, "n"]  # of the line in that result
    gated: Float[Array, "n F"]
    upped: Float[Array, "n F"]


def _forward_lines(options, x, kernels, product):
    """Returns x . gate [n, F], x . up [n, F] and the outputs [n, D]; `product` multiplies lines by their matrices."""
    gate, up, down = kernels
    gated, upped = product(x, gate), product(x, up)
    return gated, upped, product(options.activation(gated) * upped, down)


def _backward_lines(options, by_line, kernels, product_transposed, outer_product):
    """Returns gradients of each line's x [n, D] and weight [n], and of gate, up and down, with h = act(gated) upped.

    Args:
      product_transposed: multiplies lines by the transposed matrices of their experts.
      outer_product: ([n, I], [n, O]) -> [I, O] for each expert, summed over its lines in float32 or wider.
    """
    (x, grad, weight, gated, upped), (gate, up, down) = by_line, kernels
    wide = jnp.promote_types(x.dtype, jnp.float32)
    hidden, pull = jax.vjp(lambda gated, upped: options.activation(gated) * upped, gated, upped)  # [n, F] h
    # [n, F] dL/dh / w = dL/dy . down^T; without the weight it also gives the weight's gradient, so no output is saved
    to_hidden = product_transposed(grad, down).astype(wide)
    to_weight = jnp.sum(to_hidden * hidden.astype(wide), axis=-1)  # [n] dL/dw = dL/dy . (h down)
    weight = weight[:, None].astype(wide)
    to_gated, to_upped = pull((to_hidden * weight).astype(x.dtype))  # [n, F] dL/dh times dh/dgated, dh/dupped
    to_x = product_transposed(to_gated, gate) + product_transposed(to_upped, up)  # [n, D] dL/dx
    # [D, F], or [F, D] if transposed: dL/dgate = x^T dL/dgated, dL/dup = x^T dL/dupped
    transposed = _transposed(options)
    to_gate, to_up = (outer_product(to, x) if transposed else outer_product(x, to) for to in (to_gated, to_upped))
    # [F, D] dL/ddown = h^T (w dL/dy)
    return to_x, to_weight, to_gate, to_up, outer_product(hidden, (grad.astype(wide) * weight).astype(x.dtype))


def _forward_ragged(options, lines, x, kernels):
    product = functools.partial(jax.lax.ragged_dot, group_sizes=lines.sizes)
    return _forward_lines(options, _take(x, lines.token), kernels, product)


def _backward_ragged(options, lines, by_line, kernels):
    wide = jnp.promote_types(by_line.x.dtype, jnp.float32)

    def product_transposed(values, kernel):
        return jax.lax.ragged_dot(values, jnp.swapaxes(kernel, 1, 2), lines.sizes)

    def outer_product(left, right):
        return jax.lax.ragged_dot_general(left, right, lines.sizes, _BY_GROUP_OUTER, preferred_element_type=wide)

    x, grad = (_take(array, lines.token) for array in (by_line.x, by_line.grad))  # [S, D]
    return _backward_lines(options, by_line._replace(x=x, grad=grad), kernels, product_transposed, outer_product)


def _forward_blocks(options, lines, x, kernels):
    def one_block(i, carry):
        own_kernels = [_index(kernel, lines.expert[i]) for kernel in kernels]
        states = _take(x, _block(lines.token, i, lines.block))
        parts = _forward_lines(options, states, own_kernels, jnp.matmul)
        return tuple(_put(array, part, i, lines.block) for array, part in zip(carry, parts, strict=True))

    size, (_, width, hidden) = lines.assignment.size, kernels[0].shape
    empty = tuple(jnp.zeros((size, columns), x.dtype) for columns in (hidden, hidden, width))
    return jax.lax.fori_loop(0, lines.blocks, one_block, empty)


def _backward_blocks(options, lines, by_line, kernels):
    x, grad, *others = by_line
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def product_transposed(values, kernel):
        return jnp.einsum("bo,io->bi", values, kernel)

    def outer_product(left, right):
        return jnp.einsum("bi,bo->io", left, right, preferred_element_type=wide)

    def one_block(i, carry):
        to_line, to_weight, *totals = carry
        expert = lines.expert[i]
        token = _block(lines.token, i, lines.block)
        states = [_take(array, token) for array in (x, grad)] + [_block(array, i, lines.block) for array in others]
        own_kernels = [_index(kernel, expert) for kernel in kernels]
        gradients = _backward_lines(options, _ByLine(*states), own_kernels, product_transposed, outer_product)
        line, weight, *parts = gradients  # [b, D] dL/dx, [b] dL/dw, and the block's share of the matrices' gradients
        totals = [total.at[expert].add(part) for total, part in zip(totals, parts, strict=True)]
        return _put(to_line, line, i, lines.block), _put(to_weight, weight, i, lines.block), *totals

    size, transposed = lines.assignment.size, _transposed(options)
    shapes = [kernel.shape for kernel in kernels]
    shapes = [(shape[0], shape[2], shape[1]) if transposed else shape for shape in shapes[:2]] + shapes[2:]
    start = jnp.zeros((size, x.shape[1]), x.dtype), jnp.zeros(size, wide), *(jnp.zeros(s, wide) for s in shapes)
    return jax.lax.fori_loop(0, lines.blocks, one_block, start)


def _per_token(by_line, lines, weights):
    """Weighted sum of each token's lines [N, D], float32 or wider; padding lines are never read."""
    wide = jnp.promote_types(by_line.dtype, jnp.float32)
    sums = [
        _take(by_line, lines.place[:, i]).astype(wide) * weights[:, i, None].astype(wide)
        for i in range(weights.shape[1])  # one at a time: all at once would allocate another array of all lines
    ]
    return sum(sums[1:], sums[0])


def _transposed(options) -> bool:
    """Whether gradients of gate and up are computed as [E, F, D], so that the scattered dimension is last; see
    `layers.make_kernel_sharding`."""
    return options.sharding is not None and options.sharding.width is not None


def _gather(options, dtype, gate, up, down):
    """Gathers the matrices along D, in the compute type."""
    kernels = [kernel.astype(dtype) for kernel in (gate, up, down)]
    if not _transposed(options):
        return kernels
    sides = zip(kernels, (1, 1, 2), strict=True)
    return [jax.lax.all_gather(kernel, options.sharding.width, axis=side, tiled=True) for kernel, side in sides]


def _sum_over_hidden(options, tree):
    sharding = options.sharding
    return tree if sharding is None or sharding.hidden is None else jax.lax.psum(tree, sharding.hidden)


def _sum_over_rows(options, part, transposed):
    """Reduces a matrix's gradient over the devices' tokens and returns this device's shard of it."""
    sharding = options.sharding
    if sharding is None:
        return part
    if sharding.width is not None:
        part = sharding.scatter(part, sharding.width, 2)
    part = jax.lax.psum(part, tuple(axis for axis in sharding.rows if axis != sharding.width))
    return jnp.swapaxes(part, 1, 2) if transposed else part


def _take(array, index):
    return jnp.take(array, index, axis=0, mode="fill", fill_value=0)


def _index(kernel, expert):
    return jax.lax.dynamic_index_in_dim(kernel, expert, keepdims=False)


def _block(array, i, size):
    return jax.lax.dynamic_slice_in_dim(array, i * size, size)


def _put(array, block, i, size):
    return jax.lax.dynamic_update_slice_in_dim(array, block, i * size, axis=0)
