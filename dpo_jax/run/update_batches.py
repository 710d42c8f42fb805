"""Batches of a run's updates, prepared ahead of the device: packed, placed on the mesh, with counts of their work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dpo_jax import sharding
from dpo_jax.cost.flops import forward_flops, shares_of, train_flops
from dpo_jax.data.batches import ReferenceValues, make_batch
from dpo_jax.data.layout import work_counts
from dpo_jax.run.inputs import Inputs
from dpo_jax.run.programs import Programs
from dpo_jax.runtime import prefetch
from dpo_jax.steps import scores_first
from dpo_jax.types import Batch


class Prepared(NamedTuple):
    """A batch on the mesh, with its pairs and the counts of its work on the host."""

    step: int  # updates made before it
    indices: Int[np.ndarray, "P"]  # of its pairs in the training set
    batch: Batch
    counts: dict[str, int]  # positions computed, tokens among them
    flops: float  # operations that its tokens need, without padding


class UpdateBatches:
    """Makes the batches of a run's updates.

    Args:
      order: returns the pairs of an update, by its number.
      values: reference log-probs of the training pairs, None for an objective that reads none. They are replaced, by
        `sync`, where the reference syncs with the policy.
    """

    def __init__(
        self,
        inputs: Inputs,
        programs: Programs,
        order: Callable[[int], Int[np.ndarray, "P"]],
        values: ReferenceValues | None,
    ):
        self._inputs, self._programs, self._order, self._values = inputs, programs, order, values
        shapes = programs.trainable.leaf_shapes(programs.model)
        self._shares = shares_of(programs.model, shapes, programs.trainable.trained_fraction)

    def sync(self, values: ReferenceValues) -> None:
        """Replaces the reference log-probs that later batches read."""
        self._values = values

    def make(self, step: int) -> Prepared:
        """Makes the batch of update `step`, counted from 0."""
        programs, shape, indices = self._programs, self._programs.update_shape, self._order(step)
        pairs, mismatched = self._inputs.sets["train"], self._inputs.mismatched.get("train")
        of_pairs = {"weights": pairs.pair_weights, "margins": pairs.margins, "parts": pairs.part}
        batch = make_batch(indices, pairs, self._values, shape, mismatched=mismatched, **of_pairs)
        counts = work_counts(batch, pairs.lengths[indices], shape)
        scored = int(batch.lengths.sum())
        flops = train_flops(programs.model, pairs.lengths[indices], programs.layout, self._shares, scored)
        if scores_first(programs.objective, len(batch.present)):
            counts["positions_computed"] *= 2  # forward only at first; the tokens and their FLOPs are the same
        if mismatched is not None and batch.mismatched is not None:
            lengths, scored = mismatched.lengths[indices], int(batch.mismatched.lengths.sum())
            more = work_counts(batch.mismatched, lengths, shape)
            counts = {name: count + more[name] for name, count in counts.items()}
            flops += forward_flops(programs.model, lengths, programs.layout, self._shares, scored)
        return Prepared(step, indices, sharding.put(batch, programs.mesh), counts, flops)

    def stream(self, stretches: Iterator[Sequence[int]]) -> Generator[tuple[Prepared, float], None, None]:
        """Yields the batches of the updates in each stretch, made ahead, and the seconds waited for each.

        No batch is made ahead of the end of its stretch, where the reference changes.
        """
        for steps in stretches:
            with contextlib.closing(prefetch.ahead(self.make, steps)) as batches:
                yield from batches
