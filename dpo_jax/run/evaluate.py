"""Evaluation: the metrics of training, over a whole set of pairs at once."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from dpo_jax import losses
from dpo_jax.data.batches import ReferenceValues, TokenValues
from dpo_jax.data.packing import Shape
from dpo_jax.metrics import without_empty_parts
from dpo_jax.run.inputs import Inputs
from dpo_jax.run.programs import Programs
from dpo_jax.runtime.terminal import passes
from dpo_jax.scoring import score_pairs
from dpo_jax.steps import Scores, loss_metrics, mixture_metrics, pair_losses
from dpo_jax.types import Batch, Pairs

# Host batch -> (logps [P, K], sums over answers).
Score: TypeAlias = Callable[[Batch], tuple[PyTree, dict[str, PyTree]]]
Summary: TypeAlias = Callable[..., dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class EvalSet:
    """N pairs to evaluate, with their reference log-probs."""

    pairs: Pairs
    lengths: Int[np.ndarray, "N K1"]  # tokens of the prompt and of each answer
    reference: ReferenceValues | None = None  # None for reference-free losses
    mismatched: Any = None  # MismatchedPairs: each prompt with another's answers, if the objective reads them
    scored: Int[np.ndarray, "N K"] | None = None  # scored tokens of each answer; None: all its tokens
    weight: Float[np.ndarray, "N"] | None = None  # as how many pairs each counts in every mean; None: 1
    margin: Float[np.ndarray, "N"] | None = None  # of the data, for losses that read it; None: 0
    part: Int[np.ndarray, "N"] | None = None  # index of the part of a mixture that each is of; None: there is one


class Mismatched(NamedTuple):
    """Log-probs and token counts of mismatched answers."""

    logps: Float[Any, "N K"]  # under the policy, nats
    reference: Float[Any, "N K"]  # under the reference, nats
    lengths: Int[Any, "N K"]


def make_summary(objective: losses.Loss, *, paired: bool = True, mixture: Sequence[str] = ()) -> Summary:
    """Returns `summary(policy, reference, reference_sums, lengths, mismatched, running, weight, margin, part)`, the
    metrics of a whole set as one small program.

    `policy` is (log-probs [N, K], sums over answers); `mismatched` a Mismatched or None; `running` the state that the
    objective carries from update to update; `weight`, `margin` and `part` those of the pairs, or None. The numbers of
    the objective are arguments of the program.

    Args:
      mixture: names of the parts of a mixture, for metrics of each.
    """
    numbers = jax.device_put(objective.numbers) if isinstance(objective, losses.Objective) else None

    @jax.jit
    def summary(
        numbers: losses.Numbers | None,
        policy: tuple[jax.Array, dict[str, jax.Array]],
        reference: Float[jax.Array, "N K"],
        reference_sums: dict[str, Float[jax.Array, "N K"]],
        lengths: Int[jax.Array, "N K"],
        mismatched: Mismatched | None,
        running: PyTree,
        weight: Float[jax.Array, "N"] | None = None,
        margin: Float[jax.Array, "N"] | None = None,
        part: Int[jax.Array, "N"] | None = None,
    ) -> dict[str, jax.Array]:
        present = jnp.ones(len(lengths), bool)
        kl = None
        if mismatched is not None:
            kl = losses.estimate_kl(*mismatched, present, weight)
        logps, sums = policy
        scores = Scores(logps, sums, reference, lengths, present, reference_sums, weight, margin)
        loss_fn = objective if numbers is None else objective.with_numbers(numbers)
        each, _ = pair_losses(loss_fn, scores, running, kl=kl, update_baselines=False)
        metrics = loss_metrics(loss_fn, each, scores, paired=paired)
        metrics |= mixture_metrics(loss_fn, each, scores, part, mixture, paired=paired)
        return metrics | ({} if kl is None else {"kl": kl})

    return functools.partial(summary, numbers)


def evaluate(
    score: Score,
    summary: Summary,
    pairs: EvalSet,
    *,
    shape: Shape,
    running: Mapping[str, PyTree] = MappingProxyType({}),
    name: str = "eval",
) -> dict[str, float]:
    """Returns the metrics of `pair_metrics` over all pairs, named `NAME/...`, with `NAME/pairs` and `eval_time_s`.

    Every mean is over the whole set, so batching does not change it; the same holds for what a loss reads of a batch.

    Args:
      score: such as a jitted score step with its parameters bound.
      summary: from `make_summary`.
      running: state of the objective after the last update.
      name: of the set, the first part of the metrics' names.
    """
    started = time.perf_counter()

    def score_all(
        pairs: Pairs, lengths: np.ndarray, tokens: TokenValues | None, title: str = "evaluation"
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        logps = np.zeros((len(lengths), lengths.shape[1] - 1), np.float32)
        sums: dict[str, np.ndarray] = {}
        with passes(len(lengths), title, unit="pairs") as progress:
            scored = score_pairs(score, pairs, lengths, shape=shape, reference_tokens=tokens, report=progress.add)
            for part in scored:
                logps[part.indices] = part.logps
                for name, values in part.token_sums.items():
                    sums.setdefault(name, np.zeros_like(logps))[part.indices] = values
        return logps, sums

    stored = None if pairs.reference is None else pairs.reference.of(np.arange(len(pairs.lengths)))
    policy = score_all(pairs.pairs, pairs.lengths, None if stored is None else stored.tokens)
    reference = np.zeros_like(policy[0]) if stored is None else np.asarray(stored.logps, np.float32)
    sums = {} if stored is None else {name: np.asarray(each, np.float32) for name, each in stored.sums.items()}
    mismatched = None
    if pairs.mismatched is not None and stored is not None and stored.mismatched is not None:
        logps, _ = score_all(pairs.mismatched, pairs.mismatched.lengths, None, "evaluation of mismatched pairs")
        mismatched = Mismatched(logps, np.asarray(stored.mismatched, np.float32), pairs.mismatched.scored)
    scored = np.asarray(pairs.lengths[:, 1:] if pairs.scored is None else pairs.scored)
    scores = policy, reference, sums, scored, mismatched, jax.device_get(dict(running))
    columns = pairs.weight, pairs.margin, pairs.part
    of_pairs = (None if each is None else np.asarray(each) for each in columns)  # off the disk
    values = jax.device_get(summary(*jax.device_put((*scores, *of_pairs))))
    metrics = without_empty_parts({f"{name}/{metric}": float(value) for metric, value in values.items()})
    return metrics | {f"{name}/pairs": len(pairs.lengths), "eval_time_s": time.perf_counter() - started}


def make_summaries(inputs: Inputs) -> dict[str, Summary]:
    """Returns the summary of each set that evaluations are made on, by name; alike sets share one."""
    by_mixture = {
        mixture: make_summary(inputs.objective, paired=inputs.paired, mixture=mixture)
        for mixture in {pairs.mixture for pairs in inputs.eval_sets.values()}
    }
    return {name: by_mixture[pairs.mixture] for name, pairs in inputs.eval_sets.items()}


def metric_names(inputs: Inputs) -> list[str]:
    """Returns the names of the metrics of an evaluation, without those of a mixture of experts; uses no device."""
    objective = inputs.objective
    names: list[str] = []
    running = jax.eval_shape(lambda: losses.start_of(objective))
    for name, pairs in inputs.eval_sets.items():
        answers = jax.ShapeDtypeStruct((1, pairs.lengths.shape[1] - 1), np.float32)
        counts = jax.ShapeDtypeStruct(answers.shape, np.int32)
        sums = dict.fromkeys({"logits", *objective.sums}, answers)
        stored = {} if objective.reference_tokens is None else {"shared_logps": answers}
        other = Mismatched(answers, answers, counts) if name in inputs.mismatched else None
        part = jax.ShapeDtypeStruct((1,), np.int32) if pairs.mixture else None
        scores = (answers, sums), answers, stored, counts, other, running, None, None, part

        def summary(*scores: PyTree, mixture: tuple[str, ...] = pairs.mixture) -> PyTree:
            return make_summary(objective, paired=inputs.paired, mixture=mixture)(*scores)

        names += [f"{name}/{metric}" for metric in jax.eval_shape(summary, *scores)]
    return names


def evaluate_sets(
    inputs: Inputs,
    programs: Programs,
    summaries: Mapping[str, Summary],
    values: Mapping[str, ReferenceValues],
    params: PyTree,
    running: PyTree,
) -> dict[str, float]:
    """Returns the metrics of parameters on every set of data.eval, and the time of all as `eval_time_s`.

    Args:
      summaries: from `make_summaries`.
      values: reference log-probs by set; empty for an objective that reads none.
      running: the objective's baselines.
    """
    row: dict[str, float] = {}
    spent_s = 0.0
    for name, pairs in inputs.eval_sets.items():
        one = EvalSet(
            pairs,
            pairs.lengths,
            values.get(name),
            inputs.mismatched.get(name),
            pairs.scored,
            weight=pairs.pair_weights,
            margin=pairs.margins,
            part=pairs.part,
        )
        score = functools.partial(programs.score, params)
        row |= evaluate(score, summaries[name], one, shape=programs.score_shape, running=running, name=name)
        spent_s += row["eval_time_s"]
    return row | {"eval_time_s": spent_s}
