"""Measures the time to the first update, by parts, of a first start and of a second start with filled caches.

    python -m benchmarks.startup --data=train.jsonl.gz --tokenizer=DIR --shape=llama

Both starts run `dpo-jax train` in separate working folders, so both have a reference pass. The caches of compiled
programs and of tokenized pairs are empty at the first start, and the second start reuses them. With --processes, the
run has several processes on this machine. With --own_caches, each process has its own caches.

Prints a table of both starts and the ratio of their compilation times. Writes them to --out as JSON. The parts are
those in the line that `train` prints after its first update.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import common

LINE = re.compile(r"first update done after (.*?): (.*)")
SECONDS = {"d": 86400, "h": 3600, "min": 60, "s": 1}


def parts_of(line: str) -> dict[str, float] | None:
    """Parses the seconds of each part from a line of `train`, with "all" for the sum; None for any other line."""
    found = LINE.search(line)
    if found is None:
        return None
    times = {"all": found[1]} | dict(re.findall(r"(\D+?) (\d.*?)(?:, |$)", found[2]))
    return {
        name: sum(float(n) * SECONDS[unit] for n, unit in re.findall(r"([\d.]+) (\w+)", text))
        for name, text in times.items()
    }


def start(out: Path, name: str, args: Any) -> dict[str, float]:
    """Runs the configuration in `out` in a new working folder; returns the seconds of each part of its start."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "dpo_jax", "train", f"--config={out / 'config.json'}", f"--workdir={out / name}"]
    if args.processes > 1:
        command += [f"--coordinator=127.0.0.1:{port}", f"--processes={args.processes}"]
    inherited = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    print(name, file=sys.stderr, flush=True)
    running = []
    for i in range(args.processes):
        cache = out / "cache" / (str(i) if args.own_caches else "shared")
        running.append(
            subprocess.Popen(
                command + ([f"--process={i}"] if args.processes > 1 else []),
                cwd=common.ROOT,
                env=inherited | {"DPO_JAX_CACHE": str(cache)},
                stderr=subprocess.PIPE if i == 0 else None,
                text=True,
            )
        )
    found: dict[str, float] | None = None
    for line in running[0].stderr:
        print(line, end="", file=sys.stderr, flush=True)
        said = parts_of(line)
        if said is not None:
            found = said
    if any([process.wait() for process in running]) or found is None:
        sys.exit(f"{name}: the run failed")
    return found


def compare(first: dict[str, float], second: dict[str, float]) -> dict[str, Any]:
    """Returns both starts and how many times faster the second is, in total and in compilation."""
    return {
        "first": first,
        "second": second,
        "compile_ratio": common.ratio(first["compile"], second["compile"]),
        "ratio": common.ratio(first["all"], second["all"]),
    }


def main() -> None:
    parser = common.make_parser(__doc__, out="runs/startup")
    parser.add_argument("--pairs", type=int, default=8, help="pairs in a batch")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--own_caches", action="store_true", help="separate caches for each process, as on hosts without shared storage"
    )
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    args = parser.parse_args()
    from dpo_jax import config

    out = common.prepare(args)
    pairs_file = out / "pairs.jsonl"
    common.write_pairs(args.data, pairs_file, Path(args.model), count=16 * args.pairs, max_length=args.max_length)
    args.pairs_file = str(pairs_file)
    chosen = common.base_config(args, out)
    chosen.data.cache_dir = ""  # where DPO_JAX_CACHE says
    (out / "config.json").write_text(config.to_json(config.freeze(chosen)))
    found = compare(*(start(out, name, args) for name in ("first", "second")))
    common.write_results(out, args, found)
    rows = [
        {"start": name} | {f"{part} s": value for part, value in found[name].items()} for name in ("first", "second")
    ]
    print(common.table(rows))
    print(
        f"second start: {common.shown(found['ratio'])} times as fast, compiling {common.shown(found['compile_ratio'])}"
    )


if __name__ == "__main__":
    main()
