"""Text of the command `plan`: memory, time and cost of a run on hardware that may be absent.

Neither weights nor data are read, and no device is touched. `estimate` computes the numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax

from dpo_jax.config import Config
from dpo_jax.cost.chips import Chip
from dpo_jax.plan.estimate import (
    Estimate,
    Memory,
    architecture,
    drawn_lengths,
    estimate,
    updates,
)
from dpo_jax.plan.topology import Topology, parse_topology
from dpo_jax.run import checks
from dpo_jax.run.choices import objective_of
from dpo_jax.run.programs import without_devices
from dpo_jax.runtime.quantities import duration, size
from dpo_jax.runtime.terminal import say
from dpo_jax.types import InputError, counted

DOES_NOT_FIT = 3  # exit status
SWEPT_TENSOR, SWEPT_REMAT = (1, 2, 4, 8, 16), ("dots", "block")


def show(plan: Estimate, *, beside: Estimate | None = None) -> list[str]:
    """Returns the lines of an estimate without the verdict; `beside` adds a column with the reference in the update."""
    chip, update = plan.topology.chip, plan.parts["update"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    training = "" if plan.training == plan.parameters else f", of which {plan.training:,} train"
    columns = dict(plan.parts) | ({"update with reference": beside.parts["update"]} if beside else {})
    lines = [
        f"{plan.topology}: {plan.topology.count} chips of {gib(chip.hbm_bytes)}, {mesh}; attention by "
        f"{plan.attention}, remat {plan.config.model.remat}",
        f"parameters: {plan.parameters:,} in {plan.config.model.param_dtype}{training}",
        f"an update: {update.shape.pairs} pairs, in {update.work.microbatches:.1f} microbatches of {update.shape.rows} "
        f"rows of {update.shape.row_length} positions, {update.work.tokens / update.work.positions:.0%} of them real",
        "",
        row("a chip holds", list(columns)),
    ]
    for name in (*Memory._fields, "total"):
        title = "activations and the rest" if name == "rest" else name
        lines.append(row(f"  {title}", [gib(getattr(part.memory, name)) for part in columns.values()]))
    lines += ["", row("a chip does, in a call", list(columns))]
    costs = [part.cost for part in columns.values()]
    lines.append(row("  FLOPs", [f"{cost.flops:.3g}" for cost in costs]))
    for title, field in {"HBM": "hbm_bytes", network(chip): "ici_bytes", "DCN": "dcn_bytes"}.items():
        lines.append(row(f"  bytes over {title}", [size(getattr(cost, field)) for cost in costs]))
    for resource in costs[0].seconds(chip):
        lines.append(row(f"  seconds of {resource}", [f"{cost.seconds(chip)[resource]:.3f}" for cost in costs]))
    bound = max(plan.seconds("update"), key=lambda name: plan.seconds("update")[name])
    return lines + [
        "",
        f"at best, a step takes {max(plan.seconds('update').values()):.3f} s, bound by {bound}: "
        f"{plan.pairs_per_s('update'):.1f} pairs/s, MFU {plan.mfu:.0%}",
        f"at best, {plan.config.plan.pairs:,} pairs take {updates(plan.config):,} updates and a reference pass: "
        f"{duration(plan.run_seconds)}, {plan.run_seconds / 3600 * plan.topology.count:,.1f} chip-hours",
    ]


def row(title: str, cells: Sequence[str]) -> str:
    """Returns a line of the table."""
    return f"{title:<28}" + "".join(f"{cell:>24}" for cell in cells)


def gib(count: float) -> str:
    """Returns a number of bytes in GiB, for columns that are compared."""
    return f"{count / 2**30:.2f} GiB"


def network(chip: Chip) -> str:
    return "ICI" if chip.dimensions else "NVLink"


def verdict(plan: Estimate) -> str:
    """Returns the last line of a plan: whether the configuration fits, and if not, what to change."""
    need = f"{gib(plan.bytes)} of {gib(plan.topology.chip.hbm_bytes)} a chip"
    return f"fits: {need}" if plan.fits else f"does not fit: {need}; {advice(plan)}"


def advice(plan: Estimate) -> str:
    """Returns the settings to change if memory does not suffice."""
    part = max(plan.parts.values(), key=lambda part: part.memory.total)
    memory, model = part.memory, plan.config.model
    lasting = memory.weights + memory.optimizer + memory.gradients
    if lasting > plan.topology.chip.hbm_bytes / 2 and lasting > memory.rest:
        whole = plan.mesh["replica"] > plan.topology.slices
        knobs = ["mesh.fsdp up and mesh.replica down"] if whole else ["more chips"]
        return f"weights, optimizer and gradients take {gib(lasting)}: " + " or ".join(
            knobs + (["model.param_dtype=bfloat16"] if model.param_dtype == "float32" else [])
        )
    knobs = []
    if part.shape.rows > part.shape.shards:
        field = "train" if part is plan.parts["update"] else "reference"
        knobs.append(f"{field}.microbatch_rows={max(part.shape.shards, part.shape.rows // 2)}")
    if model.remat in ("none", "dots"):
        knobs.append("model.remat=block")
    knobs.append(f"mesh.tensor={2 * plan.mesh['tensor']}")
    if plan.config.data.row_length is None:
        knobs.append("a shorter data.max_length")
    return f"activations and the rest take {gib(memory.rest)}: " + " or ".join(knobs)


def swept(config: Config, topology: Topology) -> Iterator[Config]:
    """Yields the configuration on other meshes, with other remat policies and microbatches, where the model allows."""
    model = architecture(config)
    for tensor, remat in itertools.product(SWEPT_TENSOR, SWEPT_REMAT):
        if topology.count % (topology.slices * tensor) or model.kv_heads % tensor:
            continue
        mesh = dataclasses.replace(config.mesh, replica=topology.slices, fsdp=-1, tensor=tensor)
        shards = topology.count // tensor
        for rows in (None, shards):
            yield dataclasses.replace(
                config,
                mesh=mesh,
                model=dataclasses.replace(config.model, remat=remat),
                train=dataclasses.replace(config.train, microbatch_rows=rows),
            )


def sweep(config: Config, topology: Topology, report: Callable[[str], None]) -> list[Estimate]:
    """Estimates all that `swept` yields and returns those that fit, the fastest first, then the others."""
    estimates: list[Estimate] = []
    seen: set[tuple] = set()
    for each in swept(config, topology):
        try:
            kind = without_compiling(each, topology)
            if kind not in seen:
                seen.add(kind)
                estimates.append(estimate(each, topology))
                report(line_of(estimates[-1]))
        except InputError as error:
            report(f"left out: {error}")
    return sorted(estimates, key=lambda each: (not each.fits, each.run_seconds))


def without_compiling(config: Config, topology: Topology) -> tuple:
    """Returns mesh, shape and remat policy, by which a sweep skips a program that it has seen."""
    platform = "tpu" if topology.chip.dimensions else "gpu"
    lengths = drawn_lengths(config)
    model, objective = architecture(config), objective_of(config.loss)
    programs = without_devices(config, objective, model, lengths, topology.count, platform=platform)
    return tuple(programs.mesh.shape.values()), programs.update_shape, config.model.remat


def line_of(plan: Estimate) -> str:
    """Returns the line of one estimate of a sweep."""
    update = plan.parts["update"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    return (
        f"{mesh}, remat {plan.config.model.remat}, microbatches of {update.shape.rows} x {update.shape.row_length}: "
        f"{gib(plan.bytes)} a chip, {plan.pairs_per_s('update'):.1f} pairs/s at best, MFU {plan.mfu:.0%}"
        f"{'' if plan.fits else ', does not fit'}"
    )


def run_plan(config: Config, topology: str, *, sweeping: bool = False, reference_in_step: bool = False) -> int:
    """Prints a plan, or a sweep; returns the exit status: 0 if the configuration, or any of the sweep, fits.

    Raises: InputError if the configuration or the topology is invalid.
    """
    checks.check_names(config, objective_of(config.loss))
    target = parse_topology(topology)
    model = config.plan.architecture or config.model.path
    say(f"planning {model} on {target}, {counted(target.count, 'chips')}")
    jax.config.update("jax_platforms", "cpu")  # leaves the accelerators of this machine free
    jax.config.update("jax_enable_compilation_cache", False)  # cannot load programs for absent devices
    if sweeping:
        ranked = sweep(config, target, say)
        print(*(f"{place}. {line_of(each)}" for place, each in enumerate(ranked, 1)), sep="\n")
        if not ranked:
            raise InputError(
                "--sweep", got="no mesh that is valid", expected="at least one", remedy="Change --topology."
            )
        plan = ranked[0]
    else:
        plan = estimate(config, target)
        beside = estimate(config, target, reference_in_step=True) if reference_in_step else None
        print(*show(plan, beside=beside), sep="\n")
    print(verdict(plan))
    return 0 if plan.fits else DOES_NOT_FIT
