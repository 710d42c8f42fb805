"""Peak rates of accelerator chips from their makers' public pages, for shares of peak and for plans.

A chip is one JAX device. Rates of links are of one direction: a chip can send that much while it receives as much.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from dpo_jax.types import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPU, or one part of GPU.

    TPUs of a slice form a torus with two links for each dimension. GPUs of a board are joined by NVLink switches. GPUs
    that are PCIe cards are joined by NVLink bridges in groups, and to all others by PCIe and the network.
    """

    name: str  # as in topologies of libtpu: `v5p` in `v5p:4x4x4`
    kinds: tuple[str, ...]  # each `device_kind` that JAX reports for it, in full
    flops: float  # dense bfloat16 operations a second
    hbm_bytes: int  # usable by a program: for TPUs as libtpu 0.0.52 reports it, for GPUs as in the data sheet
    hbm_bytes_per_s: float
    link_bytes_per_s: float  # of one ICI or NVLink link, one way
    links: int  # ICI or NVLink links of a chip: twice the dimensions of the torus, or all to the switch or the bridge
    chips_per_host: int  # chips of a TPU host, or GPUs that NVLink joins: 8 of a board, 2 or 4 of bridged cards
    dcn_bytes_per_s: float  # of all network adapters of these chips, one way
    source: tuple[str, ...]
    dimensions: int = 0  # of the torus; 0: a switch or a bridge
    wrap: int = 0  # the multiple that an axis' size must be to form a ring, see `wraps`
    slice_chips: int = 0  # chips of the largest slice; 0: no slices
    options: tuple[tuple[str, str], ...] = ()  # further ones for `get_topology_desc`
    cloud: str = ""  # first part of the types that Google Cloud rents, `v5litepod` in `v5litepod-16`
    cloud_cores: int = 1  # what the number in a type counts of a chip: 2 where it counts TensorCores
    cloud_shapes: tuple[str, ...] = ()  # of the types, as the page in `source` lists them; the smallest first

    def wraps(self, shape: Sequence[int]) -> tuple[bool, ...]:
        """Returns, for each axis of a slice, whether its links close to a ring; otherwise it is a line.

        Three-dimensional slices made of whole 4x4x4 cubes have rings in all dimensions. In two-dimensional ones, an
        axis as long as the pod is a ring.
        """
        closed = [size % self.wrap == 0 for size in shape]
        return tuple(closed if self.dimensions == 2 else [all(closed)] * len(closed))

    def ring_bytes_per_s(self, spans: Sequence[int] = (), shape: Sequence[int] = ()) -> float:
        """Returns the rate at which a chip sends in a collective, with all dimensions in use at once.

        Around a ring a chip sends both ways. The ends of a line, or of a part of a ring, send one way only, and all
        others wait for them. A GPU sends on all its links.

        Args:
          spans: chips of the collective's group along each dimension.
          shape: chips of the slice along each dimension.
        """
        if not self.dimensions:
            return self.links * self.link_bytes_per_s
        rings = [closed and span == size for closed, span, size in zip(self.wraps(shape), spans, shape, strict=True)]
        return self.link_bytes_per_s * sum(1 + ring for ring, span in zip(rings, spans, strict=True) if span > 1)

    def topology_options(self, shape: Sequence[int]) -> dict[str, object]:
        """Returns the keywords of `get_topology_desc` for a TPU slice: one device for each chip, and its links.

        By default libtpu compiles for a slice without rings, and therefore with other collectives.
        """
        wrap = (*self.wraps(shape), False)[:3]
        bounds = (min(2, shape[0]), min(2, shape[1]), 1)  # chips of a host: 2x2x1, or fewer in a smaller slice
        return {"wrap": wrap, "chips_per_host_bounds": bounds, **dict(self.options)}


CLOUD = "https://docs.cloud.google.com/tpu/docs/"
DGX = "https://docs.nvidia.com/dgx/"
NVIDIA = "https://www.nvidia.com/en-us/data-center/"
HOPPER = "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper"
# Servers of eight PCIe cards, NVIDIA's "2-8-5": one network adapter for two cards.
CARDS = "https://docs.nvidia.com/ai-enterprise/reference-architecture/latest/compute-node-hardware.html"

SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SHAPES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

