"""The command line: `dpo-jax COMMAND --config=configs/NAME.py [--config.section.field=value ...] --workdir=DIR`."""

from __future__ import annotations

import difflib
import importlib
import os
import pathlib
import platform
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags, logging

from dpo_jax import __version__
from dpo_jax.runtime.files import Path, path
from dpo_jax.types import InputError

if TYPE_CHECKING:
    from dpo_jax.config import Config

USAGE = """\
dpo-jax COMMAND --config=configs/NAME.py [--config.section.field=value ...] --workdir=DIR

  train      everything: reference pass, updates, evaluation, export; if run again, it continues where it stopped
  reference  only the reference pass, into reference.path
  evaluate   metrics of a checkpoint of DIR on data.eval, as JSON; or of any model, --model=FOLDER_OR_HUB_ID, against
             --reference=ANOTHER, the reference of DIR, or none. Without --workdir no --config is needed
  inspect    the data after the chat template, tokenization, truncation and packing, with --pairs=N examples of each
             set; touches no device
  plan       memory per chip, time and cost of a run on --topology=v5p:4x4x4[,slices=2] or h100:64, without weights,
             data or that hardware. --sweep compares meshes, remat policies and microbatches, --reference_in_step
             compares with holding two models. Ends with status 3 where memory does not suffice
  export     a checkpoint of DIR as a Hugging Face folder, into --out (default DIR/export for the step that the finished
             run exported, else DIR/export-STEP); of a run with adapters these alone, or with --merge the model with
             them merged into it (default DIR/merged-STEP)

--step=N, last or best says which checkpoint; without it, it is the best if checkpoint.best is set, else the newest.
dpo-jax COMMAND --help lists the flags and fields of a command, with meaning, range and default; dpo-jax --version names
the version. evaluate and export read DIR/config.json where no --config is given.

Over several processes, the same command on each: on TPU hosts, under SLURM and under Open MPI they find one another;
elsewhere give --coordinator=HOST:PORT --processes=N --process=I. Asked to stop by SIGTERM or Ctrl-C, a run saves its
state and exits with status 75: the same command goes on from there. A second Ctrl-C ends it at once.
"""

Define = Callable[..., flags.FlagHolder]  # absl's flags.DEFINE_*
Value = str | int | bool | None  # of a flag


class Flag(NamedTuple):
    """A flag of one command, passed to its function under its name."""

    define: Define
    name: str
    default: Value
    help: str
    limits: dict[str, int] = {}
    value: str = ""  # stands for its value in help, where it has no default

    @property
    def typed(self) -> str:
        """The flag as it is typed."""
        if self.define is flags.DEFINE_boolean:
            return f"--{self.name}"
        return f"--{self.name}={self.value or self.default}"


class Command(NamedTuple):
    """How a command of `dpo_jax.commands`, a function of its name, is called."""

    flags: tuple[Flag, ...] = ()
    one_process: bool = False  # runs without devices and without other processes
    needs_workdir: bool = True
    reads_run: bool = False  # without --config it reads WORKDIR/config.json
    timed: bool = False  # its function takes a Stopwatch, `watch`, that began when this process did
    unread: str = ""  # sections and fields that it does not read, which its help leaves out


STEP = Flag(flags.DEFINE_string, "step", None, "checkpoint to read: a step, last or best", value="N|last|best")

COMMANDS = {
    "train": Command(unread="plan", timed=True),
    "reference": Command(unread="plan eval export profile"),
    "evaluate": Command(
        flags=(
            STEP,
            Flag(
                flags.DEFINE_string,
                "model",
                None,
                "any model, in place of a checkpoint: a folder or Hub id",
                value="MODEL",
            ),
            Flag(flags.DEFINE_string, "reference", None, "reference of --model: a folder or Hub id", value="MODEL"),
        ),
        needs_workdir=False,
        reads_run=True,
        unread="plan checkpoint.every_steps checkpoint.keep eval export log profile",
    ),
    "inspect": Command(
        flags=(Flag(flags.DEFINE_integer, "pairs", 3, "pairs to show, >= 0", {"lower_bound": 0}),),
        one_process=True,
        unread="plan checkpoint eval export log profile mesh.replica mesh.fsdp mesh.tensor model.dtype",
    ),
    "plan": Command(
        flags=(
            Flag(
                flags.DEFINE_string,
                "topology",
                "",
                "chips to plan for, such as v5p:4x4x4, v5p-128 or h100:64",
                value="CHIP:SHAPE",
            ),
            Flag(flags.DEFINE_boolean, "sweep", False, "compare configurations"),
            Flag(flags.DEFINE_boolean, "reference_in_step", False, "compare with an update that holds the reference"),
        ),
        one_process=True,
        needs_workdir=False,
        unread="prepare tokenizer sft checkpoint eval export log profile data.train data.eval data.format data.columns "
        "data.rankings data.turns data.on_template_loss data.date data.shuffle data.truncate_prompt data.on_bad_row "
        "data.cache_dir reference.path",
    ),
    "export": Command(
        flags=(
            Flag(flags.DEFINE_string, "out", "", "folder to write", value="DIR"),
            Flag(flags.DEFINE_boolean, "merge", False, "merge adapters into the model"),
            STEP,
        ),
        reads_run=True,
        unread="plan checkpoint.every_steps checkpoint.keep eval log profile",
    ),
}
COMMON = (
    Flag(
        flags.DEFINE_string,
        "config",
        None,
        "recipe configs/NAME.py[:ARG], YAML or JSON file of fields, or config.json of a run",
        value="FILE",
    ),
    Flag(flags.DEFINE_string, "workdir", None, "working folder of the run", value="DIR"),
)
PROCESSES = (
    Flag(flags.DEFINE_string, "coordinator", None, "address of process 0", value="HOST:PORT"),
    Flag(flags.DEFINE_integer, "processes", None, "number of processes, >= 1", {"lower_bound": 1}, "N"),
    Flag(flags.DEFINE_integer, "process", None, "index of this process, from 0", {"lower_bound": 0}, "I"),
)


