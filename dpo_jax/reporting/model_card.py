"""The model card that travels with an exported model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import dpo_jax
from dpo_jax.config import Config
from dpo_jax.hf.adapters import Adapters, module_of
from dpo_jax.losses import Objective, options_of

OBJECTIVES = {  # what each loss is called, and the arXiv id of its paper
    "sigmoid": ("Direct Preference Optimization", "2305.18290"),
    "robust": ("robust DPO", "2403.00409"),
    "hinge": ("a hinge loss on preferences", "2309.06657"),
    "ipo": ("Identity Preference Optimization", "2310.12036"),
    "sigmoid_norm": ("length-normalized DPO", "2411.15124"),
    "exo_pair": ("Efficient Exact Optimization", "2402.00856"),
    "nca_pair": ("Noise Contrastive Alignment", "2402.05369"),
    "sppo_hard": ("Self-Play Preference Optimization", "2405.00675"),
    "apo_zero": ("Anchored Preference Optimization (zero)", "2408.06266"),
    "apo_down": ("Anchored Preference Optimization (down)", "2408.06266"),
    "discopop": ("DiscoPOP", "2406.08414"),
    "dpo_positive": ("DPO-Positive", "2402.13228"),
    "tdpo1": ("Token-level DPO (TDPO1)", "2404.11999"),
    "tdpo2": ("Token-level DPO (TDPO2)", "2404.11999"),
    "plackett_luce": ("DPO on whole rankings (Plackett-Luce)", "2305.18290"),
    "bco_pair": ("Binary Classifier Optimization", "2404.04656"),
    "beta_dpo": ("beta-DPO", "2407.08639"),
    "aot": ("Alignment via Optimal Transport", "2406.05882"),
    "aot_unpaired": ("Alignment via Optimal Transport (unpaired)", "2406.05882"),
    "kto": ("Kahneman-Tversky Optimization", "2402.01306"),
    "simpo": ("SimPO", "2405.14734"),
    "cpo": ("Contrastive Preference Optimization", "2401.08417"),
    "orpo": ("Odds Ratio Preference Optimization", "2403.07691"),
    "sft": ("supervised fine-tuning on the chosen answers", ""),
}


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
        "objective": f"{config.loss.name}, {_words(options_of(objective))}".rstrip(", "),
        **{f"{split} data": f"{_names(spec)}: {pairs:,} pairs" for split, (spec, pairs) in data.items()},
        "updates": f"{steps} of {config.train.batch_pairs} pairs",
        **_what_trained(config, adapters, merged),
        "optimizer": _words({k: v for k, v in vars(config.optimizer).items()}),
        "lengths": f"{config.data.max_length} tokens at most, of them the prompt {config.data.max_prompt_length}",
        "seed": str(config.seed),
    }
    if config.reference.sync_steps:
        every, alpha = config.reference.sync_steps, config.reference.mixup_alpha
        rows["reference"] = f"after every {every} updates {alpha:g} of the policy and {1 - alpha:g} of itself"
    if config.sft.steps:
        rows["first"] = f"supervised fine-tuning on the chosen answers, {_words(vars(config.sft))}"
    table = [f"| {key} | {value} |" for key, value in rows.items()]
    text = [*head, "---", "", f"# {name}, after {config.loss.name}", ""]
    text += [f"`{name}` trained by {_objective(objective)} with dpo_jax {dpo_jax.__version__}.", ""]
    text += ["| setting | value |", "|---|---|", *table]
    scores = [f"| {key} | {value:.6g} |" for key, value in final.items() if key.startswith("eval/")]
    if scores:
        text += ["", f"Evaluated after update {steps}:", "", "| metric | value |", "|---|---|", *scores]
    return "\n".join(text) + "\n"


def _objective(objective: Objective) -> str:
    """What its losses are called, with their papers."""
    known = [OBJECTIVES.get(term.name, (f"`{term.name}`", "")) for term in objective.terms]
    return ", ".join(f"[{title}](https://arxiv.org/abs/{paper})" if paper else title for title, paper in known)


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
