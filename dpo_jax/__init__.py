"""Direct Preference Optimization in JAX.

The names of `__all__` are imported from their modules when they are first used, so that `import dpo_jax` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo_jax import losses as losses
    from dpo_jax.batch_checks import check_batch as check_batch
    from dpo_jax.losses import make_loss as make_loss
    from dpo_jax.run.loading import LanguageModel as LanguageModel
    from dpo_jax.run.loading import load as load
    from dpo_jax.steps import TrainState as TrainState
    from dpo_jax.steps import init_state as init_state
    from dpo_jax.steps import make_score_step as make_score_step
    from dpo_jax.steps import make_train_step as make_train_step
    from dpo_jax.types import Batch as Batch
    from dpo_jax.types import InputError as InputError

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "InputError",
    "LanguageModel",
    "TrainState",
    "check_batch",
    "init_state",
    "load",
    "losses",
    "make_loss",
    "make_score_step",
    "make_train_step",
]

_MODULES = {  # of the names that are no modules themselves
    "Batch": "types",
    "InputError": "types",
    "LanguageModel": "run.loading",
    "TrainState": "steps",
    "check_batch": "batch_checks",
    "init_state": "steps",
    "load": "run.loading",
    "make_loss": "losses",
    "make_score_step": "steps",
    "make_train_step": "steps",
}


def __getattr__(name: str) -> object:
    if name == "losses":
        return importlib.import_module("dpo_jax.losses")
    if name not in _MODULES:
        raise AttributeError(f"module 'dpo_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dpo_jax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
