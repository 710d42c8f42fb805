"""Predicts how the update of a recipe scales over the chips of one slice: the last table of docs/scaling.md.

    python -m benchmarks.pods --config configs/llama3_8b.py \\
        --topologies v5p:4x4x4 v5p:4x4x8 v5p:4x8x8 v5p:8x8x8 --tensor 4 8 8 8

Strong scaling keeps the batch size of the recipe, with the given `--tensor` for each topology. Weak scaling keeps the
number of pairs per chip, and the `tensor` of the first topology. Every update is compiled ahead of time, as by `dpo-jax
plan`, which takes a minute or two each and needs libtpu.
"""

from __future__ import annotations

import argparse
import json

import jax

from dpo_jax import flags
from dpo_jax.plan.estimate import Estimate, estimate
from dpo_jax.plan.topology import parse_topology


def rows(args: argparse.Namespace) -> list[dict]:
    """Estimates each topology under both kinds of scaling; prints each result as a JSON line at once."""
    base = flags.load(args.config)
    topologies = [parse_topology(name) for name in args.topologies]
    found = []
    for kind in ("strong", "weak"):
        for topology, tensor in zip(topologies, args.tensor, strict=True):
            pairs = base.train.batch_pairs
            if kind == "weak":
                pairs, tensor = pairs * topology.count // topologies[0].count, args.tensor[0]
                if topology == topologies[0]:
                    continue  # equal to strong scaling
            chosen = flags.load(args.config, [f"train.batch_pairs={pairs}", f"mesh.tensor={tensor}"])
            found.append(row(kind, estimate(chosen, topology)))
            print(json.dumps(found[-1]), flush=True)
    return found


def row(kind: str, found: Estimate) -> dict:
    """The columns of one estimate."""
    update, seconds = found.parts["update"], found.seconds("update")
    return {
        "scaling": kind,
        "topology": str(found.topology),
        "mesh": " x ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1),
        "batch_pairs": update.shape.pairs,
        "real_positions": update.work.tokens / update.work.positions,
        "hbm_gib": found.bytes / 2**30,
        "step_s": max(seconds.values()),
        "bound_by": max(seconds, key=lambda name: seconds[name]),
        "pairs_per_s": found.pairs_per_s("update"),
        "pairs_per_s_per_chip": found.pairs_per_s("update") / found.topology.count,
        "mfu": found.mfu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--topologies", nargs="+", required=True)
    parser.add_argument("--tensor", nargs="+", type=int, required=True, help="mesh.tensor for each topology")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    columns = ("scaling", "topology", "mesh", "batch_pairs", "real_positions", "hbm_gib", "step_s", "bound_by")
    columns += ("pairs_per_s", "pairs_per_s_per_chip", "mfu")
    found = rows(args)
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for each in found:
        cells = (f"{each[name]:.3g}" if isinstance(each[name], float) else str(each[name]) for name in columns)
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
