"""The device mesh, and which axis of which array lies across which of its axes.

Axes: `replica` (data parallel across slices), `fsdp` (rows and parameters), `tensor` (heads, MLP width, vocabulary).
One device is a mesh of one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.trees import path_name
from dpo_jax.types import Batch, InputError

AXES = ("replica", "fsdp", "tensor")
ROW_AXES = ("replica", "fsdp")
LARGE = 2**20  # bytes of an array from which lying whole on every device is worth a remark

AnyMesh = Mesh | AbstractMesh  # an abstract one has sizes and no devices
Rules = tuple[tuple[str, P], ...]  # pattern of a leaf's path, and where such leaves lie

# First match wins; leaves of the optimizer state end in the same paths and so match the same rules. An axis that
# does not divide a dimension is left out. Every family's parameters have these paths (`models.config`); a kernel
# that is held in few bits has its codes and scales below its own.
RULES: Rules = (
    (r"(embed|head)/embedding$", P("tensor", "fsdp")),
    (r"attention/[qkv]/kernel(/|$)", P(None, "fsdp", "tensor", None)),
    (r"attention/[qkv]/bias$", P(None, "tensor", None)),
    (r"attention/o/kernel(/|$)", P(None, "tensor", None, "fsdp")),
    (r"mlp/(gate|up)/kernel(/|$)", P(None, "fsdp", "tensor")),
    (r"mlp/(gate|up)/bias$", P(None, "tensor")),
    (r"mlp/down/kernel(/|$)", P(None, "tensor", "fsdp")),
    # Adapters' sides of a width that `tensor` cuts lie as the kernels' do; the others are too small to gather.
    (r"attention/[qkv]/lora_b$", P(None, None, "tensor", None)),
    (r"attention/o/lora_a$", P(None, "tensor", None, None)),
    (r"mlp/(gate|up)/lora_b$", P(None, None, "tensor")),
    (r"mlp/down/lora_a$", P(None, "tensor", None)),
    (r"experts/router/kernel$", P(None, "fsdp", None)),
    (r"experts/(gate|up)/kernel(/|$)", P(None, None, "fsdp", "tensor")),
    (r"experts/down/kernel(/|$)", P(None, None, "tensor", "fsdp")),
    (r"", P()),
)


def parse_rules(text: str) -> Rules:
    """RULES, after those of `mesh.rules`: "mlp/down/kernel$=-,fsdp,tensor;bias$=-,tensor", "-" for no axis.

    Raises: InputError for what is no pattern, no axis, or names an axis twice.
    """
    rules: list[tuple[str, P]] = []
    for each in filter(None, (part.strip() for part in text.split(";"))):
        pattern, equals, axes = each.rpartition("=")
        names = [name.strip() for name in axes.split(",")]
        used = [name for name in names if name != "-"]
        try:
            re.compile(pattern)
        except re.error:
            equals = ""
        if not equals or not pattern or not set(used) <= set(AXES) or len(set(used)) < len(used):
            raise InputError(
                "config.mesh.rules",
                got=repr(each),
                expected=f"REGEX=AXIS,AXIS,... of {', '.join(AXES)} and -, each axis once",
                remedy="Correct it; rules are separated by ';'.",
            )
        rules.append((pattern, P(*(None if name == "-" else name for name in names))))
    return (*rules, *RULES)


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


def make_mesh(replica: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices`, by default all, in an order in which neighbors on an axis are near one another.

    Of several TPU slices, whose devices reach one another over the data center's network only, `replica` crosses from
    slice to slice and no other axis does.

    Raises: InputError if the sizes do not fit the number of devices or of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape((replica, fsdp, tensor), len(devices))
    slices = len(set(map(slice_of, devices))) if devices[0].platform == "tpu" else 1
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif shape[0] % slices:
        raise InputError(
            "config.mesh.replica",
            got=f"{shape[0]} on {slices} slices",
            expected=f"a multiple of {slices}",
            remedy="Only this axis crosses from slice to slice.",
        )
    else:
        within, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def slice_of(device: Any) -> int:
    """Which of several TPU slices a device is in."""
    return getattr(device, "slice_index", 0)  # topologies of one slice have none


def row_shards(mesh: AnyMesh) -> int:
    """How many devices the rows of a microbatch are spread over."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def shards_here(mesh: Mesh) -> tuple[int, ...]:
    """Of those, the ones whose rows devices of this process hold."""
    by_shard = mesh.devices.reshape(row_shards(mesh), -1)
    this = jax.process_index()
    return tuple(i for i, devices in enumerate(by_shard) if any(device.process_index == this for device in devices))


