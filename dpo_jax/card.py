"""The model card that travels with an exported model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import dpo_jax
from dpo_jax import inputs as run_inputs
from dpo_jax.config import Config
from dpo_jax.losses import options_of
from dpo_jax.models.adapters import Adapters, module_of

OBJECTIVES = {
    "sigmoid": "[Direct Preference Optimization](https://arxiv.org/abs/2305.18290)",
    "ipo": "[Identity Preference Optimization](https://arxiv.org/abs/2310.12036)",
    "hinge": "[a hinge loss on preferences](https://arxiv.org/abs/2309.06657)",
    "sft": "supervised fine-tuning on the chosen answers",
}


def model_card(
    config: Config,
    base: str,
    *,
    data: Mapping[str, tuple[str, int]],
    steps: int,
    final: Mapping[str, float],
    adapters: Adapters | None = None,
    merged: bool = False,
) -> str:
    """Markdown with a YAML head: base model, objective, data, settings and the last evaluation.

    Args:
      base: the model that training started from, a Hub id or a folder; of a folder only the name is given, since
        its path says nothing elsewhere.
      data: of each split, the files or data sets it was read from and its number of pairs.
      steps: updates made.
      final: the row of the last evaluation; empty where there was none.
      adapters: that trained, and nothing else.
      merged: whether they are merged into the model; otherwise they are all that there is.
    """
    folder = Path(base).expanduser()
    hub = not folder.exists()
    name = base if hub else folder.resolve().name
    library = "transformers" if adapters is None or merged else "peft"
    head = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags:", "- dpo_jax"]
    head += [f"base_model: {json.dumps(base)}"] if hub else []
    rows = {
        "objective": f"{config.loss.name}, {_words(options_of(run_inputs.loss_of(config)))}".rstrip(", "),
        **{f"{split} data": f"{_names(spec)}: {pairs:,} pairs" for split, (spec, pairs) in data.items()},
        "updates": f"{steps} of {config.train.batch_pairs} pairs",
        **_what_trained(config, adapters, merged),
        "optimizer": _words({k: v for k, v in vars(config.optimizer).items()}),
        "lengths": f"{config.data.max_length} tokens at most, of them the prompt {config.data.max_prompt_length}",
        "seed": str(config.seed),
    }
    if config.sft.steps:
        rows["first"] = f"supervised fine-tuning on the chosen answers, {_words(vars(config.sft))}"
    table = [f"| {key} | {value} |" for key, value in rows.items()]
    text = [*head, "---", "", f"# {name}, after {config.loss.name}", ""]
    text += [f"`{name}` trained by {OBJECTIVES[config.loss.name]} with dpo_jax {dpo_jax.__version__}.", ""]
    text += ["| setting | value |", "|---|---|", *table]
    scores = [f"| {key} | {value:.6g} |" for key, value in final.items() if key.startswith("eval/")]
    if scores:
        text += ["", f"Evaluated after update {steps}:", "", "| metric | value |", "|---|---|", *scores]
    return "\n".join(text) + "\n"


def _what_trained(config: Config, adapters: Adapters | None, merged: bool) -> dict[str, str]:
    """A row for adapters or for frozen tensors, if there are any."""
    if adapters is not None:
        modules = sorted({module_of(each).rpartition("{layer}.")[2] for each in adapters.tensors})
        held = f", on a model in {config.lora.base}" if config.lora.base else ""
        words = f"rank {adapters.rank}, scale {adapters.scale:g}, beside {', '.join(modules)}{held}"
        return {"adapters, merged" if merged else "adapters": words}
    pattern = config.train.freeze.replace("|", "\\|")  # or it would end the cell
    return {"frozen": f"tensors of a name with `{pattern}`"} if pattern else {}


def _words(options: Mapping[str, object]) -> str:
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in options.items()
    )


def _names(spec: str) -> str:
    """A data specification with the names of files and folders in place of their paths."""

    def name(part: str) -> str:
        path, star, weight = part.strip().partition("*")
        found = Path(path).expanduser()
        return (found.resolve().name if found.exists() else path) + star + weight

    return ", ".join(map(name, spec.split(",")))
