"""Old names of public functions, which still import, with a warning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def forward(module: str, moved: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a `__getattr__` for `module`, which finds each old name where `moved` says, as in "dpo_jax.trees.join".

    It warns with DeprecationWarning, and raises AttributeError for a name that is not in `moved`.
    """

    def __getattr__(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, current = moved[name].rpartition(".")
        warnings.warn(f"{module}.{name} is now {moved[name]}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(place), current)

    return __getattr__
