"""Who may import whom: a module imports only from earlier levels, or from its own folder. And who may write files."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEVELS = (
    "__init__ types trees aliases",
    "runtime accumulate batch_checks logprobs losses fields",
    "metrics sharding models data optim config",
    "hf flags",
    "cost parallel steps demo",
    "scoring",
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

WRITER = "dpo_jax/runtime/files.py"
WRITES_ITSELF = {  # and why
    "dpo_jax/hf/folders.py": "weights, a piece at a time, into a folder that is being replaced",
    "dpo_jax/data/entry.py": "arrays of unknown length, into a folder that is being replaced",
}


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
    if path == "dpo_jax/__init__.py":
        return found  # what it exposes is imported when it is first used, and by type checkers
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


def writes(source: str) -> list[str]:
    """Calls by which a source writes or renames a file by itself; through `files` they are allowed."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func)
        owner, _, method = name.rpartition(".")
        arguments = (*call.args, *(keyword.value for keyword in call.keywords))
        constants = [str(each.value) for each in arguments if isinstance(each, ast.Constant)]
        if (
            (method in ("write_text", "write_bytes") and owner not in ("", "files"))
            or (method == "rename" and owner)
            # Of paths, which takes one argument; that of strings takes two, that of dataclasses keywords.
            or (method == "replace" and (owner == "os" or len(call.args) == 1 and not call.keywords))
            or (method in ("copy", "copy2", "copyfile", "move", "copytree") and owner == "shutil")
            or (method == "open" and any(re.fullmatch("[rbt]*[wax+][rwabt+]*", each) for each in constants))
            or name == "os.open"
        ):
            found.append(ast.unparse(call))
    return found


def unit_of(name: str) -> str:
    """The module or folder right below dpo_jax that a dotted name is in; the package itself is `__init__`."""
    part = (name.split(".") + ["__init__"])[1]
    return part if (ROOT / "dpo_jax" / part).exists() or (ROOT / "dpo_jax" / f"{part}.py").exists() else "__init__"


@pytest.mark.parametrize("path", FILES)
def test_a_module_imports_only_from_earlier_levels(path):
    assert unit_of(path.removesuffix(".py").replace("/", ".")) in LEVEL, "a new module needs a level"
    assert breaches(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", FILES)
def test_one_module_writes_files(path):
    found = writes((ROOT / path).read_text())
    if path == WRITER or path in WRITES_ITSELF:
        assert found, "no longer an exception"
    else:
        assert not found, f"write through {WRITER}"
    if path in WRITES_ITSELF:
        assert len(found) == 1 and ".open(" in found[0], "one stream is the exception"


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


@pytest.mark.parametrize(
    "source",
    [
        "os.replace(a, b)",
        "os.rename(a, b)",
        "path.rename(other)",
        "path.replace(other)",
        "path.write_text('x')",
        "(folder / name).write_bytes(b'')",
        "open(path, 'w')",
        "open(path, mode='r+')",
        "path.open('wb')",
        "gzip.open(path, 'xt')",
        "os.open(path, os.O_CREAT)",
        "shutil.copyfile(a, b)",
    ],
)
def test_the_check_itself_finds_a_write(source):
    assert writes(source)


@pytest.mark.parametrize(
    "source",
    [
        "files.write_text(path, 'x')",
        "write_bytes(path, b'')",
        "text.replace('a', 'b')",
        "dataclasses.replace(config, seed=1)",
        "path.open('rb')",
        "open(path)",
        "path.open(encoding='utf-8', newline='')",
    ],
)
def test_the_check_itself_allows_what_writes_nothing(source):
    assert not writes(source)
