"""Compares DPO with dpo_jax and with TRL: loss curves, speed, memory, page faults and computed positions.

    pip install torch==2.13.0 && pip install -e '.[bench]'
    python -m benchmarks.vs_trl --data=train.jsonl.gz --tokenizer=DIR --shape=llama --pairs=8 --steps=20
    python -m benchmarks.vs_trl --what=reference --data=train.jsonl.gz --tokenizer=DIR --pairs=8 --steps=64

All sides start from the same random checkpoint (or --model) and train on the same pairs in the same order, with AdamW
and beta 0.1:

    dpo_jax          float32
    trl              TRL's DPOTrainer at its defaults: bfloat16 autocast, gradient checkpointing
    trl-float32      float32 without gradient checkpointing
    trl-precomputed  trl-float32 with the reference scored before training; that time is reported separately
    trl-answers      trl-float32 with the vocabulary head on answer tokens only, as TRL does on GPUs

If a batch does not fit into memory with TRL, --accumulate splits it into smaller ones, each padded to its own longest
sequence.

Each side runs in a separate process, in turn, --rounds times. Each time it runs twice: with glibc's allocator at its
defaults, and tuned to keep large temporaries, which is faster for PyTorch. Ratios use the speed of TRL with the tuned
allocator, its memory with the default allocator, and dpo_jax with the default allocator. Both are shown.

--what=reference times only the scoring of the reference, over distinct pairs. For dpo_jax it is a second complete pass
in the same process, into a new store, so that no compilation is included, but reading the weights and writing the
store are. For TRL it is the loop that precomputes log-probs, after some batches of warm-up.

Prints medians, ratios and counts. Writes them to --out as JSON and PNG.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import make_model, write_pairs

__all__ = ["compare", "main", "make_model", "run_ours", "run_trl", "write_pairs"]

FLOAT32 = {"bf16": False, "gradient_checkpointing": False}
SIDES: dict[str, dict[str, Any]] = {  # settings that differ from TRL's defaults
    "dpo_jax": {},
    "trl": {},
    "trl-float32": FLOAT32,
    "trl-precomputed": FLOAT32 | {"precompute_ref_log_probs": True},
    "trl-answers": FLOAT32,
}
# Sides whose losses should equal those of dpo_jax up to floating-point error.
CURVES = ("trl-float32", "trl-precomputed", "trl-answers")


# --- sides --------------------------------------------------------------------------------------------------------


def run_side(work: Path, args: Any) -> dict[str, Any]:
    """Runs one side; called in a separate process."""
    if args.side == "dpo_jax":
        return score_ours(work, args) if args.what == "reference" else run_ours(work, args)
    if args.side == "trl-answers":
        score_answers_only()
    settings = SIDES[args.side]
    if args.what == "reference":
        return score_trl(work, args, settings)
    return run_trl(work, args, settings, stop_after=args.trl_steps)


def run_ours(work: Path, args: Any) -> dict[str, Any]:
    """Trains with dpo_jax in `work`; returns losses, step times, positions and page faults."""
    chosen = common.base_config(args, work)
    chosen.lora.path = args.adapter
    with chosen.ignore_type():
        chosen.update_from_flattened_dict(getattr(args, "fields", {}))
    return common.train_ours(work, chosen)


def score_ours(work: Path, args: Any) -> dict[str, Any]:
    """Times a second reference pass of dpo_jax."""
    from dpo_jax import config
    from dpo_jax.data import layout
    from dpo_jax.run.choices import objective_of
    from dpo_jax.run.inputs import load_inputs
    from dpo_jax.run.programs import make_programs
    from dpo_jax.run.reference_values import reference_store, score_missing
    from dpo_jax.run.state import load_params

    chosen = config.freeze(common.base_config(args, work))
    objective = objective_of(chosen.loss)
    read = load_inputs(chosen, objective, training=False)
    built = make_programs(chosen, objective, read.model, read.lengths)
    store = reference_store(read, built, work / "reference")
    assert store is not None
    positions = []
    program: Any = built.reference_scoring

    def counted(params: Any, batch: Any) -> Any:
        positions.append(layout.positions_computed(batch, built.score_shape))
        return program(params, batch)

    counting = built._replace(reference_scoring=counted)
    weights = functools.cache(lambda name: load_params(read.source, built))  # anew for each pass

    def score(name: str) -> dict[str, Any]:
        positions.clear()
        faults, started = common.minor_faults(), time.perf_counter()
        new = store._replace(folder=work / name)
        values, _ = score_missing(read, new, counting, lambda: weights(name))
        seconds, faults = time.perf_counter() - started, common.minor_faults() - faults
        return {
            "seconds": seconds,
            "faults": faults,
            "positions": sum(positions),
            "logps": next(iter(values.values())).logps.tolist(),
        }

    first = score("first")
    return score("second") | {"first_seconds": first["seconds"]}


def score_answers_only() -> None:
    """Makes TRL multiply only answer tokens with the vocabulary matrix, on any device."""
    utils: Any = importlib.import_module("trl.trainer.utils")
    assert callable(utils._use_triton)
    utils._use_triton = lambda device: True


def recorded_trainer() -> Any:
    """Returns TRL's DPOTrainer as a class that takes pairs in order and records losses, times and counts."""
    import torch
    from trl.trainer.dpo_trainer import DPOTrainer

    class Recorded(DPOTrainer):
        losses: list[float] = []
        marks: list[tuple[float, ...]] = []  # at the start of each batch: time, page faults, and the counts below
        counts = {"policy": 0, "reference": 0, "tokens": 0}
        scored: list[tuple[float, int, int]] = []  # after each batch precomputed: time, page faults, positions
        precompute_s: float | None = None

        def mark(self) -> None:
            self.marks.append((time.perf_counter(), common.minor_faults(), *self.counts.values()))

        def _get_train_sampler(self, train_dataset=None):
            rows: Any = self.train_dataset if train_dataset is None else train_dataset
            return torch.utils.data.SequentialSampler(rows)

        def training_step(self, *inputs, **options):
            self.mark()
            loss = super().training_step(*inputs, **options)
            self.losses.append(float(loss))
            return loss

        def _precompute_ref_logps(self, *inputs, **options):
            started = time.perf_counter()
            found = super()._precompute_ref_logps(*inputs, **options)
            self.precompute_s = time.perf_counter() - started
            return found

        def compute_ref_log_probs(self, model, inputs):
            found = super().compute_ref_log_probs(model, inputs)
            self.counts["reference"] += inputs["input_ids"].numel()
            self.scored.append((time.perf_counter(), common.minor_faults(), self.counts["reference"]))
            return found

    return Recorded


