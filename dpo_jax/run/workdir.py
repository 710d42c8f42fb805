"""The working folder of a run: its configuration, checkpoints and logs."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import xxhash

from dpo_jax.config import (
    CODE,
    DECIDE_NO_UPDATE,
    RESUMABLE,
    Config,
    changed,
    flat,
    from_json,
    record_from_json,
    to_json,
)
from dpo_jax.run.checkpoints import Checkpoints
from dpo_jax.run.checks import place_of
from dpo_jax.runtime import files, hosts
from dpo_jax.runtime.files import Path
from dpo_jax.types import InputError


class Change(TypedDict):
    """A recorded change of a run's configuration."""

    step: int  # updates made before it
    date: str
    changes: Mapping[str, Sequence[object]]  # by dotted names of fields: value before and after


def check(config: Config, workdir: Path, *, fields: Sequence[str] | None = None) -> None:
    """Raises InputError if the folder holds a run with another configuration.

    Args:
      fields: names of the fields to compare; None: all that change the updates of the run.
    """
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise InputError(
            str(workdir), got="a file", expected="a folder, or nothing yet", remedy="Give another --workdir."
        )
    if not path.exists():
        return
    changes = changed(record_from_json(*_recorded(workdir)), config, fields)
    if changes:
        raise InputError(
            str(path),
            got=f"this folder holds a run with other settings ({'; '.join(changes)})",
            expected="the configuration that the run began with; docs/runs.md lists the fields that may change",
            remedy="Leave the change out, or give another --workdir, which can begin from this run's export with "
            f"--config.model.path={workdir / 'export'}.",
        )


def store_folder(config: Config, folder: Path) -> Path:
    """Returns the folder of stored reference log-probs of a run in a working folder."""
    return files.path(config.reference.path, "config.reference.path") if config.reference.path else folder / "reference"


def resolve_paths(config: Config, workdir: Path | str) -> Config:
    """Replaces `{workdir}` in text fields by the working folder.

    Raises: InputError if `data.train` or `data.eval` contain it and its path has a ',' or '*', which they would parse.
    """
    if {*",*"} & {*str(workdir)} and "{workdir}" in config.data.train + config.data.eval:
        raise InputError(
            "--workdir",
            got=f"{str(workdir)!r}, and the data lie in it",
            expected="a path without ',' and '*', which have a meaning in the names of data",
            remedy="Name another folder.",
        )

    def fill(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes = {field.name: fill(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **changes)
        return value.replace("{workdir}", str(workdir)) if isinstance(value, str) else value

    return fill(config)


def dated(config: Config, workdir: Path) -> Config:
    """Returns the configuration, paths unresolved, with the day that chat templates write.

    It is the one that the configuration names, else the one of the run in this folder or of the reference pass in
    the folder of stored log-probs, else today.
    """
    if config.data.date:
        return config
    date = datetime.date.today().isoformat()
    manifest = store_folder(resolve_paths(config, workdir), workdir) / "manifest.json"
    if (workdir / "config.json").is_file():
        date = record_from_json(*_recorded(workdir)).data.date
    elif manifest.is_file():
        with contextlib.suppress(ValueError):  # a damaged manifest is an error of the pass that reads it
            date = json.loads(manifest.read_text()).get("date") or date
    date = hosts.broadcast("date", date)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=date))


def claim(config: Config, workdir: Path) -> None:
    """Writes `config.json`, whole or not at all.

    Raises: InputError if the folder cannot be written to, or is not the same folder on all processes.
    """
    files.make_folder(workdir)
    check_shared(workdir)
    if hosts.first():
        path = workdir / "config.json"
        if path.exists():  # read from that file, which names code and does not have it called
            recorded = record_from_json(*_recorded(workdir))
            code = {name: getattr(config, name) or getattr(recorded, name) for name in CODE}
            config = dataclasses.replace(config, **code)
        files.write_text(path, to_json(config))


