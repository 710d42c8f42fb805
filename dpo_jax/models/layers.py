"""The layers that a decoder is made of, with backward passes written so that every array is read as it lies.

Left to itself, XLA on CPUs transposes the activations of a weight gradient together with all the arithmetic that makes
them, and sums over rows a column at a time; here both are plain products. An embedding's gradient is added where its
sum lies, see `gradients`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

custom_vjp: Any = jax.custom_vjp  # its own annotations say nothing of what a function returns


class Across(NamedTuple):
    """How a kernel is used on a mesh where its parts lie on several devices, and rows on others."""

    gather: Callable[[Array], Array]  # the kernel [I, F] without the cut that the devices of the rows have in it
    outer: Callable[[Array, Array], Array]  # ([N, I], [N, F]) -> [I, F], the sum over n of x_n grad_n, cut as it was


@functools.partial(custom_vjp, nondiff_argnums=(3, 4))
def affine(
    x: Float[Array, "N I"],
    kernel: Float[Array, "I F"],
    bias: Float[Array, "F"] | None,
    across: Across | None = None,
    kept: bool = True,
) -> Float[Array, "N F"]:
    """x . kernel + bias, in the type of x; kernel and bias are of it already.

    Args:
      across: None: on one device.
      kept: whether a remat policy that keeps products keeps this one.
    """
    return _affine_forward(x, kernel, bias, across, kept)[0]


def _affine_forward(x, kernel, bias, across, kept):
    # Written out: a call of `affine` would hide the product from a remat policy that keeps products.
    whole = kernel if across is None else across.gather(kernel)
    # The policy passes over products with a batch axis.
    y = x @ whole if kept else jnp.einsum("bni,bif->bnf", x[None], whole[None])[0]
    return y if bias is None else y + bias[None], (x, kernel, bias)


def _affine_backward(across, kept, saved, grad):
    x, kernel, bias = saved
    grad = jax.lax.optimization_barrier(grad)  # made once, for both products
    to_bias = None if bias is None else column_sums(grad).astype(bias.dtype)
    if across is None:
        return jnp.einsum("nf,if->ni", grad, kernel), jnp.einsum("ni,nf->if", x, grad), to_bias
    to_x = jnp.einsum("nf,if->ni", grad, across.gather(kernel))
    return to_x, across.outer(x, grad).astype(kernel.dtype), to_bias


affine.defvjp(_affine_forward, _affine_backward)


def across_mesh(
    mesh: Mesh,
    rows: tuple[str, ...],
    inputs: str | None,
    outputs: str | None,
    scatter: Callable[[Array, str, int], Array],
) -> Across:
    """`Across` where rows are spread over axes of a mesh, and the kernel's two sides over one each or none.

    A device gathers the kernel in the compute type, multiplies the rows that it has, forward and backward, and adds
    up its part of the kernel's gradient, in float32 or wider. Left to itself, XLA may move all rows to all devices
    instead, many times the kernel's size.

    Args:
      scatter: within a shard_map, the sum over an axis, of which a device gets its part along a side.
    """
    axes = inputs, outputs
    kept = [None if axis in rows else axis for axis in axes]
    whole = NamedSharding(mesh, PartitionSpec(*kept))

    def here(x, grad):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        # What is scattered stands last, or the compilers for TPUs sum up the whole on every device.
        turned = inputs in rows
        part = jnp.einsum("ni,nf->fi" if turned else "ni,nf->if", x, grad, preferred_element_type=wide)
        for axis, side in ((inputs, 1), (outputs, 0 if turned else 1)):
            if axis in rows:
                part = scatter(part, axis, side)
        part = jax.lax.psum(part, tuple(axis for axis in rows if axis not in axes))
        return part.T if turned else part

    return Across(
        gather=functools.partial(jax.lax.with_sharding_constraint, shardings=whole),
        outer=jax.shard_map(
            here,
            mesh=mesh,
            in_specs=(PartitionSpec(rows, kept[0]), PartitionSpec(rows, kept[1])),
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
    """LayerNorm where there is a bias, RMSNorm where there is none; statistics float32 or wider, result of x's type.

    y = (x - mean) / sqrt(var + eps) * scale + bias, Ba et al. 2016; y = x / sqrt(mean(x^2) + eps) * scale, Zhang and
    Sennrich 2019.
    """
    return _normalize_forward(x, scale, bias, eps)[0]


def _statistics(x, centred, eps):
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if centred:
        x = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
    return x * inverse, inverse


def _along(unit, columns):
    return jnp.expand_dims(columns, range(unit.ndim - 1)).astype(unit.dtype)


def _normalize_forward(x, scale, bias, eps):
    unit, _ = _statistics(x, bias is not None, eps)
    y = unit * _along(unit, scale)
    if bias is not None:
        y = y + _along(unit, bias)
    return y.astype(x.dtype), (x, scale, bias)


def _normalize_backward(eps, saved, grad):
    x, scale, bias = saved
    unit, inverse = _statistics(x, bias is not None, eps)
    grad = grad.astype(unit.dtype)
    pulled = grad * _along(unit, scale)
    to_x = pulled - unit * (pulled * unit).mean(-1, keepdims=True)
    if bias is not None:
        to_x = to_x - pulled.mean(-1, keepdims=True)
    to_bias = None if bias is None else column_sums(grad).astype(bias.dtype)
    return (to_x * inverse).astype(x.dtype), column_sums(grad * unit).astype(scale.dtype), to_bias


normalize.defvjp(_normalize_forward, _normalize_backward)


@functools.partial(custom_vjp, nondiff_argnums=(3,))
def lookup(
    table: Float[Array, "V D"],
    tokens: Int[Array, "R S"],
    total: Float[Array, "V D"] | None,
    move: Callable[[Array], Array] | None = None,
) -> tuple[Float[Array, "R S D"], Float[Array, "V D"] | None]:
    """Rows of a table, and `total`, which the gradient of the table is added to; None: it is the table's cotangent.

    Args:
      move: takes the gradient of the rows to where the table's columns lie, on a mesh that has them elsewhere; there it
        is added in place, where otherwise each device would fill a table of its own, all to be summed.
    """
    return jnp.take(table, tokens, axis=0), total


def _lookup_forward(table, tokens, total, move):
    return lookup(table, tokens, total, move), (table, tokens)


def _lookup_backward(move, saved, cotangents):
    (table, tokens), (grad, total) = saved, cotangents
    grad = grad if move is None else move(grad)
    if total is None:
        return jnp.zeros_like(table).at[tokens].add(grad), None, None
    return None, None, total.at[tokens].add(grad.astype(total.dtype))


lookup.defvjp(_lookup_forward, _lookup_backward)
