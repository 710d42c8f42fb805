"""Clocks of a run: time to the first update, time per update, page faults, and profiles."""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource
import time
from collections.abc import Iterator

import jax
from jaxtyping import PyTree

from dpo_jax.runtime import files
from dpo_jax.runtime.files import Path
from dpo_jax.runtime.quantities import duration
from dpo_jax.runtime.terminal import say


class Stopwatch:
    """Seconds since a beginning, and how they divide into named parts.

    Args:
      age_s: seconds that have already passed when it is made; they are the part `start`.
    """

    def __init__(self, age_s: float = 0.0):
        self._started = time.perf_counter() - age_s
        self.parts: dict[str, float] = {"start": age_s} if age_s else {}

    def add(self, part: str, seconds: float) -> None:
        """Adds seconds to a part."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    def total(self) -> float:
        """Returns all seconds until now."""
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the seconds of the body to a part, without those that parts inside it count."""
        started, counted = time.perf_counter(), sum(self.parts.values())
        yield
        inside = sum(self.parts.values()) - counted
        self.add(name, time.perf_counter() - started - inside)

    def divided(self) -> dict[str, float]:
        """Returns the seconds of each part; together with `other`, the last, they are all seconds until now."""
        return self.parts | {"other": self.total() - sum(self.parts.values())}

    def __str__(self) -> str:
        parts = self.divided()
        named = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds >= 0.05)
        return f"{duration(sum(parts.values()))}: {named}"


def age_of_process() -> float:
    """Returns the seconds since this process was started, by Linux's account; 0 elsewhere."""
    try:
        # The 22nd field; the second, the name of the command, ends at the last bracket and may hold blanks.
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return 0.0


class Faults:
    """Minor page faults of this process: memory pages touched for the first time, as new large temporaries are."""

    def __init__(self):
        self._seen = resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def since(self) -> int:
        """Returns the number of faults since the last call."""
        before, self._seen = self._seen, resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return self._seen - before


class Profile:
    """Traces `steps` updates from `first` on with XProf, into a folder that TensorBoard's profile plugin reads.

    A context manager: leaving it ends a trace that is running.
    """

    def __init__(self, folder: Path, first: int, steps: int):
        self._mirror: files.Mirror | None = None
        self._folder, self._first, self._last, self._on = folder, first, first + steps, False

    def at(self, step: int, outputs: PyTree) -> None:
        """Starts or ends the trace before update `step`, after waiting for `outputs` of the updates before it."""
        if step == self._first < self._last:
            jax.block_until_ready(outputs)
            self._mirror = files.Mirror(self._folder)
            jax.profiler.start_trace(str(self._mirror.local))
            self._on = True
        if self._on and step == self._last:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Ends the trace, if it is running."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            if self._mirror is not None:
                self._mirror.close()
            say(f"profile: in {self._folder}")

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Clock:
    """Mean seconds per update, without the pauses between updates."""

    def __init__(self, step: int):
        self._at, self._step = time.perf_counter(), step

    def per_step(self, step: int) -> float:
        """Returns the mean seconds of the updates since the last call; `step` counts all updates made."""
        now = time.perf_counter()
        mean = (now - self._at) / max(1, step - self._step)
        self._at, self._step = now, step
        return mean

    @contextlib.contextmanager
    def paused(self, outputs: PyTree) -> Iterator[None]:
        """Leaves out the time of the body, after waiting for `outputs` of the updates before it."""
        jax.block_until_ready(outputs)
        started = time.perf_counter()
        yield
        self._at += time.perf_counter() - started
