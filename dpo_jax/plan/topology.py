"""Topologies to plan for: slices of TPUs and hosts of GPUs, by the names that users give."""

from __future__ import annotations

import importlib.util
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
    """Parses `v5p:4x4x4`, `v5p-128`, `v5e:16x16,slices=2` or, for GPUs, `h100:64`.

    Raises: InputError for anything else, as `chips.parse_topology`.
    """
    name, *options = text.split(",")
    chip, shape = chips.parse_topology(name)
    slices = 1
    for option in options:
        match = re.fullmatch(r"slices=([1-9]\d*)", option)
        if not match:
            raise InputError(
                "--topology",
                got=f"got {text!r} with the option {option!r}",
                expected="at most ,slices=N, for several slices of TPUs",
                remedy="Give for example --topology=v5e:16x16,slices=2.",
            )
        slices = int(match[1])
    return Topology(f"{chip.name}:{'x'.join(map(str, shape))}", chip, shape, slices)


def devices_of(topology: Topology) -> Sequence[Any]:
    """Returns devices of a TPU topology to compile for. Raises: InputError if libtpu is missing or refuses it."""
    options = topology.chip.topology_options(topology.shape)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "--topology",
            got=f"{topology}, and libtpu is not installed",
            expected="libtpu, which compiles for TPUs on any machine",
            remedy="Run pip install 'dpo-jax[plan]'.",
        )
    hosts.without_tpu()
    try:
        return topologies.get_topology_desc(topology.name, platform="tpu", **options).devices
    except Exception as error:  # of several types, by what is missing
        raise InputError(
            "--topology",
            got=f"libtpu cannot compile for {topology}; it says {' '.join(str(error).split())[:300]!r}",
            expected="a topology that the installed libtpu knows",
            remedy="Name another, or update libtpu.",
        ) from error


def extents(coordinates: Sequence[Sequence[int]], topology: Topology) -> list[int]:
    """Counts, along each dimension of the torus, the distinct coordinates of some chips."""
    return [len(set(values)) for values in zip(*coordinates, strict=True)][: topology.chip.dimensions]
