"""The command line: `dpo-jax COMMAND --config=configs/NAME.py [--config.section.field=value ...] --workdir=DIR`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from dpo_jax import config as configs
from dpo_jax.config import Config
from dpo_jax.types import InputError

USAGE = """\
dpo-jax COMMAND --config=configs/NAME.py [--config.section.field=value ...] --workdir=DIR

  train      all of it: reference pass, updates, evaluation, export; run again, it goes on where it stopped
  reference  only the reference pass, into reference.path
  evaluate   metrics of the newest checkpoint of DIR on data.eval, as JSON
  inspect    what the data looks like once rendered, tokenised, cut and packed; touches no device
  export     the newest checkpoint of DIR as a Hugging Face folder, into --out (default DIR/export, or DIR/export-STEP
             while the run goes on)

evaluate and export read DIR/config.json where no --config is given. The fields are listed in README.md.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; prints what is wrong with its input on one line and exits with status 2."""
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
        command(*_parse(argv[1], [argv[0], *argv[2:]]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _parse(command: str, argv: list[str]) -> tuple[Config, Path, flags.FlagValues]:
    values = flags.FlagValues()
    configs.define_flags(argv, values)
    flags.DEFINE_string("workdir", None, "working folder of the run", flag_values=values)
    if command == "export":
        flags.DEFINE_string("out", None, "folder to write", flag_values=values)
    if command == "inspect":
        flags.DEFINE_integer("pairs", 3, "pairs to show", lower_bound=0, flag_values=values)
    rest = configs.parse_flags(argv, values)[1:]
    if rest:
        raise InputError(
            "command line", got=f"unexpected {rest[0]!r}", expected="only --flags", remedy="See dpo-jax --help."
        )
    if not values["workdir"].value:
        raise InputError("--workdir", got="not given", expected="a folder", remedy="Give for example --workdir=runs/1.")
    workdir = Path(values["workdir"].value)
    if values["config"].value is None and command in OF_A_RUN:
        from dpo_jax.workdir import read_config

        return read_config(workdir), workdir, values
    return configs.from_flags(values), workdir, values


# Each command imports what it needs: --help and mistyped flags answer at once, and inspect loads no jax backend.


def _train(config: Config, workdir: Path, _: Any) -> None:
    from dpo_jax import train

    train.run(config, workdir)


def _reference(config: Config, workdir: Path, _: Any) -> None:
    from dpo_jax import train

    train.score_reference(config, workdir)


def _evaluate(config: Config, workdir: Path, _: Any) -> None:
    from dpo_jax import train

    print(json.dumps(train.evaluate_checkpoint(config, workdir)))


def _inspect(config: Config, workdir: Path, values: Any) -> None:
    from dpo_jax import inspect

    inspect.show(config, workdir, pairs=values["pairs"].value)


def _export(config: Config, workdir: Path, values: Any) -> None:
    from dpo_jax import train

    out = values["out"].value
    train.export_checkpoint(config, workdir, Path(out) if out else None)


COMMANDS: dict[str, Callable[[Config, Path, Any], None]] = {
    "train": _train,
    "reference": _reference,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "export": _export,
}
OF_A_RUN = ("evaluate", "export")  # commands that a finished working folder is enough for
