"""Optimizers and learning-rate schedules by name, with the conventions of PyTorch and transformers.

Step by step, a loss curve differs from TRL's by float rounding only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, PyTree

from dpo_jax.types import InputError, check_choice

Scalar: TypeAlias = Any  # a number of Python, or a traced one
Schedule = Callable[[ArrayLike], Array]  # the update, counted from 0 -> learning rate, on the device
HostSchedule = Callable[[int], float]  # the same without a device

# Decay after warm-up, as a factor of the peak: (numpy or jax.numpy, fraction of the remaining updates done, in [0, 1]).
DECAYS: dict[str, Callable[[ModuleType, Any], Any]] = {
    "constant": lambda xp, done: xp.ones_like(done),
    "linear": lambda xp, done: 1 - done,
    "cosine": lambda xp, done: 0.5 * (1 + xp.cos(math.pi * done)),
}

DEFAULTS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}  # as in `config.Optimizer`, which a test compares

NOT_DECAYED = ("scale", "bias")  # names of leaves; axes do not tell them apart, since blocks are stacked


def _adafactor() -> optax.GradientTransformation:
    """Adafactor without momentum (Shazeer and Stern 2018); steps are relative to the RMS of each (stacked) leaf."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())


# {name: (optax transformation, {option: its name in optax})}.
OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], dict[str, str]]] = {
    "adamw": (optax.scale_by_adam, {"b1": "b1", "b2": "b2", "eps": "eps"}),
    "adafactor": (_adafactor, {}),
    # torch.optim.RMSprop, as in the original DPO, adds eps outside the square root; b2 is its alpha.
    "rmsprop": (functools.partial(optax.scale_by_rms, eps_in_sqrt=False), {"b2": "decay", "eps": "eps"}),
    "lion": (optax.scale_by_lion, {"b1": "b1", "b2": "b2"}),
    "sgd": (optax.trace, {"b1": "decay"}),
}


class Optimizer(optax.GradientTransformation):
    """An optax transformation that can be made again with other numbers, which may be traced."""

    numbers: dict[
        str, float
    ]  # by option; those that choose code, and those that the optimizer does not read, are left out
    with_numbers: Callable[[Mapping[str, ArrayLike]], optax.GradientTransformation]

    def __new__(cls, numbers: dict[str, float], build: Callable[..., optax.GradientTransformation]) -> Optimizer:
        """Makes the transformation `build(numbers)`."""
        made = super().__new__(cls, *build(numbers))
        made.numbers, made.with_numbers = numbers, build
        return made


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
    min_lr_rate: float = 0.0,
    scale_updates: Callable[[PyTree], PyTree] | None = None,
) -> tuple[Optimizer, HostSchedule]:
    """Chains clipping, the named optimizer, decoupled weight decay and the learning rate, in this order.

    Gradients, moments and updates are float32, whatever the type of the parameters. `b2` keeps its default of 0.999
    for every optimizer; the customary value is 0.99 for rmsprop (PyTorch's alpha) and for lion.

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
      min_lr_rate: the share of the peak at which it ends, in [0, 1]; 0 for a constant schedule.
      scale_updates: multiplies updates by the learning-rate multipliers of their parameters.
    Returns: the optax transformation, and the learning rate as a function of the update, counted from 0. That function
      computes on the host: it is for logs, and uses no device.
    Raises: InputError for an unknown name, or for an option that the optimizer does not have and that is not at
      its default.
    """
    check_choice("config.optimizer.name", name, OPTIMIZERS)
    _, options = OPTIMIZERS[name]
    values = {"b1": b1, "b2": b2, "eps": eps}
    for option, value in values.items():
        if option not in options and value != DEFAULTS[option]:
            raise InputError(
                f"config.optimizer.{option}",
                got=f"{value}, which {name} does not use",
                expected=f"the default {DEFAULTS[option]}",
                remedy=f"Leave it out, or choose an optimizer that has {option}.",
            )
    if min_lr_rate and schedule == "constant":
        raise InputError(
            "config.optimizer.min_lr_rate",
            got=f"{min_lr_rate:g}, and the schedule 'constant' does not decay",
            expected="0, or a schedule that decays",
            remedy="Leave it out, or give for example --config.optimizer.schedule=cosine.",
        )
    of_schedule = {"warmup_steps": warmup_steps, "total_steps": total_steps, "min_lr_rate": min_lr_rate}
    host_schedule = make_host_schedule(schedule, learning_rate, **of_schedule)
    numbers = {option: values[option] for option in options} | {"learning_rate": learning_rate} | of_schedule
    # A zero chooses code: without them, the update has neither the norm's clipping nor the product with parameters.
    numbers |= {"clip_norm": clip_norm} if clip_norm else {}
    numbers |= {"weight_decay": weight_decay} if weight_decay else {}
    return Optimizer(numbers, functools.partial(_chain, name, schedule, scale_updates)), host_schedule


