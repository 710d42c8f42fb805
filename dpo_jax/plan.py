"""What a run would take on hardware that need not be there: memory of a chip, least time of a step, days.

For TPUs the real update and the real scoring program are compiled ahead of time, by libtpu, for the topology that is
named; memory is then the compiler's own account, and what crosses chips is read from the compiled programs. For GPUs,
which nothing compiles for from afar, both are counted. Neither weights nor data are read.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jaxtyping import Int

from dpo_jax import chips, hosts, losses, programs, roofline, sharding, steps
from dpo_jax import inputs as run_inputs
from dpo_jax.chips import Chip
from dpo_jax.collectives import Collective, collectives
from dpo_jax.config import Config
from dpo_jax.data import layout
from dpo_jax.models import hf_files, hf_io
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.families import family
from dpo_jax.programs import Programs
from dpo_jax.roofline import Cost, Work
from dpo_jax.types import Encoded, InputError

DRAWN_PAIRS = 4096  # at most, that stand for the data
SPREAD = 0.7  # standard deviation of the logarithm of a length, about that of HH and of UltraFeedback
DOES_NOT_FIT = 3  # exit status
SWEPT_TENSOR, SWEPT_REMAT = (1, 2, 4, 8, 16), ("dots", "block")


class Topology(NamedTuple):
    """Some chips and how they are connected."""

    name: str  # of one slice
    chip: Chip
    shape: tuple[int, ...]  # of one slice
    slices: int

    @property
    def count(self) -> int:
        return self.slices * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.slices} x {self.name}" if self.slices > 1 else self.name


class Memory(NamedTuple):
    """Bytes on a chip while a program runs."""

    weights: int
    optimizer: int
    gradients: int  # their sums, float32
    rest: int  # activations, gathered weights, batch, program

    @property
    def total(self) -> int:
        return sum(self)


class Estimate(NamedTuple):
    """What was found for one configuration."""

    topology: Topology
    mesh: dict[str, int]
    config: Config
    shape: layout.Shape
    work: Work
    memory: dict[str, Memory]  # of the update and of the scoring program
    cost: dict[str, Cost]
    pairs_per_part: int  # that a call of the scoring program takes
    moved: dict[str, list[Collective]]
    measured: bool  # compiled, rather than counted

    @property
    def total(self) -> int:
        return max(memory.total for memory in self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.topology.chip.hbm_bytes

    def seconds(self, program: str) -> float:
        """The least time of a call."""
        return max(self.cost[program].seconds(self.topology.chip).values())


def parse_topology(text: str) -> Topology:
    """`v5p:4x4x4`, `v5e:16x16,slices=2` or, for GPUs, `h100:64`. Raises: InputError for anything else."""
    name, *options = text.split(",")
    slices = 1
    problem = ""
    for option in options:
        match = re.fullmatch(r"slices=([1-9]\d*)", option)
        problem, slices = ("", int(match[1])) if match else (f"option {option!r}", 1)
    try:
        chip, shape = chips.parse_topology(name)
    except ValueError as error:
        problem = problem or str(error)
        chip, shape = chips.CHIPS[0], ()
    if not problem and slices > 1 and not chip.dimensions:
        problem = "slices of GPUs"
    if problem:
        raise InputError(
            "--topology",
            got=f"{text!r} ({problem})",
            expected="CHIP:SHAPE, and ,slices=N for several of them",
            remedy="Give for example v5p:4x4x4, v5e:16x16,slices=2 or h100:64.",
        )
    return Topology(name, chip, shape, slices)


def architecture(config: Config) -> DecoderConfig:
    """The model's shape, from `plan.architecture` or from the folder `model.path`; never from the network.

    Raises: InputError if neither is there.
    """
    path = Path(config.plan.architecture or Path(config.model.path) / hf_files.CONFIG)
    if not path.is_file():
        raise InputError(
            "config.plan.architecture",
            got=f"no file {path}",
            expected="the model's config.json",
            remedy="Name it, or a local folder as model.path.",
        )
    hf = hf_files.read_json(path)
    return family(hf, str(path)).decoder_config(hf, str(path))


def drawn_lengths(config: Config) -> Int[np.ndarray, "N 3"]:
    """Token counts of pairs such as the data's: spread about the medians of `plan`, cut as `data` says.

    One pair is as long as the limits allow, for one such pair decides how long rows are.
    """
    count = min(config.plan.pairs, DRAWN_PAIRS)
    medians = np.array([config.plan.prompt_tokens, config.plan.answer_tokens, config.plan.answer_tokens])
    drawn = np.exp(np.random.default_rng(0).normal(np.log(medians), SPREAD, (count, 3))).astype(np.int64)
    data = config.data
    drawn[0] = data.max_length
    prompt = np.clip(drawn[:, 0], 1, data.max_prompt_length)
    answers = np.clip(drawn[:, 1:], 1, data.max_length - prompt[:, None])
    return np.concatenate([prompt[:, None], answers], 1)


def devices_of(topology: Topology) -> Sequence[Any]:
    """The devices of a TPU topology, to compile for. Raises: InputError if libtpu is not there or knows no such."""
    options = dict(topology.chip.options) | ({"num_slices": topology.slices} if topology.slices > 1 else {})
    try:
        return topologies.get_topology_desc(topology.name, platform="tpu", **options).devices
    except Exception as error:  # of several types, by what is missing
        raise InputError(
            "--topology",
            got=f"libtpu cannot compile for {topology} ({' '.join(str(error).split())[:300]})",
            expected="libtpu, and a topology it knows",
            remedy="Run pip install 'dpo-jax[plan]'.",
        ) from error


def estimate(config: Config, topology: Topology, *, reference_in_step: bool = False) -> Estimate:
    """Compiles or counts a configuration on a topology.

    Args:
      reference_in_step: score the reference within the update and hold its weights, as other trainers do; to compare.
    Raises: InputError for a mesh or shapes that do not fit the topology.
    """
    model, lengths = architecture(config), drawn_lengths(config)
    if topology.chip.dimensions:
        built = programs.make_programs(config, model, lengths, devices=devices_of(topology))
        return compiled(config, topology, built, lengths, reference_in_step)
    return counted(config, topology, model, lengths, reference_in_step)
