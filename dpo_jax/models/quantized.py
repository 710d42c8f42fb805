"""Kernels that do not train, held in few bits: qwix's int8, or NormalFloat in 4 bits (Dettmers et al. 2023, QLoRA).

Up to BLOCK numbers in a line of a kernel's last axis share a scale. The kernel's place in the parameters is taken by a
dict of `codes`, two of 4 bits to a byte, and `scales`; what multiplies by it decodes it, a layer at a time.
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

from dpo_jax.types import InputError

KINDS = {"int8": "int8", "nf4": "uint8"}  # and the type of its codes
BLOCK = 64
KERNEL = re.compile(r"blocks/(attention|mlp|experts)/(?!router/)\w+/kernel")  # leaves that can be held so
PARTS = ("codes", "scales")


def check_available(kind: str) -> None:
    """Raises InputError if kernels are to be held so and qwix is not there."""
    if kind and importlib.util.find_spec("qwix") is None:
        raise InputError(
            "config.lora.base",
            got=f"{kind!r}, and qwix is not installed",
            expected="qwix",
            remedy="Run pip install 'dpo-jax[quantize]', or leave it empty.",
        )


@functools.partial(jax.jit, static_argnums=1)
def encode(kernel: Any, kind: str) -> dict[str, Any]:
    """Codes [..., F], or [..., F / 2], and scales [..., F / block] of a kernel [..., F], the scales of its type."""
    import qwix

    last = kernel.ndim - 1
    block = math.gcd(kernel.shape[last], BLOCK)
    made: Any = qwix.quantize(kernel, kind, channelwise_axes=range(last), tiled_axes={last: block})
    codes = made.qvalue
    if kind == "nf4":
        # Of a line's two halves: pairs of neighbors would be an axis of 2, for which TPUs take the memory of 128.
        low, high = jnp.split(codes.astype(jnp.uint8), 2, axis=-1)
        codes = low | high << 4
    return dict(zip(PARTS, (codes, made.scale), strict=True))


def decode(held: Mapping[str, Any]) -> Any:
    """The kernel, of the type of its scales."""
    import qwix

    codes, scales = (held[part] for part in PARTS)
    kind = next(name for name, dtype in KINDS.items() if dtype == codes.dtype.name)
    if kind == "nf4":
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)
    return qwix.dequantize(qwix.QArray(qvalue=codes, scale=scales, qtype=kind))


def decoded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with all kernels decoded."""
    return {
        name: value
        if not isinstance(value, Mapping)
        else decode(value)
        if value.keys() == set(PARTS)
        else decoded(value)
        for name, value in tree.items()
    }


def leaf_of(path: str) -> str:
    """The path of the kernel whose codes or scales are at this one; of all else, the path itself."""
    return re.sub(rf"/({'|'.join(PARTS)})$", "", path)
