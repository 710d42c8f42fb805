"""The same DPO run by dpo_jax and by TRL: loss curves laid over each other, speed, memory and work.

    pip install torch==2.13.0 && pip install -e '.[bench]'
    python benchmarks/vs_trl.py --data=train.jsonl.gz --tokenizer=DIR --shape=llama --pairs=8 --steps=20

Both sides train the same random checkpoint (or --model) on the same pairs in the same order, float32, AdamW, beta 0.1.
Each runs in a process of its own, in turn, --rounds times; prints medians, ratios and counts, and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WARM_UP = 2  # steps of each run left out of its speed: compilation, allocator, page cache
SHAPES = {
    "llama": dict(
        model_type="llama",
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "pythia": dict(
        model_type="gpt_neox",
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=2048,
        rotary_pct=0.25,
    ),
}


def make_model(folder: Path, shape: dict[str, Any], tokenizer: Path) -> None:
    """A random checkpoint of a shape, written by transformers, with the tokenizer beside it."""
    import torch
    import transformers

    torch.manual_seed(0)
    saved = transformers.AutoTokenizer.from_pretrained(tokenizer)
    vocabulary = -(-len(saved) // 128) * 128
    config = transformers.AutoConfig.for_model(
        **shape, vocab_size=vocabulary, bos_token_id=saved.eos_token_id, eos_token_id=saved.eos_token_id
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    saved.save_pretrained(folder)


def write_pairs(source: str, out: Path, tokenizer: Path, *, count: int, max_length: int) -> None:
    """The first `count` pairs of the source that need no cutting, as explicit text columns that both sides read."""
    from dpo_jax.data import formats, sources
    from dpo_jax.data.tokenize import encode, load_tokenizer
    from dpo_jax.types import InputError, Pair

    loaded = load_tokenizer(str(tokenizer))
    kept = []
    for row in sources.read(source, split="train")[0].rows:
        try:
            pair = formats.render(row, format=formats.detect(row), tokenizer=loaded)
        except InputError:
            continue
        found = encode(
            [pair],
            loaded,
            vocab_size=len(loaded),
            max_length=10**6,
            max_prompt_length=10**6 - 1,
            truncate_prompt="keep_end",
        )[0]
        if isinstance(pair, Pair) and not isinstance(found, InputError):
            ids = found.encoded
            if len(ids.prompt) + max(len(ids.chosen), len(ids.rejected)) <= max_length:
                kept.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected})
        if len(kept) == count:
            break
    if len(kept) < count:
        sys.exit(f"{source}: {len(kept)} pairs of at most {max_length} tokens; {count} are needed for these steps")
    out.write_text("".join(json.dumps(row) + "\n" for row in kept))


def run_ours(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Trains with dpo_jax in `work`; returns losses, step times, peak memory and positions."""
    from dpo_jax import config, train

    chosen = config.base()
    chosen.model.path = args.model
    chosen.model.dtype = "float32"
    chosen.data.train = args.pairs_file
    chosen.data.format = "plain"
    chosen.data.shuffle = False
    chosen.data.max_length = args.max_length
    chosen.data.max_prompt_length = args.max_length - 1
    chosen.data.cache_dir = str(work / "cache")
    chosen.train.batch_pairs, chosen.train.steps = args.pairs, args.steps
    chosen.optimizer.learning_rate = args.learning_rate
    train.run(config.freeze(chosen), work / "run")
    rows = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [row["loss"] for row in rows],
        "step_times_s": [row["step_time_s"] for row in rows],
        "positions": sum(row["positions_computed"] for row in rows),
        "reference_positions": None,
    }


