"""Processes of a run, one on each host (on a GPU cluster: one for each GPU), and how they coordinate.

A run of one process needs no special case: every function here then returns at once. Facts that must be equal are
compared through the key-value store of JAX's coordination service, not through devices, so that a difference is
reported before any device is used, instead of a collective that hangs.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import xxhash
from jax.experimental import multihost_utils

from dpo_jax.runtime import peers
from dpo_jax.types import InputError

STOPPED = 75  # exit status of a run that was asked to stop and saved its state: EX_TEMPFAIL, start it again
INTERRUPTED = 130  # exit status of a process that Ctrl-C ended without saving, as shells have it
HEARTBEAT_S = 40  # without a heartbeat, after which a process counts as dead and the others end
CONNECT_S = 300  # for all processes to come up
WATCH_S = 2  # between checks whether another process failed
FACT_S = 50  # for every process to send its facts, once all have joined

# Without a TPU, libtpu still searches for one, prints long warnings, and lets only one process at a time use it.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

T = TypeVar("T")


class Stopped(Exception):
    """The run was asked to stop, and everything done so far is on disk."""


# --- joining ------------------------------------------------------------------------------------------------------


class Membership(NamedTuple):
    """Place of this process among those of a run."""

    coordinator: str  # host:port of process 0
    processes: int
    process: int


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several if flags or environment say so; call before anything uses a device.

    Without arguments, in this order: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; SLURM or Open MPI
    with more than one task; the metadata of a machine with TPUs. Otherwise this process is the whole run.

    Args:
      coordinator: host:port of process 0, the same on every process.
      processes: their number.
      process: the index of this one, from 0.
    Raises: InputError if only some of the three are set, or do not fit, or not all processes come up.
    """
    if not _tpus():
        without_tpu()
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if any(value is not None for value in flags.values()) or "JAX_COORDINATOR_ADDRESS" not in os.environ:
        membership = _membership("flags", flags)
    else:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        membership = _membership("environment", {name: os.environ.get(name) for name in names})
    if membership is None and not _started_by_cluster():
        return
    if membership is not None and membership.processes == 1:
        return
    _initialize(membership)
    if count() > 1:
        watcher = threading.Thread(target=_watch, name="hosts", daemon=True)
        watcher.start()
        atexit.register(watcher.join)  # a thread that is cut off within a call would abort the process
        atexit.register(_over.set)
        _names[:] = all_gather("names", socket.gethostname())
        _connect()


def _membership(source: str, settings: Mapping[str, str | int | None]) -> Membership | None:
    """Reads coordinator, number of processes and index from three settings of one source; None if none is set."""
    missing = [name for name, value in settings.items() if value is None]
    if len(missing) == len(settings):
        return None
    if missing:
        raise InputError(
            ", ".join(missing),
            got=f"not given in the {source}, and {', '.join(name for name in settings if name not in missing)} given",
            expected="all three, or none",
            remedy="Give all three, equal on every process but for the process's own number.",
        )
    address, *numbers = map(str, settings.values())
    try:
        processes, process = map(int, numbers)
    except ValueError:
        processes, process = 0, 0
    if not 0 <= process < processes or ":" not in address:
        raise InputError(
            ", ".join(settings),
            got=f"got {', '.join(map(str, settings.values()))}",
            expected="HOST:PORT, the number of processes, and the index of this one, from 0 and below that number",
            remedy="Give for example 10.0.0.1:8476, 4 and 0; the next process has the index 1.",
        )
    return Membership(address, processes, process)


def _initialize(membership: Membership | None) -> None:
    """Starts JAX's coordination service; without a membership JAX asks the cluster that started the process."""
    address, processes, process = membership or (None, None, None)
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=processes,
            process_id=process,
            cluster_detection_method="deactivate" if membership else None,
            initialization_timeout=CONNECT_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except (RuntimeError, ValueError) as error:
        coordinator = address or "the coordinator that the environment names"
        raise InputError(
            "start of all processes",
            got=f"the processes could not connect to {coordinator} ({' '.join(str(error).split())})",
            expected=f"every process within {CONNECT_S} s",
            remedy="Check that all were started, that they have the same coordinator, and that its port is open.",
        ) from error


def _started_by_cluster() -> bool:
    """Whether SLURM, Open MPI or the metadata of TPU machines started this process with others."""
    tasks = {"SLURM_STEP_NODELIST": "SLURM_NTASKS", "OMPI_MCA_orte_hnp_uri": "OMPI_COMM_WORLD_SIZE"}
    if any(mark in os.environ and int(os.environ.get(number, 1)) > 1 for mark, number in tasks.items()):
        return True
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    return bool(_tpus()) and "tpu" in platforms and importlib.util.find_spec("libtpu") is not None


def _tpus() -> list[str]:
    """Lists the device files of the TPU chips of this machine."""
    return glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")


def without_tpu() -> None:
    """Tells libtpu, if it is installed, that this machine has no TPU; call before anything uses a device."""
    for name, value in WITHOUT_TPU.items():
        os.environ.setdefault(name, value)


