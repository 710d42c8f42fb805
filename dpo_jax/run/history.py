"""Records of a run: its evaluations and the best of them, changes of its configuration, and how it ended."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.config import CHANGEABLE, Config, flat, record_from_json
from dpo_jax.hf.folders import is_export
from dpo_jax.run import workdir
from dpo_jax.run.evaluate import metric_names
from dpo_jax.run.inputs import Inputs
from dpo_jax.run.workdir import Change, read_rows
from dpo_jax.runtime import files, hosts
from dpo_jax.runtime.files import Path
from dpo_jax.types import InputError, listed

LOSS = "eval/loss:min"  # decides an early stop where `checkpoint.best` is empty


class Goal(NamedTuple):
    """A metric of evaluations, and whether more of it is better."""

    metric: str
    larger: bool

    def __str__(self) -> str:
        return f"{self.metric}:{'max' if self.larger else 'min'}"


def goal_of(config: Config) -> Goal | None:
    """Returns the metric that decides which checkpoint is the best and when the run stops early; None: neither is."""
    text = config.checkpoint.best or (LOSS if config.eval.patience else "")
    metric, _, kind = text.rpartition(":")
    return Goal(metric, kind == "max") if text else None


def check_goal(config: Config, inputs: Inputs) -> None:
    """Raises InputError if the metric of `checkpoint.best` or `eval.patience` is none of the run's evaluations."""
    goal = goal_of(config)
    names = [] if goal is None else metric_names(inputs)
    if goal is None or goal.metric in names:
        return
    field = "checkpoint.best" if config.checkpoint.best else "eval.patience"
    by_default = "" if config.checkpoint.best else ", which decides where checkpoint.best is empty"
    raise InputError(
        f"config.{field}",
        got=f"{goal.metric!r}{by_default}",
        expected=f"a metric of this run's evaluations: {listed(names, most=40)}",
        remedy="Name one, for example --config.checkpoint.best=eval/rewards/accuracies:max.",
    )


@dataclasses.dataclass
class History:
    """Values of the deciding metric in the evaluations after the first update, in their order.

    The best is the first of equals, and a value that is not a number is never the best. All decisions follow from the
    steps and values alone, so that a resumed run repeats them.
    """

    goal: Goal | None
    patience: int  # evaluations without a better value after which the run ends; 0: never
    values: list[tuple[int, float]]  # (updates made, value)

    kept_best: bool = False  # whether the checkpoint of the best is kept

    def add(self, step: int, row: Mapping[str, float]) -> None:
        """Adds an evaluation after `step` updates."""
        if self.goal is not None and step and self.goal.metric in row:
            self.values.append((step, row[self.goal.metric]))

    @property
    def best(self) -> int | None:
        """Updates made at the best evaluation; None if there is none."""
        sign = -1 if self.goal is not None and self.goal.larger else 1
        numbers = [(sign * value, step) for step, value in self.values if not math.isnan(value)]
        return min(numbers)[1] if numbers else None

    @property
    def kept(self) -> int | None:
        """Updates made at the best evaluation, if its checkpoint is kept; None otherwise."""
        return self.best if self.kept_best else None

    @property
    def over(self) -> bool:
        """Whether `patience` evaluations have passed since the best one."""
        since = sum(step > (self.best or 0) for step, _ in self.values)
        return bool(self.patience and since >= self.patience)


def read_history(config: Config, folder: Path, *, before: int, kept: Collection[int]) -> History:
    """Returns the evaluations of the run in a folder, on the sets of pairs that it has now; equal on all processes.

    Args:
      before: evaluations after so many updates, or more, are left out.
      kept: steps of checkpoints; evaluations before the first best one that is kept do not count, if `checkpoint.best`
        is set.
    """
    history = History(goal_of(config), config.eval.patience, [], bool(config.checkpoint.best))
    if history.goal is None:
        return history
    since = evaluated_since(folder)
    for row in hosts.broadcast("evaluations", read_rows(folder / "eval.jsonl")):
        if since <= row["step"] < before:
            history.add(int(row["step"]), row)
    while config.checkpoint.best and history.best is not None and history.best not in kept:
        history.values = [(step, value) for step, value in history.values if step != history.best]
    return history


