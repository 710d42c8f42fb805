"""Scoring of whole sets of pairs, in batches: log-probs of every answer, for evaluation and the reference pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from dpo_jax import aliases
from dpo_jax.data.batches import TokenValues
from dpo_jax.data.layout import answer_starts, collate
from dpo_jax.data.packing import Shape, unit_lengths
from dpo_jax.logprobs.completions import completion_logps, sum_by_slot
from dpo_jax.logprobs.vocabulary import ACCELERATOR_BLOCKS, CPU_BLOCKS, Head
from dpo_jax.models.config import DecoderConfig
from dpo_jax.parallel import (
    DEFAULT_OPTIONS,
    ONE_DEVICE,
    ModelOptions,
    Placement,
    make_hidden_fn,
    model_sharding,
    split_params,
)
from dpo_jax.runtime import prefetch
from dpo_jax.types import AnswerTokens, Batch, InputError, Pairs

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Scored(NamedTuple):
    """Log-probs of n pairs of a set."""

    indices: Int[np.ndarray, "n"]  # of the pairs in the set
    logps: Float[np.ndarray, "n K"]  # nats, summed over the answer
    token_sums: dict[str, Float[np.ndarray, "n K"]]  # further sums over the answer
    forward_passes: int  # microbatches computed
    tokens: list[list[AnswerTokens]] | None = None  # for each pair and answer, if `score` returns them


def compute_dtype(name: str, platform: str) -> type:
    """Returns the type of a name in DTYPES; `auto` is float32 on CPU, which has no fast bfloat16, else bfloat16."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return DTYPES[name]


def score_pairs(
    score: Callable[[Batch], tuple[Array, dict[str, PyTree]]],
    pairs: Pairs,
    lengths: Int[np.ndarray, "N _"],
    *,
    shape: Shape,
    skip: Callable[[np.ndarray], np.ndarray] | None = None,
    reference_tokens: Sequence[PyTree] | TokenValues | None = None,
    report: Callable[[int], None] = lambda pairs: None,
) -> Iterator[Scored]:
    """Scores a set of pairs, longest first, `shape.pairs` at a time; yields each part when it is done.

    Args:
      score: maps a host batch to (logps [P, K], {name: sums [P, K]}): usually a jitted score step with its parameters.
        It is called with one microbatch at a time.
      lengths: token counts of the prompt and the answers of every pair.
      skip: maps the indices of a part to a mask of pairs that need no scoring. The parts do not depend on it: after an
        interruption, pairs are packed as they would have been, provided that whole parts were finished.
      reference_tokens: for every pair, as in `collate`, if `score` reads them.
      report: called after each microbatch with the number of its pairs.
    """
    order = np.argsort(-unit_lengths(lengths, shape.layout), kind="stable")
    parts = [order[start : start + shape.pairs] for start in range(0, len(order), shape.pairs)]
    parts = [part if skip is None else part[~skip(part)] for part in parts]
    parts = [part for part in parts if len(part)]

    def make(index: int) -> Batch:
        part = parts[index].tolist()
        tokens = None if reference_tokens is None else [reference_tokens[i] for i in part]
        return collate([pairs[i] for i in part], None, shape, tokens=tokens)

    for part, (batch, _) in zip(parts, prefetch.ahead(make, range(len(parts))), strict=True):
        logps, sums = score_batch(score, batch, report)
        count = len(part)
        token_sums = {name: values[:count] for name, values in sums.items() if name != "tokens"}
        counts = lengths[part], np.asarray(batch.lengths[:count])
        tokens = _answer_tokens(sums["tokens"], *counts, shape) if "tokens" in sums else None
        yield Scored(part, logps[:count], token_sums, int(batch.count), tokens)


def score_batch(
    score: Callable[[Batch], tuple[Array, dict[str, PyTree]]],
    batch: Batch,
    report: Callable[[int], None] = lambda pairs: None,
) -> tuple[Float[np.ndarray, "P K"], dict[str, PyTree]]:
    """Scores a batch one microbatch after another; returns arrays of the host, as `score` does for the whole batch.

    While the device computes a microbatch, the next one is on its way to it.
    """
    totals: PyTree = None
    tokens: list[PyTree] = []

    def add(micro: int, scored: PyTree) -> None:
        nonlocal totals
        logps, sums = jax.device_get(scored)
        if "tokens" in sums:
            tokens.append(sums.pop("tokens"))
        # A pair is in one microbatch, and 0 in the others.
        totals = (logps, sums) if totals is None else jax.tree.map(np.add, totals, (logps, sums))
        report(int(batch.present[micro].sum()))

    running: PyTree = None
    for micro in range(int(batch.count)):
        started = score(_one_microbatch(batch, micro))
        if running is not None:
            add(micro - 1, running)
        running = started
    assert running is not None, "a batch without microbatches"
    add(int(batch.count) - 1, running)
    logps, sums = totals
    return logps, sums | ({"tokens": jax.tree.map(lambda *each: np.concatenate(each), *tokens)} if tokens else {})