def index() -> int:
    """Returns the index of this process, from 0."""
    return _state().process_id if _client() is not None else 0


def count() -> int:
    """Returns the number of processes of the run."""
    return _state().num_processes if _client() is not None else 1


def first() -> bool:
    """Whether this is process 0, which writes the logs and prints for all."""
    return index() == 0


def mine(items: Sequence[T]) -> list[T]:
    """Returns this process's share of the items; every process must list the same ones in the same order."""
    return list(items[index() :: count()])


def is_mine(item: int) -> bool:
    """Whether the item of that index is in this process's share."""
    return item % count() == index()


def _state() -> Any:
    from jax._src import distributed  # no public function reaches the key-value store without using a device

    return distributed.global_state


def _client() -> Any:
    """Returns JAX's client of the coordination service; None in a run of one process."""
    return _state().client


# --- exchanging facts ---------------------------------------------------------------------------------------------


_calls: dict[str, int] = {}  # exchanges by name; the number in the key keeps later values apart


def all_gather(name: str, value: T, *, timeout_s: float | None = None) -> list[T]:
    """Returns the values of all processes, in their order; all must make the same calls in the same order.

    Args:
      value: anything that JSON can hold.
      timeout_s: None: as long as all processes live.
    Raises: InputError that names a process which did not answer in time.
    """
    if count() == 1:
        return [value]
    _calls[name] = _calls.get(name, 0) + 1
    key = f"dpo_jax/{name}/{_calls[name]}"
    _client().key_value_set(f"{key}/{index()}", json.dumps(value))
    return [json.loads(_get(f"{key}/{process}", timeout_s, name, process)) for process in range(count())]


def _get(key: str, timeout_s: float | None, name: str, process: int) -> str:
    while True:
        try:
            wait_ms = int(1000 * (timeout_s or 3600))
            return _client().blocking_key_value_get(key, wait_ms)
        except Exception as error:  # the client's own type of error is not public
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            if timeout_s is not None:
                raise InputError(
                    _name(process),
                    got=f"no answer about {name} in {timeout_s:.0f} s",
                    expected="every process to be at the same point",
                    remedy="Look at its own output; all must run the same command.",
                ) from None


def agree(subject: str, facts: Mapping[str, object], *, timeout_s: float | None = FACT_S) -> None:
    """Raises InputError, on every process, unless the facts are equal on all; it names those that differ, and where.

    Args:
      subject: of the facts, for the error.
      facts: values that must be equal, by name; anything that JSON can hold.
    """
    by_process = all_gather(subject, facts, timeout_s=timeout_s)
    differ = sorted({name for each in by_process for name in each if each[name] != by_process[0].get(name)})
    if not differ:
        return
    details = []
    for name in differ[:5]:
        groups: dict[str, list[int]] = {}
        for process, each in enumerate(by_process):
            groups.setdefault(json.dumps(each.get(name)), []).append(process)
        ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
        details.append(f"{name} is " + ", ".join(f"{value} on {describe(who)}" for value, who in ordered))
    more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
    raise InputError(
        subject,
        got="; ".join(details) + more,
        expected="the same on every process",
        remedy="Start all of them with the same command, code and files.",
    )


_names: list[str] = []  # of hosts, by process


def _name(process: int) -> str:
    return f"process {process}" + (f" ({_names[process]})" if _names else "")


def describe(processes: Sequence[int]) -> str:
    """Lists processes by number and host, for messages."""
    shown = ", ".join(_name(process) for process in processes[:3])
    return shown + (f" and {len(processes) - 3} more" if len(processes) > 3 else "")


def gather_dicts(name: str) -> Callable[[dict], dict]:
    """Returns a function that merges the dicts of all processes into one, on every process."""

    def gather(part: dict) -> dict:
        return {key: value for each in all_gather(name, part) for key, value in each.items()}

    return gather


def barrier(name: str) -> None:
    """Returns once every process has called it."""
    all_gather(f"barrier/{name}", None)


def broadcast(name: str, value: T) -> T:
    """Returns the value of process 0, on every process."""
    return all_gather(name, value if first() else None)[0]  # type: ignore[return-value]


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[bool]:
    """Runs the body on process 0 before the others begin it, so that they find its files; yields whether this is 0."""
    if not first():
        barrier(name)
    yield first()
    if first():
        barrier(name)


# --- ending -------------------------------------------------------------------------------------------------------


