"""Compares DPO with dpo_jax and with Tunix's DPOTrainer: speed, memory, page faults and computed positions.

    python3.11 -m venv /path/of/tunix && /path/of/tunix/bin/pip install torch==2.13.0 google-tunix
    python -m benchmarks.vs_tunix --data=train.jsonl.gz --tokenizer=DIR --tunix_python=/path/of/tunix/bin/python

Both train the same random Llama checkpoint in float32 with AdamW and beta 0.1, on the same token ids in the same order:
pairs of at most 384 prompt and 128 answer tokens, 8 per step. Tunix reads prompts and answers padded to these lengths,
holds the reference in memory, and uses its own loader for weights. Its Llama uses the rotary base 1,000,000 for every
checkpoint. So this checkpoint has that base, and the loss curves can be compared.

Each side runs in a separate process, in turn, --rounds times, with each of --allocators: glibc's allocator at its
defaults, and tuned to keep large temporaries. Prints medians, ratios and counts. Writes them to --out as JSON and PNG.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import common

SIDES = ("dpo_jax", "tunix")
ROPE_THETA = 1_000_000  # the rotary base of Tunix's Llama


def run_ours(work: Path, args: Any) -> dict[str, Any]:
    """Trains with dpo_jax."""
    return common.train_ours(work, common.base_config(args, work))


def run_tunix(work: Path, args: Any) -> dict[str, Any]:
    """Trains with Tunix; runs in its environment, which does not need dpo_jax."""
    import jax
    import numpy as np
    import optax
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params
    from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput

    saved = json.loads((Path(args.model) / "config.json").read_text())
    config = llama.ModelConfig(
        num_layers=saved["num_hidden_layers"],
        vocab_size=saved["vocab_size"],
        embed_dim=saved["hidden_size"],
        hidden_dim=saved["intermediate_size"],
        num_heads=saved["num_attention_heads"],
        head_dim=saved["hidden_size"] // saved["num_attention_heads"],
        num_kv_heads=saved["num_key_value_heads"],
        rope_theta=ROPE_THETA,
        norm_eps=saved["rms_norm_eps"],
        weight_tying=saved["tie_word_embeddings"],
    )
    policy, reference = (params.create_model_from_safe_tensors(args.model, config, None, np.float32) for _ in range(2))
    tokens = np.load(args.tokens_file)
    marks: list[tuple[float, int]] = []

    def batches() -> Iterator[TrainingInput]:
        for at in range(0, args.pairs * args.steps, args.pairs):
            marks.append((time.perf_counter(), common.minor_faults()))
            each = {name: tokens[name][at : at + args.pairs] for name in tokens.files}
            yield TrainingInput(**each)

    rate = optax.linear_schedule(args.learning_rate, 0.0, args.steps)  # the default of dpo_jax
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))
    settings = DPOTrainingConfig(eval_every_n_steps=10**9, max_steps=args.steps, beta=0.1)
    trainer = DPOTrainer(policy, reference, adamw, settings)
    losses = []
    write = trainer._buffer_metrics

    def kept(*inputs: Any, **options: Any) -> Any:
        losses.append(options["loss"])
        return write(*inputs, **options)

    trainer._buffer_metrics = kept
    trainer.train(batches())
    jax.block_until_ready(losses)
    marks.append((time.perf_counter(), common.minor_faults()))
    times, faults = ([b - a for a, b in zip(column, column[1:], strict=False)] for column in zip(*marks, strict=True))
    length = args.max_prompt + args.max_answer
    masks = [tokens[f"{name}_mask"].sum() for name in ("prompt", "prompt", "chosen", "rejected")]
    return {
        "losses": [float(loss) for loss in losses],
        "step_times_s": times,
        "positions": [2 * args.pairs * length] * args.steps,
        "reference_positions": [2 * args.pairs * length] * args.steps,
        "tokens": [int(sum(masks)) // args.steps] * args.steps,
        "faults_per_step": float(np.median(faults[common.WARM_UP :])),
    }


def pad(ids: list[Any], length: int, *, left: bool) -> tuple[Any, Any]:
    """Token ids [N, length] and their mask, padded with 0 on the left or the right."""
    import numpy as np

    tokens, mask = np.zeros((len(ids), length), np.int32), np.zeros((len(ids), length), np.int32)
    for row, each in enumerate(ids):
        span = slice(length - len(each), length) if left else slice(0, len(each))
        tokens[row, span], mask[row, span] = each, 1
    return tokens, mask


def write_tokens(pairs: list[common.Kept], out: Path, *, max_prompt: int, max_answer: int) -> None:
    """Writes the token ids of pairs, padded as Tunix requires: prompts on the left, answers on the right."""
    import numpy as np

    arrays = {}
    for name, length in (("prompt", max_prompt), ("chosen", max_answer), ("rejected", max_answer)):
        ids = [getattr(pair.ids, name) for pair in pairs]
        arrays[f"{name}_ids"], arrays[f"{name}_mask"] = pad(ids, length, left=name == "prompt")
    np.savez(out, **arrays)


def compare(results: dict[str, dict[str, list[dict[str, Any]]]], pairs: int) -> dict[str, Any]:
    """Medians for each side and allocator, ratios of dpo_jax to Tunix, and the distance between the loss curves."""
    sides: dict[str, Any] = {}
    for side, each in results.items():
        sides[side] = {}
        for name, rounds in each.items():
            done = common.worked(rounds)
            if not done:
                sides[side][name] = {"failed": rounds[0]["failed"]}
                continue
            step_s = common.median_time(done)
            sides[side][name] = {
                "step_s": step_s,
                "pairs_per_s": pairs / step_s,
                "peak_bytes": common.median_of(done, "peak_bytes"),
                "faults_per_step": common.median_of(done, "faults_per_step"),
                "positions": sum(done[0]["positions"]),
                "reference_positions_in_step": sum(done[0]["reference_positions"]),
                "tokens": sum(done[0]["tokens"]),
                "losses": done[0]["losses"],
            }
    found: dict[str, Any] = {"sides": sides, "ratios": {}, "loss_difference": {}}
    for name in next(iter(results.values())):
        ours, theirs = (sides[side][name] for side in SIDES)
        if "failed" in ours or "failed" in theirs:
            continue
        names = ("pairs_per_s", "peak_bytes", "positions")
        found["ratios"][name] = {each: ours[each] / theirs[each] for each in names}
        curves = zip(ours["losses"], theirs["losses"], strict=True)
        found["loss_difference"][name] = max(abs(a - b) for a, b in curves)
    return found


def report(out: Path, found: dict[str, Any]) -> None:
    """Prints the table, ratios and distances, and draws the plot."""
    runs = {f"{side}, {name}": one for side, each in found["sides"].items() for name, one in each.items()}
    rows = [
        {
            "side": name,
            "pairs/s": one.get("pairs_per_s", one.get("failed")),
            "step s": one.get("step_s"),
            "peak MiB": common.mib(one.get("peak_bytes")),
            "faults/step": one.get("faults_per_step"),
            "positions": one.get("positions"),
            "reference positions": one.get("reference_positions_in_step"),
            "tokens": one.get("tokens"),
        }
        for name, one in runs.items()
    ]
    print(common.table(rows))
    for name, each in found["ratios"].items():
        print(f"dpo_jax to tunix, {name}: " + ", ".join(f"{key} {common.shown(value)}" for key, value in each.items()))
    for name, distance in found["loss_difference"].items():
        print(f"largest difference of losses, {name}: {distance:.2e}")
    panels = {
        "pairs a second": {name: one.get("pairs_per_s") for name, one in runs.items()},
        "peak memory, MiB": {name: common.mib(one.get("peak_bytes")) for name, one in runs.items()},
    }
    common.plot_bars(out / "speed_and_memory.png", panels)


def main() -> None:
    parser = common.make_parser(__doc__, out="runs/vs_tunix")
    parser.add_argument(
        "--tunix_python", default=sys.executable, help="Python interpreter of the environment with Tunix"
    )
    parser.add_argument("--allocators", default="default,tuned", help="default, tuned or both")
    parser.add_argument("--pairs", type=int, default=8, help="pairs in a batch")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1, help="number of runs of each side, in turn")
    parser.add_argument("--max_prompt", type=int, default=384)
    parser.add_argument("--max_answer", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    args = parser.parse_args()
    allocators = args.allocators.split(",")
    if unknown := {*allocators} - {*common.ALLOCATORS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if args.steps <= common.WARM_UP:
        parser.error(f"the first {common.WARM_UP} steps are left out; there must be more")
    if args.shape == "pythia":
        parser.error("Tunix has no GPT-NeoX")
    args.max_length = args.max_prompt + args.max_answer
    out = common.prepare(args, rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA})
    count, limits = args.pairs * args.steps, dict(max_prompt=args.max_prompt, max_answer=args.max_answer)
    kept = common.select_pairs(args.data, Path(args.model), count=count, max_length=args.max_length, **limits)
    used = [kept[i % len(kept)] for i in range(count)]
    args.pairs_file, args.tokens_file = str(out / "pairs.jsonl"), str(out / "tokens.npz")
    common.write_rows([pair.row for pair in used], out / "pairs.jsonl")
    write_tokens(used, out / "tokens.npz", **limits)
    results: dict[str, dict[str, list[Any]]] = {side: {name: [] for name in allocators} for side in SIDES}
    functions = {"dpo_jax": ("run_ours", sys.executable), "tunix": ("run_tunix", args.tunix_python)}
    for turn in range(args.rounds):
        for side, (function, python) in functions.items():
            for name in allocators:
                function_name, work = f"benchmarks.vs_tunix:{function}", out / f"{side}-{name}-{turn}"
                one = common.in_fresh_process(function_name, work, vars(args), python=python, allocator=name)
                results[side][name].append(one)
    found = compare(results, args.pairs)
    common.write_results(out, args, found)
    report(out, found)


if __name__ == "__main__":
    main()
