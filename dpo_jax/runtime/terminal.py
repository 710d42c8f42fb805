"""Lines and progress bars on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from dpo_jax.runtime import hosts
from dpo_jax.types import printable

# Metrics shown with each step, and their formats; a metric that the loss does not have is left out.
SHOWN = {
    "loss": "loss {:.4f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "rewards/margins": "margin {:.4f}",
    "pairs_per_s": "{:.1f} pairs/s",
}


def say(message: str) -> None:
    """Prints a line to standard error, above a progress bar if there is one; standard output is for results.

    Only process 0 prints. The message may quote files; it is made `printable`.
    """
    if not hosts.first():
        return
    tqdm.write(printable(message), file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """Progress of a run on standard error: a bar on a terminal, plain lines elsewhere. A context manager.

        step 12/62: loss 0.6921, accuracy 0.531, margin 0.0012, 3.4 pairs/s, 00:15 left

    Args:
      total: number of steps, of which `start` are done.
      title: name of a step, first on the line.
      line_every_s: minimum seconds between plain lines; the last step always has one.
    """

    def __init__(self, total: int, *, start: int = 0, title: str = "step", line_every_s: float = 0.0):
        self._total, self._title, self._line_every_s = total, title, line_every_s
        self._first: tuple[int, float] | None = None
        self._last_line_s = -float("inf")
        self._bar = None
        if sys.stderr.isatty() and hosts.first():
            shape = "{desc} {n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}|{postfix} [{elapsed}<{remaining}, {rate_fmt}]"
            self._bar = tqdm(desc=title, total=total, initial=start, bar_format=shape, dynamic_ncols=True)

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Shows that `step` steps are done, with the metrics of the last."""
        now, values = time.monotonic(), metrics or {}
        parts = [form.format(values[name]) for name, form in SHOWN.items() if name in values]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        # Time is counted from the end of the first step, which compiles.
        self._first = self._first or (step, now)
        if step < self._total and now - self._last_line_s < self._line_every_s:
            return
        self._last_line_s = now
        done, elapsed = step - self._first[0], now - self._first[1]
        if done and step < self._total:
            if metrics is None:
                parts.append(f"{done / elapsed:.1f}/s")
            parts.append(f"{tqdm.format_interval(elapsed / done * (self._total - step))} left")
        say(f"{self._title} {step}/{self._total}" + (": " if parts else "") + ", ".join(parts))

    def say(self, message: str) -> None:
        """Prints a line of its own, above the bar."""
        say(message)

    def close(self) -> None:
        """Ends the bar; closing again has no effect."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Counter:
    """Progress of a pass whose total is known from its first update on. A context manager."""

    def __init__(self, title: str, *, unit: str):
        self._title, self._unit = title, unit
        self._progress: Progress | None = None

    def update(self, done: int, total: int) -> None:
        """Shows that `done` of `total` are done."""
        if self._progress is None:
            self._progress = Progress(total, title=f"{self._title}, {self._unit}", line_every_s=10.0)
        self._progress.update(done)

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.close()
