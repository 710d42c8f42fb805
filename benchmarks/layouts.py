"""Compares layouts: each pair as one sequence, prompts repeated and packed, and padded batches.

    python -m benchmarks.layouts --data=train.jsonl.gz --tokenizer=DIR --pairs=8 --steps=12

A model is trained on a fixed list of pairs in several ways (sides), each in its own process, in turn, --rounds times:

    shared       dpo_jax by default: the prompt once per pair, pairs packed into rows
    repeated     dpo_jax with data.layout=repeated: the prompt once per completion, packed
    padded       one completion per row, padded to the longest of the batch, the batch in one microbatch
    padded-micro padded, in microbatches with about as many positions as those of `shared`
    precomputed  the update of `shared` alone, with reference log-probs computed before
    in-step      like precomputed, but with the reference's weights in memory and its forward pass inside the update

The padded sides use dpo_jax's own decoder, head and update; their batches are made and their shapes compiled before the
first step. `shared` and `repeated` are complete runs that make batches as they go. The last two sides show what a
reference inside the update costs in memory: the peak of the process during steps, after memory that compilation left
over is returned, and the compiler's own numbers for the update.

Prints positions, tokens, medians of step times and ratios; writes them to --out as JSON and PNG.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import common

SIDES = ("shared", "repeated", "padded", "padded-micro", "precomputed", "in-step")
LAYOUTS = SIDES[:4]


def run_side(work: Path, args: Any) -> dict[str, Any]:
    """Runs one side, in its own process; returns its measurements."""
    chosen = common.base_config(args, work)
    if args.side in ("shared", "repeated"):
        chosen.data.layout = args.side
        return common.train_ours(work, chosen)
    from benchmarks import updates

    chosen.reference.path = str(work.parent / "reference")  # computed by the first side that reads it
    parts = updates.read(chosen, work)
    inside, padded = args.side == "in-step", args.side.startswith("padded")
    reference = None if inside else updates.reference_values(parts, work)
    if padded:
        assert reference is not None
        target = parts.programs.update_shape.positions if args.side == "padded-micro" else None
        batches = [padded_batch(pairs, each, target) for pairs, each in zip(parts.pairs, reference, strict=True)]
    else:
        batches = updates.packed_batches(parts, reference)
    update, tx = updates.make_update(parts, crops=not padded, reference_inside=inside)
    frozen = updates.load_params(parts) if inside else None
    positions = [batch.rows.tokens.size for batch in batches] if padded else updates.positions_of(parts, batches)
    return updates.time_steps(update, tx, updates.load_params(parts), frozen, batches) | {"positions": positions}


def padded_batch(pairs: Any, reference: Any, target: int | None) -> Any:
    """Makes a batch with one completion per row, padded to the longest of the batch.

        row 2 i      prompt i, chosen i, padding
        row 2 i + 1  prompt i, rejected i, padding

    Args:
      pairs: P encoded pairs.
      reference: stored log-probs [P, 2] in nats.
      target: approximate upper limit of the positions of a microbatch; None: one microbatch holds all pairs.
    """
    import numpy as np

    from benchmarks.updates import lengths_of
    from dpo_jax.data.layout import map_rows
    from dpo_jax.types import Batch, Rows

    lengths = lengths_of(pairs)
    longest, answers = int((lengths[:, 0] + lengths[:, 1:].max(1)).max()), int(lengths[:, 1:].max())
    count = len(pairs)
    fits = count if target is None else max(1, target // (2 * longest))
    each = max(n for n in range(1, fits + 1) if count % n == 0)  # pairs in a microbatch
    index = np.arange(longest, dtype=np.int32)
    grid, scored = (2 * count, longest), (2 * count, answers)
    rows = Rows(
        tokens=np.zeros(grid, np.int32),
        positions=np.tile(index, (2 * count, 1)),
        key_start=np.tile(index, (2 * count, 1)),  # padding attends only to itself
        key_end=np.tile(index + 1, (2 * count, 1)),
        source=np.zeros(scored, np.int32),
        target=np.zeros(scored, np.int32),
        slot=np.full(scored, -1, np.int32),
    )
    for row in range(2 * count):
        prompt, answer = pairs[row // 2].prompt, pairs[row // 2][1 + row % 2]
        tokens = np.concatenate([prompt, answer])
        rows.tokens[row, : len(tokens)] = tokens
        rows.key_start[row, : len(tokens)] = 0
        rows.source[row, : len(answer)] = len(prompt) - 1 + np.arange(len(answer))
        rows.target[row, : len(answer)] = answer
        rows.slot[row, : len(answer)] = row
    micro = (count // each, 2 * each)
    return Batch(
        rows=map_rows(lambda array: array.reshape(*micro, -1), rows),
        count=np.int32(micro[0]),
        present=np.kron(np.eye(micro[0], dtype=bool), np.ones(each, bool)),
        reference=np.asarray(reference, np.float32),
        lengths=lengths[:, 1:].astype(np.int32),
    )


def compare(results: dict[str, list[dict[str, Any]]], pairs: int, sequences: list[int]) -> dict[str, Any]:
    """Computes medians of each side, ratios to `shared`, and ratios of in-step to precomputed.

    Args:
      sequences: tokens trained on, with prompts counted once per pair and once per completion.
    """
    sides: dict[str, Any] = {}
    for side, rounds in results.items():
        done = common.worked(rounds)
        if not done:
            sides[side] = {"failed": rounds[0]["failed"]}
            continue
        step_s = common.median_time(done)
        sides[side] = {
            "step_s": step_s,
            "pairs_per_s": pairs / step_s,
            "positions": sum(done[0]["positions"]),
            "peak_bytes": common.median_of(done, "peak_bytes"),
            "step_peak_bytes": common.median_of(done, "step_peak_bytes"),
            "faults_per_step": common.median_of(done, "faults_per_step"),
            "compiler": done[0].get("memory"),
        }
    curves = {side: common.worked(rounds)[0]["losses"] for side, rounds in results.items() if common.worked(rounds)}
    names = ("step_s", "positions", "peak_bytes")
    ratios = {
        side: {name: common.ratio(sides[side].get(name), sides.get("shared", {}).get(name)) for name in names}
        for side in LAYOUTS
        if side in sides and side != "shared"
    }
    found: dict[str, Any] = {
        "sides": sides,
        "tokens": {"prompt once per pair": sequences[0], "prompt once per completion": sequences[1]},
        "ratios_to_shared": ratios,
        "loss_difference": {
            side: max(abs(a - b) for a, b in zip(curves["shared"], curve, strict=True))
            for side, curve in curves.items()
            if "shared" in curves and side != "shared"
        },
    }
    precomputed, inside = sides.get("precomputed", {}), sides.get("in-step", {})
    if precomputed.get("compiler") and inside.get("compiler"):
        found["in_step_to_precomputed"] = {
            "step_peak_bytes": inside["step_peak_bytes"] / precomputed["step_peak_bytes"],
            "compiler_total_bytes": inside["compiler"]["total_bytes"] / precomputed["compiler"]["total_bytes"],
            "step_s": inside["step_s"] / precomputed["step_s"],
        }
    return found


def report(out: Path, found: dict[str, Any]) -> None:
    """Prints the table and the ratios, and draws the plot."""
    rows = []
    for side, one in found["sides"].items():
        compiler = one.get("compiler") or {}
        rows.append(
            {
                "side": side,
                "pairs/s": one.get("pairs_per_s", one.get("failed")),
                "step s": one.get("step_s"),
                "positions": one.get("positions"),
                "peak MiB": common.mib(one.get("peak_bytes")),
                "peak MiB in steps": common.mib(one.get("step_peak_bytes")),
                "update MiB": common.mib(compiler.get("total_bytes")),
                "temporary MiB": common.mib(compiler.get("temp_bytes")),
                "faults/step": one.get("faults_per_step"),
            }
        )
    print(common.table(rows))
    print("tokens: " + ", ".join(f"{count:,} with the {name}" for name, count in found["tokens"].items()))
    for side, each in found["ratios_to_shared"].items():
        print(f"{side} to shared: " + ", ".join(f"{name} {common.shown(value)}" for name, value in each.items()))
    for name, value in found.get("in_step_to_precomputed", {}).items():
        print(f"reference in the update to precomputed: {name} {common.shown(value)}")
    for side, distance in found["loss_difference"].items():
        print(f"largest difference of losses between {side} and shared: {distance:.2e}")
    layouts = {side: found["sides"][side] for side in LAYOUTS if side in found["sides"]}
    panels = {
        "positions computed": {side: one.get("positions") for side, one in layouts.items()},
        "step time, s": {side: one.get("step_s") for side, one in layouts.items()},
    }
    common.plot_bars(out / "layouts.png", panels)


def main() -> None:
    parser = common.make_parser(__doc__, out="runs/layouts")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"of {','.join(SIDES)}")
    parser.add_argument("--pairs", type=int, default=8, help="pairs in a batch")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1, help="times that each side runs")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    args = parser.parse_args()
    sides = args.sides.split(",")
    if unknown := {*sides} - {*SIDES}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    out = common.prepare(args)
    args.pairs_file, count = str(out / "pairs.jsonl"), args.pairs * args.steps
    kept = common.select_pairs(args.data, Path(args.model), count=count, max_length=args.max_length)
    used = [kept[i % len(kept)] for i in range(count)]
    common.write_rows([pair.row for pair in used], out / "pairs.jsonl")
    lengths = [tuple(map(len, pair.ids)) for pair in used]
    sequences = [sum(a + b + c for a, b, c in lengths), sum(2 * a + b + c for a, b, c in lengths)]
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(args.rounds):
        for side in sides:
            given = vars(args) | {"side": side}
            results[side].append(common.in_fresh_process("benchmarks.layouts:run_side", out / f"{side}-{turn}", given))
    found = compare(results, args.pairs, sequences)
    common.write_results(out, args, found)
    report(out, found)


if __name__ == "__main__":
    main()
