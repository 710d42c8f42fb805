"""Layers with hand-written backward passes against automatic differentiation of their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models.layers import affine, normalize


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def formula(x, scale, bias, eps=1e-3):
    if bias is not None:
        x = x - x.mean(-1, keepdims=True)
    along = (1,) * (x.ndim - 1) + (-1,)
    y = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale.reshape(along)
    return y if bias is None else y + bias.reshape(along)


@pytest.mark.parametrize("rows", [(7,), (7, 3)], ids=["rows", "heads of rows"])
@pytest.mark.parametrize("layer", [True, False], ids=["layernorm", "rmsnorm"])
def test_norm_and_its_gradients_are_those_of_the_formula(layer, rows):
    x, scale, bias, weight = draw((*rows, 24), (24,), (24,), (*rows, 24))
    bias = bias if layer else None
    ours = jax.value_and_grad(lambda x, s, b: (normalize(x, s, b, 1e-3) * weight).sum(), (0, 1, 2))
    theirs = jax.value_and_grad(lambda x, s, b: (formula(x, s, b) * weight).sum(), (0, 1, 2))
    for a, b in zip(jax.tree.leaves(ours(x, scale, bias)), jax.tree.leaves(theirs(x, scale, bias)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("biased", [True, False])
def test_affine_and_its_gradients_are_those_of_the_product(biased):
    x, kernel, bias, weight = draw((7, 5), (5, 6), (6,), (7, 6))
    bias = bias if biased else None
    ours = jax.value_and_grad(lambda x, k, b: (affine(x, k, b) * weight).sum(), (0, 1, 2))
    theirs = jax.value_and_grad(lambda x, k, b: ((x @ k + (0 if b is None else b[None])) * weight).sum(), (0, 1, 2))
    for a, b in zip(jax.tree.leaves(ours(x, kernel, bias)), jax.tree.leaves(theirs(x, kernel, bias)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_norms_keep_float32_statistics_of_bfloat16_values():
    (x,) = draw((4, 512))
    x = (x + 30).astype(jnp.bfloat16)  # a mean that bfloat16 sums would lose
    scale, bias = jnp.ones(512), jnp.zeros(512)
    exact = formula(x.astype(jnp.float32), scale, bias, 1e-5)
    assert normalize(x, scale, bias, 1e-5).dtype == jnp.bfloat16
    np.testing.assert_allclose(normalize(x, scale, bias, 1e-5).astype(jnp.float32), exact, atol=0.02)
