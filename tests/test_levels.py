"""Who may import whom: a module imports only from earlier levels, or from its own folder."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEVELS = (
    "__init__ types trees aliases",
    "runtime accumulate metrics logprobs losses",
    "sharding models data optim config",
    "hf flags",
    "cost parallel steps scoring demo",
    "reference",
    "run",
    "reporting plan",
    "export",
    "train",
    "commands",
    "cli",
    "__main__",
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}

# Whatever else a package of ours may import, these stay in one place.
ONLY_IN = {"ml_collections": {"dpo_jax/config.py", "dpo_jax/flags.py"}, "torch": set(), "trl": set()}
PURE = {"losses": {"jax", "jaxtyping", "numpy"}, "logprobs": {"jax", "jaxtyping", "numpy"}}
NOT_IN_DATA = {"jax", "flax", "optax"}  # tokenized data is made on machines and in processes without a device

FILES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "dpo_jax").rglob("*.py"))]
SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("configs", "examples", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def imported(source: str) -> set[str]:
    """Dotted names that a source imports, anywhere in it; `from a import b` counts as `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def breaches(path: str, source: str) -> list[str]:
    """What a file of the package imports and may not."""
    unit = unit_of("dpo_jax." + path.removeprefix("dpo_jax/").removesuffix(".py").replace("/", "."))
    found = []
    for name in sorted(imported(source)):
        top = name.partition(".")[0]
        if top == "dpo_jax":
            target = unit_of(name)
            if target != unit and LEVEL[target] >= LEVEL[unit]:
                found.append(f"{name}: level {LEVEL[target]}, from level {LEVEL[unit]}")
            if unit in PURE and target not in ("types", *PURE):
                found.append(f"{name}: {unit} imports types alone, and what is as pure")
        elif path not in ONLY_IN.get(top, {path}):
            found.append(f"{name}: not here")
        elif unit in PURE and top not in PURE[unit] | sys.stdlib_module_names:
            found.append(f"{name}: {unit} imports jax alone")
        elif unit == "data" and top in NOT_IN_DATA:
            found.append(f"{name}: data is numpy")
    return found


def unit_of(name: str) -> str:
    """The module or folder right below dpo_jax that a dotted name is in; the package itself is `__init__`."""
    part = (name.split(".") + ["__init__"])[1]
    return part if (ROOT / "dpo_jax" / part).exists() or (ROOT / "dpo_jax" / f"{part}.py").exists() else "__init__"


@pytest.mark.parametrize("path", FILES)
def test_a_module_imports_only_from_earlier_levels(path):
    assert unit_of(path.removesuffix(".py").replace("/", ".")) in LEVEL, "a new module needs a level"
    assert breaches(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", SCRIPTS)
def test_torch_is_only_in_tests_and_benchmarks(path):
    assert not {"torch", "trl"} & {name.partition(".")[0] for name in imported((ROOT / path).read_text())}


@pytest.mark.parametrize(
    "path, source",
    [
        ("dpo_jax/losses/pairwise.py", "from dpo_jax import optim"),
        ("dpo_jax/losses/pairwise.py", "from dpo_jax.logprobs import completion_logps"),
        ("dpo_jax/losses/pairwise.py", "from dpo_jax.config import Loss"),
        ("dpo_jax/losses/pairwise.py", "import optax"),
        ("dpo_jax/data/layout.py", "from dpo_jax.models import decoder"),
        ("dpo_jax/data/layout.py", "import jax.numpy as jnp"),
        ("dpo_jax/models/decoder.py", "def f():\n    from dpo_jax import sharding"),
        ("dpo_jax/steps.py", "from dpo_jax.train import run"),
        ("dpo_jax/types.py", "import dpo_jax.config"),
        ("dpo_jax/train.py", "from ml_collections import config_dict"),
        ("dpo_jax/hf/checkpoints.py", "import torch"),
    ],
)
def test_the_check_itself_finds_a_breach(path, source):
    assert breaches(path, source)