def run_trl(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Trains with TRL's DPOTrainer in `work`; the same keys."""
    import datasets
    import torch
    import transformers
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    losses, starts, positions = [], [], {"policy": 0, "reference": 0}

    class Recorded(DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(dataset if dataset is not None else self.train_dataset)

        def training_step(self, *inputs, **options):
            starts.append(time.perf_counter())
            loss = super().training_step(*inputs, **options)
            losses.append(float(loss))
            return loss

    def count(kind: str):
        def hook(module, inputs, options):
            positions[kind] += options.get("input_ids", inputs[0] if inputs else None).numel()

        return hook

    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    settings = DPOConfig(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=args.pairs,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        beta=0.1,
        max_length=args.max_length,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Recorded(
        model=model,
        args=settings,
        train_dataset=datasets.load_dataset("json", data_files=args.pairs_file, split="train"),
        processing_class=transformers.AutoTokenizer.from_pretrained(args.model),
    )
    for kind, module in (("policy", trainer.model), ("reference", trainer.ref_model)):
        assert isinstance(module, torch.nn.Module)
        module.register_forward_pre_hook(count(kind), with_kwargs=True)
    trainer.train()
    starts.append(time.perf_counter())
    return {
        "losses": losses,
        "step_times_s": [after - before for before, after in zip(starts, starts[1:], strict=False)],
        "positions": positions["policy"],
        "reference_positions": positions["reference"],
    }


SIDES = {"dpo_jax": run_ours, "trl": run_trl}


def run_side(side: str, work: Path, argv: list[str]) -> dict[str, Any]:
    """One side in a fresh process, so that its peak memory is its own."""
    work.mkdir(parents=True)
    command = [sys.executable, __file__, *argv, f"--side={side}", f"--work={work}"]
    # TRL at its best: without these, half its step goes into page faults of large temporaries.
    tuned = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**33)} if side == "trl" else {}
    subprocess.run(command, check=True, env=os.environ | tuned, stdout=sys.stderr)
    return json.loads((work / "result.json").read_text())


def compare(results: dict[str, list[dict[str, Any]]], pairs: int) -> dict[str, Any]:
    """Medians over rounds and steps, ratios, and the largest distance between the two loss curves."""
    found: dict[str, Any] = {}
    for side, rounds in results.items():
        times = [t for one in rounds for t in one["step_times_s"][WARM_UP:]]
        found[side] = {
            "pairs_per_s": pairs / statistics.median(times),
            "peak_bytes": statistics.median(one["peak_bytes"] for one in rounds),
            "positions": rounds[0]["positions"],
            "reference_positions_in_step": rounds[0]["reference_positions"],
        }
    ours, theirs = found["dpo_jax"], found["trl"]
    curves = [results[side][0]["losses"] for side in ("dpo_jax", "trl")]
    distance = [abs(a - b) for a, b in zip(*curves, strict=True)]
    found["ratios"] = {name: ours[name] / theirs[name] for name in ("pairs_per_s", "peak_bytes", "positions")}
    found["loss_difference"] = {"first 5 steps": max(distance[:5]), f"all {len(distance)} steps": max(distance)}
    found["losses"] = dict(zip(("dpo_jax", "trl"), curves, strict=True))
    return found


def print_table(found: dict[str, Any]) -> None:
    print(f"{'':<24}{'dpo_jax':>16}{'TRL':>16}{'ratio':>10}")
    for name in ("pairs_per_s", "peak_bytes", "positions"):
        ours, theirs = (found[side][name] for side in ("dpo_jax", "trl"))
        print(f"{name:<24}{ours:>16,.2f}{theirs:>16,.2f}{found['ratios'][name]:>10.3f}")
    print("TRL's positions leave out its reference forward inside the step: ", end="")
    print(f"{found['trl']['reference_positions_in_step']:,} more")
    for span, distance in found["loss_difference"].items():
        print(f"largest difference of losses, {span}: {distance:.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preferences in any form that dpo_jax reads")
    parser.add_argument("--tokenizer", default="", help="folder of the tokenizer; needed without --model")
    parser.add_argument("--model", default="", help="checkpoint folder; empty: a random one of --shape")
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--pairs", type=int, default=8, help="pairs in a batch")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1, help="times that each side runs, in turn")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--out", default="runs/vs_trl", help="folder of the results; must not exist")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = Path(args.out)
    args.model, args.pairs_file = args.model or str(out / "model"), str(out / "pairs.jsonl")
    if args.side:
        result = SIDES[args.side](Path(args.work), args)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (Path(args.work) / "result.json").write_text(json.dumps(result | {"peak_bytes": peak}))
        return
    out.mkdir(parents=True)
    if not Path(args.model).exists():
        make_model(Path(args.model), SHAPES[args.shape], Path(args.tokenizer))
    count = args.pairs * args.steps
    write_pairs(args.data, out / "pairs.jsonl", Path(args.model), count=count, max_length=args.max_length)
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for turn in range(args.rounds):
        for side in SIDES:
            results[side].append(run_side(side, out / f"{side}-{turn}", sys.argv[1:]))
    found = compare(results, args.pairs)
    (out / "result.json").write_text(json.dumps(found, indent=2))
    print_table(found)


if __name__ == "__main__":
    main()
