"""The device mesh, and sharding specs of parameters and batches by rules.

Mesh axes: `replica` (data parallel across slices), `fsdp` (rows and parameters), `tensor` (heads, MLP width,
vocabulary). One device is a mesh of one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from dpo_jax import aliases, trees
from dpo_jax.types import Batch, InputError

AXES = ("replica", "fsdp", "tensor")
ROW_AXES = ("replica", "fsdp")
LARGE = 2**20  # bytes from which a replicated array is reported

AnyMesh = Mesh | AbstractMesh  # an abstract mesh has sizes and no devices
Rules = tuple[tuple[str, P], ...]  # (pattern of a leaf's path, sharding spec of such leaves)

# The first match wins. Leaves of the optimizer state end in the paths of their parameters and match the same rules. A
# mesh axis that does not divide a dimension is dropped. Parameters of every family have these paths
# (`models.config`); a quantized kernel has its codes and scales below its own path.
RULES: Rules = (
    (r"(embed|head)/embedding$", P("tensor", "fsdp")),
    (r"attention/[qkv]/kernel(/|$)", P(None, "fsdp", "tensor", None)),
    (r"attention/[qkv]/bias$", P(None, "tensor", None)),
    (r"attention/o/kernel(/|$)", P(None, "tensor", None, "fsdp")),
    (r"mlp/(gate|up)/kernel(/|$)", P(None, "fsdp", "tensor")),
    (r"mlp/(gate|up)/bias$", P(None, "tensor")),
    (r"mlp/down/kernel(/|$)", P(None, "tensor", "fsdp")),
    # A factor of an adapter is sharded over `tensor` as its kernel is; the other factor is small, and replicated.
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
    """Parses `mesh.rules`, such as "mlp/down/kernel$=-,fsdp,tensor;bias$=-,tensor" ("-" for no axis).

    Returns: these rules, then RULES.
    Raises: InputError for an invalid pattern, an unknown axis, or an axis that is named twice.
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
                expected=f"REGEX=AXIS,AXIS,... with axes {', '.join(AXES)} or -, each axis once",
                remedy="Write a rule as in 'embedding=tensor,-'; rules are separated by ';'.",
            )
        rules.append((pattern, P(*(None if name == "-" else name for name in names))))
    return (*rules, *RULES)


