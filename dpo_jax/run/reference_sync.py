"""TR-DPO: a reference that syncs with the policy.

Every `sync_steps` updates the reference is replaced by a mixture of policy and reference, or by the policy:

    pi_ref <- alpha pi + (1 - alpha) pi_ref

The pairs of the updates until the next sync, and those of the evaluation, are then scored again under it. Scores are
stored under an identity of their own, and so are mixed weights, so that an interrupted run goes on from both. Between
two syncs no second model is held.
Source: Gorbatovski et al. 2024 (2404.09656), Eq. 2 (soft) and 3 (hard, alpha of 1).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from dpo_jax.data.batches import ReferenceValues
from dpo_jax.run.checkpoints import read_tree, write_tree
from dpo_jax.run.inputs import Inputs
from dpo_jax.run.programs import Programs
from dpo_jax.run.reference_values import Store, score_missing
from dpo_jax.run.state import load_params
from dpo_jax.runtime import hosts
from dpo_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class ReferenceSync:
    """Steps at which a run's reference changes, and the folders of what is then scored."""

    inputs: Inputs
    programs: Programs
    store: Store  # of the first reference
    order: Callable[[int], Int[np.ndarray, "P"]]  # from an update to the indices of its pairs
    total: int  # updates of the run
    every: int  # updates between syncs
    mixup_alpha: float  # weight of the policy in the new reference; 1: the policy itself
    run: str  # digest of all settings and data that decide the policy at a sync

    def due(self, step: int) -> bool:
        """Whether the reference syncs before update `step`."""
        return 0 < step < self.total and step % self.every == 0

    def last(self, step: int) -> int:
        """Returns the update before which it synced last, a sync that is due at `step` not counted; 0: none."""
        return max(0, step - 1) // self.every * self.every

    def place(self, step: int) -> Store:
        """Returns the store of the reference that the sync at `step` makes."""
        sync = {"step": step, "every": self.every, "mixup_alpha": self.mixup_alpha, "run": self.run}
        return Store(self.store.folder / f"sync-{step:06d}", self.store.identity | {"sync": sync})

    def refresh(self, step: int, trained: Any, whole: Callable[[Any], Any]) -> dict[str, ReferenceValues]:
        """Syncs at `step` and returns reference log-probs of all pairs that are needed until the next sync.

        Args:
          trained: the policy's trained parameters.
          whole: adds the frozen ones.
        """
        held: list[Any] = []

        def params() -> Any:
            if not held:
                held.append(whole(self._mixed(step, trained)))
            return held[0]

        if self.mixup_alpha != 1:
            params()  # written down before anything else: the next mixture needs it
        return self._values(step, params)

    def stored(self, step: int) -> dict[str, ReferenceValues]:
        """Returns what an earlier `refresh` at `step` stored.

        Raises: InputError if values are missing: the policy that they need is gone.
        """

        def gone() -> Any:
            raise InputError(
                str(self.place(step).folder),
                got="lacks log-probs of pairs",
                expected=f"those of all pairs until the next sync, under the reference of step {step}",
                remedy="Restore the folder, or train anew in another working folder.",
            )

        return self._values(step, gone)

    def _values(self, step: int, params: Callable[[], Any]) -> dict[str, ReferenceValues]:
        last = min(step + self.every, self.total)
        coming = np.unique(np.concatenate([self.order(each) for each in range(step, last)]))
        only = {name: np.arange(len(pairs)) for name, pairs in self.inputs.sets.items()} | {"train": coming}
        return score_missing(self.inputs, self.place(step), self.programs, params, only=only)[0]

    def _mixed(self, step: int, trained: Any) -> Any:
        """Returns the new reference's trained parameters; a mixture is kept until the next one is on disk."""
        if self.mixup_alpha == 1:
            return trained
        folder = self._weights(step)
        if folder.exists():
            return read_tree(folder, trained)
        before = self.last(step)
        if before:
            reference = read_tree(self._weights(before), trained)
        else:
            reference = load_params(self.inputs.source, self.programs, only=self.programs.selection.trains)
        mixed = jax.jit(mix, static_argnames="alpha", donate_argnums=1)(trained, reference, alpha=self.mixup_alpha)
        write_tree(folder, mixed)
        if hosts.first() and self.last(before):
            shutil.rmtree(self._weights(self.last(before)), ignore_errors=True)
        return mixed

    def _weights(self, step: int) -> Path:
        return self.place(step).folder / "weights"


def mix(policy: Any, reference: Any, *, alpha: float) -> Any:
    """Returns alpha policy + (1 - alpha) reference, leaf by leaf."""
    return jax.tree.map(lambda p, r: (alpha * p + (1 - alpha) * r).astype(p.dtype), policy, reference)


def sync_stretches(start: int, total: int, every: int) -> Iterator[Sequence[int]]:
    """Yields the updates from `start` to `total` in stretches between syncs; `every` 0: one stretch.

    >>> [list(each) for each in sync_stretches(1, 6, 2)]
    [[1], [2, 3], [4, 5]]
    """
    while start < total:
        end = min(total, (start // every + 1) * every) if every else total
        yield range(start, end)
        start = end