def step_of(which: str, config: Config, folder: Path) -> int:
    """Returns the step of a kept checkpoint of the run in a folder.

    Args:
      which: a step, `last` or `best`; empty: `best` if the configuration has `checkpoint.best`, else `last`.
    Raises: InputError if that checkpoint is not kept.
    """
    kept = workdir.kept_steps(folder)
    if which == "last" or not (which or config.checkpoint.best):
        return kept[-1]
    remedy = "Give a step that is kept; --config.checkpoint.keep sets how many are."
    if which in ("", "best"):
        step = read_history(config, folder, before=kept[-1] + 1, kept=kept).kept
        if step is None and not which:  # no evaluation so far
            return kept[-1]
        remedy = "Give a step, or --config.checkpoint.best=METRIC:max for a metric of eval.jsonl."
    else:
        step = int(which) if which.isdecimal() and int(which) in kept else None
    if step is None:
        expected = f"last, best or a step that is kept: {listed([*map(str, kept)], most=20)}"
        raise InputError("--step", got=f"got {which}", expected=expected, remedy=remedy)
    return step


# --- changes of the configuration -----------------------------------------------------------------------------------


def changes_of(config: Config, folder: Path) -> dict[str, list[object]]:
    """Returns {dotted name: [before, now]} of the fields in `config.CHANGEABLE` that differ from the run's."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    before, now = flat(record_from_json(path.read_text(), str(path))), flat(config)
    return {name: [before[name], now[name]] for name in CHANGEABLE if before[name] != now[name]}


def shown(changes: Mapping[str, Sequence[object]]) -> str:
    """Returns changes as `train.steps: 6 -> 12; optimizer.learning_rate: 0.01 -> 0.02`."""

    def value(of: object) -> str:
        return "unset" if of is None else "empty" if of == "" else str(of)

    return "; ".join(f"{name}: {value(before)} -> {value(now)}" for name, (before, now) in changes.items())


def read_changes(folder: Path) -> list[Change]:
    """Reads the recorded changes of the configuration of the run in a folder, the first one first."""
    return [Change(**row) for row in read_rows(folder / "changes.jsonl")]


def evaluated_since(folder: Path) -> int:
    """Returns the updates made when the pairs to evaluate on were last changed; 0 if they never were."""
    return max([0, *(change["step"] for change in read_changes(folder) if "data.eval" in change["changes"])])


def changes_evaluation(folder: Path, step: int) -> bool:
    """Whether the pairs to evaluate on changed at a step, so that an evaluation there is of other pairs."""
    return any(change["step"] == step and "data.eval" in change["changes"] for change in read_changes(folder))


def record_changes(changes: Mapping[str, Sequence[object]], folder: Path, step: int) -> None:
    """Appends changes to `changes.jsonl`, once, and empties the record of an end that the run now goes beyond."""
    if not hosts.first():
        return
    if read_end(folder):
        files.write_text(folder / "end.json", "{}\n")
    if not changes:
        return
    rows = read_changes(folder)
    if rows and rows[-1]["step"] == step and rows[-1]["changes"] == {name: [*pair] for name, pair in changes.items()}:
        return  # written by a call that was killed before it had written config.json
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    rows.append(Change(step=step, date=now, changes=changes))
    files.write_text(folder / "changes.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


# --- the end --------------------------------------------------------------------------------------------------------


def read_end(folder: Path) -> dict[str, Any]:
    """Reads the record of a run's end, with "step", "of", "exported" and "reason"; empty if there is none."""
    path = folder / "end.json"
    return json.loads(path.read_text()) if path.exists() and is_export(folder / "export") else {}


def record_end(folder: Path, *, step: int, total: int, exported: int, reason: str) -> None:
    """Writes the record of a run's end, once its model is exported."""
    if hosts.first():
        end = {"step": step, "of": total, "exported": exported, "reason": reason}
        files.write_text(folder / "end.json", json.dumps(end, indent=2) + "\n")
    hosts.barrier("end")