def check_shared(folder: Path, *, within_s: float = 20.0) -> None:
    """Raises InputError, on every process, unless all of them see a file that process 0 writes into the folder."""
    token = folder / f".{hosts.broadcast('shared folder', uuid.uuid4().hex)}"
    if hosts.first():
        files.write_bytes(token, b"")
    hosts.barrier("shared folder written")
    until = time.monotonic() + within_s  # network file systems take their time
    while not token.exists() and time.monotonic() < until:
        time.sleep(0.5)
    seen = hosts.all_gather("shared folder seen", token.exists())
    if hosts.first():
        token.unlink()
    if not all(seen):
        raise InputError(
            str(folder),
            got=f"another folder on {hosts.describe([process for process, sees in enumerate(seen) if not sees])}",
            expected="one folder that all processes share",
            remedy="Give --workdir on a file system that every host mounts.",
        )


def config_of(workdir: Path) -> Config:
    """Returns the configuration of the run in this folder, without the code that it names.

    Raises: InputError if there is no run, or as `config.from_json`.
    """
    return from_json(*_recorded(workdir))


def _recorded(workdir: Path) -> tuple[str, str]:
    """Returns text and place of the run's config.json. Raises: InputError if there is no run."""
    path = workdir / "config.json"
    if not path.exists():
        raise InputError(
            str(workdir), got="no config.json in it", expected="the working folder of a run", remedy="Check --workdir."
        )
    return path.read_text(), str(path)


def run_digest(config: Config, pairs: str | None, changes: Sequence[Change], step: int) -> str:
    """Returns a digest of all settings and data that decide the first `step` updates of a run.

    Args:
      config: the present one.
      pairs: digest of the training pairs.
      changes: those of the configuration so far, as `history.read_changes` returns them.
    """
    values = {name: value for name, value in flat(config).items() if name not in RESUMABLE + DECIDE_NO_UPDATE}
    before = [change for change in changes if change["step"] < step]
    for change in reversed(changes[len(before) :]):
        values |= {name: old for name, (old, _) in change["changes"].items() if name in values}
    decisive = [
        [change["step"], {name: pair for name, pair in change["changes"].items() if name in values}]
        for change in before
    ]
    return xxhash.xxh3_64_hexdigest(json.dumps([values, pairs, decisive], sort_keys=True).encode())


def check_data(
    digests: Mapping[str, str | None], workdir: Path, *, other_eval: Callable[[int], bool] = lambda step: False
) -> int | None:
    """Returns the step of the newest checkpoint; None if there is none.

    Args:
      digests: of the run's pairs, by set; None where there are no pairs.
      other_eval: whether the pairs to evaluate on have changed since the checkpoint after so many updates, as they may.
    Raises: InputError if the checkpoint was made with other pairs, or processes see different checkpoints.
    """
    with Checkpoints(workdir / "checkpoints", keep=1, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        # Before any process reads one, for which all are needed.
        hosts.agree(f"checkpoints in {workdir}", {"step": step})
        made_with = digests if step is None else checkpoints.record(step)["data"]
    for name in ["train"] if step is not None and other_eval(step) else digests:
        if digests[name] != made_with.get(name):
            raise InputError(
                place_of(name),
                got=f"{_pairs(digests[name])}, which are not those of the checkpoint at step {step}",
                expected=_pairs(made_with.get(name)),
                remedy="Restore the data that the run began with, or give another --workdir.",
            )
    return step


def _pairs(digest: str | None) -> str:
    """Names a set of pairs for a message."""
    return f"pairs with the digest {digest}" if digest else "no pairs"


def kept_steps(workdir: Path) -> list[int]:
    """Returns the steps of all complete checkpoints, in order. Raises: InputError if there are none."""
    with Checkpoints(workdir / "checkpoints", keep=1, read_only=True) as checkpoints:
        steps = checkpoints.all_steps()
    if not steps:
        raise InputError(
            str(workdir), got="no checkpoint in it", expected="one of a training run", remedy="Run dpo-jax train first."
        )
    return steps


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a log, without a last one that an interruption left unfinished; none if the file is missing."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
