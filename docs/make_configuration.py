"""Writes docs/configuration.md, the reference of all configuration fields, from dpo_jax/config.py.

    python -m docs.make_configuration [--out=docs/configuration.md]

Names, types and defaults come from the dataclasses. A field's description is the trailing comment of its line, and
the help text in `losses.registry.OPTIONS` for options of losses. Allowed values come from `config.RULES`, and fields
that may change when a run resumes from `config.RESUMABLE`. tests/test_readme.py fails if the file is stale.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dpo_jax import config
from dpo_jax.losses.registry import OPTIONS

OUT = Path(__file__).with_name("configuration.md")
SOURCE = Path(config.__file__)

INTRODUCTION = """\
# Configuration

<!-- Written by `python -m docs.make_configuration` from dpo_jax/config.py. Edit the comments there, not this file. -->

A run is described by one configuration. It is built in three steps, each overriding the one before:

1. **Defaults.** Every field has one. The tables below list them.
2. **A recipe.** A Python file with a function `get_config()` that starts from the defaults and changes what it needs:

   ```python
   from dpo_jax.config import base


   def get_config():
       config = base()
       config.model.path = "EleutherAI/pythia-410m"
       config.data.train = "train.jsonl"
       config.loss.beta = 0.05
       return config
   ```

   `--config=recipe.py` uses it. `--config=recipe.py:large` calls `get_config("large")`.
3. **Flags.** `--config.SECTION.FIELD=VALUE` overrides one field, for example `--config.loss.beta=0.2`. `=None` clears a
   field whose default is *unset*.

A run writes its complete configuration into `config.json` in the working folder. `--config=RUN/config.json` starts the
same run again. Code is never run because a `config.json` names it. From such a file, `prepare` is ignored and a
`loss.name` of the form `module:function` is refused. Name the recipe instead, or set the field again with a flag.

All fields are checked before any device is used. An unknown field, a value of the wrong type or a value out of range
stops the run with an error that names the field and the allowed values. Text fields may contain `{workdir}`, which is
replaced by the working folder.

Recipes that ship with the project are in [`configs/`](../configs).

## How to read the tables

- **Default**: *empty* is the empty string; *unset* is `None`.
- **Allowed**: values outside are refused. Where the cell is blank, the type is the only condition, or the description
  lists the choices.
- **Resume**: a run that was interrupted continues if the same command is given again. Fields marked *may change* can
  have another value then: they change what is recorded or how the work is laid out on devices, but not the sequence of
  updates (apart from floating-point rounding). A change of any other field is refused.
"""

ENVIRONMENT = """\
## Environment variables

| variable | effect |
|---|---|
| `DPO_JAX_CACHE` | folder of tokenized data and compiled programs; default: `dpo_jax` in the user's cache folder |
| `XDG_CACHE_HOME` | the user's cache folder; default: `~/.cache` |
| `JAX_COMPILATION_CACHE_DIR` | folder of compiled programs alone; on several hosts, one that all of them see |
| `JAX_ENABLE_COMPILATION_CACHE` | `false`: do not store compiled programs |
| `JAX_PLATFORMS` | devices that JAX may use, for example `cpu` |
| `CUDA_VISIBLE_DEVICES` | GPUs that JAX may use |
| `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE` | read by `huggingface_hub`, where a model or data set is a Hub id |
| `WANDB_MODE` | read by Weights & Biases: `online`, `offline` or `disabled` |

On TPU hosts, under SLURM and under Open MPI, the processes of a run find one another through variables that the
platform sets. Elsewhere the flags `--coordinator`, `--processes` and `--process` do it, see
[Several hosts](../README.md#several-hosts).
"""

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
    """A configuration field as a row of the reference."""

    name: str  # dotted
    type: str
    default: str
    allowed: str
    resume: str
    description: str

    @property
    def row(self) -> str:
        """The field as a row of a Markdown table."""
        name, *cells = self
        return " | ".join([f"| `{name}`", *(cell.replace("|", "\\|") for cell in cells)]) + " |"


def comments_of(section: type) -> dict[str, str]:
    """Trailing comment of each field of a dataclass, from the text of its module."""
    text = SOURCE.read_text(encoding="utf-8")
    lines = text.splitlines()
    body = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == section.__name__]
    fields = [field for node in body for field in node.body if isinstance(field, ast.AnnAssign)]
    pairs = ((ast.unparse(field.target), lines[field.lineno - 1].partition("  # ")[2]) for field in fields)
    return {name: comment for name, comment in pairs if comment}


def fields_of(section: type, prefix: str = "") -> Iterator[Field]:
    """The fields of a dataclass that are no sections themselves. Raises: SystemExit for one without a description."""
    descriptions, defaults = comments_of(section), section()
    if section is config.Loss:
        descriptions |= {name: option.help for name, option in OPTIONS.items()}
    for field in dataclasses.fields(section):
        value, name = getattr(defaults, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            continue
        if field.name not in descriptions:
            raise SystemExit(f"{SOURCE}: {name} has no trailing comment")
        allowed = config.RULES[name][1] if name in config.RULES else ""
        allowed = allowed.removeprefix("a number ").removeprefix("one of ")
        resume = "may change" if name in config.RESUMABLE else "fixed"
        description = descriptions[field.name].replace(" | ", " / ")
        yield Field(name, type_of(field), default_of(value), allowed, resume, description)


def type_of(field: dataclasses.Field) -> str:
    """Type of a field without the None of optional ones."""
    text = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    return text.removesuffix(" | None")


def default_of(value: object) -> str:
    """A default as it is written on the command line; *unset* and *empty* for those that are not."""
    if value is None:
        return "*unset*"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != "" else "*empty*"


def render() -> str:
    """The text of docs/configuration.md."""
    defaults = config.Config()
    sections: dict[str, type] = {"": config.Config}
    for field in dataclasses.fields(config.Config):
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            sections[field.name] = type(value)
    if sections.keys() != SECTIONS.keys():
        raise SystemExit(f"SECTIONS and config.Config differ in {', '.join(sections.keys() ^ SECTIONS.keys())}")
    parts = [INTRODUCTION]
    for name, section in sections.items():
        title, prefix = (f"`{name}`", f"{name}.") if name else ("General", "")
        head = "| field | type | default | allowed | resume | description |\n|---|---|---|---|---|---|"
        rows = "\n".join(field.row for field in fields_of(section, prefix))
        parts.append(f"## {title}\n\n{SECTIONS[name]}\n\n{head}\n{rows}\n")
    return "\n".join([*parts, ENVIRONMENT])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.parse_args().out.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
