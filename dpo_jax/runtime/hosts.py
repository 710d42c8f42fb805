"""The processes of a run, one on each host (on a GPU cluster: one for each GPU), and what they tell one another.

A run of one process is a run of many whose number is one: every function here then answers at once. What is agreed on
goes through the key-value store of JAX's coordination service, not through devices, so that a difference is
found before any device is touched, and named instead of hanging in a collective.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import glob
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import xxhash
from jax.experimental import multihost_utils

from dpo_jax.types import InputError

STOPPED = 75  # exit status of a run that was asked to stop and saved its state: EX_TEMPFAIL, start it again
HEARTBEAT_S = 40  # of silence, after which a process counts as dead and the others end
CONNECT_S = 300  # for all processes to come up
WATCH_S = 2  # between looks at whether another process failed
FACT_S = 50  # for every process to say what it has, once it said that it is there

# Where there is no TPU libtpu looks for one all the same, says at length that it found none, and lets one process at a
# time use it.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

T = TypeVar("T")


class Stopped(Exception):
    """The run was asked to stop, and everything done so far is on disk."""


# --- who is there -------------------------------------------------------------------------------------------------


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several if flags or environment say so; call before anything touches a device.

    Without arguments, in this order: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; SLURM or Open MPI
    with more than one task; a machine with TPUs, whose metadata tell. Otherwise the run is of this process alone.

    Args:
      coordinator: host:port of process 0, the same on every process.
      processes: how many there are.
      process: which this is, from 0.
    Raises: InputError if only some of the three are given, or do not fit, or not all processes come up.
    """
    if not _tpus():
        without_tpu()
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    source = "flags"
    if not any(value is not None for value in given.values()) and "JAX_COORDINATOR_ADDRESS" in os.environ:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        given, source = {name: os.environ.get(name) for name in names}, "environment"
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise InputError(
            f"{source}: {', '.join(missing)}",
            got="not given",
            expected=f"all of {', '.join(given)}, or none",
            remedy="Give all three, the same but for the process's own number on every process.",
        )
    options: dict[str, Any] = {}
    if not missing:
        address, *counts = given.values()
        try:
            total, this = (int(count) for count in counts)  # type: ignore[arg-type]
        except ValueError:
            total, this = 0, 0
        if not 0 <= this < total or ":" not in str(address):
            raise InputError(
                f"{source}: {', '.join(given)}",
                got=", ".join(map(str, given.values())),
                expected="HOST:PORT, a number of processes, and this one's, from 0 and below that",
                remedy="Correct it.",
            )
        if total == 1:
            return
        options = dict(coordinator_address=str(address), num_processes=total, process_id=this)
        options["cluster_detection_method"] = "deactivate"
    elif not _one_of_many():
        return
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=CONNECT_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except (RuntimeError, ValueError) as error:
        where = options.get("coordinator_address", "the coordinator that the environment names")
        raise InputError(
            "jax.distributed",
            got=f"the processes did not find one another at {where} ({' '.join(str(error).split())})",
            expected=f"every process within {CONNECT_S} s",
            remedy="Check that all were started, that they have the same coordinator, and that its port is open.",
        ) from error
    if count() > 1:
        watcher = threading.Thread(target=_watch, name="hosts", daemon=True)
        watcher.start()
        atexit.register(watcher.join)  # or it would be cut off within a call, and abort the process
        atexit.register(_over.set)
        exchange("names", socket.gethostname())


def _one_of_many() -> bool:
    tasks = {"SLURM_STEP_NODELIST": "SLURM_NTASKS", "OMPI_MCA_orte_hnp_uri": "OMPI_COMM_WORLD_SIZE"}
    if any(mark in os.environ and int(os.environ.get(number, 1)) > 1 for mark, number in tasks.items()):
        return True
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    return bool(_tpus()) and "tpu" in wanted and importlib.util.find_spec("libtpu") is not None


def _tpus() -> list[str]:
    """The TPU chips of this machine."""
    return glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")


def without_tpu() -> None:
    """Tells libtpu, if it is installed, that this machine has no TPU; call before anything touches a device."""
    for name, value in WITHOUT_TPU.items():
        os.environ.setdefault(name, value)


def index() -> int:
    """Which of the processes this is, from 0."""
    return _state().process_id if _client() is not None else 0


def count() -> int:
    """How many processes the run has."""
    return _state().num_processes if _client() is not None else 1


def first() -> bool:
    """Whether this is the process that writes the logs and speaks for all."""
    return index() == 0


def mine(items: Sequence[T]) -> list[T]:
    """This process's share of some items; every process must list the same ones in the same order."""
    return list(items[index() :: count()])


def is_mine(item: int) -> bool:
    """Whether the item of that number is in this process's share."""
    return item % count() == index()


def _state() -> Any:
    from jax._src import distributed  # nothing public has the key-value store, and asks for no device

    return distributed.global_state


def _client() -> Any | None:
    return _state().client


# --- what they tell one another -----------------------------------------------------------------------------------


_calls: dict[str, int] = {}  # of each name, so that a later exchange never reads an earlier one's values


