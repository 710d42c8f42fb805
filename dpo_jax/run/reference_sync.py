"""TR-DPO: a reference that follows the policy. Every so many updates it takes the policy in, whole or in part, and the
pairs of the updates until the next time, and those of the evaluation, are scored anew under it.

    pi_ref <- alpha pi + (1 - alpha) pi_ref

What was scored is kept under an identity of its own, and so are the mixed weights, so that an interrupted run goes on
from both; between two such times no second model is held.
Source: Gorbatovski et al. 2024 (2404.09656), Eq. 2 (soft) and 3 (hard, alpha of 1).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from jaxtyping import Int

from dpo_jax import config as configs
from dpo_jax.config import Config
from dpo_jax.data.batches import ReferenceValues
from dpo_jax.run import programs, state
from dpo_jax.run.checkpoints import read_tree, write_tree
from dpo_jax.run.inputs import Inputs
from dpo_jax.run.programs import Programs, Store
from dpo_jax.runtime import hosts
from dpo_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Following:
    """When a run's reference changes, and where what it then says is kept."""

    config: Config
    inputs: Inputs
    built: Programs
    store: Store
    order: Callable[[int], Int[np.ndarray, "P"]]
    total: int

    def due(self, step: int) -> bool:
        """Whether the reference changes before update `step`."""
        return 0 < step < self.total and step % self.config.reference.sync_steps == 0

    def last(self, step: int) -> int:
        """The update before which it changed last, when what is due at `step` has not happened yet; 0: it has not."""
        every = self.config.reference.sync_steps
        return max(0, step - 1) // every * every

    def place(self, step: int) -> Store:
        """Where the values of the reference that came about at `step` are, and their identity."""
        reference = self.config.reference
        fixed = {name: value for name, value in configs.flat(self.config).items() if name not in configs.RESUMABLE}
        run = xxhash.xxh3_64_hexdigest(json.dumps([fixed, self.inputs.digests], sort_keys=True).encode())
        sync = {"step": step, "every": reference.sync_steps, "mixup_alpha": reference.mixup_alpha, "run": run}
        return Store(self.store.folder / f"sync-{step:06d}", self.store.identity | {"sync": sync})

    def refresh(self, step: int, trained: Any, whole: Callable[[Any], Any]) -> list[ReferenceValues]:
        """What the reference that comes about at `step` says of all pairs until the next time.

        Args:
          trained: the parameters that train, at `step`.
          whole: adds those that do not.
        """
        held: list[Any] = []

        def params() -> Any:
            if not held:
                held.append(whole(self._mixed(step, trained)))
            return held[0]

        if self.config.reference.mixup_alpha != 1:
            params()  # written down before anything else: the next mixture needs it
        return self._values(step, params)

    def stored(self, step: int) -> list[ReferenceValues]:
        """The same, as an earlier call has kept it. Raises: InputError if it has not: the policy of then is gone."""

        def gone() -> Any:
            raise InputError(
                str(self.place(step).folder),
                got="lacks log-probs of pairs",
                expected=f"what the reference of step {step} says of all pairs until the next",
                remedy="Restore the folder, or train anew in another working folder.",
            )

        return self._values(step, gone)

    def _values(self, step: int, params: Callable[[], Any]) -> list[ReferenceValues]:
        last = min(step + self.config.reference.sync_steps, self.total)
        coming = np.unique(np.concatenate([self.order(each) for each in range(step, last)]))
        sets = self.inputs.sets
        only = [coming, *(np.arange(len(pairs)) for pairs in sets[1:])]
        return programs.reference_values(self.inputs, self.place(step), self.built, params, only=only)[0]

    def _mixed(self, step: int, trained: Any) -> Any:
        """Parameters of the new reference, of those that train; mixtures are kept until the next is whole."""
        alpha = self.config.reference.mixup_alpha
        if alpha == 1:
            return trained
        folder = self._weights(step)
        if folder.exists():
            return read_tree(folder, trained)
        before = self.last(step)
        if before:
            reference = read_tree(self._weights(before), trained)
        else:
            selection = self.built.selection
            reference = state.load_params(self.config, self.inputs.folder, self.built, only=selection.trains)
        mixed = jax.jit(mix, static_argnames="alpha", donate_argnums=1)(trained, reference, alpha=alpha)
        write_tree(folder, mixed)
        if hosts.first() and self.last(before):
            shutil.rmtree(self._weights(self.last(before)), ignore_errors=True)
        return mixed

    def _weights(self, step: int) -> Path:
        return self.place(step).folder / "weights"


def mix(policy: Any, reference: Any, *, alpha: float) -> Any:
    """alpha policy + (1 - alpha) reference, leaf by leaf."""
    return jax.tree.map(lambda p, r: (alpha * p + (1 - alpha) * r).astype(p.dtype), policy, reference)


def stretches(start: int, total: int, every: int) -> Iterator[Sequence[int]]:
    """The updates from `start` on in stretches, each under one reference.

    >>> [list(each) for each in stretches(1, 6, 2)]
    [[1], [2, 3], [4, 5]]
    """
    while start < total:
        end = min(total, (start // every + 1) * every) if every else total
        yield range(start, end)
        start = end
