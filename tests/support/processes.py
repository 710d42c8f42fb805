"""Runs of several real processes on this machine, which find one another over loopback."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# XLA_FLAGS that more than halve the time to compile: tests compile far more than they compute.
FAST_COMPILE_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


class Ended(NamedTuple):
    """How one process of a run ended."""

    status: int  # negative: the signal
    output: str
    seconds: float  # since `ended_all` was called


class Run:
    """`dpo-jax ARGUMENTS` on each of several processes; a context manager that kills those still running.

    Args:
      arguments: command line of every process.
      module: module to run in place of the command; it takes the same --coordinator, --processes and --process.
      extra_arguments: further arguments of single processes, by index.
      devices: number of virtual devices of all processes together.
      folders: working directories of processes, by index.
      environment: variables added to the environment of processes, by index.
    """

    def __init__(
        self,
        arguments,
        folder,
        *,
        processes,
        devices=4,
        module="dpo_jax",
        extra_arguments=None,
        folders=None,
        environment=None,
    ):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"process-{i}.txt" for i in range(processes)]
        self.processes = []
        for i, output in enumerate(self.outputs):
            where = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process={i}"]
            chosen = f"--xla_force_host_platform_device_count={devices // processes} {FAST_COMPILE_FLAGS}"
            added = {"XLA_FLAGS": chosen, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
            added |= (environment or {}).get(i, {})
            command = [sys.executable, "-m", module, *arguments, *where, *(extra_arguments or {}).get(i, [])]
            with output.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        cwd=(folders or {}).get(i, ROOT),
                        env=os.environ | added,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def texts(self):
        return [output.read_text() for output in self.outputs]

    def wait_for(self, condition, *, within_s=180):
        """Waits until `condition()`; fails if any process ends before, or it takes too long."""
        until = time.monotonic() + within_s
        while not condition():
            ended = [process.poll() for process in self.processes]
            assert all(status is None for status in ended) and time.monotonic() < until, (ended, self.texts())
            time.sleep(0.05)

    def ended_all(self, *, within_s=240):
        """Waits until all processes have ended and returns how each did."""
        started, ended = time.monotonic(), []
        for process, output in zip(self.processes, self.outputs, strict=True):
            try:
                status = process.wait(max(0.1, started + within_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running after {within_s} s: {self.texts()}") from None
            ended.append(Ended(status, output.read_text(), time.monotonic() - started))
        return ended


def wait_for_all(runs, *, within_s=240):
    """Starts an iterable of runs, all before any ends, and waits; fails unless every process of each ends well."""
    with contextlib.ExitStack() as stack:
        for run in [stack.enter_context(run) for run in runs]:
            ended = run.ended_all(within_s=within_s)
            assert not any(each.status for each in ended), ended


def arguments(command, configuration, workdir, **fields):
    """Returns the command line of a run of a `config.json`, with fields changed; dots written as double underscores."""
    changes = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    return [command, f"--config={configuration}", f"--workdir={workdir}", *changes]
