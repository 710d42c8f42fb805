"""Checkpoints of a run: its state, and what must still hold when it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dpo_jax.steps import TrainState


class Checkpoints:
    """The checkpoints of one workdir, written in the background, the newest `keep` of them kept.

    A checkpoint holds the training state and a JSON record of the configuration and the data; the data's position
    is the step, from which the order of pairs follows.
    """

    def __init__(self, folder: Path, *, keep: int, read_only: bool = False):
        limits: dict[str, Any] = {"save_interval_steps": 0} if read_only else {"max_to_keep": keep}
        options = ocp.CheckpointManagerOptions(read_only=read_only, create=not read_only, **limits)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options, item_names=("state", "record"))

    def latest_step(self) -> int | None:
        """Updates made at the newest whole checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
        """Copies the state off the devices and writes it in the background; nothing if that step is there already."""
        if step == self.latest_step():
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        # Forced, or the manager would put its own questions to the preemption service, in `hosts`' place.
        self._manager.save(step, args=items, force=True)

    def record(self, step: int) -> dict[str, Any]:
        """The record saved with that step."""
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of that step, placed as `like`, a tree of shapes with shardings."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=args)["state"]

    def restore_params(self, step: int, params: Any, running: Any) -> tuple[Any, Any]:
        """Parameters and baselines of that step alone, placed as these are, trees of shapes with shardings."""
        tree = {"params": params, "running": running}
        places = ocp.checkpoint_utils.construct_restore_args(tree)
        state = ocp.args.PyTreeRestore(tree, restore_args=places, partial_restore=True)
        found = self._manager.restore(step, args=ocp.args.Composite(state=state))["state"]
        return found["params"], found["running"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def write_tree(folder: Path, tree: Any) -> None:
    """Arrays by themselves, whole or not at all; returns when they are on disk."""
    with ocp.StandardCheckpointer() as writer:
        writer.save(Path(folder).absolute(), tree)


def read_tree(folder: Path, like: Any) -> Any:
    """What `write_tree` wrote, placed as `like`."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(Path(folder).absolute(), shapes)
