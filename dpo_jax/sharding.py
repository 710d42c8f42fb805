"""The device mesh, and which axis of which array lies across which of its axes.

Axes: `replica` (data parallel across slices), `fsdp` (rows and parameters), `tensor` (heads, MLP width, vocabulary).
One device is a mesh of one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.types import Batch, InputError

AXES = ("replica", "fsdp", "tensor")
ROW_AXES = ("replica", "fsdp")

# First match wins; leaves of the optimizer state end in the same paths and so match the same rules. An axis that
# does not divide a dimension is left out.
RULES: tuple[tuple[str, P], ...] = (
    (r"(embed|head)/embedding$", P("tensor", "fsdp")),
    (r"attention/[qkv]/kernel$", P(None, "fsdp", "tensor", None)),
    (r"attention/[qkv]/bias$", P(None, "tensor", None)),
    (r"attention/o/kernel$", P(None, "tensor", None, "fsdp")),
    (r"mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"mlp/(gate|up)/bias$", P(None, "tensor")),
    (r"mlp/down/kernel$", P(None, "tensor", "fsdp")),
    (r"", P()),
)


def mesh_shape(sizes: Sequence[int], devices: int) -> tuple[int, ...]:
    """Mesh axis sizes with a -1 filled in, checked against the number of devices.

    Raises: InputError if they do not multiply to `devices`.
    """
    known = math.prod(size for size in sizes if size != -1)
    filled = tuple(devices // known if size == -1 else size for size in sizes)
    if math.prod(filled) != devices:
        raise InputError(
            "config.mesh",
            got=f"{' x '.join(f'{a} {s}' for a, s in zip(AXES, sizes, strict=True))} on {devices} devices",
            expected=f"sizes whose product is {devices}",
            remedy="Change one, or set it to -1 to take what is left.",
        )
    return filled


def make_mesh(replica: int, fsdp: int, tensor: int) -> Mesh:
    """The mesh over all devices."""
    devices = jax.devices()
    shape = mesh_shape((replica, fsdp, tensor), len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def row_shards(mesh: Mesh) -> int:
    """How many devices the rows of a microbatch are spread over."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for every array (or its shape) of a tree of parameters or of a training state."""

    def place(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition(_path_name(path), leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(place, tree)


def partition(name: str, shape: Sequence[int], axis_sizes: Any) -> P:
    """The PartitionSpec of the first rule that matches `name`, less the axes that do not divide `shape`."""
    spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
    if len(spec) != len(shape):  # such as the factored moments of adafactor
        return P()
    fits = [
        axis if axis is not None and size % axis_sizes[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=True)
    ]
    return P(*fits)


def divides(axis: str, mesh: Mesh, *sizes: int) -> str | None:
    """The axis if it divides all the sizes, else None."""
    return axis if all(size % mesh.shape[axis] == 0 for size in sizes) else None


def batch_shardings(mesh: Mesh, batch: Batch) -> Batch:
    """Rows across `replica` and `fsdp`; what is one number a pair on every device."""
    everywhere = NamedSharding(mesh, P())
    rows = jax.tree.map(lambda _: NamedSharding(mesh, P(None, ROW_AXES)), batch.rows)
    return jax.tree.map(lambda _: everywhere, batch)._replace(rows=rows)


def put(batch: Batch, mesh: Mesh) -> Batch:
    """Moves a batch of host arrays onto the mesh."""
    return jax.device_put(batch, batch_shardings(mesh, batch))


def _path_name(path: Any) -> str:
    return "/".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def bytes_per_device(tree: Any) -> int:
    """Bytes of a placed tree that the first device holds."""
    device = jax.devices()[0]
    return sum(
        int(np.prod(shard.data.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
