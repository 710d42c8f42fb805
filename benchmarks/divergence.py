"""Measures how much of the KL divergence along answers the C likeliest tokens in a reference store account for.

    python -m benchmarks.divergence --workdir=runs/quickstart

Uses the policy that a finished run exported and the reference it was trained against. Evaluates `tdpo2` on the held-out
pairs of the run, with `loss.kl_tokens` at each of --tokens and at the size of the vocabulary, where the divergence is
exact. Prints nats per token and the share of the exact value, for chosen and for rejected answers. Writes them to --out
as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from benchmarks import common
from dpo_jax import flags
from dpo_jax.hf import checkpoints
from dpo_jax.run import inputs as run_inputs
from dpo_jax.run import programs, state
from dpo_jax.run.choices import objective_of
from dpo_jax.run.evaluate import EvalSet, evaluate, make_summary
from dpo_jax.run.reference_values import reference_store, score_missing
from dpo_jax.run.workdir import resolve_paths

SIDES = ("chosen", "rejected")


def divergence(workdir: Path, likely: int) -> dict[str, float]:
    """Divergence in nats per token along chosen and rejected answers, from the `likely` likeliest tokens."""
    fine_tuned = workdir / "sft" / "export"
    start = [f"model.path={fine_tuned}", "sft.steps=0"] if fine_tuned.exists() else []
    start += ["data.train=", "loss.name=tdpo2", f"loss.kl_tokens={likely}"]  # only held-out pairs are scored
    chosen = resolve_paths(flags.load(str(workdir / "config.json"), start), workdir)
    objective = objective_of(chosen.loss)
    inputs = run_inputs.load_inputs(chosen, objective, training=False)
    pairs = inputs.sets["eval"]
    built = programs.make_programs(chosen, objective, inputs.model, inputs.lengths)
    with tempfile.TemporaryDirectory() as folder:
        store = reference_store(inputs, built, Path(folder) / "reference")
        assert store is not None
        weights = state.load_params(inputs.source, built)
        values, _ = score_missing(inputs, store, built, lambda: weights)
    policy = state.load_params(dataclasses.replace(inputs.source, folder=workdir / "export"), built)
    row = evaluate(
        lambda batch: built.score(policy, batch),
        make_summary(built.objective),
        EvalSet(pairs, pairs.lengths, values["eval"]),
        shape=built.score_shape,
    )
    return {side: row[f"eval/sequence_kl/{side}"] for side in SIDES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="working folder of a finished run")
    parser.add_argument("--tokens", default="1,4,8,32,128", help="numbers of likely tokens")
    parser.add_argument("--out", default="runs/divergence", help="folder of the results; must not exist")
    args = parser.parse_args()
    folder, out = Path(args.workdir), Path(args.out)
    out.mkdir(parents=True)
    vocabulary = checkpoints.read_config(folder / "export")[0].vocab_size
    found = {likely: divergence(folder, likely) for likely in [*map(int, args.tokens.split(",")), vocabulary]}
    rows = [
        {"likely tokens": likely}
        | {f"{side}, nats a token": row[side] for side in SIDES}
        | {f"{side}, share": row[side] / found[vocabulary][side] for side in SIDES}
        for likely, row in found.items()
    ]
    print(common.table(rows))
    common.write_results(out, args, {"rows": rows})


if __name__ == "__main__":
    main()