def shardings(mesh: AnyMesh, tree: Any, rules: Rules = RULES) -> Any:
    """A NamedSharding for every array (or its shape) of a tree of parameters or of a training state."""

    def place(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition(path_name(path), leaf.shape, mesh.shape, rules))

    return jax.tree_util.tree_map_with_path(place, tree)


def partition(name: str, shape: Sequence[int], axis_sizes: Any, rules: Rules = RULES) -> P:
    """The PartitionSpec of the first rule that matches `name`, less the axes that do not divide `shape`."""
    spec = next(spec for pattern, spec in rules if re.search(pattern, name))
    if len(spec) != len(shape):  # such as the factored moments of adafactor
        return P()
    fits = [
        axis if axis is not None and size % axis_sizes[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=True)
    ]
    return P(*fits)


def whole_everywhere(tree: Any) -> dict[str, int]:
    """Path and bytes of every placed array of at least LARGE bytes that each of several devices holds whole."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if size >= LARGE and len(leaf.sharding.device_set) > 1 and leaf.sharding.is_fully_replicated:
            found[path_name(path)] = size
    return found


def divides(axis: str, mesh: Mesh, *sizes: int) -> str | None:
    """The axis if it divides all the sizes, else None."""
    return axis if all(size % mesh.shape[axis] == 0 for size in sizes) else None


def sum_scattered(mesh: Mesh, x: jax.Array, axis: str, side: int) -> jax.Array:
    """Within a shard_map: this device's part, along dimension `side`, of the sum of `x` over an axis of the mesh."""
    if mesh.devices.flat[0].platform != "cpu":
        return jax.lax.psum_scatter(x, axis, scatter_dimension=side, tiled=True)
    # Between processes, that of CPUs gives wrong numbers now and then: github.com/jax-ml/jax/issues/40830.
    size = x.shape[side] // mesh.shape[axis]
    return jax.lax.dynamic_slice_in_dim(jax.lax.psum(x, axis), jax.lax.axis_index(axis) * size, size, side)


def everywhere(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def batch_shardings(mesh: Mesh, batch: Batch) -> Batch:
    """Rows across `replica` and `fsdp`; what is one number a pair on every device."""
    rows = jax.tree.map(lambda _: NamedSharding(mesh, P(None, ROW_AXES)), batch.rows)
    return jax.tree.map(lambda _: everywhere(mesh), batch)._replace(rows=rows)


def put(batch: Batch, mesh: Mesh) -> Batch:
    """Moves a batch of host arrays onto the mesh; of rows, each process the ones that its devices hold."""
    places = batch_shardings(mesh, batch)
    if jax.process_count() == 1:
        return jax.device_put(batch, places)

    def share(array: Any, place: NamedSharding) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

    return jax.tree.map(share, batch, places)


def from_parts(
    shape: Sequence[int], place: NamedSharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """An array of which this process reads what its devices hold: each part once, and one after another.

    jax.make_array_from_callback has the parts of all devices in the host's memory before it moves the first, and reads
    what several of them hold once for each.
    """
    parts: dict[tuple[Any, ...], tuple[tuple[slice, ...], list[Any]]] = {}
    for device, index in place.addressable_devices_indices_map(tuple(shape)).items():
        assert index is not None
        parts.setdefault(tuple((each.start, each.stop) for each in index), (index, []))[1].append(device)
    arrays: list[jax.Array] = []
    for index, devices in parts.values():
        numbers = read(index)
        arrays += [jax.device_put(numbers, device) for device in devices]
    return jax.make_array_from_single_device_arrays(tuple(shape), place, arrays)


def bytes_per_device(tree: Any, gathered: str = "") -> int:
    """Bytes of a placed tree that one device holds, or would if what lies across the axis `gathered` did not."""

    def size(leaf: Any) -> int:
        times = leaf.sharding.mesh.shape[gathered] if gathered and gathered in leaf.sharding.spec else 1
        return times * math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))
