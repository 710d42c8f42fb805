"""Quantized kernels of frozen layers: int8, or NormalFloat of 4 bits (Dettmers et al. 2023, QLoRA), by qwix.

Up to BLOCK neighbors along a kernel's last axis share a scale. In the parameters the kernel is replaced by a dict of
`codes`, two to a byte if they have 4 bits, and `scales`. A layer decodes its own kernel just before it multiplies.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from dpo_jax.types import InputError

KINDS = {"int8": "int8", "nf4": "uint8"}  # kind -> dtype of its codes
BLOCK = 64  # most numbers that share a scale
KERNEL = re.compile(r"blocks/(attention|mlp|experts)/(?!router/)\w+/kernel")  # paths of leaves that may be quantized
PARTS = ("codes", "scales")


def check_available(kind: str) -> None:
    """Raises InputError if a kind of quantization is configured and qwix is missing."""
    if kind and importlib.util.find_spec("qwix") is None:
        raise InputError(
            "config.lora.base",
            got=f"{kind!r}, and qwix is not installed",
            expected="qwix",
            remedy="Run pip install 'dpo-jax[quantize]', or leave it empty.",
        )


@functools.partial(jax.jit, static_argnums=1)
def encode(kernel: Float[Array, "*N F"], kind: str) -> dict[str, Shaped[Array, "*N _"]]:
    """Quantizes a kernel [..., F]: codes [..., F], or [..., F / 2] for nf4, and scales [..., F / block] of its type."""
    import qwix

    last = kernel.ndim - 1
    block = math.gcd(kernel.shape[last], BLOCK)
    quantized: Any = qwix.quantize(kernel, kind, channelwise_axes=range(last), tiled_axes={last: block})
    codes = quantized.qvalue
    if kind == "nf4":
        # A byte holds one code of each half: neighbors in a byte would take an axis of 2, which TPUs pad to 128.
        low, high = jnp.split(codes.astype(jnp.uint8), 2, axis=-1)
        codes = low | high << 4
    return dict(zip(PARTS, (codes, quantized.scale), strict=True))


def decode(quantized: Mapping[str, Array]) -> Float[Array, "*N F"]:
    """Dequantizes what `encode` returned; the kernel has the type of its scales."""
    import qwix

    codes, scales = (quantized[part] for part in PARTS)
    kind = next(name for name, dtype in KINDS.items() if dtype == codes.dtype.name)
    if kind == "nf4":
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)
    return qwix.dequantize(qwix.QArray(qvalue=codes, scale=scales, qtype=kind))


def decoded(tree: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns the parameters with every quantized kernel decoded."""
    return {
        name: value
        if not isinstance(value, Mapping)
        else decode(value)
        if value.keys() == set(PARTS)
        else decoded(value)
        for name, value in tree.items()
    }


def leaf_of(path: str) -> str:
    """Returns the kernel's path, given that of its codes or scales; any other path is returned unchanged."""
    return re.sub(rf"/({'|'.join(PARTS)})$", "", path)
