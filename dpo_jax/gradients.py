"""Gradients of several microbatches, added up where their sum lies.

A sum goes backwards through a microbatch: every use of a parameter passes the sum on unchanged, and its backward pass
adds the parameter's gradient to what comes back. `jax.vjp` of a function that ends in the sums, started from their
values, so gives the new ones. Where a use writes into the sum in place (the vocabulary matrix, block by block, in
`logprobs`; embeddings, token by token, in `models.layers`), no array holds the gradient of one microbatch alone.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

custom_vjp: Any = jax.custom_vjp  # its own annotations say nothing of what a function returns


@custom_vjp
def collect(params: Any, sums: Any) -> tuple[Any, Any]:
    """(params, sums), two trees of the same form: what is then done with the parameters is differentiated into `sums`.

    Backward pass: each sum's cotangent plus its parameter's, in the type of the sum; `params` themselves get none.
    """
    return params, sums


def _collect_forward(params, sums):
    return (params, sums), None


def _collect_backward(_, cotangents):
    return None, jax.tree.map(lambda grad, total: total + grad.astype(total.dtype), *cotangents)


collect.defvjp(_collect_forward, _collect_backward)


def zeros(params: Any) -> Any:
    """Sums of no gradient yet, float32 or wider."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