def exchange(name: str, value: Any, *, timeout_s: float | None = None) -> list[Any]:
    """What every process gave under this name, in their order; all must call it, in the same order of calls.

    Args:
      value: anything that JSON holds.
      timeout_s: None: as long as all processes live.
    Raises: InputError that names a process which did not answer in time.
    """
    if count() == 1:
        return [value]
    _calls[name] = _calls.get(name, 0) + 1
    key = f"dpo_jax/{name}/{_calls[name]}"
    _client().key_value_set(f"{key}/{index()}", json.dumps(value))  # type: ignore[union-attr]
    found = [json.loads(_get(f"{key}/{process}", timeout_s, name, process)) for process in range(count())]
    if name == "names":
        _names[:] = found
    return found


def _get(key: str, timeout_s: float | None, name: str, process: int) -> str:
    while True:
        try:
            wait_ms = int(1000 * (timeout_s or 3600))
            return _client().blocking_key_value_get(key, wait_ms)  # type: ignore[union-attr]
        except Exception as error:  # the client's own type of error is not public
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            if timeout_s is not None:
                raise InputError(
                    f"{_name(process)}",
                    got=f"no answer about {name} in {timeout_s:.0f} s",
                    expected="every process to be at the same point",
                    remedy="Look at its own output; all must run the same command.",
                ) from None


def agree(what: str, facts: dict[str, Any], *, timeout_s: float | None = FACT_S) -> None:
    """Raises InputError, on every process, unless all of them give equal facts: which differ, and on which process.

    Args:
      what: what they are about, for the error.
      facts: what must be equal, by name.
    """
    everyone = exchange(what, facts, timeout_s=timeout_s)
    differ = sorted({name for each in everyone for name in each if each[name] != everyone[0].get(name)})
    if not differ:
        return
    details = []
    for name in differ[:5]:
        groups: dict[str, list[int]] = {}
        for process, each in enumerate(everyone):
            groups.setdefault(json.dumps(each.get(name)), []).append(process)
        ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
        details.append(f"{name} is " + ", ".join(f"{value} on {named(who)}" for value, who in ordered))
    more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
    raise InputError(
        what,
        got="; ".join(details) + more,
        expected="the same on every process",
        remedy="Start all of them with the same command, code and files.",
    )


_names: list[str] = []


def _name(process: int) -> str:
    return f"process {process}" + (f" ({_names[process]})" if _names else "")


def named(processes: Sequence[int]) -> str:
    """Some processes in words, by number and host."""
    shown = ", ".join(_name(process) for process in processes[:3])
    return shown + (f" and {len(processes) - 3} more" if len(processes) > 3 else "")


def merged(name: str) -> Callable[[dict], dict]:
    """A function that joins what every process has found into one dict, on every process."""

    def gather(part: dict) -> dict:
        return {key: value for each in exchange(name, part) for key, value in each.items()}

    return gather


def wait(name: str) -> None:
    """Returns once every process has called it."""
    exchange(f"wait/{name}", None)


def agreed(name: str, value: T) -> T:
    """Process 0's value, on every process."""
    return exchange(name, value if first() else None)[0]


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[bool]:
    """The body runs to its end on process 0 before it begins on the others: what it makes, they find."""
    if not first():
        wait(name)
    yield first()
    if first():
        wait(name)


# --- how they end -------------------------------------------------------------------------------------------------


def leave(status: int, reason: str = "") -> NoReturn:
    """Ends this process; where it fails and has others, they are told why and end within seconds.

    A process that failed does not wait for the others at JAX's shutdown barrier, which they may never reach.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if count() == 1 or status in (0, STOPPED):
        sys.exit(status)
    with contextlib.suppress(Exception):
        _client().key_value_set("dpo_jax/failed", json.dumps([index(), reason]))  # type: ignore[union-attr]
        if first():  # the store goes with this process: the others must have read it
            threading.Event().wait(2 * WATCH_S)
    os._exit(status)


def _watch() -> None:
    """Ends this process as soon as another says that it failed."""
    while not _over.wait(WATCH_S):
        try:
            process, reason = json.loads(_client().key_value_try_get("dpo_jax/failed"))  # type: ignore[union-attr]
        except Exception as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the service has ended, of which JAX itself takes care
        if process != index():
            threading.Event().wait(1)  # where all found the same mistake, each says so itself
            print(f"error: {_name(process)} stopped: {reason}", file=sys.stderr, flush=True)
            os._exit(1)
        return


_over = threading.Event()
_asked = threading.Event()
_checks = 0


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """While the body runs, SIGTERM asks the run to stop at the next `asked_to_stop`, not the process to end.

    Across processes JAX's preemption service listens from `join` on, and carries the notice from one to all.
    """
    alone = count() == 1 and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: _asked.set()) if alone else None
    try:
        yield
    finally:
        if alone:
            signal.signal(signal.SIGTERM, before)
            _asked.clear()


def asked_to_stop() -> bool:
    """Whether to stop here; the same answer on every process, which must all call it equally often."""
    global _checks
    _checks += 1
    if count() > 1:
        return multihost_utils.reached_preemption_sync_point(_checks)
    return _asked.is_set()


def stop_if_asked() -> None:
    """Raises Stopped where everything done so far is on disk already."""
    if asked_to_stop():
        raise Stopped("asked to stop")


# --- what code they run -------------------------------------------------------------------------------------------


@functools.cache
def code_digest() -> str:
    """Of every source file of this package and the versions of what it computes with."""
    root = Path(__file__).parents[1]
    state = xxhash.xxh3_128(f"{jax.__version__} {sys.version_info[:2]}".encode())
    for path in sorted(root.rglob("*.py")):
        state.update(f"\n{path.relative_to(root)}\n".encode() + path.read_bytes())
    return state.hexdigest()
