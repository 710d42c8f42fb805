"""The working folder of a run: whose it is, what it logged, how far it came."""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo_jax import config as configs
from dpo_jax.config import Config
from dpo_jax.run.checkpoints import Checkpoints
from dpo_jax.runtime import files, hosts
from dpo_jax.types import InputError


def check(config: Config, workdir: Path, *, fields: Sequence[str] | None = None) -> None:
    """Raises InputError if the folder holds a run whose configuration makes other updates.

    Args:
      fields: those that must be equal; None: all that change the run.
    """
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise InputError(str(workdir), got="is a file", expected="a folder, or nothing yet", remedy="Name another.")
    if not path.exists():
        return
    changes = configs.changed(configs.record_from_json(*_recorded(workdir)), config, fields)
    if changes:
        raise InputError(
            str(path),
            got=f"this folder holds a run with other settings ({'; '.join(changes)})",
            expected="the configuration that the run began with",
            remedy="Undo the change, or give another --workdir.",
        )


def claim(config: Config, workdir: Path) -> None:
    """Writes `config.json`, whole or not at all.

    Raises: InputError if the folder cannot be written to, or is not the same folder on all processes.
    """
    make(workdir)
    check_shared(workdir)
    if hosts.first():
        files.write_text(workdir / "config.json", configs.to_json(config))


def make(folder: Path) -> None:
    """Makes the folder if there is none. Raises: InputError if it cannot be, or cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            str(folder), got=f"cannot be written to ({error})", expected="a folder for the run", remedy="Name another."
        ) from error


def check_shared(folder: Path, *, within_s: float = 20.0) -> None:
    """Raises InputError on a process that does not see in the folder what the first process writes there."""
    token = folder / f".{hosts.agreed('shared folder', uuid.uuid4().hex)}"
    if hosts.first():
        token.touch()
    hosts.wait("shared folder written")
    until = time.monotonic() + within_s  # network file systems take their time
    while not token.exists() and time.monotonic() < until:
        time.sleep(0.5)
    seen = hosts.exchange("shared folder seen", token.exists())
    if hosts.first():
        token.unlink()
    if not all(seen):
        raise InputError(
            str(folder),
            got=f"another folder on {hosts.named([i for i, each in enumerate(seen) if not each])}",
            expected="one folder that all processes share",
            remedy="Give --workdir on a file system that every host mounts.",
        )


def config_of(workdir: Path) -> Config:
    """Returns the configuration of the run in this folder, without the code that it names.

    Raises: InputError if there is no run, or as `config.from_json`.
    """
    return configs.from_json(*_recorded(workdir))


def _recorded(workdir: Path) -> tuple[str, str]:
    """Returns text and place of the run's config.json. Raises: InputError if there is no run."""
    path = workdir / "config.json"
    if not path.exists():
        raise InputError(
            str(workdir), got="no config.json", expected="the working folder of a run", remedy="Check --workdir."
        )
    return path.read_text(), str(path)


def check_data(digests: Mapping[str, str | None], workdir: Path) -> int | None:
    """Returns the updates in the newest checkpoint, None if there is none.

    Raises: InputError if it was made with other pairs, or processes see different ones.
    """
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1, read_only=True)
    step = checkpoints.latest_step()
    hosts.agree(f"checkpoints in {workdir}", {"step": step})  # before any of them reads one, for which it needs all
    made_with = digests if step is None else checkpoints.record(step)["data"]
    checkpoints.close()
    for split, digest in digests.items():
        if digest != made_with[split]:
            raise InputError(
                f"config.data.{split}",
                got=f"pairs of digest {digest}",
                expected=f"those of digest {made_with[split]}, with which the checkpoint at step {step} was made",
                remedy="Restore the data, or give another --workdir.",
            )
    return step


def newest_step(workdir: Path) -> int:
    """Returns the updates in the newest checkpoint. Raises: InputError if there is none."""
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1, read_only=True)
    step = checkpoints.latest_step()
    checkpoints.close()
    if step is None:
        raise InputError(
            str(workdir / "checkpoints"), got="no checkpoint", expected="one of a training run", remedy="Train first."
        )
    return step


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a log, without a last one that an interruption left unfinished; none if there is no such file."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
