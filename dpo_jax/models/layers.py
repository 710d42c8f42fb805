"""Linear maps, normalization and embedding lookup, with hand-written backward passes that avoid transposed copies.

Automatic differentiation on CPUs makes XLA transpose the activations of a weight gradient together with all the
arithmetic that computes them, and sum over rows one column at a time. Here both are plain products. The gradient of an
embedding is added in place to the running sum of gradients, see `accumulate`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

custom_vjp: Any = jax.custom_vjp  # its own annotations lose the return type

Scatter = Callable[[Array, str, int], Array]  # (x, mesh axis, dimension) -> this device's part of the sum over the axis


class KernelSharding(NamedTuple):
    """Collectives of a kernel [I, F] that is sharded over some devices while rows are sharded over others."""

    gather: Callable[[Array], Array]  # the kernel [I, F], no longer sharded over the axes of the rows
    weight_grad: Callable[[Array, Array], Array]  # ([N, I], [N, F]) -> [I, F]: x^T grad, sharded as the kernel is


@functools.partial(custom_vjp, nondiff_argnums=(3, 4))
def affine(
    x: Float[Array, "N I"],
    kernel: Float[Array, "I F"],
    bias: Float[Array, "F"] | None,
    sharding: KernelSharding | None = None,
    saveable: bool = True,
) -> Float[Array, "N F"]:
    """Linear map x . kernel + bias, in the type of x.

    Args:
      kernel, bias: of the type of x already.
      sharding: how the kernel is sharded; None: on one device.
      saveable: whether a remat policy that saves products saves this one.
    """
    return _affine_forward(x, kernel, bias, sharding, saveable)[0]


def _affine_forward(x, kernel, bias, sharding, saveable):
    # Written out: a call of `affine` would hide the product from a remat policy that saves products.
    gathered = kernel if sharding is None else sharding.gather(kernel)
    # The policy ignores products with a batch axis, so a batch axis of 1 keeps this one from being saved.
    y = x @ gathered if saveable else jnp.einsum("bni,bif->bnf", x[None], gathered[None])[0]
    return y if bias is None else y + bias[None], (x, kernel, bias)


def _affine_backward(sharding, saveable, saved, grad):
    x, kernel, bias = saved  # [N, I], [I, F], [F]
    grad = jax.lax.optimization_barrier(grad)  # [N, F] dL/dy, computed once and read by both products
    to_bias = None if bias is None else column_sums(grad).astype(bias.dtype)  # [F] dL/db = sum_n grad
    if sharding is None:
        # [N, I] dL/dx = grad . W^T, and [I, F] dL/dW = x^T . grad
        return jnp.einsum("nf,if->ni", grad, kernel), jnp.einsum("ni,nf->if", x, grad), to_bias
    to_x = jnp.einsum("nf,if->ni", grad, sharding.gather(kernel))  # [N, I] dL/dx = grad . W^T
    return to_x, sharding.weight_grad(x, grad).astype(kernel.dtype), to_bias  # [I, F] dL/dW = x^T . grad


affine.defvjp(_affine_forward, _affine_backward)


def make_kernel_sharding(
    mesh: Mesh, rows: tuple[str, ...], inputs: str | None, outputs: str | None, scatter: Scatter
) -> KernelSharding:
    """Returns the collectives of a kernel, each of whose two sides is sharded over one mesh axis or replicated.

    Each device gathers the kernel in the compute type, multiplies its own rows, forward and backward, and reduces its
    part of the kernel's gradient in float32 or wider. Automatic partitioning may instead move all rows to all devices,
    many times the kernel's size.

    Args:
      rows: mesh axes that rows are sharded over.
      inputs, outputs: mesh axis of the kernel's I and of its F; None: replicated.
      scatter: reduce-scatter within a shard_map, such as `sharding.sum_scattered`.
    """
    axes = inputs, outputs
    unscattered = [None if axis in rows else axis for axis in axes]
    gathered = NamedSharding(mesh, PartitionSpec(*unscattered))

    def weight_grad(x, grad):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        # The scattered dimension is last; otherwise compilers for TPUs reduce all of it on every device.
        transposed = inputs in rows
        # [I, F], or [F, I] if transposed: dL/dW = x^T . grad of this device's rows
        part = jnp.einsum("ni,nf->fi" if transposed else "ni,nf->if", x, grad, preferred_element_type=wide)
        for axis, side in ((inputs, 1), (outputs, 0 if transposed else 1)):
            if axis in rows:
                part = scatter(part, axis, side)
        part = jax.lax.psum(part, tuple(axis for axis in rows if axis not in axes))
        return part.T if transposed else part

    return KernelSharding(
        gather=functools.partial(jax.lax.with_sharding_constraint, shardings=gathered),
        weight_grad=jax.shard_map(
            weight_grad,
            mesh=mesh,
            in_specs=(PartitionSpec(rows, unscattered[0]), PartitionSpec(rows, unscattered[1])),
            out_specs=PartitionSpec(inputs, outputs),
            check_vma=False,
        ),
    )


def column_sums(x: Float[Array, "*N D"]) -> Float[Array, "D"]:
    """Sums over all but the last axis, float32 or wider."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    ones = jnp.ones(x.shape[:-1], wide)
    return jnp.tensordot(ones, x.astype(wide), x.ndim - 1, precision=jax.lax.Precision.HIGHEST)


