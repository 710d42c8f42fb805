"""The table of chips: what follows from its figures, and that libtpu knows its TPUs by these names and shapes."""

import math
import os

import pytest

from dpo_jax.cost import chips
from dpo_jax.types import InputError

CHIP = {chip.name: chip for chip in chips.CHIPS}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v5p", "v5p"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA B200", "b200"),
        # Other parts, whose names contain one of those above.
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA B200A", None),
        ("NVIDIA A100-SXM-64GB", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("TPU v4 lite", None),
        ("cpu", None),
        ("TPU v3", None),
    ],
)
def test_chip_is_known_by_the_kind_of_device(kind, name):
    chip = chips.chip_of(kind)
    assert (chip.name if chip else None) == name


def test_no_two_chips_share_a_name_or_a_kind():
    names, kinds = [c.name for c in chips.CHIPS], [kind for c in chips.CHIPS for kind in c.kinds]
    assert len(set(names)) == len(names) and len(set(kinds)) == len(kinds)


@pytest.mark.parametrize(
    ("kind", "flops", "gib", "hbm_bytes_per_s"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12, 40, 1555e9),
        ("NVIDIA A100 80GB PCIe", 312e12, 80, 1935e9),
        ("NVIDIA A100-PCIE-40GB", 312e12, 40, 1555e9),
        ("NVIDIA H100 80GB HBM3", 989e12, 80, 3350e9),
        ("NVIDIA H100 PCIe", 756e12, 80, 2000e9),
        ("NVIDIA H100 NVL", 835e12, 94, 3900e9),
        ("NVIDIA H200 NVL", 835e12, 141, 4800e9),
    ],
)
def test_a_part_has_the_figures_of_its_own_data_sheet(kind, flops, gib, hbm_bytes_per_s):
    chip = chips.chip_of(kind)
    assert chip is not None
    assert (chip.flops, chip.hbm_bytes, chip.hbm_bytes_per_s) == (flops, gib * chips.GIB, hbm_bytes_per_s)


@pytest.mark.parametrize("chip", chips.CHIPS, ids=lambda chip: chip.name)
def test_every_chip_names_its_source_and_has_all_its_figures(chip):
    assert chip.source and all(source.startswith("https://") for source in chip.source)
    figures = chip.flops, chip.hbm_bytes, chip.hbm_bytes_per_s, chip.link_bytes_per_s, chip.dcn_bytes_per_s
    assert min(figures) > 0
    assert chip.links == 2 * chip.dimensions or not chip.dimensions


@pytest.mark.parametrize(
    ("name", "both_ways"),
    [
        ("v5e", 400e9),
        ("v5p", 1200e9),
        ("v6e", 800e9),
        ("a100", 600e9),
        ("h100", 900e9),
        ("h100-pcie", 600e9),  # an NVLink bridge to one neighbor
        ("h100-nvl", 600e9),
        ("h200", 900e9),
        ("b200", 1.8e12),
    ],
)
def test_links_add_up_to_what_the_maker_gives_for_both_directions(name, both_ways):
    assert 2 * CHIP[name].links * CHIP[name].link_bytes_per_s == both_ways


@pytest.mark.parametrize(
    ("name", "shape", "wraps"),
    [
        ("v5p", (4, 4, 4), (True, True, True)),
        ("v5p", (2, 4, 4), (False, False, False)),  # not made of cubes
        ("v5p", (8, 8, 12), (True, True, True)),
        ("v5e", (8, 8), (False, False)),
        ("v5e", (8, 16), (False, True)),
        ("v6e", (16, 16), (True, True)),
    ],
)
def test_axes_close_in_cubes_and_across_a_pod(name, shape, wraps):
    assert CHIP[name].wraps(shape) == wraps


@pytest.mark.parametrize(
    ("name", "spans", "shape", "links"),
    [
        ("v5p", (4, 4, 4), (4, 4, 4), 6),
        ("v5p", (1, 4, 4), (4, 4, 4), 4),
        ("v5p", (1, 1, 4), (4, 4, 8), 1),  # half of a ring is a line
        ("v5p", (2, 2, 4), (2, 2, 4), 3),
        ("v5e", (16, 16), (16, 16), 4),
        ("v5e", (8, 16), (8, 16), 3),
        ("h100", (), (), 18),
    ],
)
def test_a_ring_sends_both_ways_and_a_line_one(name, spans, shape, links):
    assert CHIP[name].ring_bytes_per_s(spans, shape) == links * CHIP[name].link_bytes_per_s


