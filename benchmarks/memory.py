"""Memory of the update as reported by the compiler, for several vocabulary sizes and for each policy of model.remat.

    python -m benchmarks.memory --data=train.jsonl.gz --tokenizer=DIR --steps=6

(a) The update of the same model and batch shape is compiled, not run, at each of --vocabularies. Its total memory
counts arguments, results and temporaries, and donated buffers once. For each vocabulary matrix of V x D (one if the
embeddings are tied, else two), the benchmark subtracts parameters, gradient and AdamW's two moments: 16 V D bytes in
float32. Any further arrays as large as a vocabulary matrix are in the remainder. So its growth from the smallest to the
largest vocabulary is also reported as a number of such matrices.

(b) The update is compiled and run with each policy, in separate processes, in turn, --rounds times.

Prints two tables and writes them to --out as JSON and PNG.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import common

COPIES = 4  # arrays as large as a vocabulary matrix: parameters, gradient, two moments
FLOAT_BYTES = 4


def compile_vocabularies(work: Path, args: Any) -> dict[str, Any]:
    """Returns the memory of the update as reported by the compiler, at each vocabulary size."""
    import dataclasses

    import jax

    from benchmarks import updates
    from dpo_jax.models import decoder
    from dpo_jax.steps import init_state

    parts = updates.read(common.base_config(args, work), work)
    batch = updates.packed_batches(parts, None)[0]
    found = {}
    for size in args.sizes:
        model = dataclasses.replace(parts.inputs.model, vocab_size=size)
        update, tx = updates.make_update(parts, model=model)
        state = jax.eval_shape(lambda tx=tx, model=model: init_state(decoder.init(jax.random.key(0), model), tx))
        matrices = 1 if model.tie_embeddings else 2
        found[str(size)] = updates.memory_of(update.lower(state, None, batch).compile()) | {
            "matrix_bytes": FLOAT_BYTES * size * model.width,
            "matrices": matrices,
        }
    return {"vocabularies": found}


def run_policy(work: Path, args: Any) -> dict[str, Any]:
    """Compiles and runs the update with one remat policy."""
    from benchmarks import updates

    chosen = common.base_config(args, work)
    chosen.model.remat = args.remat
    parts = updates.read(chosen, work)
    batches = updates.packed_batches(parts, None)
    update, tx = updates.make_update(parts)
    try:
        return updates.time_steps(update, tx, updates.load_params(parts), None, batches)
    except Exception as error:  # a policy that a backend does not support is a result too
        return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"}


def without_vocabulary(found: dict[str, Any]) -> dict[str, Any]:
    """Adds to each vocabulary size the total without its matrices, and how that remainder grows."""
    sizes = {}
    for size, one in found.items():
        less = COPIES * one["matrices"] * one["matrix_bytes"]
        sizes[size] = one | {"subtracted_bytes": less, "rest_bytes": one["total_bytes"] - less}
    small, large = sizes[min(sizes, key=int)], sizes[max(sizes, key=int)]
    grown = large["matrix_bytes"] - small["matrix_bytes"]
    return {
        "vocabularies": sizes,
        "rest_ratio": common.ratio(large["rest_bytes"], small["rest_bytes"]),
        "rest_growth_in_matrices": common.ratio(large["rest_bytes"] - small["rest_bytes"], grown),
        "temp_growth_in_matrices": common.ratio(large["temp_bytes"] - small["temp_bytes"], grown),
    }


def compare_policies(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians for each policy, and ratios to `none`."""
    found: dict[str, Any] = {}
    for name, rounds in results.items():
        done = common.worked(rounds)
        if not done:
            found[name] = {"failed": rounds[0]["failed"]}
            continue
        found[name] = {
            "temp_bytes": done[0]["memory"]["temp_bytes"],
            "total_bytes": done[0]["memory"]["total_bytes"],
            "step_s": common.median_time(done),
            "step_peak_bytes": common.median_of(done, "step_peak_bytes"),
        }
    base = found.get("none", {})
    for one in found.values():
        for name in ("temp_bytes", "step_s"):
            one[f"{name}_ratio"] = common.ratio(one.get(name), base.get(name))
    return found


def report(out: Path, found: dict[str, Any]) -> None:
    """Prints both tables, and draws the plot."""
    rows = [
        {
            "vocabulary": f"{int(size):,}",
            "temporary MiB": common.mib(one["temp_bytes"]),
            "total MiB": common.mib(one["total_bytes"]),
            "subtracted MiB": common.mib(one["subtracted_bytes"]),
            "rest MiB": common.mib(one["rest_bytes"]),
            "a matrix MiB": common.mib(one["matrix_bytes"]),
        }
        for size, one in found["vocabularies"].items()
    ]
    print(common.table(rows))
    print(f"rest, largest to smallest vocabulary: {common.shown(found['rest_ratio'])}")
    for name in ("rest", "temp"):
        print(f"growth of {name} in vocabulary matrices: {common.shown(found[f'{name}_growth_in_matrices'])}")
    print()
    policies = found["policies"]
    rows = [
        {
            "model.remat": name,
            "temporary MiB": one.get("failed") or common.mib(one["temp_bytes"]),
            "to none": one["temp_bytes_ratio"],
            "step s": one.get("step_s"),
            "to none ": one["step_s_ratio"],
            "peak of steps MiB": common.mib(one.get("step_peak_bytes")),
        }
        for name, one in policies.items()
    ]
    print(common.table(rows))
    panels = {
        "temporaries of the update, MiB": {name: common.mib(one.get("temp_bytes")) for name, one in policies.items()},
        "step time, s": {name: one.get("step_s") for name, one in policies.items()},
    }
    common.plot_bars(out / "remat.png", panels)


def main() -> None:
    parser = common.make_parser(__doc__, out="runs/memory")
    parser.add_argument("--vocabularies", default="32000,128000", help="vocabulary sizes")
    parser.add_argument("--pairs", type=int, default=8, help="pairs in a batch")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1, help="number of runs of each policy, in turn")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    args = parser.parse_args()
    if args.steps <= common.WARM_UP:
        parser.error(f"the first {common.WARM_UP} steps are left out; there must be more")
    from dpo_jax.models.decoder import REMAT

    out = common.prepare(args)
    pairs_file, count = out / "pairs.jsonl", args.pairs * args.steps
    common.write_pairs(args.data, pairs_file, Path(args.model), count=count, max_length=args.max_length)
    given = vars(args) | {"pairs_file": str(pairs_file), "sizes": [int(size) for size in args.vocabularies.split(",")]}
    answer = common.in_fresh_process("benchmarks.memory:compile_vocabularies", out / "vocabularies", given)
    if "failed" in answer:
        raise SystemExit(f"vocabularies: {answer['failed']}")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in REMAT}
    for turn in range(args.rounds):
        for name in REMAT:
            work = out / f"{name}-{turn}"
            results[name].append(common.in_fresh_process("benchmarks.memory:run_policy", work, given | {"remat": name}))
    found = without_vocabulary(answer["vocabularies"]) | {"policies": compare_policies(results)}
    common.write_results(out, args, found)
    report(out, found)


if __name__ == "__main__":
    main()