def leave(status: int, reason: str = "") -> NoReturn:
    """Ends this process; if it failed, the other processes print the reason and end within seconds.

    A process that failed does not wait for the others at JAX's shutdown barrier, which they may never reach.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if count() == 1 or status in (0, STOPPED):
        sys.exit(status)
    _over.set()  # what the others do from here on changes nothing
    _tell_others(reason)
    os._exit(status)


def _tell_others(reason: str) -> None:
    """Tells the other processes why this one ends, unless another failed before, and gives them time to read it."""
    with contextlib.suppress(Exception):
        _client().key_value_set("dpo_jax/failed", json.dumps([index(), reason]))
    _wait_for_readers()


def _wait_for_readers() -> None:
    """Keeps process 0, with which the key-value store ends, until the others have read it."""
    if first():
        threading.Event().wait(2 * WATCH_S)


def _watch() -> None:
    """Ends this process as soon as another reports that it failed, or process 0 that another is lost."""
    while not _over.wait(WATCH_S):
        try:
            process, reason = json.loads(_client().key_value_try_get("dpo_jax/failed"))
        except Exception as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the service has ended, and process 0 with it
        if process != index() and not _over.wait(1):  # if all met the same error, each prints its own
            _end(process, reason)
        return


def _connect() -> None:
    """Connects all processes, so that one that is killed is noticed; without connections JAX notices it, later."""
    server = peers.Server(_lost) if first() else None
    port, token = broadcast("peers", (server.port, server.token) if server else (0, ""))
    if server is None:
        host = _state().coordinator_address.rpartition(":")[0].strip("[]")
        with contextlib.suppress(OSError):  # a firewall
            atexit.register(peers.Client(host, port, token, index(), _lost).end)
    else:
        atexit.register(server.end)


def _lost(process: int) -> None:
    """Ends this process, and process 0 all others, because a process ended without a word."""
    if _over.is_set():
        return
    reason = None
    if first():
        with contextlib.suppress(Exception):  # it may have said before why it failed
            _client().key_value_set("dpo_jax/failed", json.dumps([process, None]))
        with contextlib.suppress(Exception):
            process, reason = json.loads(_client().key_value_try_get("dpo_jax/failed"))
    _end(process, reason)


def _end(process: int, reason: str | None) -> NoReturn:
    """Ends this process because of another, with the reason that it gave."""
    said = f" stopped: {reason}"
    if reason is None:
        said = " no longer answers; expected every process to run to the end. It was killed or its host is gone: look "
        said += "at its own output. Start all again with the same command, which goes on from the last checkpoint."
    os.write(2, f"error: {_name(process)}{said}\n".encode())  # at once, before JAX aborts this process
    _wait_for_readers()
    os._exit(1)


def await_end() -> None:
    """Gives the end of another process, which an error here may come from, a few seconds to be noticed.

    It then ends this process, with a message that names the other one.
    """
    if count() > 1:
        _over.wait(3 * WATCH_S)


_over = threading.Event()
_asked = threading.Event()
_checks = 0


def _ask(*_: object) -> None:
    _asked.set()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C (SIGINT), while the body runs, requests to stop at the next `asked_to_stop`.

    A second Ctrl-C ends the process at once. With several processes JAX's preemption service listens for SIGTERM from
    `join` on, and passes the request from one to all; Ctrl-C in one of them is made a SIGTERM.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is _wait_for_thread:  # an outer one listens already
        yield
        return
    # Handlers of Python run only between two of its instructions, so not while XLA compiles; the number of a signal
    # is written to this socket at once, and another thread reads it.
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    thread = threading.Thread(target=_listen_for_interrupts, args=(ours,), name="interrupts", daemon=True)
    previous = {signal.SIGINT: signal.signal(signal.SIGINT, _wait_for_thread)}
    if count() == 1:
        previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, _ask)
    previous_fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        theirs.close()  # which ends the thread
        thread.join()
        ours.close()
        _asked.clear()


def _wait_for_thread(*_: object) -> None:
    """Handles SIGINT in place of Python's KeyboardInterrupt; `_listen_for_interrupts` does the rest."""


def _listen_for_interrupts(signals: socket.socket) -> None:
    """Asks the run to stop at the first SIGINT that arrives, and ends this process at the second."""
    interrupts = 0
    while number := signals.recv(1):
        if number[0] != signal.SIGINT:
            continue
        interrupts += 1
        if interrupts > 1:
            _end_at_once()
            continue
        print("\nstopping as soon as the state can be saved; Ctrl-C again ends at once", file=sys.stderr, flush=True)
        if count() == 1:
            _ask()
        else:
            os.kill(os.getpid(), signal.SIGTERM)


def _end_at_once() -> None:
    """Ends this process without saving, and tells the others."""
    if count() > 1:
        _tell_others("interrupted twice")
    os._exit(INTERRUPTED)


def asked_to_stop() -> bool:
    """Whether the run should stop; equal on every process, all of which must call it equally often."""
    global _checks
    _checks += 1
    if count() > 1:
        return multihost_utils.reached_preemption_sync_point(_checks)
    return _asked.is_set()


def stop_if_asked() -> None:
    """Raises Stopped if the run should stop; call it only while everything done so far is on disk."""
    if asked_to_stop():
        raise Stopped("asked to stop")


# --- comparing code -----------------------------------------------------------------------------------------------


@functools.cache
def code_digest() -> str:
    """Returns a digest of every source file of this package, and of the versions of JAX and Python."""
    root = Path(__file__).parents[1]
    state = xxhash.xxh3_128(f"{jax.__version__} {sys.version_info[:2]}".encode())
    for path in sorted(root.rglob("*.py")):
        state.update(f"\n{path.relative_to(root)}\n".encode() + path.read_bytes())
    return state.hexdigest()
