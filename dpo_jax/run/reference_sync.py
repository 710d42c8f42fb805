"""TR-DPO: the reference is synced with the policy every `sync_steps` updates.

    pi_ref <- alpha pi + (1 - alpha) pi_ref

Pairs of the updates until the next sync, and those of the evaluation, are rescored under the new reference. Their
log-probs are stored under an identity of their own, and so are mixed weights, so that an interrupted run resumes from
both. Between syncs no second model is held.
Source: Gorbatovski et al. 2024 (2404.09656), Eq. 2 (soft) and 3 (hard, alpha of 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int, PyTree

from dpo_jax.data.batches import ReferenceValues
from dpo_jax.data.order import reached
from dpo_jax.reference.store import Store
from dpo_jax.run.checkpoints import has_tree, read_tree, write_tree
from dpo_jax.run.inputs import Inputs
from dpo_jax.run.programs import Programs
from dpo_jax.run.reference_values import score_missing
from dpo_jax.run.state import load_params
from dpo_jax.runtime import files, hosts
from dpo_jax.runtime.files import Path
from dpo_jax.runtime.terminal import Counter
from dpo_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class ReferenceSync:
    """Syncs the reference of a run with its policy, and rescores pairs under it."""

    inputs: Inputs
    programs: Programs
    store: Store  # of the first reference
    order: Callable[[int], Int[np.ndarray, "P"]]  # from an update to the indices of its pairs
    total_steps: int  # updates of the run
    sync_steps: int  # updates between syncs, > 0
    mixup_alpha: float  # weight of the policy in the new reference, in (0, 1]; 1: the policy itself
    run_digest: Callable[[int], str]  # of all settings and data that decide the policy at the sync of a step

    def due(self, step: int) -> bool:
        """Whether the reference syncs before update `step`."""
        return 0 < step < self.total_steps and step % self.sync_steps == 0

    def last(self, step: int) -> int:
        """Returns the step of the last sync before `step`, without one that is due at `step` itself; 0: none."""
        return max(0, step - 1) // self.sync_steps * self.sync_steps

    def store_at(self, step: int) -> Store:
        """Returns the store of the reference that the sync at `step` makes."""
        sync = {
            "step": step,
            "every": self.sync_steps,
            "mixup_alpha": self.mixup_alpha,
            "run": self.run_digest(step),
        }
        return Store(self.store.folder / f"sync-{step:06d}", self.store.identity | {"sync": sync})

    def refresh(self, step: int, policy: PyTree, add_frozen: Callable[[PyTree], PyTree]) -> dict[str, ReferenceValues]:
        """Syncs at `step` and returns reference log-probs of all pairs that are needed until the next sync.

        Args:
          policy: its trainable parameters.
          add_frozen: joins trainable parameters with the frozen ones.
        """
        cached: list[PyTree] = []

        def params() -> PyTree:
            if not cached:
                cached.append(add_frozen(self._mixed(step, policy)))
            return cached[0]

        if self.mixup_alpha != 1:
            params()  # written to disk before anything else: the next mixture needs it
        return self._values(step, params)

    def stored(self, step: int) -> dict[str, ReferenceValues]:
        """Returns the log-probs that an earlier `refresh` at `step` stored.

        Raises: InputError if some are missing: the policy of that step is gone, so they cannot be scored again.
        """

        def raise_missing() -> PyTree:
            raise InputError(
                str(self.store_at(step).folder),
                got="log-probs of some pairs are missing",
                expected=f"log-probs of all pairs until the next sync, under the reference of step {step}",
                remedy="Restore the folder, or train anew in another working folder.",
            )

        return self._values(step, raise_missing)

    def _values(self, step: int, params: Callable[[], PyTree]) -> dict[str, ReferenceValues]:
        """Reads or scores the log-probs that are needed from `step` until the next sync."""
        # Of all updates until then, even beyond the run's last: its end may be moved, and this reference is gone then.
        coming = reached(self.order, range(step, step + self.sync_steps), len(self.inputs.sets["train"]))
        store, only = self.store_at(step), {"train": coming}
        with Counter(f"reference of step {step}", unit="pairs") as counter:
            return score_missing(self.inputs, store, self.programs, params, counter.update, only=only, provided=False)[
                0
            ]

    def _mixed(self, step: int, policy: PyTree) -> PyTree:
        """Returns the new reference's trainable parameters; a mixture stays on disk until the next one is complete."""
        if self.mixup_alpha == 1:
            return policy
        folder = self._weights(step)
        if has_tree(folder):
            return read_tree(folder, policy)
        previous = self.last(step)
        if previous:
            reference = read_tree(self._weights(previous), policy)
        else:
            reference = load_params(self.inputs.source, self.programs, only=self.programs.trainable.trains)
        mixed = jax.jit(mix, static_argnames="alpha", donate_argnums=1)(policy, reference, alpha=self.mixup_alpha)
        write_tree(folder, mixed)
        if hosts.first() and self.last(previous):
            files.remove_folder(self._weights(self.last(previous)))
        return mixed

    def _weights(self, step: int) -> Path:
        return self.store_at(step).folder / "weights"


def mix(policy: PyTree, reference: PyTree, *, alpha: float) -> PyTree:
    """Returns alpha policy + (1 - alpha) reference, leaf by leaf."""
    return jax.tree.map(lambda p, r: (alpha * p + (1 - alpha) * r).astype(p.dtype), policy, reference)


def sync_stretches(start: int, total: int, every: int) -> Iterator[Sequence[int]]:
    """Splits the updates from `start` to `total` into ranges, each under one reference; `every` 0: one range.

    >>> [list(each) for each in sync_stretches(1, 6, 2)]
    [[1], [2, 3], [4, 5]]
    """
    while start < total:
        end = min(total, (start // every + 1) * every) if every else total
        yield range(start, end)
        start = end