def _chain(
    name: str,
    schedule: str,
    scale_updates: Callable[[PyTree], PyTree] | None,
    numbers: Mapping[str, Scalar],
) -> optax.GradientTransformation:
    transform, options = OPTIMIZERS[name]
    rate = make_schedule(
        schedule,
        numbers["learning_rate"],
        warmup_steps=numbers["warmup_steps"],
        total_steps=numbers["total_steps"],
        min_lr_rate=numbers["min_lr_rate"],
    )
    decay = numbers.get("weight_decay")
    parts = [
        optax.clip_by_global_norm(numbers["clip_norm"]) if "clip_norm" in numbers else optax.identity(),
        transform(**{theirs: numbers[ours] for ours, theirs in options.items()}),
        optax.identity() if decay is None else optax.add_decayed_weights(decay, mask=decayed),
        optax.scale_by_learning_rate(rate),
        optax.stateless(lambda updates, _: scale_updates(updates)) if scale_updates else optax.identity(),
    ]
    return _in_float32(optax.chain(*parts))


def make_schedule(
    name: str, peak: ArrayLike, *, warmup_steps: ArrayLike, total_steps: ArrayLike, min_lr_rate: ArrayLike = 0.0
) -> Schedule:
    """Returns the learning rate of update t, counted from 0, as a JAX function.

    peak * t / warmup_steps, then peak * (m + (1 - m) * DECAYS[name]) with m = min_lr_rate, in [0, 1], which reaches its
    end at total_steps. So the first update of a warm-up has rate 0, and the last update of all is one step short of the
    end.

    All four numbers may be traced. Raises: InputError for an unknown name.
    Source: transformers.optimization.get_{constant,linear,cosine}_schedule_with_warmup and
      get_cosine_with_min_lr_schedule_with_warmup.
    """
    rate = _schedule(name, peak, warmup_steps, total_steps, min_lr_rate)
    return lambda step: rate(jnp, jnp.asarray(step, jnp.float32))


def make_host_schedule(
    name: str, peak: float, *, warmup_steps: int, total_steps: int, min_lr_rate: float = 0.0
) -> HostSchedule:
    """Returns `make_schedule` computed in numpy, so that a log of the learning rate needs no device.

    The float32 value is the compiled schedule's, but for the last bit of a cosine, or of a schedule with a floor.
    """
    rate = _schedule(name, peak, warmup_steps, total_steps, min_lr_rate)
    return lambda step: float(rate(np, np.float32(step)))


def _schedule(name: str, peak: Scalar, warmup_steps: Scalar, total_steps: Scalar, floor: Scalar) -> Callable[..., Any]:
    """Returns `rate(xp, step)`, the schedule over numpy or jax.numpy, for a float32 step."""
    check_choice("config.optimizer.schedule", name, DECAYS)

    def rate(xp: ModuleType, step):
        def share(steps, count):  # of a count, at least 1; XLA multiplies by the inverse of a constant count anyway
            return steps * (xp.float32(1) / xp.maximum(1, count).astype(xp.float32))

        done = xp.clip(share(step - warmup_steps, total_steps - warmup_steps), 0, 1)
        decay = floor + (1 - floor) * DECAYS[name](xp, done)
        return peak * xp.where(step < warmup_steps, share(step, warmup_steps), decay)

    return rate


def decayed(params: PyTree) -> PyTree:
    """Marks with True the leaves that weight decay applies to: matrices, not the scales of norms and not biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) not in NOT_DECAYED, params
    )


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `tx` on float32 copies: bfloat16 moments lose most updates, for 1 + 1e-3 is 1 there."""

    def init(params: PyTree) -> PyTree:
        return tx.init(optax.tree.cast(params, jnp.float32))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        return tx.update(optax.tree.cast(updates, jnp.float32), state, optax.tree.cast(params, jnp.float32))

    return optax.GradientTransformation(init, update)
