"""Lines that a run prints about its data, its size and its evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from dpo_jax import sharding, trees
from dpo_jax.data.dataset import PairSet
from dpo_jax.run.inputs import Inputs
from dpo_jax.run.programs import Programs
from dpo_jax.runtime import hosts
from dpo_jax.runtime.quantities import size
from dpo_jax.runtime.terminal import say
from dpo_jax.types import counted


def describe_data(inputs: Inputs) -> None:
    """Prints a line for each set of pairs (counts, lengths, truncated and dropped rows), and warnings."""
    for name, pairs in inputs.sets.items():
        longest = int((pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(1)).max())
        counts = f"{len(pairs):,} pairs, {pairs.lengths.sum():,} tokens, longest {longest}"
        partly = f", {pairs.scored.sum():,} of them scored" if pairs.report["partly_scored"] else ""
        say(f"{name}: {counts}{partly}; {truncation(pairs.report)}")
        for line in weights_and_margins(pairs):
            say(f"{name}: {line}")
        if longest > inputs.model.max_positions:
            say(
                f"warning: {name} has sequences of up to {longest} tokens and the model was trained on "
                f"{inputs.model.max_positions}; lower data.max_length unless the model is known to handle more"
            )
    for warning in inputs.warnings:
        say(f"warning: {warning}")


def describe_warmup(warmup_steps: int, total: int) -> None:
    """Warns of a warm-up that ends with the run or after it, so that no update has the peak learning rate."""
    if warmup_steps >= total:
        say(
            f"warning: the warm-up of {counted(warmup_steps, 'updates')} is no shorter than the run of {total}: no "
            "update has the peak learning rate; shorten the warm-up or make more updates"
        )


def truncation(report: Mapping[str, Any]) -> str:
    """Returns one line: how many prompts and answers were truncated, split at their boundary, or dropped and why."""
    dropped = "; ".join(f"{entry['rows']} rows dropped: {entry['reason']}" for entry in report["dropped"])
    split = f"; {report['boundary_split']} pairs with prompt and answer tokenized separately"
    counts = f"{report['prompts_cut']} prompts and {report['answers_cut']} answers truncated"
    return f"{counts}{split if report['boundary_split'] else ''}; {dropped or 'no rows dropped'}"


def weights_and_margins(pairs: PairSet) -> list[str]:
    """Returns a line for weights other than 1 and one for margins other than 0: how many, and the range of all."""
    lines = []
    for what, usual, values in (("weight", 1, pairs.pair_weights), ("margin", 0, pairs.margins)):
        given = pairs.report[f"{what}s_given"]
        if values is not None:
            lines.append(f"{given:,} pairs have a {what} other than {usual}; {values.min():g} to {values.max():g}")
        elif given:
            lines.append(f"{given:,} pairs have a {what}, which is not read, as no answers are compared")
    return lines


def describe_run(programs: Programs, params: PyTree, frozen: PyTree, start: int, total: int) -> None:
    """Prints the size of a run: parameters, memory, mesh, steps and shapes; warns of large replicated parameters.

    Args:
      params, frozen: trainable and frozen parameters.
      start, total: updates already made, and in all.
    """
    training, fixed = programs.trainable.count_parameters(programs.model)
    of_which = f", of which {training:,} are trainable" if fixed else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in programs.mesh.shape.items())
    shape = programs.update_shape
    crops = f", the last ones shortened to {', '.join(f'{r} x {n}' for r, n in shape.crops[1:])}" if shape.crops else ""
    processes = f" in {hosts.count()} processes" if hosts.count() > 1 else ""
    say(
        f"model: {training + fixed:,} parameters{of_which}, {programs.param_dtype}, computing in "
        f"{np.dtype(programs.dtype).name} on {mesh} {jax.devices()[0].platform}{processes}, "
        f"{size(sharding.bytes_per_device((params, frozen)))} per device"
    )
    for path, count in sharding.large_replicated(trees.join(params, frozen)).items():
        say(f"warning: {path}, {size(count)}, is replicated on every device; mesh.rules can shard it")
    say(
        f"steps {start} to {total}: {shape.pairs} pairs each, packed into rows of {shape.row_length} positions, "
        f"microbatches of {counted(shape.rows, 'rows')}{crops}; {programs.attention} attention"
    )


def evaluation_lines(row: Mapping[str, float]) -> list[str]:
    """Returns the main metrics of an evaluation, a line for each set of pairs."""
    sets = [name.removesuffix("/pairs") for name in row if name.endswith("/pairs") and "/by_source/" not in name]
    names = [[f"{each}/{metric}" for metric in ("loss", "rewards/accuracies", "rewards/margins")] for each in sets]
    return [", ".join(f"{name} {row[name]:.4f}" for name in shown if name in row) for shown in names]


def before_and_after(evaluations: Sequence[Mapping[str, float]]) -> None:
    """Prints a table of the first and the last evaluation, if there are two."""
    if len(evaluations) < 2:
        return
    first, last = evaluations[0], evaluations[-1]
    names = [name for name in first if name in last and name.startswith("eval/") and not name.endswith("/pairs")]
    width = max([26, *(len(name) + 2 for name in names)])
    say(f"{'':<{width}}{'before':>12}{'after':>12}")
    for name in names:
        say(f"{name:<{width}}{first[name]:>12.4f}{last[name]:>12.4f}")
