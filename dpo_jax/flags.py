"""The flags --config and --config.SECTION.FIELD: recipes and files of fields, with overrides."""

from __future__ import annotations

import difflib
import re
import runpy
import sys
import traceback
from collections.abc import Collection, Sequence

from absl import flags
from ml_collections import config_dict, config_flags

from dpo_jax.config import CODE, Config, _kinds, _thaw, _unknown, flat, freeze, from_file, record_from_json, type_name
from dpo_jax.fields import files, trl
from dpo_jax.runtime.buckets import scheme_of
from dpo_jax.runtime.files import Path, local
from dpo_jax.runtime.files import path as path_of
from dpo_jax.runtime.terminal import say
from dpo_jax.types import InputError, shown


def define_flags(argv: Sequence[str] | None = None, flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines --config, and --config.SECTION.FIELD for each field that `argv` (default: sys.argv) overrides."""
    help_text = "recipe configs/NAME.py[:ARG], YAML or JSON file of fields, or the config.json of a run"
    argv = _check_overrides(list(sys.argv if argv is None else argv), flag_values)
    config_flags.DEFINE_config_file("config", None, help_text, flag_values, sys_argv=_with_values(argv))
    # The parser of ml_collections reads Python files only, and reports errors as tracebacks.
    flag_values["config"].parser = _Source(_overridden(argv))


def parse_flags(argv: Sequence[str] | None = None, flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses the `argv` of `define_flags` and returns what is no flag. Raises: InputError if an argument is invalid."""
    argv = _check_overrides(list(sys.argv if argv is None else argv), flag_values)
    try:
        arguments = flag_values(_with_values(argv))
    except flags.Error as error:
        if isinstance(error.__context__, InputError):  # absl turns what _Source raised into its own error
            raise error.__context__ from None
        raise _flag_error(error, flag_values) from None
    config = flag_values["config"].value
    if config is not None:
        config.update_from_flattened_dict({match[1]: None for arg in argv if (match := _UNSET.fullmatch(arg))})
    return arguments


def from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> Config:
    """Returns the checked configuration of --config and its overrides. Raises: InputError as `freeze` does."""
    if flag_values["config"].value is None:
        raise _no_config("--config", "not given")
    return freeze(flag_values["config"].value)


def load(source: str, overrides: Sequence[str] = ()) -> Config:
    """Returns the configuration of a file with overrides: `load("configs/NAME.py:ARG", ["loss.beta=0.2"])`.

    Raises: InputError, as the command line does.
    """
    argv, flag_values = ["", f"--config={source}", *(f"--config.{each}" for each in overrides)], flags.FlagValues()
    define_flags(argv, flag_values)
    parse_flags(argv, flag_values)
    return from_flags(flag_values)


def _flag_error(error: flags.Error, flag_values: flags.FlagValues) -> InputError:
    """Describes an error of absl: a value of another type, a flag that is unknown or has no value."""
    text = str(error)
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        names = [each for each in flag_values if "." not in each]
        close = difflib.get_close_matches(name, names, n=1)
        fields = [field for field in flat(Config()) if field.rpartition(".")[2] == name]
        meant = list(map(_typed, fields)) or [f"--{each}" for each in close]
        remedy = trl.remedy(name, _typed) or (f"Did you mean {' or '.join(meant)}?" if meant else _SEE_HELP)
        return InputError(f"--{name}", got="no such flag", expected=_OWN_FLAGS, remedy=remedy)
    match = re.match(r"flag --([\w.]+)=(.*?): ", text, re.DOTALL)
    if match is None:
        return InputError("command line", got=text, expected=_OWN_FLAGS, remedy=_SEE_HELP)
    name, value = match[1], match[2]
    expected = getattr(flag_values[name].parser, "syntactic_help", "") or "true or false"
    if name.startswith("config."):
        section = Config()
        for part in name.split(".")[1:-1]:
            section = getattr(section, part)
        expected = type_name(_kinds(type(section))[name.rpartition(".")[2]][0])
    return InputError(f"--{name}", got=f"got {shown(value)}", expected=expected, remedy=f"Write --{name}=VALUE.")


_OWN_FLAGS, _SEE_HELP = "flags of this command", "See dpo-jax COMMAND --help."


def _typed(field: str) -> str:
    """Returns a field, or `field=value`, as it is typed on the command line."""
    return f"--config.{field}" + ("" if "=" in field else "=VALUE")


_UNSET = re.compile(r"--?config\.([^=]+)=None")


def _with_values(argv: Sequence[str]) -> list[str]:
    """Returns the arguments without those that unset a field: absl's parsers know no None."""
    return [arg for arg in argv if not _UNSET.fullmatch(arg)]


def _overridden(argv: Sequence[str]) -> list[str]:
    """Returns the dotted names of the fields that the arguments override."""
    return [match[1] for arg in argv if (match := re.match(r"--?(?:no)?config\.([^=]*)", arg))]


def _check_overrides(argv: list[str], flag_values: flags.FlagValues) -> list[str]:
    """Checks the overrides and returns the arguments, with those of flag files inserted.

    Raises: InputError for an override of a field that does not exist, one that unsets a field which always has a value,
      or one without a config to override.
    """
    try:
        argv = flag_values.read_flags_from_files(argv, force_gnu=False)
    except flags.Error as error:
        got = str(error).removeprefix("ERROR:: ")
        raise InputError("--flagfile", got=got, expected="a readable file", remedy="Check the path.") from None
    names = _overridden(argv)
    fields = flat(Config())
    for name in names:
        if name not in fields:
            head = name.partition(".")[0]
            siblings = [field for field in fields if field.partition(".")[0] == head]
            got, expected, remedy = _unknown(name, siblings or fields, _typed)
            if name in _kinds(Config):
                got, remedy = f"{name!r} is a section of fields", f"Write for example {_typed(siblings[0])}."
            elif not siblings:
                sections = dict.fromkeys(field.partition(".")[0] for field in fields if "." in field)
                expected = f"SECTION.FIELD, with one of the sections {', '.join(sections)}"
            raise InputError(f"--config.{name}", got=got, expected=expected, remedy=remedy)
    for name in [match[1] for arg in argv if (match := _UNSET.fullmatch(arg))]:
        if fields[name] is not None:  # only fields that are unset by default may be unset
            remedy = f"Leave it out for the recipe's value; the default is {fields[name]!r}."
            raise InputError(f"--config.{name}", got="None", expected="a value", remedy=remedy)
    sources = [arg for arg in argv if re.match(r"--?config(=|$)", arg)]
    if len(sources) > 1:
        remedy = "Give one, and the rest as --config.SECTION.FIELD=VALUE."
        raise InputError("--config", got=f"given {len(sources)} times", expected="one file", remedy=remedy)
    if names and not sources:
        raise _no_config("--config", f"not given, but --config.{names[0]} is")
    return argv


def _no_config(place: str, got: str) -> InputError:
    expected = "a recipe (a Python file with get_config), a YAML or JSON file of fields, or the config.json of a run"
    return InputError(place, got=got, expected=expected, remedy="Give for example --config=configs/quickstart.py.")


class _Source(flags.ArgumentParser):
    """Reads the file that --config names into a locked ConfigDict.

    Args:
      overridden: dotted names of the fields that the command line overrides.
    """

    def __init__(self, overridden: Collection[str]):
        self._overridden = overridden

    def parse(self, argument: str) -> config_dict.ConfigDict:
        scheme, slashes, rest = argument.partition("://") if scheme_of(argument) else ("", "", argument)
        name, *args = rest.split(":", 1)
        path = f"{scheme}{slashes}{name}"
        file = path_of(path, "--config")
        if not file.is_file():
            raise _no_config(f"--config={path}", "no such file")
        if files.is_data(path):
            if args:
                got, remedy = f"{args[0]!r} after the name of a file of fields", f"Give --config={path}."
                raise InputError(f"--config={argument}", got=got, expected="only the file", remedy=remedy)
            text = _text_of(file)
            config, recorded = from_file(text, path, overridden=self._overridden), record_from_json(text, path)
            for field in sorted(CODE):
                code, name = getattr(recorded, field), file.name
                if code and not getattr(config, field):
                    say(f"note: {code}, which {name} names, is not called; give --config.{field}={code} to call it")
            return _thaw(config)
        local(path, "--config", "a recipe is code that is run where it is")
        try:
            get_config = runpy.run_path(path).get("get_config")
            if get_config is None:
                raise _no_config(path, "no function get_config")
            config = get_config(*args)
            if not isinstance(config, config_dict.ConfigDict) or not set(_kinds(Config)) <= set(config):
                got = f"get_config returns {'nothing' if config is None else shown(config)}"
                expected = "dpo_jax.config.base() with fields changed"
                remedy = "Begin it with config = base(), and end it with return config."
                raise InputError(path, got=got, expected=expected, remedy=remedy)
            return config.lock()
        except InputError:
            raise
        except Exception as error:
            raise _recipe_error(error, path) from error


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            str(file), got=f"cannot be read ({error})", expected="UTF-8 text", remedy="Check it."
        ) from None


def _recipe_error(error: Exception, path: str) -> InputError:
    """Describes an exception in a recipe, at the recipe's line; for an unknown field it lists the valid ones."""
    frames = list(traceback.walk_tb(error.__traceback__))
    place = ":".join([path, *(str(line) for frame, line in frames if frame.f_code.co_filename == path)][:2])
    owner: object = frames[-1][0].f_locals.get("self")
    name = re.search(r"""["'\\]+(\w+)["'\\]""", str(error))
    fields = list(owner) if isinstance(owner, config_dict.ConfigDict) else []
    typed = re.match(r"Could not override field '(\w+)'.*?\. (.*) is of .*<class '(\w+)'>\.?$", str(error), re.DOTALL)
    if fields and name and name[1] not in fields:
        got, expected, remedy = _unknown(name[1], fields)
    elif typed:
        kinds = {"int": int, "float": float, "bool": bool, "str": str}
        got, expected = f"{typed[1]} = {shown(typed[2])}", type_name(kinds.get(typed[3], Config))
        remedy = "Correct the recipe."
    else:
        got, expected, remedy = f"{type(error).__name__}: {error}", "a recipe that runs", "Correct the recipe."
    return InputError(place, got=got, expected=expected, remedy=remedy)
