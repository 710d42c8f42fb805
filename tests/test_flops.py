"""Counted operations against those of unpadded products and of XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.cost import flops
from dpo_jax.data import layout, packing
from dpo_jax.models.config import DecoderConfig, LayerKind
from dpo_jax.types import Encoded

CONFIG = DecoderConfig(
    vocab_size=100, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_width=64, max_positions=64
)
LENGTHS = np.array([[5, 3, 4], [7, 1, 6]])
RANKED = np.array([[5, 3, 4, 2, 6], [7, 1, 6, 0, 0], [4, 2, 2, 3, 0]])
UNPAIRED = np.array([[5, 3, 0], [7, 0, 6]])


@pytest.mark.parametrize("lengths", [LENGTHS, RANKED, UNPAIRED], ids=["pairs", "ranked", "unpaired"])
@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_visible_pairs_are_those_of_the_intervals(name, lengths):
    units = [layout.lay_out(Encoded.of(*(np.ones(n, int) for n in row)), name) for row in lengths]
    assert flops.visible_pairs(lengths, name) == sum((unit.key_end - unit.key_start).sum() for unit in units)


@pytest.mark.parametrize("window", [1, 4, 100])
def test_visible_pairs_of_a_window_are_those_of_the_intervals(window):
    units = [layout.lay_out(Encoded.of(*(np.ones(n, int) for n in row)), "repeated") for row in LENGTHS]
    seen = 0
    for unit in units:
        index = np.arange(len(unit.key_end))
        seen += (unit.key_end - np.maximum(unit.key_start, index - (window - 1))).sum()
    assert flops.visible_pairs(LENGTHS, "repeated", window) == seen


def test_every_layer_sees_as_much_as_its_own_window_lets_it():
    kinds = dict(kinds=(LayerKind(window=4), LayerKind()), pattern=(0, 0, 1))
    near, far = (flops.visible_pairs(LENGTHS, "repeated", window) for window in (4, None))
    assert near < far
    less = 4.0 * CONFIG.heads * CONFIG.head_dim * 2 * (far - near)  # in two of the three layers
    some = flops.forward_flops(dataclasses.replace(CONFIG, **kinds), LENGTHS, "repeated")
    assert flops.forward_flops(CONFIG, LENGTHS, "repeated") - some == less


def products(rows, inner, columns):
    """As XLA counts them on a compiled product of just that size."""
    args = jax.ShapeDtypeStruct((rows, inner), jnp.float32), jax.ShapeDtypeStruct((inner, columns), jnp.float32)
    cost = jax.jit(jnp.matmul).lower(*args).compile().cost_analysis()
    assert cost is not None
    return cost["flops"]


def test_a_token_costs_what_its_own_experts_and_the_router_do():
    # Five experts, of which each token meets two: of 10 tokens, 20 go through a feed-forward block of some expert.
    mixed = dataclasses.replace(CONFIG, experts=5, experts_per_token=2)
    dense = flops.product_flops(CONFIG, 10, 4) - 3 * 3 * products(10, 32, 64)
    assert flops.product_flops(mixed, 10, 4) == dense + 3 * (3 * products(20, 32, 64) + products(10, 32, 5))


def test_forward_operations_are_those_of_the_products():
    # Ten real tokens of one block matrix after the other.
    tokens = int(packing.unit_lengths(LENGTHS, "shared").sum())
    c = CONFIG
    block = products(tokens, 32, 32) * 2 + products(tokens, 32, 16) * 2 + products(tokens, 32, 64) * 3
    seen = 4.0 * c.heads * c.head_dim * flops.visible_pairs(LENGTHS, "shared")
    head = products(int(LENGTHS[:, 1:].sum()), 32, 100)
    assert flops.forward_flops(c, LENGTHS, "shared") == pytest.approx(3 * (block + seen) + head, rel=1e-6)
    assert flops.train_flops(c, LENGTHS, "shared") == 3 * flops.forward_flops(c, LENGTHS, "shared")


def test_padding_costs_nothing_and_a_repeated_prompt_its_tokens():
    shared, repeated = (flops.forward_flops(CONFIG, LENGTHS, name) for name in layout.LAYOUTS)
    assert repeated > shared


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA GH200 480GB", "bfloat16", None),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5p", "bfloat16", 459e12),
        ("TPU v6 lite", "bfloat16", 918e12),
        ("cpu", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "float32", None),
    ],
)
def test_peaks_are_known_by_the_kind_of_device(kind, dtype, peak):
    assert flops.peak_flops(kind, dtype) == peak
