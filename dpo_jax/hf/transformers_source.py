"""Finds which fields of a `config.json` the installed transformers reads, in its source text; nothing is imported."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

# Files that read the configurations of all types. Trainers, quantizers and generation change no forward pass.
SHARED = (
    "activations.py",
    "cache_utils.py",
    "configuration_utils.py",
    "masking_utils.py",
    "modeling_*.py",
    "integrations/*attention*.py",
    "integrations/moe.py",
)


class Source(NamedTuple):
    """Text of transformers' files that compute models of one type, by name of file."""

    own: dict[str, str]  # configuration and model of the type; empty where transformers has no such type
    shared: dict[str, str]  # of all types

    def reader(self, name: str) -> str | None:
        """Returns the file that has this name as an attribute, a string or a declared field; None if none has.

        Local variables and words in comments do not count: no configuration is read by them.
        """
        return next((file for file, text in (self.own | self.shared).items() if _has(text, name)), None)

    def is_default(self, name: str, value: Any) -> bool:
        """Returns whether `value` is the one that a model gets where the file lacks the field."""
        declared = f"    {name}: "
        texts = [
            text for file, text in (self.own | self.shared).items() if "configuration_" in file and declared in text
        ]
        stated = [
            found for text in texts for found in re.findall(rf"^{re.escape(declared)}[^=\n]+ = (.+)$", text, re.M)
        ]
        return bool(stated) and all(_literal(each) == value for each in stated)


@functools.cache
def source(model_type: str) -> Source:
    """Reads the files of the installed transformers that compute models of one `model_type`."""
    spec = importlib.util.find_spec("transformers")
    assert spec and spec.origin, "transformers is installed with this package"
    root = Path(spec.origin).parent
    name = model_type.replace("-", "_")
    # The text part of a model, such as gemma3_text, is in the folder of the whole.
    folders = (root / "models" / each for each in (name, name.removesuffix("_text")))
    folder = next((each for each in folders if each.is_dir()), None) if re.fullmatch(r"\w+", name) else None
    own = [path for kind in ("configuration", "modeling") for path in folder.glob(f"{kind}_*.py")] if folder else []
    shared = [path for pattern in SHARED for path in root.glob(pattern)]
    return Source(*({path.name: path.read_text("utf-8") for path in sorted(paths)} for paths in (own, shared)))


def version() -> str:
    """Returns the name and version of the installed transformers."""
    return f"transformers {importlib.metadata.version('transformers')}"


def _has(text: str, name: str) -> bool:
    """Returns whether source text has `.name`, `"name`, or `name:` as a field of a class."""
    # A pattern that begins with the name itself is found fast.
    spans = (found.span() for found in re.finditer(rf"{re.escape(name)}\b", text))
    return any(
        text[start - 1 : start] in {".", "'", '"'} or (text[start - 5 : start], text[end : end + 1]) == ("\n    ", ":")
        for start, end in spans
    )


def _literal(text: str) -> Any:
    """Returns the value of a Python literal; for any other expression an object that equals no field."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return object()
