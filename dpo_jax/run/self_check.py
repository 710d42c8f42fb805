"""Self-check of a run that starts at its reference: the first margins are 0 to rounding, or the run stops.

At the first update the policy has the reference's weights, so the log-probs that the update computes must be those that
the store holds. A store of other values, pairs of other tokens or other weights would otherwise go unnoticed.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Bool, Float, Int

from dpo_jax.data.batches import ReferenceValues, make_batch
from dpo_jax.data.keys import content_key
from dpo_jax.run.inputs import Inputs
from dpo_jax.run.programs import Programs
from dpo_jax.run.reference_values import Store
from dpo_jax.run.state import load_params
from dpo_jax.runtime.terminal import say
from dpo_jax.scoring import score_batch
from dpo_jax.types import InputError

# Mean difference of an answer's log-probs, as a share of 1 + their size, that two programs' rounding may explain.
# Elsewhere than on CPUs even float32 products are rounded to fewer bits by default.
ROUNDING = {"cpu float32": 1e-4, "cpu bfloat16": 1e-3, "": 2e-2}


def check_start(
    gap: Float[np.ndarray, "P"],
    indices: Int[np.ndarray, "P"],
    values: ReferenceValues,
    inputs: Inputs,
    programs: Programs,
    store: Store,
    synced: int = 0,
) -> None:
    """Raises InputError unless policy and reference agree on a batch of pairs, where both have the same weights.

    Reference log-probs that came with the data may be those of another model; a difference there is only a warning.

    Args:
      gap: largest |policy - reference| over the answers of each pair, in nats.
      indices: of the batch's pairs in the training set.
      values: reference log-probs of the training pairs.
      store: that holds them, of the last sync if there was one.
      synced: step of that sync; 0: none, and policy and reference are the initial weights.
    """
    gap, logps = gap[: len(indices)], values.of(indices).logps
    from_data = np.asarray(np.isfinite(inputs.sets["train"].reference[indices]).all(1)) & (synced == 0)
    limit = rounding(programs)
    if disagrees(gap, logps, from_data, limit):
        say(
            "warning: reference log-probs that came with the data differ from the model's by "
            f"{gap[from_data].mean():.4g} nats on average in the first batch; they are used as they are"
        )
    if not disagrees(gap, logps, ~from_data, limit):
        return
    again = logps if synced else rescored(indices, inputs, programs)  # the weights of a sync are in the state only
    change = np.abs(again - logps).max(1)
    mean = gap[~from_data].mean()
    pairs = inputs.sets["train"]
    if damaged := [i for i in indices.tolist() if tuple(pairs.keys[i]) != tuple(content_key(pairs[i]))]:
        place, culprit = pairs.place(damaged[0]), "the data: the tokens of this pair do not match its key"
        remedy = "Delete the folder of tokenized data (--config.data.cache_dir), which is then made again."
    elif not np.isfinite(again).all():
        place, culprit = str(inputs.source.folder), "the weights: they give log-probs that are not finite"
        remedy = "Check them; after updates, lower --config.optimizer.learning_rate and train anew in another folder."
    elif synced:
        place, culprit = str(store.folder), f"the store: the policy at step {synced} gives these pairs other log-probs"
        remedy = "Delete this folder and run again: that reference is scored again from the checkpoint of its step."
    elif disagrees(change, logps, ~from_data, limit):
        place, culprit = str(store.folder), "the store: the initial weights give these pairs other log-probs"
        remedy = "Delete the folder, or give another --config.reference.path, to score the reference again."
    else:
        place, culprit = str(inputs.source.folder), "the weights: the policy's are not those of this folder"
        remedy = "Start in a new working folder; if this is one, please report it with the model's config.json."
    raise InputError(
        place,
        got=f"policy and reference differ by {mean:.4g} nats an answer at step {synced}; the cause is {culprit}",
        expected="margins of 0 to rounding, since policy and reference have the same weights there",
        remedy=remedy,
    )


def rounding(programs: Programs) -> float:
    """Returns the entry of ROUNDING for the devices and the type that a run computes with."""
    platform = programs.mesh.devices.flat[0].platform
    return ROUNDING.get(f"{platform} {np.dtype(programs.dtype).name}", ROUNDING[""])


def disagrees(
    gap: Float[np.ndarray, "P"], logps: Float[np.ndarray, "P K"], chosen: Bool[np.ndarray, "P"], limit: float
) -> bool:
    """Whether the chosen pairs differ by more than rounding explains; also where a difference is not finite."""
    if not chosen.any():
        return False
    size = 1 + np.abs(logps[chosen]).max(1)
    return not gap[chosen].mean() <= limit * size.mean()


def rescored(indices: Int[np.ndarray, "P"], inputs: Inputs, programs: Programs) -> Float[np.ndarray, "P K"]:
    """Returns the log-probs of some training pairs under the initial weights, scored again."""
    params, shape, parts = load_params(inputs.source, programs), programs.score_shape, []
    for at in range(0, len(indices), shape.pairs):
        part = indices[at : at + shape.pairs]
        batch = make_batch(part, inputs.sets["train"], None, shape)
        parts.append(score_batch(functools.partial(programs.score_reference, params), batch)[0][: len(part)])
    return np.concatenate(parts)
