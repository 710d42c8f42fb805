"""Records which fields of a configuration a command reads."""

import contextlib
import dataclasses
import sys

from dpo_jax import config

# Code that passes over all fields, to copy or to compare them.
PASSES = ("/config.py", "/flags.py", "/dataclasses.py")


@contextlib.contextmanager
def recorded(monkeypatch):
    """Yields a set that gains the dotted name of each field that is read inside."""
    read = set()

    def record(section, prefix):
        fields = dataclasses.fields(section)
        names = {field.name for field in fields if not dataclasses.is_dataclass(getattr(section(), field.name))}

        def get(self, name):
            code = sys._getframe(1).f_code
            if name in names and not code.co_filename.endswith(PASSES) and "resolve_paths" not in code.co_qualname:
                read.add(prefix + name)
            return object.__getattribute__(self, name)

        monkeypatch.setattr(section, "__getattribute__", get)

    with monkeypatch.context() as monkeypatch:
        record(config.Config, "")
        for name, value in vars(config.Config()).items():
            if dataclasses.is_dataclass(value):
                record(type(value), f"{name}.")
        yield read