class Parsed(NamedTuple):
    """A parsed command line."""

    config: Config
    workdir: Path | None
    options: dict[str, Value]  # values of the command's flags, by name
    place: dict[str, Any]  # values of the flags in PROCESSES, by name


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 2 for bad input, after a line that says so; `hosts.STOPPED` if asked to stop.

    Ctrl-C before there is anything to save ends it with 130.
    """
    try:
        _main(argv)
    except KeyboardInterrupt:
        from dpo_jax.runtime import hosts

        print("\ninterrupted", file=sys.stderr)
        hosts.leave(hosts.INTERRUPTED, "interrupted")


def _main(argv: Sequence[str] | None) -> None:
    argv = list(sys.argv if argv is None else argv)
    # Two libraries warn of what is intended: folders that are only read, and an environment without torch.
    logging.set_verbosity(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if (text := shown_at_once(argv[1:])) is not None:
        print(text, end="")
        sys.exit(0 if len(argv) > 1 else 2)
    try:
        command = COMMANDS.get(argv[1])
        if command is None:
            close = difflib.get_close_matches(argv[1], COMMANDS)
            raise InputError(
                "command line",
                got=f"unknown command {argv[1]!r}",
                expected=f"one of {', '.join(COMMANDS)}",
                remedy=f"Did you mean dpo-jax {close[0]}?" if close else "See dpo-jax --help.",
            )
        find_modules_here()
        parsed = parse(command, [argv[0], *argv[2:]])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if command.one_process:
        run_alone(argv[1], parsed)
    else:
        run_together(argv[1], parsed)


def shown_at_once(arguments: Sequence[str]) -> str | None:
    """Returns the text that arguments ask for instead of a command: help or the version; None: they ask for neither."""
    name = next((each for each in arguments if each in COMMANDS), None)
    wants_help = not arguments or arguments[0] == "help" or {"-h", "--help"} & {*arguments}
    if wants_help:
        return help_of(name) if name else USAGE
    if arguments[0] in ("--version", "version"):
        libraries = (f"{library} {metadata.version(library)}" for library in ("jax", "transformers"))
        return f"dpo-jax {__version__} ({', '.join(libraries)}, Python {platform.python_version()})\n"
    return None


def help_of(name: str) -> str:
    """Returns the help of a command: its lines of USAGE, its flags and the fields that it reads."""
    from dpo_jax.reporting.fields import entry, fields_text

    command, width = COMMANDS[name], min(shutil.get_terminal_size().columns, 120) - 1
    lines = re.search(rf"^  {name} +(.*(?:\n   .*)*)", USAGE, re.MULTILINE)
    assert lines
    about = textwrap.fill(f"dpo-jax {name}: {' '.join(lines[1].split())}", width)
    flags_here = (*COMMON, *command.flags, *(() if command.one_process else PROCESSES))
    text = [line for flag in flags_here for line in entry(flag.typed, flag.help, width)]
    title = "Fields, each typed as --config.NAME=VALUE and shown with its default; None: unset."
    return "\n".join(
        [about, "", *text, "", *textwrap.wrap(title, width), "", fields_text(command.unread.split(), width)]
    )


def find_modules_here() -> None:
    """Lets recipes name modules of the working directory, which comes last, so that they shadow no installed one."""
    directory = os.getcwd()
    sys.path[:] = [entry for entry in sys.path if entry not in ("", directory)] + [""]


def check_flags(argv: Sequence[str], own: Sequence[Flag]) -> None:
    """Raises InputError for a flag that another command has and this one, with its `own` flags, has not."""
    names = {re.sub(r"^--?|=.*", "", each) for each in argv if each.startswith("-")} - {flag.name for flag in own}
    for name, command in COMMANDS.items():
        flags_there = (*command.flags, *(() if command.one_process else PROCESSES))
        for flag in [each for each in flags_there if each.name in names]:
            got = f"no flag of this command, but of dpo-jax {name}"
            raise InputError(f"--{flag.name}", got=got, expected="flags of this command", remedy="Leave it out.")


def for_any_model(argv: list[str]) -> list[str]:
    """Adds defaults to arguments that name no run: a recipe that changes no field, and --model as model.path."""
    given: dict[str, str] = {}
    for each, after in zip(argv[1:], [*argv[2:], ""], strict=False):
        if match := re.fullmatch(r"--?([\w.]+)(?:=(.*))?", each):
            given[match[1]] = after if match[2] is None else match[2]
    if "workdir" in given or not {"model", "config.model.path", "config"} & given.keys():
        return argv
    recipe = [] if "config" in given else [f"--config={pathlib.Path(__file__).parent / 'demo' / 'defaults.py'}"]
    model = [f"--config.model.path={given['model']}"] if given.get("model") and "config.model.path" not in given else []
    return [argv[0], *recipe, *model, *argv[1:]]


def parse(command: Command, argv: list[str]) -> Parsed:
    """Parses the arguments after the command. Raises: InputError if any is invalid."""
    from dpo_jax.flags import define_flags, from_flags, parse_flags

    values = flags.FlagValues()
    if command.reads_run and not command.needs_workdir:
        argv = for_any_model(argv)
    define_flags(argv, values)
    processes = () if command.one_process else PROCESSES
    check_flags(argv, (*command.flags, *processes))
    for flag in (*COMMON[1:], *command.flags, *processes):
        flag.define(flag.name, flag.default, flag.help, flag_values=values, **flag.limits)
    unexpected = parse_flags(argv, values)[1:]
    if unexpected:
        remedy = "Write fields as --config.section.field=value, such as --config.loss.beta=0.1."
        raise InputError("command line", got=f"unexpected {unexpected[0]!r}", expected="only --flags", remedy=remedy)
    if command.needs_workdir and not values["workdir"].value:
        raise InputError("--workdir", got="not given", expected="a folder", remedy="Give for example --workdir=runs/1.")
    workdir = path(values["workdir"].value, "--workdir") if values["workdir"].value else None
    if values["config"].value is None and command.reads_run and workdir is not None:
        from dpo_jax.run.workdir import config_of

        config = config_of(workdir)
    else:
        config = from_flags(values)
    options, place = ({each.name: values[each.name].value for each in group} for group in (command.flags, processes))
    return Parsed(config, workdir, options, place)


def call(name: str, parsed: Parsed) -> None:
    """Says what is about to run, calls the command's function, and exits with the status that it returns, if any."""
    # Imported here, so that --help and mistyped flags do not wait for the import of JAX.
    from dpo_jax.runtime.terminal import say, waiting

    say(f"dpo_jax {__version__}, {name}: {described(COMMANDS[name], parsed)}")
    with waiting("loading libraries"):
        commands, clocks = map(importlib.import_module, ("dpo_jax.commands", "dpo_jax.runtime.clocks"))
    watch = {"watch": clocks.Stopwatch(clocks.age_of_process())} if COMMANDS[name].timed else {}
    status = getattr(commands, name)(parsed.config, parsed.workdir, **parsed.options, **watch)
    if status:
        sys.exit(status)