def _one_microbatch(batch: Batch, micro: int) -> Batch:
    """Returns a batch of the same pairs that holds a single microbatch."""
    one = slice(micro, micro + 1)
    return batch._replace(
        rows=jax.tree.map(lambda array: array[one], batch.rows),
        present=batch.present[one],
        count=np.int32(1),
        crop=None if batch.crop is None else batch.crop[one],
    )


def _answer_tokens(
    entries: tuple[np.ndarray, ...], lengths: np.ndarray, scored: np.ndarray, shape: Shape
) -> list[list[AnswerTokens]]:
    """Splits arrays of scored tokens [A, R, T, ...] by pair and answer."""

    def of_answer(start: np.ndarray, tokens: int) -> AnswerTokens:
        micro, row, first = start
        return AnswerTokens(*(array[micro, row, first : first + tokens] for array in entries))

    starts = answer_starts(lengths, scored, shape)
    return [
        [of_answer(*answer) for answer in zip(*pair, strict=True)] for pair in zip(starts, scored.tolist(), strict=True)
    ]


def make_logps_fn(
    config: DecoderConfig,
    *,
    pairs: int,
    answers: int = 2,
    options: ModelOptions = DEFAULT_OPTIONS,
    placement: Placement = ONE_DEVICE,
    sums: Collection[str] = (),
    tokens: int | None = None,
) -> Callable[..., PyTree]:
    """Returns `logps_fn(params, rows) -> (logps [P, K], {"logits": [P, K], ...})` of a decoder.

    logps are log-probs in nats, summed over answer tokens; the second value holds other sums over answer tokens: of the
    mean logit, of the router statistics of `experts.routing`, and those named in `sums`.

    With a third argument, running sums of the gradients of `params` as in `accumulate`, it returns
    `((logps, ...), sums)`, and its backward pass adds to the sums. With `frozen`, parameters that are not among
    `params`, it reads those as well; they get no gradient.

    Args:
      pairs, answers, sums: see `logprobs.completion_logps`.
      options: how the decoder is computed.
      placement: mesh and rules by which rows and parameters are sharded.
      tokens: C: also return {"tokens": (log-probs of the targets [R, T], the C likeliest tokens at each entry
        [R, T, C], their log-probs)}, and nothing can be differentiated; None: not.
    Raises: InputError if `tokens` exceeds the vocabulary.
    """
    if tokens is not None and tokens > config.vocab_size:
        raise InputError(
            "config.loss.kl_tokens",
            got=f"got {tokens}, and the vocabulary has {config.vocab_size} tokens",
            expected=f"at most {config.vocab_size}",
            remedy="Lower it.",
        )
    sharding = model_sharding(config, placement)
    hidden_fn = make_hidden_fn(config, options, placement.platform, sharding)
    score = functools.partial(
        completion_logps,
        pairs=pairs,
        answers=answers,
        soft_cap=config.logit_soft_cap,
        blocks=CPU_BLOCKS if placement.platform == "cpu" else ACCELERATOR_BLOCKS,
        sharding=sharding.head,
        sums=tuple(sums),
        likely=tokens,
    )

    def logps_fn(params: PyTree, rows: PyTree, sums: PyTree = None, *, frozen: PyTree = None) -> PyTree:
        split = split_params(params, sums, frozen)
        hidden, statistics, embedding_sum = hidden_fn(split, rows)
        new_sums: dict[str, PyTree] = split.vocabulary_sums | {"embed": embedding_sum}
        name = "head" if "head" in split.vocabulary else "embed"
        head_sums = None if sums is None else Head(new_sums.get(name), new_sums.get("logits"))
        bias = split.vocabulary.get("logits")
        logps, aux, head_sums = score(hidden, split.vocabulary[name], rows, bias=bias, total=head_sums)
        at_source = {key: jnp.take_along_axis(values, rows.source, 1) for key, values in statistics.items()}
        aux |= {key: sum_by_slot(values, rows.slot, pairs, answers) for key, values in at_source.items()}
        if head_sums is None:
            return logps, aux
        new_sums |= {name: head_sums.weights, "logits": head_sums.bias}
        return (logps, aux), split.join_sums(new_sums, trained=params)

    return logps_fn


__getattr__ = aliases.forward(
    __name__,
    {
        "join": "dpo_jax.trees.join",
        "WORDS": "dpo_jax.parallel.VOCABULARY_LEAVES",
        "kernel_across": "dpo_jax.parallel.kernel_sharding",
        "experts_across": "dpo_jax.parallel.expert_sharding",
        "of_words": "dpo_jax.parallel.split_vocabulary",
    },
)
