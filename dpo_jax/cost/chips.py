"""What an accelerator chip can do at most: one table, from makers' public pages, for shares of peak and for plans.

A chip is one JAX device here. Rates are of one direction: what a chip can send while it receives as much.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation. TPUs lie in a torus, two links to a dimension; GPUs of a host hang on a switch."""

    name: str  # as in topologies of libtpu: `v5p` in `v5p:4x4x4`
    kinds: tuple[str, ...]  # parts of a `device_kind` that mean it
    flops: float  # dense bfloat16 operations a second
    hbm_bytes: int  # that a program can use: of TPUs what libtpu 0.0.52 itself says, of GPUs the data sheet's
    hbm_bytes_per_s: float
    link_bytes_per_s: float  # of one ICI or NVLink link, one way
    links: int  # of a chip: twice the dimensions of the torus, or all to the switch
    chips_per_host: int
    dcn_bytes_per_s: float  # of a host, one way: all its network cards
    source: tuple[str, ...]
    dimensions: int = 0  # of the torus; 0: a switch
    wrap: int = 0  # what an axis must be a multiple of to close, see `wraps`
    slice_chips: int = 0  # the most that one slice has
    options: tuple[tuple[str, Any], ...] = ()  # that `get_topology_desc` needs besides

    def wraps(self, shape: Sequence[int]) -> tuple[bool, ...]:
        """Which axes of a slice close to rings; the others are lines.

        Slices of whole cubes, 4x4x4, close in three dimensions; where there are two, an axis as long as the pod does.
        """
        closed = [size % self.wrap == 0 for size in shape]
        return tuple(closed if self.dimensions == 2 else [all(closed)] * len(closed))

    def ring_bytes_per_s(self, spans: Sequence[int] = (), shape: Sequence[int] = ()) -> float:
        """What a chip sends at most in a collective of a group of `spans` chips a dimension, in a slice of `shape`.

        All dimensions are used at once. Round a closed axis a chip sends both ways; of a line or of a part of an axis
        the ends send one way, and all others wait for them. A GPU sends on all its links.
        """
        if not self.dimensions:
            return self.links * self.link_bytes_per_s
        rings = [closed and span == size for closed, span, size in zip(self.wraps(shape), spans, shape, strict=True)]
        return self.link_bytes_per_s * sum(1 + ring for ring, span in zip(rings, spans, strict=True) if span > 1)

    def topology_options(self, shape: Sequence[int]) -> dict[str, Any]:
        """Of TPUs, keywords of `get_topology_desc` for a slice: one device a chip, and the links that it has.

        Left to itself, libtpu compiles for a slice without closed axes, and so with other collectives.
        """
        wrap = (*self.wraps(shape), False)[:3]
        bounds = (min(2, shape[0]), min(2, shape[1]), 1)  # chips of a host: 2x2x1, but for a single chip
        return {"wrap": wrap, "chips_per_host_bounds": bounds, **dict(self.options)}


CLOUD = "https://docs.cloud.google.com/tpu/docs/"
DGX = "https://docs.nvidia.com/dgx/"

