"""Account of the time of a run over all its starts: seconds of updates that count, and of everything else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

from dpo_jax.runtime import hosts
from dpo_jax.runtime.clocks import Stopwatch
from dpo_jax.runtime.quantities import duration
from dpo_jax.runtime.terminal import say

# Parts of the time of a run, and how a person calls them. A second is in exactly one of them.
PARTS = {
    "steps": "updates",
    "compile": "compiling",
    "reference": "reference",
    "evaluate": "evaluation",
    "save": "checkpoints",
    "export": "export",
    "start": "start",  # of the first process of the run, until its first update: imports, data, weights
    "restart": "restarts",  # the same of later ones, and all that was done after the checkpoint they began from
}
STOPWATCH = {  # parts of the stopwatch of a start
    "compile": "compile",
    "reference": "reference",
    "evaluate": "evaluation",
    "save": "save",
    "export": "export",
}
FIELDS = ("goodput", *(f"time/{part}_s" for part in (*PARTS, "down")), "time/unix_s")  # of a row of metrics.jsonl

Fields = Mapping[str, float]  # of an earlier row or checkpoint; {}: there is none


class Account:
    """Seconds of each part, of this start and of those before it.

    A start that ends before its first row is in none of the parts, but in `down`, as is the time between two starts.

    Args:
      watch: stopwatch of this start.
      now: the seconds since 1970.
    """

    def __init__(self, watch: Stopwatch, now: Callable[[], float] = time.time):
        self._watch, self._now = watch, now
        self._before = dict.fromkeys((*PARTS, "down"), 0.0)
        self._began_s: float | None = None  # seconds of the start, until its first update
        self._begun = "start"

    def begin(self, checkpoint: Fields, last: Fields) -> None:
        """Takes over what earlier starts spent; call it right before the first update of this one.

        Args:
          checkpoint: `fields` when the checkpoint was made that this start began from.
          last: `fields` of the last row that any start wrote. What came after the checkpoint is done again.
        """
        for part in self._before:
            self._before[part] = checkpoint.get(f"time/{part}_s", 0.0)
        self._before["restart"] += max(0.0, total_of(last) - total_of(checkpoint))
        known_s = max(each.get("time/unix_s", 0.0) for each in (checkpoint, last))
        if known_s:
            self._begun = "restart"
            down_s = max(0.0, self._now() - self._watch.total() - known_s)
            self._before["down"] = max(each.get("time/down_s", 0.0) for each in (checkpoint, last)) + down_s
        parts = self._watch.parts
        self._began_s = self._watch.total() - sum(parts.get(name, 0.0) for name in STOPWATCH.values())

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each part until now, and of `down`, when no process of the run was known to live."""
        spent = {part: self._watch.parts.get(name, 0.0) for part, name in STOPWATCH.items()}
        rest = self._watch.total() - sum(spent.values())
        began = rest if self._began_s is None else self._began_s
        spent |= {"steps": rest - began, self._begun: began}
        return {part: seconds + spent.get(part, 0.0) for part, seconds in self._before.items()}

    def fields(self) -> dict[str, float]:
        """Returns the seconds as fields of a row, the share of updates in the time that is not down, and the time."""
        fields = {f"time/{part}_s": seconds for part, seconds in self.seconds().items()}
        total = total_of(fields)
        return {"goodput": fields["time/steps_s"] / total if total else 0.0, **fields, "time/unix_s": self._now()}

    def line(self) -> str:
        """Returns the account as a line for people, without parts of less than half a second."""
        fields = self.fields()
        named = {name: fields[f"time/{part}_s"] for part, name in PARTS.items()}
        parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in named.items() if seconds >= 0.5)
        down = fields["time/down_s"]
        after = f"; down for {duration(down)} besides" if down >= 0.5 else ""
        return f"goodput {fields['goodput']:.0%} of {duration(total_of(fields))}: {parts}{after}"

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Prints the account after the body, and also if it was asked to stop."""
        try:
            yield
        except hosts.Stopped:
            say(self.line())
            raise
        say(self.line())


def total_of(fields: Fields) -> float:
    """Returns the sum of all parts."""
    return sum(fields.get(f"time/{part}_s", 0.0) for part in PARTS)
