"""Checkpoints of a run: the training state, and a record of configuration and data to compare on resuming."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from dpo_jax.runtime import buckets, files
from dpo_jax.runtime.files import Path
from dpo_jax.runtime.terminal import waiting
from dpo_jax.steps import TrainState
from dpo_jax.types import InputError

T = TypeVar("T")

COMPLETE = "commit_success.txt"  # orbax's file, written after all others of a checkpoint


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
        options: dict[str, Any] = {"create": True, "preservation_policy": Kept(keep, best)}
        if read_only:
            options = {"read_only": True, "create": False, "save_interval_steps": 0}
        self._open = True
        self._manager = ocp.CheckpointManager(
            _place(folder),
            options=ocp.CheckpointManagerOptions(atomicity_options=_atomicity(folder), **options),
            item_names=("state", "record"),
        )

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
    """Writes a tree of arrays into a new folder, whole or not at all; returns when it is there."""
    with ocp.StandardCheckpointer(atomicity_options=_atomicity(folder)) as writer:
        writer.save(_place(folder), tree, force=True)  # in place of what a killed process left


def has_tree(folder: Path) -> bool:
    """Whether `write_tree` has written the whole of a tree into the folder."""
    return files.has_folder(folder, COMPLETE)


def read_tree(folder: Path, like: T) -> T:
    """Reads a tree that `write_tree` wrote, with shapes, types and shardings of `like`."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    with ocp.StandardCheckpointer(atomicity_options=_atomicity(folder)) as reader:
        return reader.restore(_place(folder), shapes)


def _atomicity(folder: Path) -> ocp.options.AtomicityOptions:
    """Returns how a checkpoint becomes valid: by its folder's name on disk, by its object COMPLETE in a bucket."""
    mode = ocp.options.AtomicityMode.COMMIT_FILE if files.in_bucket(folder) else ocp.options.AtomicityMode.AUTO
    return ocp.options.AtomicityOptions(mode=mode)


def _place(folder: Path) -> Path:
    """Returns the folder as orbax takes it, absolute; orbax is made able to write arrays to it."""
    if buckets.scheme_of(str(folder)) == "s3":
        _address_s3()
    return files.resolved(folder)


@functools.cache
def _address_s3() -> None:
    """Makes orbax address arrays at s3:// by tensorstore's driver for it.

    orbax writes them to disks and gs:// alone, and takes s3://BUCKET for the name of a folder. It has no setting for
    the address, so two of its functions are wrapped; a version that has no such functions is refused.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    try:
        is_remote, address = tensorstore_utils._use_gcs_driver, gcs_utils.get_kvstore_for_gcs
    except AttributeError as error:
        raise InputError(
            "s3://",
            got=f"orbax-checkpoint {ocp.__version__}, whose arrays cannot be sent there ({error})",
            expected="orbax-checkpoint 0.12",
            remedy="Install that version, or use gs:// or a disk.",
        ) from error
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith("s3:/") or is_remote(path)
    gcs_utils.get_kvstore_for_gcs = lambda path: (
        buckets.kvstore(str(path)) if str(path).startswith("s3:/") else address(path)
    )