# Google's pages give the ICI of a chip in both directions together: 1200 GB/s of v5p are 6 links of 100 GB/s each way.
# NVIDIA's pages give sparse rates and NVLink in both directions: halved here. An NVLink bridge of 600 GB/s is 12 links
# of 25 GB/s each way, all to one neighbor.
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
        options=(("chip_config_name", "megacore"),),  # otherwise each of its two cores is a device
        cloud="v4",
        cloud_cores=2,
        cloud_shapes=SHAPES_3D,
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
        cloud="v5litepod",
        cloud_shapes=SHAPES_2D,
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
        cloud="v5p",
        cloud_cores=2,
        cloud_shapes=(*SHAPES_3D, "16x16x16", "16x16x24"),
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
        cloud="v6e",
        cloud_shapes=SHAPES_2D,
    ),
    Chip(
        name="a100",
        kinds=("NVIDIA A100-SXM4-80GB",),
        flops=312e12,
        hbm_bytes=80 * GIB,
        hbm_bytes_per_s=2039e9,
        link_bytes_per_s=25e9,
        links=12,
        chips_per_host=8,
        dcn_bytes_per_s=200e9,  # 8 x 200 Gbps
        source=(NVIDIA + "a100/", DGX + "dgxa100-user-guide/"),
    ),
    Chip(
        name="a100-40gb",
        kinds=("NVIDIA A100-SXM4-40GB",),
        flops=312e12,
        hbm_bytes=40 * GIB,
        hbm_bytes_per_s=1555e9,
        link_bytes_per_s=25e9,
        links=12,
        chips_per_host=8,
        dcn_bytes_per_s=200e9,  # 8 x 200 Gbps
        source=(NVIDIA + "a100/", DGX + "dgxa100-user-guide/"),
    ),
    Chip(
        name="a100-pcie",
        kinds=("NVIDIA A100 80GB PCIe",),
        flops=312e12,
        hbm_bytes=80 * GIB,
        hbm_bytes_per_s=1935e9,
        link_bytes_per_s=25e9,
        links=12,
        chips_per_host=2,
        dcn_bytes_per_s=25e9,  # 200 Gbps
        source=(NVIDIA + "a100/", CARDS),
    ),
    Chip(
        name="a100-pcie-40gb",
        kinds=("NVIDIA A100-PCIE-40GB",),
        flops=312e12,
        hbm_bytes=40 * GIB,
        hbm_bytes_per_s=1555e9,
        link_bytes_per_s=25e9,
        links=12,
        chips_per_host=2,
        dcn_bytes_per_s=25e9,  # 200 Gbps
        source=(NVIDIA + "a100/", CARDS),
    ),
    Chip(
        name="h100",
        kinds=("NVIDIA H100 80GB HBM3",),
        flops=989e12,
        hbm_bytes=80 * GIB,
        hbm_bytes_per_s=3350e9,
        link_bytes_per_s=25e9,
        links=18,
        chips_per_host=8,
        dcn_bytes_per_s=400e9,  # 8 x 400 Gbps
        source=(NVIDIA + "h100/", DGX + "dgxh100-user-guide/"),
    ),
    Chip(
        name="h100-pcie",
        kinds=("NVIDIA H100 PCIe",),
        flops=756e12,
        hbm_bytes=80 * GIB,
        hbm_bytes_per_s=2000e9,
        link_bytes_per_s=25e9,
        links=12,
        chips_per_host=2,
        dcn_bytes_per_s=50e9,  # 400 Gbps
        source=(NVIDIA + "h100/", HOPPER, CARDS),
    ),
    Chip(
        name="h100-nvl",
        kinds=("NVIDIA H100 NVL",),
        flops=835e12,
        hbm_bytes=94 * GIB,
        hbm_bytes_per_s=3900e9,
        link_bytes_per_s=25e9,
        links=12,
        chips_per_host=2,
        dcn_bytes_per_s=50e9,  # 400 Gbps
        source=(NVIDIA + "h100/", CARDS),
    ),
    Chip(
        name="h200",
        kinds=("NVIDIA H200",),
        flops=989e12,
        hbm_bytes=141 * GIB,
        hbm_bytes_per_s=4800e9,
        link_bytes_per_s=25e9,
        links=18,
        chips_per_host=8,
        dcn_bytes_per_s=400e9,  # 8 x 400 Gbps
        source=(NVIDIA + "h200/", DGX + "dgxh100-user-guide/"),
    ),
    Chip(
        name="h200-nvl",
        kinds=("NVIDIA H200 NVL",),
        flops=835e12,
        hbm_bytes=141 * GIB,
        hbm_bytes_per_s=4800e9,
        link_bytes_per_s=25e9,
        links=18,
        chips_per_host=4,
        dcn_bytes_per_s=100e9,  # 2 x 400 Gbps
        source=(NVIDIA + "h200/", CARDS),
    ),
    Chip(
        name="b200",
        kinds=("NVIDIA B200",),
        flops=2250e12,
        hbm_bytes=180 * GIB,
        hbm_bytes_per_s=8000e9,
        link_bytes_per_s=50e9,
        links=18,
        chips_per_host=8,
        dcn_bytes_per_s=400e9,  # 8 x 400 Gbps
        source=(NVIDIA + "dgx-b200/", DGX + "dgxb200-user-guide/"),
    ),
)


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip of a JAX `device_kind`; None where the table does not list exactly this kind.

    Names of other parts are too alike to guess: GH200 contains H200, and a share of an A100 (MIG) starts as an A100.
    """
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Parses the chip and the shape of one TPU slice, such as `v5p:4x4x4`, or a number of GPUs, such as `h100:64`.

    A slice may also be named by its type on Google Cloud, such as `v5p-128` or `v5litepod-256`. Stricter than libtpu,
    which accepts shapes that do not exist, such as `v5e:4x4x4`.

    Raises: InputError for an unknown chip, a shape that its torus cannot have, or a type that Google Cloud has not.
    """
    generation, separator, text = name.partition(":")
    if not separator and (match := re.fullmatch(r"(\w+)-(\d+)", name)):
        for chip in CHIPS:
            if match[1] in (chip.cloud, chip.name) and chip.cloud:
                return chip, _cloud_shape(chip, int(match[2]))
    chip = next((chip for chip in CHIPS if chip.name == generation), None)
    sizes = text.split("x")
    if chip is not None and len(sizes) == max(1, chip.dimensions) and all(n.isdecimal() and int(n) for n in sizes):
        shape = tuple(map(int, sizes))
        whole = not chip.dimensions or all(size == 1 or size % 2 == 0 for size in shape[:2])  # hosts of 2 x 2 chips
        if whole and (not chip.slice_chips or math.prod(shape) <= chip.slice_chips):
            return chip, shape
    raise InputError(
        "--topology",
        got=f"got {name!r}",
        expected=f"a type of Google Cloud such as v5p-128, v5litepod-256 or v6e-64, or one of {valid_topologies()}",
        remedy="Give for example --topology=v5p:4x4x4, --topology=v5e:16x16,slices=2 or --topology=h100:64.",
    )


