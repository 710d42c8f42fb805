"""Writes docs/configuration.md, the reference of all configuration fields, from dpo_jax/config.py.

    python -m docs.make_configuration [--out=docs/configuration.md]

Names, types and defaults come from the dataclasses. A field's description is the trailing comment of its line, and
the help text in `losses.registry.OPTIONS` for options of losses. Allowed values come from `config.RULES`, and fields
that may change when a run resumes from `config.RESUMABLE`. `reporting/fields.py` reads them, for `--help` too.
tests/test_readme.py fails if the file is stale.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dpo_jax.reporting.fields import SECTIONS, Field, fields

OUT = Path(__file__).with_name("configuration.md")

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

   `--config=recipe.py` uses it. `--config=recipe.py:large` calls `get_config("large")`. A YAML or JSON file with the
   fields that differ does as well, `--config=fields.yaml`:

   ```yaml
   model: {path: EleutherAI/pythia-410m}
   data:
     train: train.jsonl
   loss.beta: 0.05
   ```
3. **Flags.** `--config.SECTION.FIELD=VALUE` overrides one field, for example `--config.loss.beta=0.2`. `=None` clears a
   field whose default is *unset*.

A run writes its complete configuration into `config.json` in the working folder. `--config=RUN/config.json` starts the
same run again. Code is never run because a YAML or JSON file names it. From such a file, `prepare` is ignored and a
`loss.name` of the form `module:function` is refused. Name the recipe instead, or set the field again with a flag.

`dpo-jax COMMAND --help` lists the fields that a command reads, as the tables below do. YAML is read as YAML 1.2:
`1e-6` is a number, and `no`, `off` and `2024-01-31` are text.

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
  updates (apart from floating-point rounding). Those marked *recorded* may change as well, while a run goes on or after
  its end; the change is recorded in `changes.jsonl` ([a run's life](runs.md#going-on)). A change of any other field is
  refused.
"""

ENVIRONMENT = """\
## Environment variables

| variable | effect |
|---|---|
| `DPO_JAX_CACHE` | tokenized data, programs, copies from buckets; default: `dpo_jax` in the user's cache folder |
| `XDG_CACHE_HOME` | the user's cache folder; default: `~/.cache` |
| `JAX_COMPILATION_CACHE_DIR` | folder of compiled programs alone; on several hosts, one that all of them see |
| `JAX_ENABLE_COMPILATION_CACHE` | `false`: do not store compiled programs |
| `JAX_PLATFORMS` | devices that JAX may use, for example `cpu` |
| `CUDA_VISIBLE_DEVICES` | GPUs that JAX may use |
| `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE` | read by `huggingface_hub`, where a model or data set is a Hub id |
| `GOOGLE_APPLICATION_CREDENTIALS`, `STORAGE_EMULATOR_HOST` | read for paths at `gs://`, see [buckets.md](buckets.md) |
| `AWS_PROFILE`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_DEFAULT_REGION` | read for paths at `s3://` |
| `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID` | in place of the flags `--coordinator` ... |
| `AWS_ENDPOINT_URL` | address of another store that speaks the protocol of `s3://` |
| `WANDB_MODE` | read by Weights & Biases: `online`, `offline` or `disabled` |

On TPU hosts, under SLURM and under Open MPI, the processes of a run find one another through variables that the
platform sets. Elsewhere the flags `--coordinator`, `--processes` and `--process` do it, see
[hosts.md](hosts.md).
"""


def row_of(field: Field) -> str:
    """A field as a row of a Markdown table."""
    allowed = field.allowed.removeprefix("a number ").removeprefix("one of ")
    resume = field.resume
    cells = field.type, default_of(field.default), allowed, resume, field.description.replace(" | ", " / ")
    return " | ".join([f"| `{field.name}`", *(cell.replace("|", "\\|") for cell in cells)]) + " |"


def default_of(value: object) -> str:
    """A default as it is written on the command line; *unset* and *empty* for those that are not."""
    if value is None:
        return "*unset*"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != "" else "*empty*"


def render() -> str:
    """The text of docs/configuration.md."""
    parts = [INTRODUCTION]
    for name, section in fields().items():
        title = f"`{name}`" if name else "General"
        head = "| field | type | default | allowed | resume | description |\n|---|---|---|---|---|---|"
        rows = "\n".join(map(row_of, section))
        parts.append(f"## {title}\n\n{SECTIONS[name]}\n\n{head}\n{rows}\n")
    return "\n".join([*parts, ENVIRONMENT])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.parse_args().out.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
