"""Counts what makes a package hard to read: long functions, many parameters, `Any`, docstrings that begin as riddles.

python -m tests.support.counts [PACKAGE_DIR]
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LINES, PARAMETERS = 60, 8  # the most that a function may have; its docstring, `self` and `cls` are not counted
# Functions that these modules export may have one parameter for each option.
PUBLIC = ("losses", "steps", "optim", "scoring", "logprobs")
RIDDLES = ("What ", "Of ", "The same ", "Those ", "That ")
ALIASES = {"np", "jnp", "P", "pa", "pq", "ocp", "plt"}


class Counts(NamedTuple):
    """Findings in a package: each a place and what is there; the two numbers are totals."""

    root_modules: list[str]
    long_functions: list[str]
    many_parameters: list[str]
    many_parameters_public: list[str]
    riddles: list[str]
    aliases: list[str]
    docstrings: int
    uses_of_any: int


def count(package: Path) -> Counts:
    """Reads every Python file of a package."""
    public = public_names(package)
    counts = Counts([], [], [], [], [], [], 0, 0)
    counts.root_modules.extend(path.stem for path in sorted(package.glob("*.py")) if path.stem != "__init__")
    docstrings = uses_of_any = 0
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{path.relative_to(package.parent)}:{getattr(node, 'lineno', 1)}"
            if isinstance(node, ast.Name):
                uses_of_any += node.id == "Any"
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                docstrings += 1
                if f"{text} ".startswith(RIDDLES):
                    counts.riddles.append(f"{place} {text.splitlines()[0]}")
            if isinstance(node, ast.FunctionDef):
                if (lines := lines_of(node)) > LINES:
                    counts.long_functions.append(f"{place} {node.name}: {lines} lines")
                if (parameters := parameters_of(node)) > PARAMETERS:
                    kind = counts.many_parameters_public if node.name in public else counts.many_parameters
                    kind.append(f"{place} {node.name}: {parameters} parameters")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for name in node.names:
                    if name.asname not in ALIASES | {None, name.name}:
                        counts.aliases.append(f"{place} {name.name} as {name.asname}")
    return counts._replace(docstrings=docstrings, uses_of_any=uses_of_any)


def public_names(package: Path) -> set[str]:
    """Returns the names that the modules in PUBLIC offer: of a folder those it imports, of a file those it defines."""
    names = set()
    for module in PUBLIC:
        folder, file = package / module / "__init__.py", package / f"{module}.py"
        for node in ast.parse((folder if folder.exists() else file).read_text()).body:
            if isinstance(node, ast.ImportFrom) and folder.exists():
                names |= {name.asname or name.name for name in node.names}
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
    return {name for name in names if not name.startswith("_")}


def lines_of(function: ast.FunctionDef) -> int:
    """Returns the number of lines from the first one or, if there is a docstring, from its last one to the end."""
    first = function.body[0].end_lineno if ast.get_docstring(function) else function.lineno
    return (function.end_lineno or 0) - (first or 0)


def parameters_of(function: ast.FunctionDef) -> int:
    """Returns the number of named parameters besides `self` and `cls`."""
    names = [each.arg for each in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def main() -> None:
    counts = count(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dpo_jax")
    listed = {
        "modules in the root": counts.root_modules,
        f"functions over {LINES} lines": counts.long_functions,
        f"functions with more than {PARAMETERS} parameters, outside the public interface": counts.many_parameters,
        f"functions with more than {PARAMETERS} parameters, in it": counts.many_parameters_public,
        f"docstrings that begin as riddles, of {counts.docstrings}": counts.riddles,
        "imports under another name": counts.aliases,
    }
    for title, places in listed.items():
        print(f"{len(places):4d} {title}", *places, sep="\n       ")
    print(f"{counts.uses_of_any:4d} uses of Any")


if __name__ == "__main__":
    main()