def make_trainer(work: Path, args: Any, settings: dict[str, Any], callbacks: list[Any] | None = None) -> Any:
    """Returns a DPOTrainer that records times and counts; at TRL's defaults but for batches, steps and `settings`."""
    import datasets
    import torch
    import transformers
    from trl.trainer.dpo_config import DPOConfig

    settings = dict(settings)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.adapter:
        import peft

        model = peft.PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    trainer = recorded_trainer()(
        model=model,
        args=DPOConfig(
            output_dir=str(work / "trl"),
            per_device_train_batch_size=args.pairs // args.accumulate,
            gradient_accumulation_steps=args.accumulate,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            beta=settings.pop("beta", 0.1),
            max_length=args.max_length,
            use_cpu=True,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=datasets.load_dataset("json", data_files=args.pairs_file, split="train"),
        processing_class=transformers.AutoTokenizer.from_pretrained(args.model),
        callbacks=callbacks,
    )
    return trainer


def run_trl(
    work: Path, args: Any, settings: dict[str, Any] = FLOAT32, *, stop_after: int | None = None
) -> dict[str, Any]:
    """Trains with TRL's DPOTrainer in `work`; returns a dict with the keys of `run_ours`.

    Args:
      settings: fields of DPOConfig.
      stop_after: stop after this many steps of the same learning-rate schedule; None: run all steps.
    """
    import transformers

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **options):
            control.should_training_stop = control.should_training_stop or state.global_step == stop_after

    trainer = make_trainer(work, args, settings, [Stop()])
    precomputed = trainer.counts["reference"]
    trainer.counts["reference"] = 0

    def counter(kind: str):
        def hook(module, inputs, options):
            ids = options["input_ids"] if "input_ids" in options else inputs[0]
            trainer.counts[kind] += ids.numel()
            if kind == "policy":
                trainer.counts["tokens"] += int(options["attention_mask"].sum())

        return hook

    trainer.model.register_forward_pre_hook(counter("policy"), with_kwargs=True)
    if trainer.ref_model is not None:
        trainer.ref_model.register_forward_pre_hook(counter("reference"), with_kwargs=True)
    trainer.train()
    trainer.mark()
    marks = trainer.marks[:: args.accumulate]  # at the start of each step, which is several batches
    times, faults, *counts = (
        [after - before for before, after in zip(column, column[1:], strict=False)]
        for column in map(list, zip(*marks, strict=True))
    )
    positions, reference_positions, tokens = counts
    of_batches = np.reshape(trainer.losses, (-1, args.accumulate))  # each is divided by the number of batches already
    return {
        "losses": of_batches.sum(1).tolist(),
        "step_times_s": times,
        "positions": positions,
        "reference_positions": reference_positions,
        "tokens": tokens,
        "faults_per_step": statistics.median(faults[common.WARM_UP :]),
        "precompute_s": trainer.precompute_s,
        "precompute_positions": precomputed or None,
    }


