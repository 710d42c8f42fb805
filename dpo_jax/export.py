"""Exports trained parameters as a Hugging Face folder, with tokenizer and model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import PyTree

from dpo_jax.config import Config
from dpo_jax.hf import adapters, checkpoints, folders, hub, peft
from dpo_jax.reporting.model_card import model_card
from dpo_jax.run.inputs import Inputs, specs_of
from dpo_jax.run.workdir import Change
from dpo_jax.runtime import hosts
from dpo_jax.runtime.files import Path
from dpo_jax.runtime.terminal import say


def export_model(
    config: Config,
    inputs: Inputs,
    params: PyTree,
    out: Path,
    evaluations: Sequence[Mapping[str, float]],
    steps: int,
    *,
    merge: bool = False,
    changes: Sequence[Change] = (),
) -> None:
    """Writes a Hugging Face folder with a model card.

    Args:
      params: all parameters, trained and frozen.
      evaluations: rows of eval.jsonl; the card shows the last.
      steps: updates made.
      merge: write the model with adapters merged into it, instead of the adapters alone.
      changes: of the configuration, as `history.read_changes` returns them.
    """
    trained_adapters = inputs.trainable.adapters
    card = model_card(
        config,
        inputs.objective,
        inputs.name,
        data={name: (spec, len(inputs.sets[name])) for name, spec in specs_of(config.data).items()},
        steps=steps,
        final=evaluations[-1] if evaluations else {},
        adapters=trained_adapters,
        merged=merge,
        changes=[change for change in changes if change["step"] < steps],
    )
    options = checkpoints.WriteOptions(
        dtype=config.export.dtype,
        tokenizer=inputs.tokenizer_folder,
        card=card,
        hosts=folders.Hosts(hosts.index(), hosts.count(), hosts.barrier),
    )
    if trained_adapters is None or merge:
        params = params if trained_adapters is None else adapters.merge(params, trained_adapters)
        checkpoints.export(params, base=inputs.base, out=out, options=options)
    else:
        table, _ = checkpoints.family_table(inputs.base, inputs.model)
        peft.save(params, trained_adapters, table, inputs.model.stacks, base=inputs.name, out=out, options=options)
    hosts.barrier("export")  # process 0 moves the folder into place before it arrives here
    say(f"exported to {out}")


def upload(config: Config, out: Path) -> None:
    """Uploads an export where `export.push_to_hub` says so, from process 0. Raises: InputError as `hub.push`."""
    if config.export.push_to_hub and hosts.first():
        say(f"uploaded to {hub.push(out, config.export.push_to_hub, private=config.export.hub_private)}")
