"""Measures whether step time and memory grow with the data: the same number of steps over data sets of several sizes.

    python -m benchmarks.scaling --data=train.jsonl.gz --sizes=1000,10000,100000 --steps=200

Without --model and --tokenizer, a tokenizer of 1,024 tokens is trained on the data. The model is then small, and the
work of the host becomes visible. For each size, the same tiny model trains on copies of the first pairs of the data.
Each copy has its number before the prompt, so that all pairs differ. The rows contain reference log-probs, so there is
no reference pass. The order is shuffled. Tokenizing and training run in separate processes:

    tokenize s    reading, tokenizing and storing all pairs
    us/pair       median step time divided by the pairs in a batch
    RSS           memory of the training process after its first steps and at its end; anonymous: without mapped files

Prints a table and the ratios of the largest size to the smallest. Writes them to --out as JSON and PNG.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common

NUMBER = 16  # maximal tokens of the number before the prompt
BASE_PAIRS = 1000  # pairs to copy


def small_tokenizer(source: str) -> Any:
    """Trains a tokenizer on the text of a source."""
    from dpo_jax.data import sources
    from dpo_jax.demo import quickstart

    rows = sources.read(source, split="train")[0].rows
    return quickstart.train_tokenizer(text for row in rows for text in row.fields.values() if isinstance(text, str))


def write_copies(rows: list[dict[str, str]], out: Path, count: int) -> None:
    """Writes `count` copies of `rows` in turn, each with its number before the prompt and with reference log-probs."""
    with out.open("w") as file:
        for number, row in enumerate(itertools.islice(itertools.cycle(rows), count)):
            given = {"ref_chosen_logps": -50.0, "ref_rejected_logps": -50.0}
            file.write(json.dumps(row | given | {"prompt": f"{number:07d}{row['prompt']}"}) + "\n")


def configure(work: Path, args: Any) -> Any:
    """Configuration of a shuffled run over `args.pairs_file`, with equal shapes at every size of the data."""
    chosen = common.base_config(args, work)
    chosen.data.shuffle = True
    chosen.data.row_length, chosen.train.microbatch_rows = 2 * args.max_length, 1
    chosen.data.cache_dir = args.pairs_file + ".cache"
    return chosen


def tokenize(work: Path, args: Any) -> dict[str, Any]:
    """Reads, tokenizes and stores the pairs; returns the seconds."""
    from dpo_jax import config
    from dpo_jax.run import inputs
    from dpo_jax.run.choices import objective_of

    chosen = config.freeze(configure(work, args))
    started = time.perf_counter()
    inputs.load_inputs(chosen, objective_of(chosen.loss), training=True)
    return {"seconds": time.perf_counter() - started}


def train(work: Path, args: Any) -> dict[str, Any]:
    """Trains and measures memory after the first steps and at the end."""
    from dpo_jax import config
    from dpo_jax import train as trainer

    chosen, log = configure(work, args), work / "run" / "metrics.jsonl"
    started = time.perf_counter()
    with common.watch(log) as samples:
        trainer.run(config.freeze(chosen), work / "run")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    warm = next(sample for sample in samples if sample.rows >= common.WARM_UP)
    return {
        "seconds": time.perf_counter() - started,
        "step_times_s": [row["step_time_s"] for row in rows],
        "data_wait_s": sum(row["data_wait_s"] for row in rows[common.WARM_UP :]) / len(rows[common.WARM_UP :]),
        "positions": sum(row["positions_computed"] for row in rows),
        "rss_start_bytes": warm.rss_bytes,
        "rss_end_bytes": samples[-1].rss_bytes,
        "anonymous_start_bytes": warm.anonymous_bytes,
        "anonymous_end_bytes": samples[-1].anonymous_bytes,
    }


def compare(tokenized: dict[int, list[Any]], trained: dict[int, list[Any]], pairs: int) -> dict[str, Any]:
    """Medians for each size, and ratios of the largest to the smallest."""
    sizes = []
    for size, rounds in trained.items():
        row: dict[str, Any] = {"pairs": size}
        done, read = common.worked(rounds), common.worked(tokenized[size])
        if done and read:
            row |= {
                "tokenize_s": common.median_of(read, "seconds"),
                "tokenize_peak_bytes": common.median_of(read, "peak_bytes"),
                "seconds_per_pair": common.median_time(done) / pairs,
                **{
                    name: common.median_of(done, name)
                    for name in (
                        "data_wait_s positions rss_start_bytes rss_end_bytes anonymous_start_bytes anonymous_end_bytes "
                        "peak_bytes seconds"
                    ).split()
                },
            }
            row["rss_growth_bytes"] = row["rss_end_bytes"] - row["rss_start_bytes"]
        sizes.append(row)
    first, last = min(sizes, key=lambda row: row["pairs"]), max(sizes, key=lambda row: row["pairs"])
    names = ("seconds_per_pair", "rss_end_bytes", "anonymous_end_bytes", "peak_bytes", "tokenize_s")
    ratios = {name: common.ratio(last.get(name), first.get(name)) for name in names}
    return {"sizes": sizes, "ratios_of_largest_to_smallest": ratios}


def report(out: Path, found: dict[str, Any]) -> None:
    """Prints the table and ratios, and draws the plot."""
    sizes = found["sizes"]
    rows = []
    for one in sizes:
        per_pair, waited = one.get("seconds_per_pair"), one.get("data_wait_s")
        rows.append(
            {
                "pairs": one["pairs"],
                "us/pair": None if per_pair is None else 1e6 * per_pair,
                "wait for data, us/step": None if waited is None else 1e6 * waited,
                "tokenize s": one.get("tokenize_s"),
                "tokenize peak MiB": common.mib(one.get("tokenize_peak_bytes")),
                "RSS at start MiB": common.mib(one.get("rss_start_bytes")),
                "at end": common.mib(one.get("rss_end_bytes")),
                "growth": common.mib(one.get("rss_growth_bytes")),
                "anonymous at end": common.mib(one.get("anonymous_end_bytes")),
                "peak": common.mib(one.get("peak_bytes")),
            }
        )
    print(common.table(rows))
    for name, value in found["ratios_of_largest_to_smallest"].items():
        print(f"largest to smallest: {name} {common.shown(value)}")
    counts = [one["pairs"] for one in sizes]
    lines = {name: (counts, [one.get(name, 0.0) for one in sizes]) for name in ("seconds_per_pair", "rss_end_bytes")}
    panels = {
        "seconds a pair": {"step time": lines["seconds_per_pair"]},
        "memory at the end, bytes": {"RSS": lines["rss_end_bytes"]},
    }
    common.plot_lines(out / "scaling.png", panels, x="pairs in the data")


def main() -> None:
    parser = common.make_parser(__doc__, out="runs/scaling", shape="tiny")
    parser.add_argument("--sizes", default="1000,10000,100000", help="pairs in the data")
    parser.add_argument("--pairs", type=int, default=8, help="pairs in a batch")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1, help="number of runs of each size, in turn")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    if args.steps <= common.WARM_UP:
        parser.error(f"the first {common.WARM_UP} steps are left out; there must be more")
    with tempfile.TemporaryDirectory() as folder:  # the tokenizer is saved with the model
        if not args.model and not args.tokenizer:
            small_tokenizer(args.data).save_pretrained(folder)
            args.tokenizer = folder
        out = common.prepare(args)
    kept = common.select_pairs(args.data, Path(args.model), count=BASE_PAIRS, max_length=args.max_length - NUMBER)
    tokenized: dict[int, list[Any]] = {size: [] for size in sizes}
    trained: dict[int, list[Any]] = {size: [] for size in sizes}
    for size in sizes:
        write_copies([pair.row for pair in kept], out / f"{size}.jsonl", size)
        given = vars(args) | {"pairs_file": str(out / f"{size}.jsonl")}
        tokenized[size].append(common.in_fresh_process("benchmarks.scaling:tokenize", out / f"tokenize-{size}", given))
    for turn in range(args.rounds):
        for size in sizes:
            given, work = vars(args) | {"pairs_file": str(out / f"{size}.jsonl")}, out / f"train-{size}-{turn}"
            trained[size].append(common.in_fresh_process("benchmarks.scaling:train", work, given))
    found = compare(tokenized, trained, args.pairs)
    common.write_results(out, args, found)
    report(out, found)


if __name__ == "__main__":
    main()
