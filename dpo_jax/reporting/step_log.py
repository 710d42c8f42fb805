"""Writes rows of metrics.jsonl: metrics of a step, counts of its batch, and throughput."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jaxtyping import ArrayLike

from dpo_jax.metrics import without_empty_parts
from dpo_jax.runtime.clocks import Clock, Faults
from dpo_jax.runtime.terminal import Progress

Write = Callable[[int, dict[str, float]], None]


class Pending(NamedTuple):
    """A step whose metrics are not fetched yet."""

    done: int  # updates made, this one included
    metrics: Mapping[str, ArrayLike]  # on the device
    row: Mapping[str, float]  # from the host
    flops: float


class StepLog:
    """Logs each step once the next is under way, so that the device does not wait for the host.

    Args:
      write: takes a step, counted from 0, and its row.
      clock: measures the time of an update.
      every: updates between rows; the last of `total` always has one.
      examples: of a batch, such as pairs.
      peak_flops: operations a second that the devices can do; None: not known, and no `mfu` is reported.
    """

    def __init__(
        self,
        write: Write,
        progress: Progress,
        clock: Clock,
        *,
        every: int,
        total: int,
        examples: int,
        peak_flops: float | None,
    ):
        self._write, self._progress, self._clock, self._faults = write, progress, clock, Faults()
        self._every, self._total, self._examples, self._peak_flops = every, total, examples, peak_flops
        self._pending: Pending | None = None
        self._waited_s = 0.0

    def add(
        self, done: int, metrics: Mapping[str, ArrayLike], row: Mapping[str, float], *, flops: float, waited_s: float
    ) -> None:
        """Writes the pending row of an earlier step; this step's becomes the pending one."""
        self.flush()
        self._waited_s += waited_s
        if (done - 1) % self._every == 0 or done == self._total:
            self._pending = Pending(done, metrics, {**row, "data_wait_s": self._waited_s}, flops)
            self._waited_s = 0.0

    def flush(self) -> None:
        """Writes the pending row, if there is one, after waiting for its step."""
        if self._pending is None:
            return
        (done, metrics, host_row, flops), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        row = without_empty_parts(values) | dict(host_row)
        step_s = self._clock.per_step(done)
        row |= {"step_time_s": step_s, "pairs_per_s": self._examples / step_s}
        row |= {"tokens_real/s": row["tokens_real"] / step_s, "flops/s": flops / step_s}
        row["minor_faults"] = self._faults.since()
        if self._peak_flops is not None:
            row["mfu"] = flops / step_s / self._peak_flops
        self._write(done - 1, row)
        self._progress.update(done, row)
