"""TODO runtime.clocks."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from dpo_jax.runtime.terminal import say


class Stopwatch:
    """Seconds since it was made, and what they went into."""

    def __init__(self):
        self._started, self.parts = time.perf_counter(), {}

    def add(self, part: str, seconds: float) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what the body takes to a part, less what is counted to others inside it."""
        started, others = time.perf_counter(), sum(self.parts.values())
        yield
        inside = sum(self.parts.values()) - others
        self.add(name, time.perf_counter() - started - inside)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        return f"{time.perf_counter() - self._started:.1f} s: {parts}"


class Faults:
    """Memory pages of this process that were touched for the first time: large temporaries made anew are slow."""

    def __init__(self):
        self._seen = resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def since(self) -> int:
        """How many since the last call."""
        before, self._seen = self._seen, resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return self._seen - before


class Profile:
    """Traces `steps` updates from `first` on with XProf, into a folder that TensorBoard's profile plugin reads."""

    def __init__(self, folder: Path, first: int, steps: int):
        self._folder, self._first, self._last, self._on = folder, first, first + steps, False

    def at(self, step: int, running: Any) -> None:
        """Starts or stops before update `step`, once the updates that make `running` are done."""
        if step == self._first < self._last:
            jax.block_until_ready(running)
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        if self._on and step == self._last:
            jax.block_until_ready(running)
            self.close()

    def close(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            say(f"profile: in {self._folder}")
            self._on = False


class Clock:
    """Seconds per update, what happens between updates left out."""

    def __init__(self, step: int):
        self._at, self._step = time.perf_counter(), step

    def per_step(self, step: int) -> float:
        """Mean seconds of the updates since the last call, `step` of them made in all."""
        now = time.perf_counter()
        mean = (now - self._at) / max(1, step - self._step)
        self._at, self._step = now, step
        return mean

    @contextlib.contextmanager
    def paused(self, running: Any) -> Iterator[None]:
        """Leaves out what runs inside, once the updates that make `running` are done."""
        jax.block_until_ready(running)
        started = time.perf_counter()
        yield
        self._at += time.perf_counter() - started