def test_topology_is_a_chip_and_the_shape_of_a_slice():
    assert chips.parse_topology("v5p:4x4x8") == (CHIP["v5p"], (4, 4, 8))
    assert chips.parse_topology("v5e:16x16") == (CHIP["v5e"], (16, 16))
    assert chips.parse_topology("h100:64") == (CHIP["h100"], (64,))
    assert CHIP["h100"] == chips.chip_of("NVIDIA H100 80GB HBM3"), "the SXM part"
    assert chips.parse_topology("h100-pcie:8") == (CHIP["h100-pcie"], (8,))


@pytest.mark.parametrize(
    ("name", "shape"),
    [  # from the pages of Google Cloud on each chip
        ("v4-8", (2, 2, 1)),
        ("v4-32", (2, 2, 4)),
        ("v4-4096", (8, 16, 16)),
        ("v5litepod-1", (1, 1)),
        ("v5litepod-256", (16, 16)),
        ("v5e-16", (4, 4)),
        ("v5p-128", (4, 4, 4)),
        ("v5p-1024", (8, 8, 8)),
        ("v5p-12288", (16, 16, 24)),
        ("v6e-8", (2, 4)),
        ("v6e-64", (8, 8)),
    ],
)
def test_a_type_of_google_cloud_is_a_chip_and_a_shape(name, shape):
    chip, found = chips.parse_topology(name)
    assert found == shape and chip.name == name.partition("-")[0].replace("litepod", "e")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("v5p-100", "expected v5p-64 or v5p-128; the number counts TensorCores, two of each chip"),
        ("v5p-4", "expected v5p-8;"),
        ("v5p-99999", "expected v5p-12288;"),
        ("v5litepod-48", "expected v5litepod-32 or v5litepod-64; the number counts chips"),
        ("v5e-2", "got 'v5litepod-2', which Google Cloud does not have; expected v5litepod-1 or v5litepod-4"),
    ],
)
def test_a_type_that_google_cloud_has_not_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(InputError) as refused:
        chips.parse_topology(name)
    assert nearest in str(refused.value) and "--topology: got" in str(refused.value)


@pytest.mark.parametrize("chip", [chip for chip in chips.CHIPS if chip.dimensions], ids=lambda chip: chip.name)
def test_types_of_a_chip_are_slices_of_it_in_order(chip):
    shapes = [chips.parse_topology(f"{chip.name}:{shape}")[1] for shape in chip.cloud_shapes]
    sizes = [math.prod(shape) for shape in shapes]
    assert sizes == sorted(set(sizes)) and chip.cloud_cores == (2 if chip.dimensions == 3 else 1)
    assert not chip.options or sizes[-1] <= chip.slice_chips


@pytest.mark.parametrize(
    "name",
    ["v5p", "v5p:4x4", "v5e:4x4x4", "v5e:32x32", "v5e:0x4", "v9:4x4", "h100:8x8", "v5p:4x4xa", "v5e:3x5", "h100-8"],
)
def test_a_topology_that_is_not_built_is_an_error_that_lists_what_is(name):
    with pytest.raises(ValueError, match="v5p:XxYxZ of at most 6144 chips"):
        chips.parse_topology(name)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("name", ["v4:4x4x4", "v5e:1x1", "v5e:4x8", "v5e:16x16", "v5p:2x2x1", "v5p:8x8x8", "v6e:16x16"])
def test_libtpu_has_one_device_for_each_chip_of_a_topology(name, slices):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    topologies = pytest.importorskip("jax.experimental.topologies")
    chip, shape = chips.parse_topology(name)
    try:
        topologies.get_topology_desc("v5e:2x2", platform="tpu")
    except Exception as error:
        pytest.skip(f"no TPU compiler here: {error}")
    several = {"num_slices": slices} if slices > 1 else {}
    found = topologies.get_topology_desc(name, platform="tpu", **chip.topology_options(shape), **several).devices
    assert len(found) == slices * math.prod(shape)
    assert chips.chip_of(found[0].device_kind) == chip
    assert {tuple(device.coords[: chip.dimensions]) for device in found} >= {tuple(size - 1 for size in shape)}
