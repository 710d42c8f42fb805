"""The training loop: a state, batches, an update, and the actions between updates.

It depends on no model, data or file. Supervised fine-tuning and preference optimization both run on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

from dpo_jax.runtime import hosts

State = TypeVar("State")
Prepared = TypeVar("Prepared", contravariant=True)
Metrics = TypeVar("Metrics", contravariant=True)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Updates that a run makes, and how often it evaluates and saves between them."""

    start: int  # updates made before
    total: int  # updates made at the end
    evaluate_every: int = 0  # updates between evaluations; 0: only before the first update and after the last
    save_every: int = 500  # updates between checkpoints; the last is always saved
    save_evaluated: bool = False  # whether there is a checkpoint at every evaluation after the first update

    def evaluates(self, done: int) -> bool:
        """Whether an evaluation is due after `done` updates."""
        return done in (0, self.total) or bool(self.evaluate_every and done % self.evaluate_every == 0)

    def saves(self, done: int) -> bool:
        """Whether a checkpoint is due after `done` updates."""
        return done == self.total or done % self.save_every == 0 or (self.save_evaluated and self.evaluates(done))


@runtime_checkable
class Between(Protocol[State, Prepared, Metrics]):
    """Actions of a run between its updates; `done` counts the updates made so far."""

    def evaluate(self, done: int, state: State) -> bool | None:
        """Evaluates the state; returns whether the run ends here, before its last update."""

    def save(self, done: int, state: State) -> None:
        """Saves the state; when it returns, the state may be changed."""

    def before(self, done: int, state: State) -> None:
        """Is called right before the next update."""

    def after(self, done: int, prepared: Prepared, metrics: Metrics, waited_s: float) -> None:
        """Is called right after an update is dispatched, with its metrics and the seconds waited for its batch."""


def run_loop(
    state: State,
    schedule: Schedule,
    batches: Iterator[tuple[Prepared, float]],
    update: Callable[[State, Prepared], tuple[State, Metrics]],
    between: Between[State, Prepared, Metrics],
) -> State:
    """Makes the updates of a schedule, or fewer if an evaluation ends the run, and returns the last state, saved.

    Args:
      state: after `schedule.start` updates.
      batches: the input of each update, in order, with the seconds waited for it.
      update: returns the next state and metrics, from a state and an input.
    Raises: hosts.Stopped, once the state is saved, if the run was asked to stop.
    """
    for done in range(schedule.start, schedule.total):
        if schedule.evaluates(done) and between.evaluate(done, state):
            between.save(done, state)
            return state
        if hosts.asked_to_stop():
            between.save(done, state)
            raise hosts.Stopped(f"asked to stop, and saved at step {done} of {schedule.total}")
        between.before(done, state)
        prepared, waited_s = next(batches)
        state, metrics = update(state, prepared)
        between.after(done + 1, prepared, metrics, waited_s)
        if schedule.saves(done + 1):
            between.save(done + 1, state)
    between.evaluate(schedule.total, state)
    return state
