"""Digests of what runs write, to show that a change of the code changes no number.

Runs the quickstart, and where `--models` and `--data` are given 20 updates of `configs/hh.py` on each of those models,
with the package of each tree in turn; then prints one digest for each: of the rows of `metrics.jsonl` and `eval.jsonl`
without what a clock decides, of every exported tensor file, and of the instructions of the compiled updates.

    git worktree add ../before COMMIT
    python -m benchmarks.digests --trees ../before . --out=/tmp/digests --models=MODELS --data=HH_DATA

Digests of one tree agree with those of another where the numbers are the same bit for bit, on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CLOCKED = {"step_time_s", "pairs_per_s", "eval_time_s", "data_wait_s", "tokens_real/s", "flops/s", "minor_faults"}
CLOCKED |= {"goodput"}
METADATA = re.compile(r", metadata=\{[^{}]*\}")


def rows_of(path: Path) -> list[str]:
    """The rows of a log without what a clock decides, names sorted."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in CLOCKED and not k.startswith("time/")} for row in rows]
    return [json.dumps(row, sort_keys=True) for row in rows]


def instructions(dump: Path) -> list[str]:
    """The optimized updates in a folder of dumps, without names of files, functions and modules."""
    found = []
    for path in sorted(dump.glob("*jit_update*after_optimizations.txt")):
        lines = METADATA.sub("", path.read_text()).splitlines()
        body = [line for line in lines[1:] if re.match(r"\s+(ROOT )?%?[\w.-]+ = ", line)]
        found.append("\n".join(body))
    return sorted(found)


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def run(tree: Path, out: Path, arguments: list[str]) -> dict[str, str]:
    """Trains with a tree's package and returns the digests of what the run wrote."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    dump = out / "dump"
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*update.*"
    added = {
        "XLA_FLAGS": flags,
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_PLATFORMS": "cpu",
        "DPO_JAX_CACHE": str(out / "cache"),
        "PYTHONPATH": str(tree),
    }
    with (out / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "dpo_jax", "train", f"--workdir={out / 'run'}", *arguments]
        subprocess.run(command, cwd=tree, env=os.environ | added, stdout=log, stderr=log, check=True)
    found = {}
    for name in ("metrics.jsonl", "eval.jsonl", "sft/metrics.jsonl"):
        if (out / "run" / name).exists():
            found[name] = digest(rows_of(out / "run" / name))
    tensors = sorted((out / "run" / "export").glob("*.safetensors"))
    found["export"] = hashlib.sha256(b"".join(path.read_bytes() for path in tensors)).hexdigest()[:16]
    programs = instructions(dump)
    counts = "+".join(str(text.count("\n") + 1) for text in programs)
    found["instructions"] = f"{digest(programs)} ({counts})"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", nargs="+", type=Path, default=[Path()], help="checkouts of the project")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--models", type=Path, help="folder of Hugging Face folders")
    parser.add_argument("--data", type=Path, help="folder with hh_harmless_{train,eval}.jsonl.gz")
    parser.add_argument("--only", nargs="*", help="names of runs: quickstart, or a model's")
    chosen = parser.parse_args()
    runs = {"quickstart": ["--config=configs/quickstart.py"]}
    if chosen.models and chosen.data:
        for model in sorted(path for path in chosen.models.absolute().iterdir() if path.is_dir()):
            runs[model.name] = [
                "--config=configs/hh.py",
                f"--config.model.path={model}",
                f"--config.data.train={chosen.data.absolute() / 'hh_harmless_train.jsonl.gz'}",
                f"--config.data.eval={chosen.data.absolute() / 'hh_harmless_eval.jsonl.gz'}",
                "--config.train.steps=20",
                "--config.train.batch_pairs=16",
                "--config.optimizer.warmup_steps=5",
                "--config.optimizer.learning_rate=1e-4",
            ]
    for name, arguments in runs.items():
        for tree in chosen.trees:
            if not chosen.only or name in chosen.only:
                found = run(tree.absolute(), chosen.out.absolute() / f"{name}-{tree.absolute().name}", arguments)
                print(f"{name}, {tree}:", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
