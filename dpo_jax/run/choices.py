"""Objective, optimizer and trainable parameters that a configuration names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dpo_jax import losses, optim
from dpo_jax.config import Config
from dpo_jax.hf import adapters as low_rank
from dpo_jax.hf import checkpoints, peft
from dpo_jax.hf.tensors import Tensor
from dpo_jax.models.config import DecoderConfig
from dpo_jax.run.trainable import EVERYTHING, Selection, select


def loss_of(config: Config) -> losses.Objective:
    """The configured objective with its options bound."""
    options = {k: v for k, v in dataclasses.asdict(config.loss).items() if k != "name" and v is not None}
    return losses.make_loss(config.loss.name, options)


def optimizer_of(config: Config, *, total_steps: int, selection: Selection = EVERYTHING) -> Any:
    """The configured optimizer and its learning-rate schedule over `total_steps` updates."""
    options = {name: value for name, value in dataclasses.asdict(config.optimizer).items() if name != "layer_decay"}
    paced = selection.paced if selection.rates else None
    return optim.make_optimizer(**options, total_steps=total_steps, paced=paced)


def selection_of(config: Config, table: Sequence[Tensor], model: DecoderConfig) -> Selection:
    """What trains of a model of this table. Raises: InputError for patterns or an adapter that do not fit it."""
    lora, adapters = config.lora, None
    if lora.path:
        adapters = peft.read(checkpoints.resolve(lora.path), table, model.stacks)
    elif lora.rank:
        alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
        chosen = low_rank.choose(table, model.stacks, lora.targets)
        adapters = low_rank.Adapters(lora.rank, alpha, lora.rank_stabilised, chosen)
    freeze, decay = config.train.freeze, config.optimizer.layer_decay
    return select(table, model, adapters=adapters, freeze=freeze, layer_decay=decay)
