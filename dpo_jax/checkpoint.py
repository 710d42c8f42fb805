"""Checkpoints of a run: its state, and what must still hold when it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

    def restore_params(self, step: int, like: Any) -> Any:
        """The parameters of that step alone, placed as `like`."""
        tree = {"params": like}
        places = ocp.checkpoint_utils.construct_restore_args(tree)
        state = ocp.args.PyTreeRestore(tree, restore_args=places, partial_restore=True)
        return self._manager.restore(step, args=ocp.args.Composite(state=state))["state"]["params"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