def described(command: Command, parsed: Parsed) -> str:
    """Returns, for the first line of a command, the model, data and working folder that it reads and that are named."""
    config, unread = parsed.config, command.unread.split()
    data = () if "data.train" in unread else (config.data.train, config.data.eval)
    folder = str(parsed.workdir or "")
    named = {"model": config.model.path, "data": ", ".join(filter(None, data)), "folder": folder}
    return ", ".join(f"{what} {name}" for what, name in named.items() if name)


def run_alone(name: str, parsed: Parsed) -> None:
    """Runs a command in this process alone."""
    try:
        call(name, parsed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_together(name: str, parsed: Parsed) -> None:
    """Runs a command on all processes of a run; if it fails on one, none is left waiting."""
    import jax

    from dpo_jax.config import flat
    from dpo_jax.runtime import hosts

    try:
        hosts.join(**parsed.place)
        options = {f"--{option}": value for option, value in parsed.options.items()}
        facts = {"command": name, "workdir": str(parsed.workdir), "code": hosts.code_digest()}
        facts |= options | flat(parsed.config)
        hosts.agree("command, code and configuration", facts)
        call(name, parsed)
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
        if isinstance(error, jax.errors.JaxRuntimeError):
            hosts.await_end()  # a collective fails if a process is killed
        traceback.print_exc()
        hosts.leave(1, f"{type(error).__name__}: {error}")
