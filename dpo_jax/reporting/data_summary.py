"""Prints the data as a model sees it, for the command `inspect`, before any device is touched."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import Config
from dpo_jax.data.columns import named
from dpo_jax.data.dataset import PairSet
from dpo_jax.data.marks import is_scored, unmark
from dpo_jax.data.order import epoch_size, make_order
from dpo_jax.data.packing import Shape, choose_shape, plan, unit_lengths
from dpo_jax.reporting.console import weights_and_margins
from dpo_jax.run import checks, workdir
from dpo_jax.run.choices import objective_of
from dpo_jax.run.inputs import load_inputs, prepare
from dpo_jax.run.programs import ACCELERATOR_POSITIONS, CPU_POSITIONS
from dpo_jax.runtime.files import Path
from dpo_jax.types import counted, printable

BAR, BINS = 40, 8  # characters of the longest bar of a histogram, and its most bins
SAMPLED_STEPS = 64  # most steps that are packed to measure how full rows are
PADDED_PAIRS = 8  # pairs in the padded batches that packing is compared with


def show(config: Config, folder: Path, *, pairs: int) -> None:
    """Prints examples of each set, what was truncated and dropped, lengths, warnings, and how full packed rows are.

    Args:
      folder: the working folder.
      pairs: examples of each set.
    Raises: InputError for whatever cannot be used in configuration or data.
    """
    config = workdir.resolve_paths(workdir.dated(config, folder), folder)
    checks.check_model_named(config)
    objective = objective_of(config.loss)
    checks.check_names(config, objective)
    prepare(config.prepare, folder)
    inputs = load_inputs(config, objective, training=False)
    _, layout = checks.fit(config, inputs.model, inputs.lengths)
    for name, examples in inputs.sets.items():
        for section in (
            [f"=== {name}: {_of_rows(examples, len(examples), examples.report['rows'])}"],
            *(example(examples, inputs.tokenizer, i) for i in range(min(pairs, len(examples)))),
            truncated_and_dropped(examples),
            lengths(examples, layout),
        ):
            print(printable("\n".join(section)), end="\n\n")
    for warning in inputs.warnings:
        print(printable(f"warning: {warning}"), end="\n\n")
    if "train" in inputs.sets:
        checks.updates_of(config, inputs.sets["train"])
        print("\n".join(packing(config, inputs.sets["train"], inputs.lengths, layout)))


def _of_rows(pairs: PairSet, count: int, rows: int) -> str:
    """Says how many pairs, examples or rankings were made of how many rows."""
    things = {"paired": "pairs", "unpaired": "examples", "ranked": "rankings"}[pairs.kind]
    return f"{counted(count, things)} from {counted(rows, 'rows')}"


def example(pairs: PairSet, tokenizer: PreTrainedTokenizerBase, index: int) -> list[str]:
    """One pair token by token, separated by `|`; only tokens of lines marked `scored` count in a loss.

    An answer of several turns has a line for each stretch of scored tokens and for each of others between them.
    """

    def line(name: str, ids: np.ndarray, end: str) -> str:
        text = "|".join(str(tokenizer.decode([int(i)])) for i in ids).replace("\n", "\\n")
        return f"{f'{name}, {len(ids)} tokens{end}':<31} {text}"

    pair = pairs[index]
    lines = [f"--- {pairs.place(index)}", line("prompt", pair.prompt, ":")]
    for name, answer in zip(answer_names(pairs), pair.answers, strict=False):
        # Missing in unpaired examples, and for objectives such as sft that read no rejected answers.
        scored = is_scored(answer)
        edges = [0, *(np.flatnonzero(scored[1:] != scored[:-1]) + 1), len(answer)] if len(answer) else []
        for begin, end in itertools.pairwise(edges):
            state = ", scored:" if scored[begin] else ", not scored:"
            lines.append(line(name, unmark(answer[begin:end]), state))
    return lines


def answer_names(pairs: PairSet) -> list[str]:
    """Names of the answers, best first."""
    if pairs.kind != "ranked":
        return ["chosen", "rejected"]
    return ["answer 1 (best)", *(f"answer {n}" for n in range(2, pairs.lengths.shape[1]))]


def truncated_and_dropped(pairs: PairSet) -> list[str]:
    """Counts of truncated prompts and answers, how sources were read, and which rows were dropped and why."""
    report = pairs.report
    lines = [
        f"truncated: {counted(report['prompts_cut'], 'prompts')} by {counted(report['prompt_tokens_cut'], 'tokens')}, "
        f"{counted(report['answers_cut'], 'answers')} by {counted(report['answer_tokens_cut'], 'tokens')}",
        *weights_and_margins(pairs),
    ]
    if report["boundary_split"]:
        lines.append(
            "prompt and answers tokenized separately, because a token would span both: "
            f"{counted(report['boundary_split'], 'pairs')}"
        )
    if report["reference_given"]:
        lines.append(f"reference log-probs come with the data: {counted(report['reference_given'], 'pairs')}")
    if report["exchanges_cut"]:
        lines.append(
            f"exchanges (a user's turn and what follows) dropped from long prompts: {report['exchanges_cut']:,}"
        )
    if report["partly_scored"]:
        lines.append(
            f"turns of a user or a tool stand in {counted(report['partly_scored'], 'answers')}: "
            f"{counted(report['unscored_tokens'], 'tokens')} that are not scored"
        )
    for name, source in zip(pairs.names, report["sources"], strict=True):
        layouts = f" ({', '.join(source['layouts'])})" if source["layouts"] else ""
        weight = f", weight {source['weight']:g}" if source["weight"] != 1 else ""
        made = _of_rows(pairs, source["pairs"], source["rows"])
        lines.append(f"read as {source['format']}{layouts}: {name}, {made}{weight}")
        if source["unread"]:
            lines.append(f"  columns that nothing reads: {named(source['unread'])}")
        if source["unread_keys"]:
            lines.append(f"  keys of messages that nothing reads: {named(source['unread_keys'])}")
        if source["header_left_out"]:
            begun = repr(source["header_left_out"])
            lines.append(
                f"  its template begins a generated answer with {begun}, and writes none before a given answer"
            )
    for entry in report["dropped"]:
        lines.append(f"dropped {entry['rows']}: {entry['reason']} (such as {', '.join(entry['places'])})")
    return lines


def lengths(pairs: PairSet, layout: str) -> list[str]:
    """Histograms of the token counts of prompts and answers, and of the positions that a pair takes."""
    prompt, *answers = np.asarray(pairs.lengths).T
    scored = np.asarray(pairs.scored).T if pairs.report["partly_scored"] else [prompt[:0] for _ in answers]
    columns = {
        "prompt tokens": prompt,
        **{f"{name} tokens": n[n > 0] for name, n in zip(answer_names(pairs), answers, strict=True)},
        **{f"{name} tokens, scored": n[n > 0] for name, n in zip(answer_names(pairs), scored, strict=True)},
        f"positions per pair, {layout} prompt": unit_lengths(pairs.lengths, layout),
    }
    lines = []
    for title, values in columns.items():
        if not len(values):  # an answer that every pair lacks
            continue
        lines.append(f"{title}: mean {values.mean():.1f}, median {np.median(values):.0f}, max {values.max()}")
        lines.extend(histogram(values))
    return lines


def histogram(values: np.ndarray) -> list[str]:
    """One line per bin: its range, its count, and a bar in proportion to the largest count."""
    edges = np.unique(np.linspace(values.min(), values.max() + 1, BINS + 1).astype(int))
    counts, _ = np.histogram(values, edges)
    return [
        f"  {low:>6}-{high - 1:<6}{count:>8}  {'#' * round(BAR * count / counts.max())}"
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def packing(config: Config, pairs: PairSet, all_lengths: np.ndarray, layout: str) -> list[str]:
    """How full the packed rows of the first epoch are, and their positions against those of padded batches.

    Args:
      pairs: the training pairs.
      all_lengths: token counts [N, 1 + K] of everything that a run lays out, which decide the shape of batches.
    """
    lines = [f"=== packing: {config.train.batch_pairs} pairs per step, {layout} prompt; counts include empty rows"]
    for backend, target in (("a CPU", CPU_POSITIONS), ("an accelerator", ACCELERATOR_POSITIONS)):
        shape = choose_shape(
            all_lengths,
            layout=layout,
            pairs=config.train.batch_pairs,
            row_length=config.data.row_length,
            rows=config.train.microbatch_rows,
            shards=1,
            target_positions=target,
        )
        counts = positions_per_step(pairs, shape, seed=config.seed, shuffle=config.data.shuffle)
        computed, real, padded = np.sum([*counts], axis=0)
        lines += [
            f"on one device, {backend}: microbatches of {counted(shape.rows, 'rows')} x {shape.row_length}, "
            f"{computed:,} positions, {real / computed:.1%} of them filled with tokens",
            f"  {computed / padded:.3f} times the {padded:,} positions of padded batches of {PADDED_PAIRS} pairs that "
            "repeat the prompt for each answer",
        ]
    return lines


def positions_per_step(pairs: PairSet, shape: Shape, *, seed: int, shuffle: bool) -> Iterator[tuple[int, int, int]]:
    """Yields, for at most SAMPLED_STEPS steps of the first epoch, the positions (computed, with a token, if padded).

    The last are the positions of the same pairs in batches of PADDED_PAIRS, each answer after its own prompt.
    """
    order = make_order(pairs.source, pairs.weights, batch_pairs=shape.pairs, seed=seed, shuffle=shuffle)
    for step in range(min(SAMPLED_STEPS, epoch_size(pairs.source, pairs.weights) // shape.pairs)):
        tokens = np.asarray(pairs.lengths[order(step)])
        computed = sum(microbatch.positions for microbatch in plan(tokens, shape))
        longest = tokens[:, 0] + tokens[:, 1:].max(1)
        answers = (tokens[:, 1:] > 0).sum(1)
        groups = [slice(at, at + PADDED_PAIRS) for at in range(0, len(longest), PADDED_PAIRS)]
        padded = sum(answers[group].sum() * longest[group].max() for group in groups)
        real = int(unit_lengths(tokens, shape.layout).sum())
        yield computed, real, int(padded)
