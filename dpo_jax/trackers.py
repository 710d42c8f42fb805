"""Where the numbers of a run go: JSON lines, TensorBoard, Weights & Biases, and the terminal."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
import types
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from tqdm import tqdm

from dpo_jax import hosts
from dpo_jax.types import InputError

# What is shown of a step while it runs, and how; a metric that a loss does not have is left out.
SHOWN = {
    "loss": "loss {:.4f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "rewards/margins": "margin {:.4f}",
    "pairs_per_s": "{:.1f} pairs/s",
}


@runtime_checkable
class Tracker(Protocol):
    """Takes the numbers of a step, by name; steps come in order."""

    def write(self, step: int, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """Appends `{"step": ..., NAME: NUMBER, ...}` lines to a file; each is on disk, whole, before `write` returns.

    A number that is not finite stands there as NaN or Infinity, as Python's json writes and reads them.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: IO[str] | None = None

    def truncate_after(self, step: int) -> None:
        """Drops rows of later steps, and a last line that an interruption left unfinished; call before `write`.

        The file is replaced whole or not at all. Raises: InputError if any other line is not such a row.
        """
        if not self._path.exists():
            return
        lines = self._path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        kept = [line for number, line in enumerate(lines, 1) if self._step_of(line, number) <= step]
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        beside.write_text("".join(kept))
        os.replace(beside, self._path)

    def _step_of(self, line: str, number: int) -> int:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{self._path}:{number}",
                got=f"{line.strip():.60}",
                expected='a JSON object with a "step"',
                remedy="Remove the line, or move the file away.",
            ) from None

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Appends one row."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a")
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class TensorBoardWriter:
    """Writes scalars to `WORKDIR/tensorboard`, on disk within about a second.

    What an interrupted run wrote from `resume_step` on is hidden, for it comes again.
    """

    def __init__(self, workdir: Path, resume_step: int):
        package = _package("tensorboardX", "log.tensorboard")
        self._writer = package.SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=resume_step,
            flush_secs=1,  # its own two minutes would be lost to a kill; its `flush` does not wait for the queue
            filename_suffix=f".{resume_step}",  # its names differ only by the second, and it overwrites
        )

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Logs to a run of a Weights & Biases project; a resumed working folder goes on in the same run.

    Steps that an interrupted run had logged already are not logged again: wandb takes no step twice, and they would
    bring the same numbers. Online, offline or disabled is wandb's own choice, by WANDB_MODE.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]):
        package = _package("wandb", "log.wandb")
        name_file = workdir / "wandb_run"
        if not name_file.exists():
            name_file.write_text(uuid.uuid4().hex)
        self._run = package.init(
            project=project,
            id=name_file.read_text(),
            name=workdir.name,
            dir=str(workdir),
            config=dict(config),
            resume="allow",
        )

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        self._run.finish()


def check_available(*, tensorboard: bool, wandb: str) -> None:
    """Raises InputError if a tracker that is asked for is not installed."""
    if tensorboard:
        _package("tensorboardX", "log.tensorboard")
    if wandb:
        _package("wandb", "log.wandb")


def _package(name: str, field: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"config.{field}",
            got=f"{name} cannot be imported ({error})",
            expected="it installed, or the field unset",
            remedy="Run pip install 'dpo-jax[track]'.",
        ) from error


def open_trackers(
    workdir: Path, *, tensorboard: bool, wandb: str, config: Mapping[str, Any], resume_step: int
) -> list[Tracker]:
    """The trackers that are asked for besides JSON lines.

    Args:
      workdir: the run's folder, which exists.
      wandb: project; empty for none.
      config: every field of the run, shown beside its curves.
      resume_step: the first step that will be written; 0 for a new run.
    Raises: InputError if a package is missing.
    """
    found: list[Tracker] = []
    if tensorboard:
        found.append(TensorBoardWriter(workdir, resume_step))
    if wandb:
        found.append(WandbWriter(wandb, workdir, config))
    return found


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


def say(message: str) -> None:
    """Prints a line to standard error, above a progress bar if there is one; standard output is for results.

    Of several processes only the first prints.
    """
    if not hosts.first():
        return
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """How far a run is, on standard error: a live bar on a terminal, plain lines elsewhere.

        step 12/62: loss 0.6921, accuracy 0.531, margin 0.0012, 3.4 pairs/s, 00:15 left

    Args:
      total: steps in all, of which `start` are done.
      title: what a step is, first on the line.
      line_every_s: least seconds between plain lines; the last step always has one.
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
        now, shown = time.monotonic(), metrics or {}
        parts = [form.format(shown[name]) for name, form in SHOWN.items() if name in shown]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        # From the first step seen, for the one before it compiled.
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
        if self._bar is not None:
            self._bar.close()


class Counter:
    """Progress of a pass whose length is known only once it is under way: `with Counter("reference") as counter`."""

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
