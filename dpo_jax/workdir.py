"""The working folder of a run: whose it is, what it logged, how far it came."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dpo_jax import config as configs
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.config import Config
from dpo_jax.types import InputError


def check(config: Config, workdir: Path) -> None:
    """Raises InputError if the folder holds a run whose configuration makes other updates."""
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise InputError(str(workdir), got="is a file", expected="a folder, or nothing yet", remedy="Name another.")
    if not path.exists():
        return
    changes = configs.changed(read_config(workdir), config)
    if changes:
        raise InputError(
            str(path),
            got=f"this folder holds a run with other settings ({'; '.join(changes)})",
            expected="the configuration that the run began with",
            remedy="Undo the change, or give another --workdir.",
        )


def claim(config: Config, workdir: Path) -> None:
    """Writes `config.json`, whole or not at all."""
    workdir.mkdir(parents=True, exist_ok=True)
    beside = workdir / f".config.json.{os.getpid()}"
    beside.write_text(configs.to_json(config))
    os.replace(beside, workdir / "config.json")


def read_config(workdir: Path) -> Config:
    """The configuration that the run in this folder began with. Raises: InputError if there is no run."""
    path = workdir / "config.json"
    if not path.exists():
        raise InputError(
            str(workdir), got="no config.json", expected="the working folder of a run", remedy="Check --workdir."
        )
    return configs.from_json(path.read_text(), str(path))


def finished_steps(workdir: Path) -> int | None:
    """Updates in the newest checkpoint; None if there is none."""
    if not (workdir / "checkpoints").exists():
        return None
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1, read_only=True)
    step = checkpoints.latest_step()
    checkpoints.close()
    return step


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a log; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