# Pages give ICI of a chip in both directions together: 1200 GB/s of v5p are 6 links of 100 GB/s each way. GPUs are of
# the SXM boards in the maker's 8-GPU system, whose pages give sparse rates and NVLink both ways: halved here.
CHIPS = (
    Chip(
        name="v4",
        kinds=("TPU v4",),
        flops=275e12,
        hbm_bytes=int(30.75 * GIB),  # of 32
        hbm_bytes_per_s=1200e9,
        link_bytes_per_s=50e9,
        links=6,
        chips_per_host=4,
        dcn_bytes_per_s=25e9,
        source=(
            CLOUD + "v4",
            "https://arxiv.org/abs/2304.01433 (Jouppi et al. 2023, table 4: links)",
            "https://jax-ml.github.io/scaling-book/tpus (DCN; Google's page gives none)",
        ),
        dimensions=3,
        wrap=4,
        slice_chips=4096,
        options=(("chip_config_name", "megacore"),),  # or else each of its two cores is a device
    ),
    Chip(
        name="v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        flops=197e12,
        hbm_bytes=int(15.75 * GIB),  # of 16
        hbm_bytes_per_s=819e9,
        link_bytes_per_s=50e9,
        links=4,
        chips_per_host=8,
        dcn_bytes_per_s=25e9,  # 2 x 100 Gbps
        source=(CLOUD + "v5e",),
        dimensions=2,
        wrap=16,
        slice_chips=256,
    ),
    Chip(
        name="v5p",
        kinds=("TPU v5p", "TPU v5"),
        flops=459e12,
        hbm_bytes=int(95.73 * GIB),  # of 96
        hbm_bytes_per_s=2765e9,
        link_bytes_per_s=100e9,
        links=6,
        chips_per_host=4,
        dcn_bytes_per_s=25e9,  # 50 Gbps a chip
        source=(CLOUD + "v5p",),
        dimensions=3,
        wrap=4,
        slice_chips=6144,
    ),
    Chip(
        name="v6e",
        kinds=("TPU v6 lite", "TPU v6e"),
        flops=918e12,
        hbm_bytes=int(31.24 * GIB),  # of 32
        hbm_bytes_per_s=1638e9,
        link_bytes_per_s=100e9,
        links=4,
        chips_per_host=8,
        dcn_bytes_per_s=100e9,  # 4 x 200 Gbps
        source=(CLOUD + "v6e",),
        dimensions=2,
        wrap=16,
        slice_chips=256,
    ),
    Chip(
        name="a100",
        kinds=("A100",),
        flops=312e12,
        hbm_bytes=80 * GIB,
        hbm_bytes_per_s=2039e9,
        link_bytes_per_s=25e9,
        links=12,
        chips_per_host=8,
        dcn_bytes_per_s=200e9,  # 8 x 200 Gbps
        source=("https://www.nvidia.com/en-us/data-center/a100/", DGX + "dgxa100-user-guide/"),
    ),
    Chip(
        name="h100",
        kinds=("H100",),
        flops=989e12,
        hbm_bytes=80 * GIB,
        hbm_bytes_per_s=3350e9,
        link_bytes_per_s=25e9,
        links=18,
        chips_per_host=8,
        dcn_bytes_per_s=400e9,  # 8 x 400 Gbps
        source=("https://www.nvidia.com/en-us/data-center/h100/", DGX + "dgxh100-user-guide/"),
    ),
    Chip(
        name="h200",
        kinds=("H200",),
        flops=989e12,
        hbm_bytes=141 * GIB,
        hbm_bytes_per_s=4800e9,
        link_bytes_per_s=25e9,
        links=18,
        chips_per_host=8,
        dcn_bytes_per_s=400e9,  # 8 x 400 Gbps
        source=("https://www.nvidia.com/en-us/data-center/h200/", DGX + "dgxh100-user-guide/"),
    ),
    Chip(
        name="b200",
        kinds=("B200",),
        flops=2250e12,
        hbm_bytes=180 * GIB,
        hbm_bytes_per_s=8000e9,
        link_bytes_per_s=50e9,
        links=18,
        chips_per_host=8,
        dcn_bytes_per_s=400e9,  # 8 x 400 Gbps
        source=("https://www.nvidia.com/en-us/data-center/dgx-b200/", DGX + "dgxb200-user-guide/"),
    ),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None where it is not in the table."""
    return next((chip for chip in CHIPS if any(kind in device_kind for kind in chip.kinds)), None)


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the shape of one slice, such as `v5p:4x4x4`, as libtpu names it; GPUs are counted, as in `h100:64`.

    libtpu itself takes shapes that are not built, such as `v5e:4x4x4`.

    Raises: ValueError for an unknown chip, or a shape that its torus does not have.
    """
    generation, _, text = name.partition(":")
    chip = next((chip for chip in CHIPS if chip.name == generation), None)
    sizes = text.split("x")
    if chip is not None and len(sizes) == max(1, chip.dimensions) and all(n.isdecimal() and int(n) for n in sizes):
        shape = tuple(map(int, sizes))
        if not chip.slice_chips or math.prod(shape) <= chip.slice_chips:
            return chip, shape
    known = ", ".join(
        f"{c.name}:{'x'.join('XYZ'[: c.dimensions])} of at most {c.slice_chips} chips"
        if c.dimensions
        else f"{c.name}:N"
        for c in CHIPS
    )
    raise ValueError(f"topology: got {name!r}; expected {known}. Name one of these, such as v5p:4x4x4.")
