"""Objective, optimizer and trainable parameters that a configuration names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from dpo_jax import losses, optim
from dpo_jax.config import Config, Loss, Optimizer
from dpo_jax.hf import peft
from dpo_jax.hf.adapters import Adapters, choose
from dpo_jax.hf.checkpoints import resolve
from dpo_jax.hf.tensors import Tensor
from dpo_jax.models.config import DecoderConfig
from dpo_jax.run.trainable import EVERYTHING, Trainable, select
from dpo_jax.types import InputError


def objective_of(loss: Loss) -> losses.Objective:
    """Returns the configured objective with its options bound. Raises: InputError as `losses.make_loss`."""
    options = {k: v for k, v in dataclasses.asdict(loss).items() if k != "name" and v is not None}
    with losses.errors_at("config.loss.{}"):
        objective = losses.combine(loss.name, options)
        for name in sorted(objective.needs - {*losses.GIVEN}):
            raise InputError(
                "name",
                got=f"{loss.name} has the parameter {name!r} without a default",
                expected=f"inputs that a run has: {', '.join(losses.GIVEN)}",
                remedy="Give it a default, or rename it.",
            )
        return objective


def optimizer_of(
    optimizer: Optimizer, *, total_steps: int, trainable: Trainable = EVERYTHING
) -> tuple[optim.Optimizer, optim.HostSchedule]:
    """Returns the configured optimizer and its learning-rate schedule over `total_steps` updates."""
    elsewhere = {"layer_decay", "warmup_ratio"}
    options = {name: value for name, value in dataclasses.asdict(optimizer).items() if name not in elsewhere}
    options["warmup_steps"] = warmup_of(optimizer, total_steps)
    scale_updates = trainable.scale_updates if trainable.multipliers else None
    return optim.make_optimizer(**options, total_steps=total_steps, scale_updates=scale_updates)


def warmup_of(optimizer: Optimizer, total_steps: int) -> int:
    """Returns the number of updates of warm-up in a run of `total_steps`, rounded up as transformers does."""
    return optimizer.warmup_steps or math.ceil(optimizer.warmup_ratio * total_steps)


def trainable_of(config: Config, table: Sequence[Tensor], model: DecoderConfig) -> Trainable:
    """Returns which parameters of a model of this table train.

    Raises: InputError for patterns or an adapter that do not fit it.
    """
    lora, adapters = config.lora, None
    if lora.path:
        adapters = peft.read(resolve(lora.path, "config.lora.path"), table, model.stacks)
    elif lora.rank:
        alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
        chosen = choose(table, model.stacks, lora.targets)
        adapters = Adapters(lora.rank, alpha, lora.rank_stabilised, chosen)
    freeze, decay = config.train.freeze, config.optimizer.layer_decay
    return select(table, model, adapters=adapters, freeze=freeze, layer_decay=decay)
