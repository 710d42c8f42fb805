"""The command line: `dpo-jax COMMAND --config=configs/NAME.py [--config.section.field=value ...] --workdir=DIR`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from dpo_jax import config as configs
from dpo_jax.config import Config
from dpo_jax.flags import define_flags, from_flags, parse_flags
from dpo_jax.types import InputError

USAGE = """\
dpo-jax COMMAND --config=configs/NAME.py [--config.section.field=value ...] --workdir=DIR

  train      all of it: reference pass, updates, evaluation, export; run again, it goes on where it stopped
  reference  only the reference pass, into reference.path
  evaluate   metrics of the newest checkpoint of DIR on data.eval, as JSON
  inspect    what the data looks like once rendered, tokenized, cut and packed; touches no device
  plan       what a run would take on --topology=v5p:4x4x4[,slices=2] or h100:64: memory of a chip, time, cost; without
             weights, data or that hardware. --sweep compares meshes, remat policies and microbatches,
             --reference_in_step with holding two models. Ends with status 3 where memory does not suffice
  export     the newest checkpoint of DIR as a Hugging Face folder, into --out (default DIR/export, or DIR/export-STEP
             while the run goes on); of a run with adapters these alone, or with --merge the model with them
             merged into it (default DIR/merged-STEP)

evaluate and export read DIR/config.json where no --config is given. The fields are listed in README.md.

Over several processes, the same command on each: on TPU hosts, under SLURM and under Open MPI they find one another;
elsewhere give --coordinator=HOST:PORT --processes=N --process=I. Asked to stop by SIGTERM, a run saves its state and
exits with status 75: the same command goes on from there.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 2 for bad input, said in one line; `hosts.STOPPED` if asked to stop."""
    argv = list(sys.argv if argv is None else argv)
    # What these two warn of is as it should be: folders that are only read, and an environment without torch.
    logging.set_verbosity(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if len(argv) < 2 or argv[1] in ("-h", "--help", "help"):
        print(USAGE, end="")
        sys.exit(0 if len(argv) > 1 else 2)
    try:
        command = COMMANDS.get(argv[1])
        if command is None:
            raise InputError(
                "command line",
                got=f"unknown command {argv[1]!r}",
                expected=f"one of {', '.join(COMMANDS)}",
                remedy="See dpo-jax --help.",
            )
        if "" not in sys.path:
            sys.path.insert(0, "")  # as `python -m` has it: a configuration may name a module beside it
        parsed = _parse(argv[1], [argv[0], *argv[2:]])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if argv[1] in ALONE:
        _report_errors(command, parsed)
    else:
        _together(argv[1], command, parsed)


def _report_errors(command: Callable[..., None], parsed: tuple) -> None:
    try:
        command(*parsed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _together(name: str, command: Callable[..., None], parsed: tuple) -> None:
    """Runs a command on all processes of a run; if it fails on one, none is left waiting."""
    from dpo_jax.runtime import hosts

    config, workdir, values = parsed
    try:
        hosts.join(values["coordinator"].value, values["processes"].value, values["process"].value)
        facts = {"command": name, "workdir": str(workdir), "code": hosts.code_digest(), **configs.flat(config)}
        hosts.agree("command, code and configuration", facts)
        command(config, workdir, values)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        hosts.leave(2, str(error))
    except hosts.Stopped as error:
        if hosts.first():
            print(f"{error}; the same command goes on from there", file=sys.stderr)
        hosts.leave(hosts.STOPPED)
    except Exception as error:
        if hosts.count() == 1:
            raise
        traceback.print_exc()
        hosts.leave(1, f"{type(error).__name__}: {error}")


def _parse(command: str, argv: list[str]) -> tuple[Config, Path, flags.FlagValues]:
    values = flags.FlagValues()
    define_flags(argv, values)
    flags.DEFINE_string("workdir", None, "working folder of the run", flag_values=values)
    if command == "plan":
        flags.DEFINE_string("topology", None, "CHIP:SHAPE[,slices=N]", flag_values=values)
        flags.DEFINE_boolean("sweep", False, "compare configurations", flag_values=values)
        flags.DEFINE_boolean("reference_in_step", False, "beside it, with the reference's weights", flag_values=values)
    if command not in ALONE:
        flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0", flag_values=values)
        flags.DEFINE_integer("processes", None, "how many there are", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("process", None, "which this is, from 0", lower_bound=0, flag_values=values)
    if command == "export":
        flags.DEFINE_string("out", None, "folder to write", flag_values=values)
        flags.DEFINE_boolean("merge", False, "merge adapters into the model", flag_values=values)
    if command == "inspect":
        flags.DEFINE_integer("pairs", 3, "pairs to show", lower_bound=0, flag_values=values)
    rest = parse_flags(argv, values)[1:]
    if rest:
        raise InputError(
            "command line", got=f"unexpected {rest[0]!r}", expected="only --flags", remedy="See dpo-jax --help."
        )
    if command == "plan":
        return from_flags(values), Path(), values
    if not values["workdir"].value:
        raise InputError("--workdir", got="not given", expected="a folder", remedy="Give for example --workdir=runs/1.")
    workdir = Path(values["workdir"].value)
    if values["config"].value is None and command in OF_A_RUN:
        from dpo_jax.run.workdir import read_config

        return read_config(workdir), workdir, values
    return from_flags(values), workdir, values


# Each command imports what it needs: --help and mistyped flags answer at once, and inspect loads no jax backend.


def _train(config: Config, workdir: Path, _: Any) -> None:
    from dpo_jax import train

    train.run(config, workdir)


def _reference(config: Config, workdir: Path, _: Any) -> None:
    from dpo_jax import commands

    commands.score_reference(config, workdir)


def _evaluate(config: Config, workdir: Path, _: Any) -> None:
    from dpo_jax import commands
    from dpo_jax.runtime import hosts

    row = commands.evaluate_checkpoint(config, workdir)
    if hosts.first():
        print(json.dumps(row))


def _inspect(config: Config, workdir: Path, values: Any) -> None:
    from dpo_jax.reporting import data_summary

    data_summary.show(config, workdir, pairs=values["pairs"].value)


def _plan(config: Config, workdir: Path, values: Any) -> None:
    if not values["topology"].value:
        raise InputError(
            "--topology", got="not given", expected="CHIP:SHAPE", remedy="Give for example --topology=v5p:4x4x4."
        )
    from dpo_jax.plan.command import run

    options = {"sweeping": values["sweep"].value, "reference_in_step": values["reference_in_step"].value}
    sys.exit(run(config, values["topology"].value, **options))


def _export(config: Config, workdir: Path, values: Any) -> None:
    from dpo_jax import commands

    out = values["out"].value
    commands.export_checkpoint(config, workdir, Path(out) if out else None, merge=values["merge"].value)


COMMANDS: dict[str, Callable[[Config, Path, Any], None]] = {
    "train": _train,
    "reference": _reference,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "plan": _plan,
    "export": _export,
}
OF_A_RUN = ("evaluate", "export")  # commands that a finished working folder is enough for
ALONE = ("inspect", "plan")  # commands of one process, which touch no device