def mesh_shape(sizes: Sequence[int], devices: int) -> tuple[int, ...]:
    """Fills in a mesh axis size of -1 from the number of devices.

    Raises: InputError if they do not multiply to `devices`.
    """
    fixed = math.prod(size for size in sizes if size != -1)
    filled = tuple(devices // fixed if size == -1 else size for size in sizes)
    if math.prod(filled) != devices:
        raise InputError(
            "config.mesh",
            got=f"{' x '.join(f'{a} {s}' for a, s in zip(AXES, sizes, strict=True))} on "
            f"{devices} device{'s' * (devices > 1)}",
            expected=f"sizes whose product is {devices}",
            remedy="Change one, or give for example --config.mesh.fsdp=-1 for all remaining devices.",
        )
    return filled


def make_mesh(replica: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh over `devices`, by default all, ordered so that neighbors on an axis are physically close.

    TPU slices are joined by the data center's network only: `replica` spans them, and no other axis does.

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
            remedy="Change it: only this axis spans slices.",
        )
    else:
        within, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def slice_of(device: object) -> int:
    """The index of a device's TPU slice; 0 if there is only one."""
    return getattr(device, "slice_index", 0)  # topologies of one slice have none


def row_shards(mesh: AnyMesh) -> int:
    """The number of shards that the rows of a microbatch are split into."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def shards_here(mesh: Mesh) -> tuple[int, ...]:
    """The row shards that devices of this process hold, in [0, row_shards)."""
    by_shard = mesh.devices.reshape(row_shards(mesh), -1)
    this = jax.process_index()
    return tuple(i for i, devices in enumerate(by_shard) if any(device.process_index == this for device in devices))


def shardings(mesh: AnyMesh, tree: PyTree, rules: Rules = RULES) -> PyTree:
    """Returns a NamedSharding for every array, or shape, in a tree of parameters or a training state."""

    def place(path, leaf) -> NamedSharding:
        return NamedSharding(mesh, partition(trees.path_name(path), leaf.shape, mesh.shape, rules))

    return jax.tree_util.tree_map_with_path(place, tree)


def partition(name: str, shape: Sequence[int], axis_sizes: Mapping[str, int], rules: Rules = RULES) -> P:
    """Returns the spec of the first rule that matches the path `name`, without axes that do not divide `shape`.

    An array whose number of dimensions is not the rule's is replicated.
    """
    spec = next(spec for pattern, spec in rules if re.search(pattern, name))
    if len(spec) != len(shape):  # for example the factored moments of adafactor
        return P()
    fits = [
        axis if axis is not None and size % axis_sizes[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=True)
    ]
    return P(*fits)


def large_replicated(tree: PyTree) -> dict[str, int]:
    """Returns {path: bytes} of the placed arrays of at least LARGE bytes that are replicated on several devices."""
    sizes = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if size >= LARGE and len(leaf.sharding.device_set) > 1 and leaf.sharding.is_fully_replicated:
            sizes[trees.path_name(path)] = size
    return sizes


def divides(axis: str, mesh: AnyMesh, *sizes: int) -> str | None:
    """Returns the axis if it divides all the sizes, else None."""
    return axis if all(size % mesh.shape[axis] == 0 for size in sizes) else None


def sum_scattered(mesh: Mesh, x: jax.Array, axis: str, side: int) -> jax.Array:
    """Reduce-scatters `x` over a mesh axis, within a shard_map: this device's part, along dimension `side`, of the sum.

    On CPUs it sums everything and slices: the reduce-scatter between processes on CPUs gives wrong numbers now and
    then, see https://github.com/jax-ml/jax/issues/40830.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return jax.lax.psum_scatter(x, axis, scatter_dimension=side, tiled=True)
    size = x.shape[side] // mesh.shape[axis]
    return jax.lax.dynamic_slice_in_dim(jax.lax.psum(x, axis), jax.lax.axis_index(axis) * size, size, side)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds in full."""
    return NamedSharding(mesh, P())


def batch_shardings(mesh: AnyMesh, batch: Batch) -> Batch:
    """Returns a NamedSharding for every array of a batch, and of a batch within it.

    Rows [A, R, ...] are sharded over `replica` and `fsdp` along R; everything else is replicated.
    """

    def place(name, value):
        if isinstance(value, Batch):
            return batch_shardings(mesh, value)
        spec = P(None, ROW_AXES) if name == "rows" else P()
        return jax.tree.map(lambda _: NamedSharding(mesh, spec), value)

    return batch._replace(**{name: place(name, value) for name, value in batch._asdict().items()})


def put(batch: Batch, mesh: Mesh) -> Batch:
    """Moves a batch of host arrays onto the mesh; each process copies only the rows that its devices hold."""
    return _put(batch, batch_shardings(mesh, batch))


def put_replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies host arrays, which are the same in all processes, onto every device of the mesh."""
    return _put(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def _put(tree: PyTree, places: PyTree) -> PyTree:
    if jax.process_count() == 1:
        return jax.device_put(tree, places)

    def share(array, place: NamedSharding) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

    return jax.tree.map(share, tree, places)


def from_parts(
    shape: Sequence[int], place: NamedSharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """Creates a sharded array by reading the shards of this process's devices, each once, one at a time.

    jax.make_array_from_callback would hold the shards of all devices in host memory at once, and read a replicated
    shard once for each device.

    Args:
      read: returns the array at an index, as numpy.
    """
    parts: dict[tuple, tuple[tuple[slice, ...], list[Any]]] = {}
    for device, index in place.addressable_devices_indices_map(tuple(shape)).items():
        assert index is not None
        parts.setdefault(tuple((each.start, each.stop) for each in index), (index, []))[1].append(device)
    arrays: list[jax.Array] = []
    for index, devices in parts.values():
        numbers = read(index)
        arrays += [jax.device_put(numbers, device) for device in devices]
    return jax.make_array_from_single_device_arrays(tuple(shape), place, arrays)


def bytes_per_device(tree: PyTree, gathered: str = "") -> int:
    """Returns the bytes of a placed tree on one device, as placed or with the mesh axis `gathered` all-gathered."""

    def size(leaf) -> int:
        times = leaf.sharding.mesh.shape[gathered] if gathered and gathered in leaf.sharding.spec else 1
        return times * math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


__getattr__ = aliases.forward(
    __name__,
    {
        "path_name": "dpo_jax.trees.path_name",
        "everywhere": "dpo_jax.sharding.replicated",
        "whole_everywhere": "dpo_jax.sharding.large_replicated",
    },
)
