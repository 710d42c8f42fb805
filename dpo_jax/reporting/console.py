"""What a run says of itself: its data, its shapes, and how far it moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dpo_jax import sharding, trees
from dpo_jax.run.inputs import Inputs
from dpo_jax.run.programs import Programs
from dpo_jax.runtime import hosts
from dpo_jax.runtime.terminal import say


def describe_data(inputs: Inputs) -> None:
    """One line for each set of pairs: how many, how long, what was cut or dropped. And what may not be as meant."""
    for name, pairs in inputs.sets.items():
        longest = int((pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(1)).max())
        say(f"{name}: {len(pairs):,} pairs, {pairs.lengths.sum():,} tokens, longest {longest}; {cuts(pairs.report)}")
        if longest > inputs.model.max_positions:
            say(
                f"warning: {name} has sequences of up to {longest} tokens and the model was trained on "
                f"{inputs.model.max_positions}; lower data.max_length unless it is known to reach further"
            )
    for warning in inputs.warnings:
        say(f"warning: {warning}")


def cuts(report: Mapping[str, Any]) -> str:
    """What was cut, tokenized apart and dropped, in words."""
    dropped = "; ".join(f"{entry['rows']} rows dropped: {entry['reason']}" for entry in report["dropped"])
    apart = f"; {report['boundary_split']} pairs tokenized apart" if report["boundary_split"] else ""
    counts = f"{report['prompts_cut']} prompts and {report['answers_cut']} answers cut{apart}"
    return f"{counts}; {dropped or 'no row dropped'}"


def describe_run(programs: Programs, params: Any, frozen: Any, start: int, total: int) -> None:
    """The run's size: parameters, those that train and those that do not, mesh, shapes, steps."""
    sizes = programs.selection.counts(programs.model)
    those = f", of which {sizes[0]:,} train" if sizes[1] else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in programs.mesh.shape.items())
    shape = programs.update_shape
    cut = f", the last ones cut to {', '.join(f'{r} x {n}' for r, n in shape.crops[1:])}" if shape.crops else ""
    processes = f" of {hosts.count()} processes" if hosts.count() > 1 else ""
    held = sharding.bytes_per_device((params, frozen))
    say(
        f"model: {sum(sizes):,} parameters{those}, {programs.param_dtype}, computing in "
        f"{np.dtype(programs.dtype).name} on {mesh} {jax.devices()[0].platform}{processes}, {held:,} bytes a device"
    )
    for path, size in sharding.large_replicated(trees.join(params, frozen)).items():
        say(f"warning: {path}, {size:,} bytes, lies whole on every device; mesh.rules can cut it")
    say(
        f"steps {start} to {total} of {shape.pairs} pairs, packed into rows of {shape.row_length} positions, "
        f"{shape.rows} rows at a time{cut}; attention by {programs.attention}"
    )


def one_line(row: Mapping[str, float]) -> str:
    """The numbers of an evaluation that one looks at first."""
    shown = ("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins")
    return ", ".join(f"{name} {row[name]:.4f}" for name in shown if name in row)


def before_and_after(evaluations: Sequence[Mapping[str, float]]) -> None:
    """A table of the first and the last evaluation, if there were two."""
    if len(evaluations) < 2:
        return
    first, last = evaluations[0], evaluations[-1]
    say(f"{'':<26}{'before':>12}{'after':>12}")
    for name in first:
        if name.startswith("eval/") and name != "eval/pairs":
            say(f"{name:<26}{first[name]:>12.4f}{last[name]:>12.4f}")
