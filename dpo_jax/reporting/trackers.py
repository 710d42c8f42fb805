"""Writers of a run's metrics: JSON lines, TensorBoard, and Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib
import json
import types
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from dpo_jax.runtime import files
from dpo_jax.runtime.files import Path
from dpo_jax.types import InputError


@runtime_checkable
class Tracker(Protocol):
    """Takes the metrics of each step, by name; steps come in order. Closing it again has no effect.

    Once `flush` returns, the rows so far outlast this process.
    """

    def write(self, step: int, row: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """Appends `{"step": ..., NAME: NUMBER, ...}` lines to a file; on disk each is there, whole, before `write` returns.

    In a bucket they are there after `flush`; see `files.LineLog`. A number that is not finite is written as NaN or
    Infinity, as Python's json does. A context manager.
    """

    def __init__(self, path: Path):
        self._path = path
        self._log = files.LineLog(path)

    def truncate_after(self, step: int) -> dict[str, float]:
        """Drops rows of later steps, and a last line that an interruption left unfinished; call before `write`.

        The file is replaced whole or not at all. Raises: InputError if any other line is not such a row.
        Returns: the last row that was in it, dropped or not; no fields if there was none.
        """
        if not self._path.exists():
            return {}
        lines = self._path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        earlier = [line for number, line in enumerate(lines, 1) if self._step_of(line, number) <= step]
        files.write_text(self._path, "".join(earlier))
        return json.loads(lines[-1]) if lines else {}

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
        self._log.write(json.dumps({"step": step, **row}) + "\n")

    def flush(self) -> None:
        """Returns once every row is where it is read from."""
        self._log.flush()

    def close(self) -> None:
        """Closes the file, if it is open."""
        self._log.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TensorBoardWriter:
    """Writes scalars to `WORKDIR/tensorboard`, on disk within about a second, in a bucket at each `flush`.

    Rows that an interrupted run wrote from `resume_step` on are hidden, for the resumed run writes them again.
    """

    def __init__(self, workdir: Path, resume_step: int):
        package = _package("tensorboardX", "log.tensorboard")
        self._mirror = files.Mirror(workdir / "tensorboard")
        self._writer: Any = package.SummaryWriter(
            str(self._mirror.local),
            purge_step=resume_step,
            flush_secs=1,  # by default a kill would lose two minutes; `flush` does not wait for the queue
            filename_suffix=f".{resume_step}",  # default names repeat within a second, and files are overwritten
        )

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Writes the rows so far to the event file, and a copy of that to a bucket."""
        self._writer.flush()
        self._mirror.upload()

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
            self._mirror.close()


class WandbWriter:
    """Logs to a run of a Weights & Biases project; a resumed working folder continues the same run.

    Steps that an interrupted run has logged already are skipped by wandb itself, which takes no step twice; their
    numbers would be the same. The environment variable WANDB_MODE chooses online, offline or disabled.
    What wandb keeps on disk is copied to a bucket when the run is closed.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, object]):
        package = _package("wandb", "log.wandb")
        name_file = workdir / "wandb_run"
        if not name_file.exists():
            files.write_text(name_file, uuid.uuid4().hex)
        self._mirror = files.Mirror(workdir)
        self._run: Any = package.init(
            project=project,
            id=name_file.read_text(),
            name=workdir.name,
            dir=str(self._mirror.local),
            config=dict(config),
            resume="allow",
        )

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=step)

    def flush(self) -> None:
        """Does nothing: wandb sends each row by itself."""

    def close(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish()
            self._mirror.close()


class HookWriter:
    """Calls a function of the user's with each step and a dict of its metrics; what it raises ends the run."""

    def __init__(self, function: Callable[..., object]):
        self._function = function

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self._function(step, dict(row))

    def flush(self) -> None: ...

    def close(self) -> None: ...


def check_available(*, tensorboard: bool, wandb: str) -> None:
    """Raises InputError if the package of a requested tracker is not installed."""
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
    workdir: Path, *, tensorboard: bool, wandb: str, config: Mapping[str, object], resume_step: int
) -> list[Tracker]:
    """Opens TensorBoard and Weights & Biases writers, those that are requested.

    Where one fails to open, those opened before it are closed.

    Args:
      workdir: the run's folder, which exists.
      wandb: project; empty for none.
      config: every field of the run, shown beside its curves.
      resume_step: the first step that will be written; 0 for a new run.
    Raises: InputError if a package is missing.
    """
    opened: list[Tracker] = []
    with contextlib.ExitStack() as on_error:
        if tensorboard:
            opened.append(TensorBoardWriter(workdir, resume_step))
            on_error.callback(opened[-1].close)
        if wandb:
            opened.append(WandbWriter(wandb, workdir, config))
        on_error.pop_all()
    return opened
