"""The optimizer and the learning rate of a run, with the conventions of PyTorch and transformers.

Same numbers, same curve: a loss laid over one from TRL differs by float rounding, step by step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax.types import InputError, check_choice

Schedule = Callable[[Any], jax.Array]

# Decay after warm-up, as a factor of the peak, of the fraction of the remaining updates that are done, in [0, 1].
DECAYS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "constant": jnp.ones_like,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + jnp.cos(math.pi * done)),
}

DEFAULTS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}  # as in `config.Optimizer`, which a test compares

NOT_DECAYED = ("scale", "bias")  # names of leaves; blocks are stacked on a layer axis, so ndim cannot tell


def _adafactor() -> optax.GradientTransformation:
    """Shazeer and Stern 2018 without momentum; steps are relative to the size of each (stacked) parameter."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())


# Each with the options it takes, and what optax calls them.
OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], dict[str, str]]] = {
    "adamw": (optax.scale_by_adam, {"b1": "b1", "b2": "b2", "eps": "eps"}),
    "adafactor": (_adafactor, {}),
    # torch.optim.RMSprop, as in the original DPO, adds eps outside the square root; b2 is its alpha.
    "rmsprop": (functools.partial(optax.scale_by_rms, eps_in_sqrt=False), {"b2": "decay", "eps": "eps"}),
    "lion": (optax.scale_by_lion, {"b1": "b1", "b2": "b2"}),
    "sgd": (optax.trace, {"b1": "decay"}),
}


def make_optimizer(
    *,
    name: str,
    learning_rate: float,
    schedule: str,
    warmup_steps: int,
    weight_decay: float,
    clip_norm: float,
    b1: float,
    b2: float,
    eps: float,
    total_steps: int,
    paced: Callable[[Any], Any] | None = None,
) -> tuple[optax.GradientTransformation, Schedule]:
    """Clipping, the named optimizer, decoupled weight decay and the learning rate, in this order.

    Whatever the parameters' type, gradients, moments and updates are float32. `b2` keeps its default of 0.999 for
    every optimizer; the customary value is 0.99 for rmsprop (PyTorch's alpha) and for lion.

    Args:
      name: one of OPTIMIZERS.
      learning_rate: peak, > 0.
      schedule: one of DECAYS; see `make_schedule`.
      weight_decay: each update subtracts learning rate * weight_decay * parameter, except from leaves named in
        NOT_DECAYED. As torch.optim.AdamW does; here for the other optimizers too.
      clip_norm: gradients of a larger global norm are scaled to it, as torch.nn.utils.clip_grad_norm_ does but for
        the 1e-6 it adds to the norm; 0: never.
      b1, b2, eps: see the comments in `config.Optimizer`.
      total_steps: updates in the run, where the schedule ends.
      paced: takes updates to those that are made, in proportion, for parameters with learning rates of their own.
    Returns: the optax transformation, and the learning rate as a function of the update, counted from 0.
    Raises: InputError for an unknown name, or for an option that the optimizer does not have and that is not at
      its default.
    """
    check_choice("config.optimizer.name", name, OPTIMIZERS)
    transform, options = OPTIMIZERS[name]
    given = {"b1": b1, "b2": b2, "eps": eps}
    for option, value in given.items():
        if option not in options and value != DEFAULTS[option]:
            raise InputError(
                f"config.optimizer.{option}",
                got=f"{value}, which {name} does not use",
                expected=f"the default {DEFAULTS[option]}",
                remedy=f"Leave it out, or choose an optimizer that has {option}.",
            )
    rate = make_schedule(schedule, learning_rate, warmup_steps=warmup_steps, total_steps=total_steps)
    parts = [
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        transform(**{theirs: given[ours] for ours, theirs in options.items()}),
        optax.add_decayed_weights(weight_decay, mask=decayed) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(rate),
        optax.stateless(lambda updates, _: paced(updates)) if paced is not None else optax.identity(),
    ]
    return _in_float32(optax.chain(*parts)), rate


def make_schedule(name: str, peak: float, *, warmup_steps: int, total_steps: int) -> Schedule:
    """Learning rate of update t, from 0: peak * t / warmup_steps, then peak * DECAYS[name] down to total_steps.

    So the first update of a warm-up has rate 0, and the last of all is one step short of 0.

    Raises: InputError for an unknown name.
    Source: transformers.optimization.get_{constant,linear,cosine}_schedule_with_warmup.
    """
    check_choice("config.optimizer.schedule", name, DECAYS)

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup_steps) / max(1, total_steps - warmup_steps), 0, 1)
        return peak * jnp.where(step < warmup_steps, step / max(1, warmup_steps), DECAYS[name](done))

    return rate


def decayed(params: Any) -> Any:
    """True for the leaves that weight decay applies to: matrices, not the scales of norms and not biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) not in NOT_DECAYED, params
    )


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same on float32 copies: bfloat16 moments lose most updates, for 1 + 1e-3 is 1 there."""

    def init(params: Any) -> Any:
        return tx.init(optax.tree.cast(params, jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(optax.tree.cast(updates, jnp.float32), state, optax.tree.cast(params, jnp.float32))

    return optax.GradientTransformation(init, update)
