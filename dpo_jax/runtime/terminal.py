"""Lines and progress bars on the terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

from dpo_jax.runtime import hosts, quantities
from dpo_jax.types import printable

# Metrics shown with each step, and their formats; a metric that the loss does not have is left out.
SHOWN = {
    "loss": "loss {:.4f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "rewards/margins": "margin {:.4f}",
    "pairs_per_s": "{:.1f} pairs/s",
}
LINE_EVERY_S = 10.0  # between plain lines of a pass
SHORT_S = 0.5  # what ends sooner is not shown, and no speed is told that was measured for a shorter time
DRAWS_PER_S = 20  # of a bar, at most

_LEAST_BAR, _MOST_BAR = 8, 40  # columns of a bar


def say(message: str) -> None:
    """Prints a line to standard error, above a progress bar if there is one; standard output is for results.

    Only process 0 prints. The message may quote files; it is made `printable`.
    """
    if not hosts.first():
        return
    tqdm.write(printable(message), file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """Progress of a run or a pass on standard error: a bar on a terminal, plain lines elsewhere. A context manager.

        step 12/62: loss 0.6921, accuracy 0.531, margin 0.0012, 3.4 pairs/s, 15 s left
        reference pass 512/2,048 pairs: 1.2/s, 21 min 20 s left

    It is shown at its start, with nothing done. A bar also shows the time that passes until the first update.

    Args:
      total: number of steps, pairs or bytes, of which `start` are done; None: not known.
      title: what is done, first on the line.
      unit: what is counted, after the numbers; bytes are shown as sizes. With neither unit nor total, no number is.
      line_every_s: minimum seconds between plain lines; the last update always has one.
      after_s: seconds after which it is shown, whether there was an update or not; what ends sooner is not shown.
    """

    def __init__(
        self,
        total: int | None,
        *,
        start: int = 0,
        title: str = "step",
        unit: str = "",
        line_every_s: float = 0.0,
        after_s: float = 0.0,
    ):
        self._total, self._title, self._unit, self._line_every_s = total, title, unit, line_every_s
        self._done, self._started = start, time.monotonic()
        self._parts: list[str] = []
        # Time left is counted from the end of the first step, which compiles; to read and write bytes compiles nothing.
        self._first = (start, self._started) if unit == "bytes" else None
        self._last_line_s = -float("inf")
        self._bar: _Bar | None = None
        self._shown = self._closed = False
        self._lock = threading.Lock()
        self._timer = threading.Timer(after_s, self._show)
        self._timer.daemon = True
        if after_s:
            self._timer.start()
        else:
            self._show()

    def update(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        """Shows that `done` are done in all, with the metrics of the last."""
        now, values = time.monotonic(), metrics or {}
        self._first = self._first or (done, now)
        self._done = done
        self._parts = [form.format(values[name]) for name, form in SHOWN.items() if name in values]
        if metrics is None and self._speed(now):
            self._parts.append(f"{self._amount(self._speed(now))}/s")
        with self._lock:
            if self._bar is not None:
                self._bar.show(done, at_once=done == self._total)
            elif self._shown and (done == self._total or now - self._last_line_s >= self._line_every_s):
                self._say_line(now)

    def add(self, number: int) -> None:
        """Shows that so many more are done."""
        self.update(self._done + number)

    def say(self, message: str) -> None:
        """Prints a line of its own, above the bar."""
        say(message)

    def close(self) -> None:
        """Ends the bar; closing again has no effect."""
        self._timer.cancel()
        with self._lock:
            self._closed = True
            if self._bar is not None:
                self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self) -> None:
        """Shows the bar or the first line."""
        with self._lock:
            if self._closed:
                return
            self._shown = True
            if sys.stderr.isatty() and hosts.first():
                self._bar = _Bar(self._line)
            else:
                self._say_line(time.monotonic())

    def _say_line(self, now: float) -> None:
        self._last_line_s = now
        parts = [*self._parts, *self._time_left(now)]
        counts = f"{self._title} {self._amounts() or '...'}"
        say(counts + (": " if parts else "") + ", ".join(parts))

    def _line(self, columns: int | None, ascii_only: bool) -> str:
        """Returns the bar as a line of at most this many columns; None: as long as it gets."""
        now = time.monotonic()
        if self._done == self._total:
            ends = [f"in {quantities.duration(now - self._started)}"]
        else:
            ends = self._time_left(now) or [f"{quantities.duration(now - self._started, digits=0)} so far"]
        share = self._done / self._total if self._total else None
        return bar_line(self._title, self._amounts(), share, ends, self._parts, columns=columns, ascii_only=ascii_only)

    def _amounts(self) -> str:
        """Returns how many are done of how many; empty if nothing is counted."""
        if not self._unit and self._total is None:
            return ""
        amounts = [self._amount(each) for each in (self._done, self._total) if each is not None]
        return "/".join(amounts) + (f" {self._unit}" if self._unit not in ("", "bytes") else "")

    def _amount(self, count: float) -> str:
        if self._unit == "bytes":
            return quantities.size(count)
        return f"{count:,}" if isinstance(count, int) else f"{count:,.1f}"

    def _speed(self, now: float) -> float:
        """Returns the number done per second since the first update; 0: not known yet."""
        first, since = self._first or (self._done, now)
        return (self._done - first) / (now - since) if now - since >= SHORT_S else 0.0

    def _time_left(self, now: float) -> list[str]:
        speed = self._speed(now)
        if not speed or self._total is None or self._done >= self._total:
            return []
        return [f"{quantities.duration((self._total - self._done) / speed)} left"]


def bar_line(
    title: str,
    amounts: str,
    share: float | None,
    ends: Sequence[str],
    parts: Sequence[str],
    *,
    columns: int | None,
    ascii_only: bool = False,
) -> str:
    """Returns a progress bar as a line: title, amounts, a bar, `ends`, and as many of the other parts as fit.

    Where columns are few, the last parts are left out first, then the bar, and then the title is cropped.

    Args:
      share: of the work that is done, from 0 to 1; None: not known, and there is no bar.
      columns: most characters of the line; None: as many as it takes.
    """
    columns = 10_000 if columns is None else columns
    ends = list(ends)
    amounts = amounts and f" {amounts}"
    room = columns - disp_len(f"{title}{amounts}, {', '.join(ends)}")
    if room < 0:
        title = disp_trim(title, max(0, disp_len(title) + room))
    drawn = share is not None and room >= len(" 100% ||") + _LEAST_BAR
    room -= (len(" 100% ||") + _LEAST_BAR) * drawn
    for part in parts:
        if (room := room - len(f", {part}")) < 0:
            room += len(f", {part}")
            break
        ends.append(part)
    bar = ","
    if drawn and share is not None:
        width = min(_MOST_BAR, _LEAST_BAR + room)
        bar = f" {share:4.0%} |{_blocks(share * width, '#' if ascii_only else '█').ljust(width)}|"
    return disp_trim(f"{title}{amounts}{bar} {', '.join(ends)}".strip(), columns)


def _blocks(length: float, block: str) -> str:
    """Returns so many blocks, the last one, of the Unicode ones, in eighths."""
    whole, eighths = divmod(int(length * 8), 8)
    return block * whole + (" ▏▎▍▌▋▊▉"[eighths] if eighths and block == "█" else "")


class _Bar(tqdm):
    """A line that is drawn again each second and at each update, below the lines that `say` prints.

    Args:
      line: returns it, for a number of columns and whether it must be ASCII.
    """

    def __init__(self, line: Callable[[int | None, bool], str]):
        self._line, self._closed, self._drawn_s = line, threading.Event(), -float("inf")
        super().__init__(file=sys.stderr, dynamic_ncols=True, leave=None)
        threading.Thread(target=self._tick, name="progress bar", daemon=True).start()

    def show(self, done: int, *, at_once: bool) -> None:
        """Draws the line anew, if it is due."""
        self.n = done
        if at_once or time.monotonic() - self._drawn_s >= 1 / DRAWS_PER_S:
            self.refresh()

    def close(self) -> None:
        """Ends the line, which stays unless another one is above it."""
        self._closed.set()
        super().close()

    def _tick(self) -> None:
        while not self._closed.wait(1.0):
            self.refresh()

    def __str__(self) -> str:
        self._drawn_s, entries = time.monotonic(), self.format_dict
        return self._line(entries["ncols"] or None, bool(entries["ascii"]))  # some terminals say 0


class Counter:
    """Progress of a pass whose total is known from its first update on. A context manager."""

    def __init__(self, title: str, *, unit: str):
        self._title, self._unit = title, unit
        self._progress: Progress | None = None

    def update(self, done: int, total: int) -> None:
        """Shows that `done` of `total` are done; the first call is best made with nothing done."""
        if self._progress is None:
            self._progress = passes(total, self._title, unit=self._unit, after_s=0.0)
        if done:
            self._progress.update(done)

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.close()


def passes(total: int | None, title: str, *, unit: str, after_s: float = SHORT_S) -> Progress:
    """Returns the progress of a pass over `total` pairs, rows or bytes; a short pass shows nothing.

    Args:
      after_s: seconds after which it is shown.
    """
    return Progress(total, title=title, unit=unit, line_every_s=LINE_EVERY_S, after_s=after_s)


def waiting(title: str) -> Progress:
    """Returns a context manager that shows, while its body runs, what is waited for and how long already."""
    return Progress(None, title=title, after_s=SHORT_S)
