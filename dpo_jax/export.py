"""TODO export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_jax.config import Config
from dpo_jax.hf import adapters as low_rank
from dpo_jax.hf import checkpoints as hf_io
from dpo_jax.hf import folders, peft
from dpo_jax.reporting import model_card
from dpo_jax.run.inputs import Inputs
from dpo_jax.runtime import hosts
from dpo_jax.runtime.terminal import say


def export(
    config: Config,
    inputs: Inputs,
    params: Any,
    out: Path,
    evaluations: list[dict[str, float]],
    steps: int,
    *,
    merge: bool = False,
) -> None:
    """Writes a Hugging Face folder with a model card.

    Args:
      merge: write the model with adapters merged into it, and not the adapters alone.
    """
    data = {
        split: (spec, len(pairs))
        for split, spec, pairs in (
            ("train", config.data.train, inputs.train),
            ("eval", config.data.eval, inputs.eval),
        )
        if pairs is not None
    }
    final = evaluations[-1] if evaluations else {}
    adapters = inputs.selection.adapters
    text = model_card.model_card(
        config, inputs.name, data=data, steps=steps, final=final, adapters=adapters, merged=merge
    )
    together: dict[str, Any] = {
        "tokenizer": inputs.tokenizer_folder,
        "card": text,
        "hosts": folders.Hosts(hosts.index(), hosts.count(), hosts.wait),
    }
    if adapters is None or merge:
        params = params if adapters is None else low_rank.merge(params, adapters)
        hf_io.export(params, base=inputs.base, out=out, dtype=config.export.dtype, **together)
    else:
        table, _ = hf_io.family_table(inputs.base, inputs.model)
        dtype = config.export.dtype or "float32"
        peft.save(params, adapters, table, inputs.model.stacks, base=inputs.name, out=out, dtype=dtype, **together)
    hosts.wait("export")  # it is in place once the first is through
    say(f"exported to {out}")
