"""`dpo-jax inspect`: what the data looks like to a model, before any device is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.config import Config
from dpo_jax.data.dataset import PairSet
from dpo_jax.data.order import epoch_size, make_order
from dpo_jax.data.packing import Shape, choose_shape, plan, unit_lengths
from dpo_jax.run import checks
from dpo_jax.run.choices import objective_of
from dpo_jax.run.inputs import Inputs, load_inputs, prepare, resolve_paths
from dpo_jax.run.programs import ACCELERATOR_POSITIONS, CPU_POSITIONS

BAR, BINS, SAMPLED_STEPS = 40, 8, 64
PADDED_PAIRS = 8  # pairs in the padded batches that packing is compared with


def show(config: Config, folder: Path, *, pairs: int) -> None:
    """Prints `pairs` examples of each set, cuts, drops and lengths, what may not be as meant, and how full rows are."""
    config = resolve_paths(config, folder)
    checks.check_model_named(config)
    objective = objective_of(config.loss)
    checks.check_names(config, objective)
    prepare(config.prepare, folder)
    inputs = load_inputs(config, objective, training=False)
    _, layout_name = checks.fit(config, inputs.model, inputs.lengths)
    for name, found in inputs.sets.items():
        for section in (
            [f"=== {name}: {len(found):,} pairs of {found.report['rows']:,} rows"],
            *(example(found, inputs.tokenizer, i) for i in range(min(pairs, len(found)))),
            cuts(found),
            lengths(found, layout_name),
        ):
            print("\n".join(section), end="\n\n")
    for warning in inputs.warnings:
        print(f"warning: {warning}", end="\n\n")
    if "train" in inputs.sets:
        print("\n".join(packing(config, inputs, layout_name)))


def example(pairs: PairSet, tokenizer: Any, index: int) -> list[str]:
    """One pair, token by token: `|` stands between tokens, and only what follows `scored` counts in a loss."""

    def line(name: str, ids: np.ndarray, end: str) -> str:
        text = "|".join(tokenizer.decode([int(i)]) for i in ids).replace("\n", "\\n")
        return f"{f'{name}, {len(ids)} tokens{end}':<31} {text}"

    pair = pairs[index]
    shown = [f"--- {pairs.place(index)}", line("prompt", pair.prompt, ":")]
    for name, answer in zip(names(pairs), pair.answers, strict=False):
        if len(answer):  # an objective such as sft reads no rejected one, and an unpaired example has one of the two
            shown.append(line(name, answer, ", scored:"))
    return shown


def names(pairs: PairSet) -> list[str]:
    """Of the answers, best first."""
    if pairs.kind != "ranked":
        return ["chosen", "rejected"]
    return ["answer 1 (best)", *(f"answer {n}" for n in range(2, pairs.lengths.shape[1]))]


def cuts(pairs: PairSet) -> list[str]:
    """What truncation cut, what was dropped and where, and how sources were read."""
    report = pairs.report
    lines = [
        f"cut: {report['prompts_cut']} prompts by {report['prompt_tokens_cut']:,} tokens, "
        f"{report['answers_cut']} answers by {report['answer_tokens_cut']:,}",
        f"tokenized apart, since a token would have spanned the boundary: {report['boundary_split']}",
        f"with reference log-probs of their own: {report['reference_given']}",
    ]
    for name, source in zip(pairs.names, report["sources"], strict=True):
        lines.append(f"read as {source['format']}: {name}, {source['pairs']:,} pairs of {source['rows']:,} rows")
        if source["header_left_out"]:
            lines.append(f"  its template ends the generation header in {source['header_left_out']!r}, left out here")
    for entry in report["dropped"]:
        lines.append(f"dropped {entry['rows']}: {entry['reason']} (such as {', '.join(entry['places'])})")
    return lines


def lengths(pairs: PairSet, name: str) -> list[str]:
    """Histograms of token counts and of the positions that a pair takes."""
    prompt, *answers = np.asarray(pairs.lengths).T
    columns = {
        "prompt tokens": prompt,
        **{f"{each} tokens": counts[counts > 0] for each, counts in zip(names(pairs), answers, strict=True)},
        f"positions of a pair, prompt {name}": unit_lengths(pairs.lengths, name),
    }
    lines = []
    for title, values in columns.items():
        if not len(values):  # answers that are nowhere
            continue
        lines.append(f"{title}: mean {values.mean():.1f}, median {np.median(values):.0f}, most {values.max()}")
        lines.extend(histogram(values))
    return lines


def histogram(values: np.ndarray) -> list[str]:
    """A line a bin, its bar in proportion to the fullest."""
    edges = np.unique(np.linspace(values.min(), values.max() + 1, BINS + 1).astype(int))
    counts, _ = np.histogram(values, edges)
    return [
        f"  {low:>6}-{high - 1:<6}{count:>8}  {'#' * round(BAR * count / counts.max())}"
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def packing(config: Config, inputs: Inputs, name: str) -> list[str]:
    """How full the rows of the first epoch are, and what padding instead would compute."""
    train = inputs.sets["train"]
    checks.updates_of(config, train)
    found = [f"=== rows of {config.train.batch_pairs} pairs a step, prompt {name}, empty rows counted"]
    for backend, target in (("a CPU", CPU_POSITIONS), ("an accelerator", ACCELERATOR_POSITIONS)):
        shape = choose_shape(
            inputs.lengths,
            layout=name,
            pairs=config.train.batch_pairs,
            row_length=config.data.row_length,
            rows=config.train.microbatch_rows,
            shards=1,
            target_positions=target,
        )
        computed, real, padded = np.sum([*counts(config, train, shape)], axis=0)
        found.append(
            f"on one device, {backend}: {shape.rows} rows of {shape.row_length} at a time, {computed:,} positions, "
            f"{real / computed:.3f} of them real"
        )
        found.append(
            f"  {computed / padded:.3f} of the {padded:,} positions of batches of {PADDED_PAIRS} pairs, each answer "
            "after its own prompt and padded to the longest"
        )
    return found


def counts(config: Config, pairs: PairSet, shape: Shape) -> Iterator[tuple[int, int, int]]:
    """Of each step of the first epoch, at most SAMPLED_STEPS: positions computed, real ones, and padded instead."""
    order = make_order(
        pairs.source, pairs.weights, batch_pairs=shape.pairs, seed=config.seed, shuffle=config.data.shuffle
    )
    for step in range(min(SAMPLED_STEPS, epoch_size(pairs.source, pairs.weights) // shape.pairs)):
        tokens = np.asarray(pairs.lengths[order(step)])
        computed = sum(microbatch.positions for microbatch in plan(tokens, shape))
        longest = tokens[:, 0] + tokens[:, 1:].max(1)
        answers = (tokens[:, 1:] > 0).sum(1)
        groups = [slice(at, at + PADDED_PAIRS) for at in range(0, len(longest), PADDED_PAIRS)]
        padded = sum(answers[group].sum() * longest[group].max() for group in groups)
        real = int(unit_lengths(tokens, shape.layout).sum())
        yield computed, real, int(padded)
