"""The model card that travels with an exported model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import dpo_jax
from dpo_jax.config import DECIDE_NO_UPDATE, Config
from dpo_jax.data.specs import is_pattern, parts_of
from dpo_jax.hf.adapters import Adapters, module_of
from dpo_jax.losses import Objective, options_of
from dpo_jax.run.history import shown
from dpo_jax.run.workdir import Change
from dpo_jax.runtime import files


def model_card(
    config: Config,
    objective: Objective,
    base: str,
    *,
    data: Mapping[str, tuple[str, int]],
    steps: int,
    final: Mapping[str, float],
    adapters: Adapters | None = None,
    merged: bool = False,
    changes: Sequence[Change] = (),
) -> str:
    """Returns Markdown with a YAML head: base model, objective, data, settings and the last evaluation.

    Args:
      objective: what `config.loss` makes.
      base: the model that training started from, a Hub id or a folder. Of a folder only the name is shown, since its
        path means nothing elsewhere.
      data: for each set of pairs, the files or data sets it was read from and its number of pairs.
      steps: number of updates.
      final: metrics of the last evaluation; empty if there was none.
      adapters: the adapters that trained; None if all parameters did.
      changes: of the configuration before the last update, as `history.read_changes` returns them.
      merged: whether the adapters are merged into the model; otherwise the folder holds the adapters alone.
    """
    folder = files.path(base)
    hub = not folder.exists()
    name = base if hub else files.resolved(folder).name
    library = "transformers" if adapters is None or merged else "peft"
    head = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags:", "- dpo_jax"]
    head += [f"base_model: {json.dumps(base)}"] if hub else []
    rows = {
        "objective": f"{config.loss.name}, {_listed(options_of(objective))}".rstrip(", "),
        **{f"{split} data": f"{_names(spec)}: {pairs:,} pairs" for split, (spec, pairs) in data.items()},
        "updates": f"{steps} of {config.train.batch_pairs} pairs",
        **_trained(config, adapters, merged),
        "optimizer": _listed(vars(config.optimizer)),
        "lengths": f"{config.data.max_length} tokens at most, of them the prompt {config.data.max_prompt_length}",
        "seed": str(config.seed),
    }
    if config.reference.sync_steps:
        every, alpha = config.reference.sync_steps, config.reference.mixup_alpha
        rows["reference"] = f"after every {every} updates {alpha:g} of the policy and {1 - alpha:g} of itself"
    if config.sft.steps:
        rows["first"] = f"supervised fine-tuning on the chosen answers, {_listed(vars(config.sft))}"
    for change in changes:
        fields = {key: pair for key, pair in change["changes"].items() if key not in DECIDE_NO_UPDATE}
        rows |= {f"changed after update {change['step']}": shown(fields)} if fields else {}
    table = [f"| {key} | {value} |" for key, value in rows.items()]
    text = [*head, "---", "", f"# {name}, after {config.loss.name}", ""]
    text += [f"`{name}` trained by {_objective(objective)} with dpo_jax {dpo_jax.__version__}.", ""]
    text += ["| setting | value |", "|---|---|", *table]
    scores = [f"| {key} | {value:.6g} |" for key, value in final.items() if key.startswith("eval/")]
    if scores:
        text += ["", f"Evaluated after update {steps}:", "", "| metric | value |", "|---|---|", *scores]
    return "\n".join(text) + "\n"


def _objective(objective: Objective) -> str:
    """Returns the titles of its losses, linked to their papers."""
    entries = [term.entry for term in objective.terms]
    return ", ".join(
        f"[{each.title}](https://arxiv.org/abs/{each.paper})" if each.paper else each.title for each in entries
    )


def _trained(config: Config, adapters: Adapters | None, merged: bool) -> dict[str, str]:
    """Returns the table's row for adapters or for frozen tensors; empty if there are none."""
    if adapters is not None:
        modules = sorted({module_of(each).rpartition("{layer}.")[2] for each in adapters.tensors})
        quantized_base = f", on a model in {config.lora.base}" if config.lora.base else ""
        description = f"rank {adapters.rank}, scale {adapters.scale:g}, beside {', '.join(modules)}{quantized_base}"
        return {"adapters, merged" if merged else "adapters": description}
    pattern = config.train.freeze.replace("|", "\\|")  # or it would end the cell
    return {"frozen": f"tensors of a name with `{pattern}`"} if pattern else {}


def _listed(options: Mapping[str, object]) -> str:
    """Returns "name value, name value"."""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in options.items()
    )


def _names(spec: str) -> str:
    """Returns a data specification with names of files and folders in place of their paths."""

    def name(source: str) -> str:
        path = files.path(source)
        return files.resolved(path).name if path.exists() else path.name if is_pattern(source) else source

    return ", ".join(name(part.source) + (f"*{part.weight:g}" if part.weight != 1 else "") for part in parts_of(spec))
