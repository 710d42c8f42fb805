"""Topologies to plan for: slices of TPUs and hosts of GPUs, by the names that users give."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.experimental import topologies

from dpo_jax.cost import chips
from dpo_jax.cost.chips import Chip
from dpo_jax.runtime import hosts
from dpo_jax.types import InputError


class Topology(NamedTuple):
    """Chips and how they are connected: one slice or several, or GPUs on switches."""

    name: str  # of one slice
    chip: Chip
    shape: tuple[int, ...]  # of one slice
    slices: int

    @property
    def count(self) -> int:
        return self.slices * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.slices} x {self.name}" if self.slices > 1 else self.name


def parse_topology(text: str) -> Topology:
    """Parses `v5p:4x4x4`, `v5e:16x16,slices=2` or, for GPUs, `h100:64`. Raises: InputError for anything else."""
    name, *options = text.split(",")
    slices = 1
    problem = ""
    for option in options:
        match = re.fullmatch(r"slices=([1-9]\d*)", option)
        problem, slices = ("", int(match[1])) if match else (f" with the option {option!r}", 1)
    try:
        chip, shape = chips.parse_topology(name)
    except ValueError:
        chip, shape = None, ()
    if problem or chip is None:
        raise InputError(
            "--topology",
            got=f"{text!r}{problem}",
            expected=f"CHIP:SHAPE, and ,slices=N for several slices of TPUs; CHIP:SHAPE is {chips.valid_topologies()}",
            remedy="Give for example --topology=v5p:4x4x4, --topology=v5e:16x16,slices=2 or --topology=h100:64.",
        )
    return Topology(name, chip, shape, slices)


def devices_of(topology: Topology) -> Sequence[Any]:
    """Returns devices of a TPU topology to compile for. Raises: InputError if libtpu is missing or refuses it."""
    options = topology.chip.topology_options(topology.shape)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    hosts.without_tpu()
    try:
        return topologies.get_topology_desc(topology.name, platform="tpu", **options).devices
    except Exception as error:  # of several types, by what is missing
        raise InputError(
            "--topology",
            got=f"libtpu cannot compile for {topology} ({' '.join(str(error).split())[:300]})",
            expected="libtpu, and a topology it knows",
            remedy="Name another; if libtpu is missing, run pip install 'dpo-jax[plan]'.",
        ) from error


def extents(coordinates: Sequence[Sequence[int]], topology: Topology) -> list[int]:
    """Counts, along each dimension of the torus, the distinct coordinates of some chips."""
    return [len(set(values)) for values in zip(*coordinates, strict=True)][: topology.chip.dimensions]