def score_trl(work: Path, args: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Times how TRL precomputes log-probs, without the first batches, which are repeated in the file for warm-up."""
    lines = Path(args.pairs_file).read_text().splitlines(keepends=True)
    again = min(len(lines), common.WARM_UP * args.pairs)
    (work / "pairs.jsonl").write_text("".join(lines[:again] + lines))
    args.pairs_file = str(work / "pairs.jsonl")
    trainer = make_trainer(work, args, settings | {"precompute_ref_log_probs": True})
    before, after = trainer.scored[again // args.pairs - 1], trainer.scored[-1]
    seconds, faults, positions = (end - start for start, end in zip(before, after, strict=True))
    columns = [trainer.train_dataset[f"ref_{answer}_logps"][again:] for answer in ("chosen", "rejected")]
    return {
        "seconds": seconds,
        "faults": faults,
        "positions": positions,
        "logps": [[float(value) for value in pair] for pair in zip(*columns, strict=True)],
    }


# --- comparison ---------------------------------------------------------------------------------------------------

Results = dict[str, dict[str, list[dict[str, Any]]]]  # side, allocator, round


def compare(results: Results, pairs: int) -> dict[str, Any]:
    """Medians over rounds and steps, ratios of dpo_jax to the other sides, and distances between loss curves.

    Positions and tokens are counted over the steps that all sides completed.
    """
    worked = {side: {name: common.worked(rounds) for name, rounds in each.items()} for side, each in results.items()}
    every = [one for each in worked.values() for rounds in each.values() for one in rounds]
    steps = min((len(one["losses"]) for one in every), default=0)
    sides: dict[str, Any] = {side: {} for side in results}
    for side, each in worked.items():
        for name, rounds in each.items():
            if not rounds:
                sides[side][name] = {"failed": results[side][name][0]["failed"]}
                continue
            step_s = common.median_time(rounds)
            sides[side][name] = {
                "step_s": step_s,
                "pairs_per_s": pairs / step_s,
                "faults_per_step": common.median_of(rounds, "faults_per_step"),
                "peak_bytes": common.median_of(rounds, "peak_bytes"),
                "positions": sum(rounds[0]["positions"][:steps]),
                "reference_positions_in_step": sum(rounds[0]["reference_positions"][:steps]),
                "tokens": sum(rounds[0]["tokens"][:steps]),
                "precompute_s": common.median_of(rounds, "precompute_s"),
                "precompute_positions": rounds[0].get("precompute_positions"),
            }
    return {
        "what": "train",
        "steps_compared": steps,
        "sides": sides,
        "ratios": ratios(sides),
        "loss_difference": loss_difference(worked),
        "losses": {side: rounds[0]["losses"] for side in worked if (rounds := first_worked(worked[side]))},
    }


def first_worked(allocators: dict[str, list[Any]]) -> list[Any]:
    """The rounds of the first allocator with which any round succeeded."""
    return next((rounds for rounds in allocators.values() if rounds), [])


def ratios(sides: dict[str, Any]) -> dict[str, Any]:
    """Ratios of dpo_jax to each other side: speed against TRL with the tuned allocator, memory with the default one."""
    if "dpo_jax" not in sides:
        return {}
    ours, tuned = (sides["dpo_jax"].get(name, {}) for name in ("default", "tuned"))
    found: dict[str, Any] = {"dpo_jax": {"time, allocator as it is to tuned": by_name("pairs_per_s", tuned, ours)}}
    for side, each in sides.items():
        if side == "dpo_jax":
            continue
        fast, plain = each.get("tuned", {}), each.get("default", {})
        found[side] = {
            "pairs_per_s": by_name("pairs_per_s", ours, fast),
            "peak_bytes": by_name("peak_bytes", ours, plain),
            "positions": by_name("positions", ours, plain or fast),
        }
    return found


def by_name(name: str, one: dict[str, Any], other: dict[str, Any]) -> float | None:
    """Ratio of one number of two sides."""
    return common.ratio(one.get(name), other.get(name))


def loss_difference(worked: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Largest distance between the loss curve of dpo_jax and that of each side in CURVES."""
    ours = first_worked(worked.get("dpo_jax", {}))
    found = {}
    for side in CURVES:
        theirs = first_worked(worked.get(side, {}))
        if ours and theirs:
            curves = zip(ours[0]["losses"], theirs[0]["losses"], strict=False)
            distance = [abs(a - b) for a, b in curves]
            found[side] = {"first 5 steps": max(distance[:5]), f"all {len(distance)} steps": max(distance)}
    return found


def compare_reference(results: Results, pairs: int) -> dict[str, Any]:
    """Pairs per second of the reference pass, ratios, and the largest distance between log-probs in nats."""
    sides: dict[str, Any] = {side: {} for side in results}
    logps = {}
    for side, each in results.items():
        for name, rounds in each.items():
            done = common.worked(rounds)
            if not done:
                sides[side][name] = {"failed": rounds[0]["failed"]}
                continue
            logps.setdefault(side, done[0]["logps"])
            seconds = common.median_of(done, "seconds")
            sides[side][name] = {
                "seconds": seconds,
                "first_seconds": common.median_of(done, "first_seconds"),
                "pairs_per_s": common.ratio(pairs, seconds),
                "faults": common.median_of(done, "faults"),
                "peak_bytes": common.median_of(done, "peak_bytes"),
                "positions": done[0]["positions"],
            }
    distance = {
        side: max(
            abs(a - b)
            for one, other in zip(logps["dpo_jax"], values, strict=True)
            for a, b in zip(one, other, strict=True)
        )
        for side, values in logps.items()
        if side != "dpo_jax" and "dpo_jax" in logps
    }
    return {"what": "reference", "pairs": pairs, "sides": sides, "ratios": ratios(sides), "logps_difference": distance}


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table, one for each side and allocator."""
    rows = []
    for side, each in found["sides"].items():
        for allocator, one in each.items():
            row: dict[str, Any] = {"side": f"{side}, {allocator}"}
            if "failed" in one:
                rows.append(row | {"pairs/s": one["failed"]})
                continue
            row |= {"pairs/s": one["pairs_per_s"]}
            if found["what"] == "train":
                row |= {"step s": one["step_s"]}
            row |= {"peak MiB": common.mib(one["peak_bytes"])}
            if found["what"] == "reference":
                rows.append(row | {"seconds": one["seconds"], "faults": one["faults"], "positions": one["positions"]})
                continue
            row |= {"faults/step": one["faults_per_step"], "positions": one["positions"]}
            row |= {"reference positions": one["reference_positions_in_step"], "tokens": one["tokens"]}
            rows.append(row | {"precompute s": one["precompute_s"]})
    return rows


def report(out: Path, found: dict[str, Any]) -> None:
    """Prints the table, ratios and distances, and draws the plot."""
    print(common.table(rows_of(found)))
    for side, each in found["ratios"].items():
        against = "dpo_jax" if side == "dpo_jax" else f"dpo_jax to {side}"
        print(f"{against}: " + ", ".join(f"{name} {common.shown(value)}" for name, value in each.items()))
    for side, spans in found.get("loss_difference", {}).items():
        for span, distance in spans.items():
            print(f"largest difference of losses from {side}, {span}: {distance:.2e}")
    for side, distance in found.get("logps_difference", {}).items():
        print(f"largest difference of reference log-probs from {side}: {distance:.2e} nats")
    runs = {f"{side}, {name}": one for side, each in found["sides"].items() for name, one in each.items()}
    panels = {
        "pairs a second": {name: one.get("pairs_per_s") for name, one in runs.items()},
        "peak memory, MiB": {name: common.mib(one.get("peak_bytes")) for name, one in runs.items()},
    }
    common.plot_bars(out / "speed_and_memory.png", panels)
    if found.get("losses"):
        curves = {side: (list(range(len(losses))), losses) for side, losses in found["losses"].items()}
        common.plot_lines(out / "losses.png", {"loss": curves}, x="step")


def parse_args() -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Returns the options, and the sides to run, each with an allocator."""
    parser = common.make_parser(__doc__, out="runs/vs_trl")
    parser.add_argument("--what", choices=("train", "reference"), default="train")
    parser.add_argument(
        "--sides", default="", help=f"of {','.join(SIDES)}, each alone or as SIDE:ALLOCATOR; empty: all of them"
    )
    parser.add_argument(
        "--allocators", default="default,tuned", help="default, tuned or both, for sides that name none"
    )
    parser.add_argument("--pairs", type=int, default=8, help="pairs in a batch")
    parser.add_argument("--steps", type=int, default=20, help="with --what=reference: batches of pairs to score")
    parser.add_argument("--trl_steps", type=int, help="stop TRL after this many steps; unset: run all")
    parser.add_argument("--accumulate", type=int, default=1, help="batches into which TRL splits the pairs of a step")
    parser.add_argument("--rounds", type=int, default=1, help="number of runs of each side, in turn")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument(
        "--adapter", default="", help="PEFT folder of an adapter; then only the adapter trains; empty: none"
    )
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    args = parser.parse_args()
    reference = args.what == "reference"
    sides = args.sides.split(",") if args.sides else [s for s in SIDES if not (reference and s == "trl-precomputed")]
    runs = []
    for side, _, allocator in (each.partition(":") for each in sides):
        runs += [(side, name) for name in (allocator or args.allocators).split(",")]
    sides, allocators = ({run[at] for run in runs} for at in (0, 1))
    if unknown := (sides - set(SIDES)) | (allocators - set(common.ALLOCATORS)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if reference and "trl-precomputed" in sides:
        parser.error("with --what=reference, every TRL side precomputes; leave trl-precomputed out")
    if args.accumulate != 1 and (reference or args.accumulate < 1 or args.pairs % args.accumulate):
        parser.error("--accumulate is for training, and divides --pairs")
    if not reference and min(args.steps, args.trl_steps or args.steps) <= common.WARM_UP:
        parser.error(f"the first {common.WARM_UP} steps are left out; there must be more")
    return args, runs


def main() -> None:
    args, runs = parse_args()
    reference = args.what == "reference"
    out = common.prepare(args)
    args.pairs_file, count = str(out / "pairs.jsonl"), args.pairs * args.steps
    distinct = write_pairs(args.data, out / "pairs.jsonl", Path(args.model), count=count, max_length=args.max_length)
    print(f"{count} pairs of at most {args.max_length} tokens, {distinct} of them distinct", file=sys.stderr)
    if reference and distinct < count:
        sys.exit(f"{args.data}: {distinct} distinct pairs, and {count} are to be scored; lower --steps")
    results: Results = {side: {} for side, _ in runs}
    for turn in range(args.rounds):
        for side, name in runs:
            work = out / f"{side}-{name}-{turn}"
            found = common.in_fresh_process(
                "benchmarks.vs_trl:run_side", work, vars(args) | {"side": side}, allocator=name
            )
            results[side].setdefault(name, []).append(found)
    found = compare_reference(results, count) if reference else compare(results, args.pairs)
    common.write_results(out, args, found)
    report(out, found)


if __name__ == "__main__":
    main()
