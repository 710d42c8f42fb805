"""Kills a run at random moments, on a disk and in buckets, and compares its results with those of an unbroken run.

    python -m benchmarks.kills --kills=20

The run is a tiny one on the CPU with everything that a run writes: reference log-probs, two syncs of the reference
with mixed weights, evaluations, checkpoints and the export. Its working folder is on this disk, and in buckets of
servers of gs:// and s3:// that this script starts on this machine. A process gets SIGKILL at a moment drawn evenly
from the seconds that an unbroken run takes there; the next one goes on in the same folder. At the end of a run its
logs, without what a clock decides, and its exported weights are compared with those of the unbroken run, bit by bit.
The next run begins in a new folder, until there were --kills kills.

Prints for each place the kills, the runs that they were spread over, the updates that were done when a kill came, and
the runs that differ; writes them to --out as JSON. With --check it fails if any differs.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

PLACES = ("disk", "gs", "s3")


def start(config: Path, workdir: Any, cwd: Path) -> subprocess.Popen:
    """Starts the run, or goes on with it, in an empty working directory."""
    command = [sys.executable, "-m", "dpo_jax", "train", f"--config={config}", f"--workdir={workdir}"]
    environment = os.environ | {"PYTHONPATH": str(common.ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def killed_after(process: subprocess.Popen, seconds: float) -> bool:
    """Kills a process after some seconds; returns False if it came to its end before. Exits if it failed."""
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    if process.returncode:
        sys.exit(f"the run failed:\n{said.decode()}")
    return False


def result_of(workdir: Any) -> tuple[Any, ...]:
    """Returns what two equal runs have in common: rows of the logs, and the bytes of the exported weights."""
    from tests.support.runs import read_rows, untimed

    rows = [untimed(read_rows(workdir / name)) for name in ("metrics.jsonl", "eval.jsonl")]
    return (*rows, (workdir / "export" / "model.safetensors").read_bytes())


def updates_in(workdir: Any) -> int:
    """Returns the updates in the newest checkpoint of a run, 0 where there is none."""
    from dpo_jax.run.checkpoints import Checkpoints

    with Checkpoints(workdir / "checkpoints", keep=1, read_only=True) as checkpoints:
        return checkpoints.latest_step() or 0


def kill_in(place: Any, config: Path, args: argparse.Namespace, expected: tuple[Any, ...]) -> dict:
    """Kills runs in folders of a place until there were enough kills; returns what the table shows of them."""
    moments, kills, runs, differ, updates = random.Random(args.seed), 0, 0, 0, []
    cwd = Path(args.out) / "cwd"
    cwd.mkdir(exist_ok=True)
    started = time.perf_counter()
    killed_after(start(config, place / "unbroken", cwd), 3600)
    lasts_s = time.perf_counter() - started
    differ += result_of(place / "unbroken") != expected
    while kills < args.kills:
        workdir = place / f"run-{runs}"
        while kills < args.kills and killed_after(start(config, workdir, cwd), moments.uniform(0, lasts_s)):
            kills += 1
            updates.append(updates_in(workdir))
            print(f"{workdir}: kill {kills}, at {updates[-1]} updates", file=sys.stderr, flush=True)
        killed_after(start(config, workdir, cwd), 3600)
        runs += 1
        differ += result_of(workdir) != expected
    assert not [*cwd.iterdir()], "a run wrote into its working directory"
    return {"kills": kills, "runs": runs, "updates": updates, "differ": differ}


def rows_of(found: dict[str, dict]) -> list[dict[str, Any]]:
    """Returns the rows of the table."""
    return [
        {"place": place}
        | {name: row[name] for name in ("kills", "runs", "differ")}
        | {"mean updates at a kill": sum(row["updates"]) / max(1, len(row["updates"]))}
        for place, row in found.items()
    ]


def measure(args: argparse.Namespace) -> dict[str, dict]:
    """Runs all places against the unbroken run."""
    from dpo_jax import config
    from dpo_jax.runtime import files
    from tests.support import object_stores, runs

    out, found = Path(args.out).absolute(), {}
    inputs = runs.make_inputs(out / "inputs")
    fields = dict(reference__sync_steps=2, reference__mixup_alpha=0.5, data__date="2024-02-29", eval__every_steps=3)
    with object_stores.servers():
        (out / "config.json").write_text(config.to_json(runs.make_config(inputs, **fields)))
        killed_after(start(out / "config.json", out / "whole", out), 3600)  # which fills the caches too
        expected = result_of(out / "whole")
        for name in args.places:
            place: Any = out / "disk" if name == "disk" else files.path(f"{name}://{object_stores.BUCKET}/kills")
            found[name] = kill_in(place, out / "config.json", args, expected)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/kills", help="folder of the results; must not exist")
    parser.add_argument("--kills", type=int, default=20, help="in each place")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    parser.add_argument("--check", action="store_true", help="fail if a run differs")
    args = parser.parse_args(arguments)
    if Path(args.out).exists():
        sys.exit(f"--out={args.out}: exists already; name another folder")
    Path(args.out).mkdir(parents=True)
    found = measure(args)
    common.write_results(Path(args.out), args, {"places": found})
    print(common.table(rows_of(found)))
    if args.check and any(row["differ"] for row in found.values()):
        sys.exit("runs differ")


if __name__ == "__main__":
    main()
