"""Every configuration field with its meaning, default and range, for `--help` and for docs/configuration.md."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Collection
from typing import NamedTuple

from dpo_jax import config
from dpo_jax.losses.registry import OPTIONS

# One sentence for each section of the configuration; "" is for the fields outside of any section.
SECTIONS = {
    "": "Fields that belong to no section.",
    "model": "The model to train and how it is computed.",
    "tokenizer": "The tokenizer and its chat template.",
    "data": "Where preferences come from and how they are tokenized and packed into rows.",
    "loss": "The training objective. [objectives.md](objectives.md) says which loss to choose, with formulas. "
    "An option that is unset has the default of the chosen loss. An option that this loss does not have is an error.",
    "train": "Batch size and length of training.",
    "lora": "Low-rank adapters (LoRA) on a frozen model.",
    "sft": "Supervised fine-tuning on the chosen answers, as a first stage. Its result is the reference and the "
    "starting point of preference training.",
    "optimizer": "Optimizer and learning-rate schedule.",
    "reference": "The reference pass and where its log-probabilities are stored.",
    "eval": "Evaluation on `data.eval`.",
    "checkpoint": "Checkpoints, from which a run resumes.",
    "mesh": "The device mesh. The product of the three axes is the number of devices.",
    "plan": "Assumptions of `dpo-jax plan`. Other commands ignore this section.",
    "log": "Where metrics are written.",
    "profile": "Profiling.",
    "export": "The exported Hugging Face folder.",
}


class Field(NamedTuple):
    """A configuration field."""

    name: str  # dotted
    type: str
    default: object
    allowed: str  # values that are not refused; empty: all of the type
    resume: str  # whether it may differ when a run resumes: may change, recorded (it may, and that is recorded), fixed
    description: str

    @property
    def typed(self) -> str:
        """The field and its default, as they are typed after `--config.`."""
        value = str(self.default).lower() if isinstance(self.default, bool) else self.default
        return f"{self.name}={value}"


def fields() -> dict[str, list[Field]]:
    """Returns the fields of each section in their order; "" holds those outside of sections.

    Raises: ValueError for a field or a section without a description.
    """
    defaults = config.Config()
    sections: dict[str, object] = {"": defaults}
    sections |= {name: value for name, value in vars(defaults).items() if dataclasses.is_dataclass(value)}
    if sections.keys() != SECTIONS.keys():
        raise ValueError(f"SECTIONS and config.Config differ in {', '.join(sections.keys() ^ SECTIONS.keys())}")
    return {name: _fields_of(section, f"{name}." if name else "") for name, section in sections.items()}


def _fields_of(section: object, prefix: str) -> list[Field]:
    """Returns the fields of a section that are no sections themselves."""
    descriptions, rows = dict(comments()[type(section).__name__]), []
    if isinstance(section, config.Loss):
        descriptions |= {name: option.help for name, option in OPTIONS.items()}
    for field in dataclasses.fields(type(section)):  # type: ignore[arg-type]
        value, name = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            continue
        if field.name not in descriptions:
            raise ValueError(f"{config.__file__}: {name} has no trailing comment")
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        allowed = config.RULES[name][1] if name in config.RULES else ""
        resume = "may change" if name in config.RESUMABLE else "recorded" if name in config.CHANGEABLE else "fixed"
        rows.append(Field(name, kind.removesuffix(" | None"), value, allowed, resume, descriptions[field.name]))
    return rows


@functools.cache
def comments() -> dict[str, dict[str, str]]:
    """Returns {class: {field: trailing comment}} of config.py, from its text."""
    text = inspect.getsource(config)
    lines, found = text.splitlines(), {}
    for section in ast.parse(text).body:
        if isinstance(section, ast.ClassDef):
            fields = [node for node in section.body if isinstance(node, ast.AnnAssign)]
            pairs = [(ast.unparse(node.target), lines[node.lineno - 1].partition("  # ")[2]) for node in fields]
            found[section.name] = {name: comment for name, comment in pairs if comment}
    return found


def fields_text(unread: Collection[str], width: int) -> str:
    """Returns the fields by section, wrapped to a width.

    Args:
      unread: names of sections, and dotted names of fields, to leave out.
    """
    parts = []
    for section, rows in fields().items():
        rows = [row for row in rows if section not in unread and row.name not in unread]
        if not rows:
            continue
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"docs/\1", SECTIONS[section]).replace("`", "")
        parts.append(textwrap.fill(f"{section}: {title}" if section else title, width))
        for row in rows:
            numbers = row.allowed.removeprefix("a number ").removeprefix("in ")
            missing = row.allowed.startswith("a number ") and numbers not in row.description
            text = f"{row.description}; {numbers}" if missing else row.description
            parts += entry(row.typed, text, width)
        parts.append("")
    return "\n".join(parts)


def entry(name: str, text: str, width: int, column: int = 34) -> list[str]:
    """Returns the lines of an item of help: a name, and from `column` on, its text; a narrow one has it below."""
    column = column if width >= 2 * column else 6
    lines = textwrap.wrap(text, width - column) or [""]
    if len(name) + 4 > column:
        return [f"  {name}", *(" " * column + line for line in lines)]
    return [f"  {name}".ljust(column) + lines[0], *(" " * column + line for line in lines[1:])]
