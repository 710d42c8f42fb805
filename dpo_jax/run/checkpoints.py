"""Checkpoints of a run: the training state, and a record of configuration and data to compare on resuming."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from dpo_jax.runtime.terminal import waiting
from dpo_jax.steps import TrainState

T = TypeVar("T")


@runtime_checkable
class HasStep(Protocol):
    """A checkpoint as orbax's policies see it."""

    step: int


@dataclasses.dataclass(frozen=True)
class Kept:
    """Orbax's policy for which checkpoints to keep: the newest ones, and the best if there is one."""

    newest: int
    best: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[HasStep], *, context: object) -> list[bool]:
        """Returns for each checkpoint, in the order of their steps, whether it is kept."""
        first, best = len(checkpoints) - self.newest, self.best()
        return [index >= first or each.step == best for index, each in enumerate(checkpoints)]


class Checkpoints:
    """Checkpoints in one folder, written in the background. A context manager.

    The newest `keep` are kept, and besides them that of the step that `best` returns, which is asked at every save.

    A checkpoint holds the training state and a JSON record of the configuration and the data. The position in the
    data is not stored: the step decides the order of pairs.
    """

    def __init__(
        self, folder: Path, *, keep: int, read_only: bool = False, best: Callable[[], int | None] = lambda: None
    ):
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
        else:
            options = ocp.CheckpointManagerOptions(create=True, preservation_policy=Kept(keep, best))
        self._open = True
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options, item_names=("state", "record"))

    def latest_step(self) -> int | None:
        """Returns the number of updates before the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Returns the number of updates before each complete checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, record: Mapping[str, object]) -> None:
        """Copies the state off the devices and writes it in the background; a step that is saved already is skipped."""
        if step == self.latest_step():
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        # force: otherwise the manager would poll the preemption service too, which `hosts` does.
        self._manager.save(step, args=items, force=True)

    def record(self, step: int) -> dict[str, Any]:
        """Returns the record saved with that step."""
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Returns the state of that step, sharded as `like`: a tree of shapes with shardings."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=args)["state"]

    def restore_params(self, step: int, params: PyTree, running: PyTree) -> tuple[PyTree, PyTree]:
        """Returns parameters and baselines of that step without the optimizer's state.

        Args:
          params, running: trees of shapes with the shardings that the arrays will have.
        """
        tree = {"params": params, "running": running}
        restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
        state = ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=True)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=state))["state"]
        return restored["params"], restored["running"]

    def close(self) -> None:
        """Waits until everything is on disk, and stops writing; closing again has no effect."""
        if not self._open:
            return
        self._open = False
        try:
            with waiting("writing the checkpoint"):
                self._manager.wait_until_finished()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_tree(folder: Path, tree: PyTree) -> None:
    """Writes a tree of arrays into a new folder, whole or not at all; returns when it is on disk."""
    with ocp.StandardCheckpointer() as writer:
        writer.save(Path(folder).absolute(), tree)


def read_tree(folder: Path, like: T) -> T:
    """Reads a tree that `write_tree` wrote, with shapes, types and shardings of `like`."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(Path(folder).absolute(), shapes)