@functools.partial(custom_vjp, nondiff_argnums=(3,))
def normalize(
    x: Float[Array, "*N D"], scale: Float[Array, "D"], bias: Float[Array, "D"] | None, eps: float
) -> Float[Array, "*N D"]:
    """LayerNorm over the last axis if there is a bias, otherwise RMSNorm, in float32 or wider; the result has x's type.

    LayerNorm: y = (x - mean) / sqrt(var + eps) * scale + bias. RMSNorm: y = x / sqrt(mean(x^2) + eps) * scale.

    Source: Ba et al. 2016 (LayerNorm); Zhang and Sennrich 2019 (RMSNorm).
    """
    return _normalize_forward(x, scale, bias, eps)[0]


def _unit_and_inverse(x, centered, eps):
    """Returns u = x / s [*N, D], after centering if asked, and 1 / s [*N, 1], with s = sqrt(mean(x^2) + eps)."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if centered:
        x = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
    return x * inverse, inverse


def _per_column(unit, columns):
    return jnp.expand_dims(columns, range(unit.ndim - 1)).astype(unit.dtype)


def _normalize_forward(x, scale, bias, eps):
    unit, _ = _unit_and_inverse(x, bias is not None, eps)
    y = unit * _per_column(unit, scale)
    if bias is not None:
        y = y + _per_column(unit, bias)
    return y.astype(x.dtype), (x, scale, bias)


def _normalize_backward(eps, saved, grad):
    x, scale, bias = saved  # [*N, D], [D], [D]
    unit, inverse = _unit_and_inverse(x, bias is not None, eps)  # u [*N, D], 1 / s [*N, 1]
    grad = grad.astype(unit.dtype)  # [*N, D] dL/dy
    to_unit = grad * _per_column(unit, scale)  # [*N, D] dL/du = dL/dy * scale
    to_x = to_unit - unit * (to_unit * unit).mean(
        -1, keepdims=True
    )  # [*N, D] s dL/dx: less its part along u, from ds/dx
    if bias is not None:
        to_x = to_x - to_unit.mean(-1, keepdims=True)  # [*N, D] s dL/dx: less its mean, from d mean/dx
    to_bias = None if bias is None else column_sums(grad).astype(bias.dtype)  # [D] dL/db = sum_n dL/dy
    # [*N, D] dL/dx, and [D] dL/dscale = sum_n dL/dy * u
    return (to_x * inverse).astype(x.dtype), column_sums(grad * unit).astype(scale.dtype), to_bias


normalize.defvjp(_normalize_forward, _normalize_backward)


@functools.partial(custom_vjp, nondiff_argnums=(3,))
def lookup(
    table: Float[Array, "V D"],
    tokens: Int[Array, "R S"],
    grad_sum: Float[Array, "V D"] | None,
    move_grad: Callable[[Array], Array] | None = None,
) -> tuple[Float[Array, "R S D"], Float[Array, "V D"] | None]:
    """Looks up the embeddings of tokens, and passes on the running sum of the table's gradient.

    Args:
      grad_sum: the backward pass adds the table's gradient to the cotangent of this sum, in place; None: the gradient
        is the table's cotangent.
      move_grad: reshards the gradient of the embeddings [R, S, D] as the table's columns are sharded, so that each
        device adds to its own columns; otherwise each would fill a whole table, and all of them would be summed.
    Returns: the embeddings, and `grad_sum` as it came.
    """
    return jnp.take(table, tokens, axis=0), grad_sum


def _lookup_forward(table, tokens, grad_sum, move_grad):
    return lookup(table, tokens, grad_sum, move_grad), (table, tokens)


def _lookup_backward(move_grad, saved, cotangents):
    (table, tokens), (grad, grad_sum) = saved, cotangents  # [V, D], [R, S]; [R, S, D] dL/dx, [V, D]
    grad = grad if move_grad is None else move_grad(grad)
    if grad_sum is None:
        return (
            jnp.zeros_like(table).at[tokens].add(grad),
            None,
            None,
        )  # [V, D] dL/dtable[v] = sum of dL/dx where token = v
    return None, None, grad_sum.at[tokens].add(grad.astype(grad_sum.dtype))  # [V, D] sum so far + dL/dtable


lookup.defvjp(_lookup_forward, _lookup_backward)