def _cloud_shape(chip: Chip, number: int) -> tuple[int, ...]:
    """Returns the shape of a type of Google Cloud. Raises: InputError that names the nearest if there is none."""
    shapes = [tuple(map(int, shape.split("x"))) for shape in chip.cloud_shapes]
    numbers = [math.prod(shape) * chip.cloud_cores for shape in shapes]
    if number in numbers:
        return shapes[numbers.index(number)]
    below, above = [n for n in numbers if n < number][-1:], [n for n in numbers if n > number][:1]
    counted = "TensorCores, two of each chip" if chip.cloud_cores == 2 else "chips"
    raise InputError(
        "--topology",
        got=f"got '{chip.cloud}-{number}', which Google Cloud does not have",
        expected=" or ".join(f"{chip.cloud}-{n}" for n in below + above) + f"; the number counts {counted}",
        remedy=f"Name one of these, or a shape such as {chip.name}:{chip.cloud_shapes[4]}.",
    )


def valid_topologies() -> str:
    """Returns the shapes that `parse_topology` reads, for messages."""
    return ", ".join(
        f"{chip.name}:{'x'.join('XYZ'[: chip.dimensions])} of at most {chip.slice_chips} chips"
        if chip.dimensions
        else f"{chip.name}:N"
        for chip in CHIPS
    )
