"""The update step and the scoring step: pure functions, not jitted; the caller jits, shards and donates.

All they know of a model is `logps_fn(params, rows) -> [P, K]`, so any model that can score a batch fits; all they know
of an objective is its parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from dpo_jax import accumulate, aliases, losses
from dpo_jax.accumulate import each_microbatch, mask_absent
from dpo_jax.batch_checks import check_batch, check_scored, is_consistent, without_padding
from dpo_jax.losses.common import divisor, weighted_sum
from dpo_jax.metrics import pair_metrics
from dpo_jax.types import Batch, InputError

OF_A_PART = ("loss", "rewards/margins", "rewards/accuracies")  # metrics of each part of a mixture

LogpsFn = Callable[..., PyTree]  # (params, rows) -> [P, K], see make_train_step


class TrainState(NamedTuple):
    """Everything that an update changes."""

    step: Int[Array, ""]  # updates made
    params: PyTree
    opt_state: PyTree
    running: PyTree  # baselines of the objective, kept from update to update, see `losses.start_of`


class Scores(NamedTuple):
    """Log-probs of answers under policy and reference, all that a loss may compare. In nats."""

    logps: Float[Array, "P K"]  # policy, summed over answer tokens
    sums: Mapping[str, Float[Array, "P K"]]  # {aux name: further sums over answer tokens, policy}
    reference: Float[Array, "P K"]
    lengths: Int[Array, "P K"]  # scored tokens; 0: missing
    present: Bool[Array, "P"]  # False: padding
    reference_sums: Mapping[str, Float[Array, "P K"]] = MappingProxyType({})  # those of `sums` the reference has too
    weight: Float[Array, "P"] | None = None  # as how many pairs each counts; None: 1
    margin: Float[Array, "P"] | None = None  # of the data, for losses that read it; None: 0


def init_state(params: PyTree, tx: optax.GradientTransformation, loss_fn: losses.Loss | None = None) -> TrainState:
    """Creates the state before the first update.

    `loss_fn` is needed where the objective keeps baselines, which only those of `losses.make_loss` do.
    """
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), losses.start_of(loss_fn) if loss_fn else {})


def make_train_step(
    logps_fn: LogpsFn,
    loss_fn: losses.Loss,
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    in_place: bool = False,
    crops: Sequence[accumulate.Crop] = (),
    penalties: Mapping[str, float | Array] = MappingProxyType({}),
    mask_gradients: Callable[[PyTree], PyTree] = lambda grads: grads,
    paired: bool = True,
    seed: int | Array = 0,
    report_gap: bool = False,
    mixture: Sequence[str] = (),
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Builds `step(state, batch) -> (state, metrics)`.

    The gradient is that of the mean loss over all pairs of the batch, however they are split into microbatches: each
    microbatch adds its pairs' losses, divided by the number of pairs in the batch, into float32 accumulators. With
    `batch.weight` w the mean is sum w_i l_i / sum w_i over the whole batch, and so are the means of all metrics: a pair
    of weight 2 is the pair twice. A batch whose weights are all 0 has loss and gradient 0. Only the
    `batch.count` microbatches in use are computed. A loss that reads the whole batch (it has a parameter `present`, or
    a baseline) sees all of it: with several microbatches, all are scored without gradient first, at the cost of one
    more forward pass, and the loss's derivatives are then propagated back through one microbatch after the other.

    Shapes and types of the batch are checked once, when the step is traced. Values are not known then: if a pair is in
    two microbatches, or `count` is no number of microbatches, loss and gradient are nan, and `batch_checks.check_batch`
    says why. Padding pairs change nothing, whatever their values.

    Args:
      logps_fn: `(params, rows) -> [P, K]`: log-probs in nats of the batch's pairs that are in `rows`, one microbatch
        of `batch.rows`, and any value for the other pairs.
      loss_fn: `(policy, reference, *, lengths, ...) -> [P]`, from `losses.make_loss` or like those of `losses.LOSSES`.
        Each of its parameters that is named in `losses.GIVEN` is passed as a keyword, and each named in
        `losses.COLUMNS`, weight and margin, where the batch has it. Other parameters without a default are passed what
        `logps_fn` returns by their names. The step multiplies its losses by the weights.
      tx: the optimizer; it receives float32 gradients.
      has_aux: `logps_fn` returns `(logps, {name: [P, K] sums over answer tokens})`; reported as means over tokens.
      in_place: `logps_fn` accumulates gradients itself: it takes the running sums as a third argument and returns
        `(result, sums)`, see `accumulate`. Otherwise each microbatch's gradient is computed and then added.
      crops: functions of a microbatch's rows; `batch.crop` says which is applied to each. Each is compiled.
      penalties: {aux name: weight}; weight x mean over answer tokens is added to the objective, not to the reported
        loss. The pairs' weights do not enter: a pair of weight 2 is routed once.
      mask_gradients: sets the gradients of frozen parts of a leaf to 0.
      paired: whether every pair has both answers, see `pair_metrics`.
      seed: of the rounding of bfloat16 parameters, see `apply_updates`.
      report_gap: adds "gap" [P] to the metrics: for each pair, the largest |policy - reference| of its answers, in
        nats; 0 for padding. Before the first update it should be 0 to float rounding.
      mixture: names of the parts of a mixture that `batch.part` counts; the metrics of each are reported besides, see
        `mixture_metrics`.
    Raises: InputError, when the step is traced, for a batch or a result whose shapes do not fit, and for an input of
      the loss that is missing.
    Returns: the step. Its metrics describe the parameters before the update: those of `pair_metrics`, `grad_norm`, the
      global norm before any clipping, and `kl` or `baseline/NAME` where the loss reads them.
    """
    needs, baselines = losses.needs_of(loss_fn), losses.start_of(loss_fn).keys()
    score_step = make_score_step(logps_fn, has_aux=has_aux, crops=crops)
    score_into = _scoring_into_sums(logps_fn, has_aux=has_aux, in_place=in_place)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        check_batch(batch, crops=len(crops))
        _check_baselines(state.running, baselines)
        consistent, batch = is_consistent(batch), without_padding(batch)
        present = batch.present.any(0)
        pairs = jnp.where(consistent, divisor(weighted_sum(present, batch.weight), batch.weight), jnp.nan)
        tokens = jnp.maximum(batch.lengths.sum(), 1)
        kl = _mismatched_kl(score_step, state.params, batch) if "kl" in needs else None

        def scores_of(scored) -> Scores:
            logps, aux = scored
            stored = batch.reference_sums or {}
            return Scores(logps, aux, batch.reference, batch.lengths, present, stored, batch.weight, batch.margin)

        def mean_loss(scored, here):
            # Masked after the loss: a masked margin of 0 would still count as log 2.
            each, _ = pair_losses(loss_fn, scores_of(scored), state.running, kl=kl)
            return weighted_sum(jnp.where(here, each, 0), batch.weight) / pairs

        slopes = None
        if scores_first(loss_fn, len(batch.present)):
            slopes = jax.grad(mean_loss)(score_step(state.params, batch), present)

        def add_gradient(rows, here, sums):
            def microbatch_loss(sums):
                scored, sums = score_into(state.params, rows, sums)
                check_scored(scored if has_aux else scored[0], has_aux, batch.reference.shape)
                # Masked before the loss too: what is not finite would reach the gradient through a mask after it.
                scored = mask_absent(here, scored)
                if slopes is None:
                    loss = mean_loss(scored, here)
                else:
                    by_slope = jax.tree.map(lambda slope, x: (slope * x).sum(), slopes, scored)
                    loss = sum(jax.tree.leaves(by_slope))
                for name, weight in penalties.items():
                    loss += weight * scored[1][name].sum() / tokens
                return (loss, sums), scored

            (loss, _), pull, scored = jax.vjp(microbatch_loss, sums, has_aux=True)
            return *pull((jnp.ones_like(loss), sums)), scored, None

        grads, scored, _ = each_microbatch(add_gradient, accumulate.zeros(state.params), batch, crops)
        grads = mask_gradients(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = apply_updates(state.params, updates, state.step, seed=seed)
        scores = scores_of(scored)
        each, running = pair_losses(loss_fn, scores, state.running, kl=kl)
        metrics = loss_metrics(loss_fn, each, scores, paired=paired)
        metrics["loss"] = jnp.where(consistent, metrics["loss"], jnp.nan)
        metrics |= mixture_metrics(loss_fn, each, scores, batch.part, mixture, paired=paired)
        metrics |= {"grad_norm": optax.tree.norm(grads)} | ({} if kl is None else {"kl": kl})
        metrics |= {f"baseline/{name}": baseline["value"] for name, baseline in running.items()}
        metrics |= {"gap": largest_gaps(scores)} if report_gap else {}
        return TrainState(state.step + 1, params, opt_state, running), metrics

    return step


def _check_baselines(running: Mapping[str, PyTree], expected: Iterable[str]) -> None:
    if running.keys() != expected:
        raise InputError(
            "state.running",
            got=f"baselines of {', '.join(running) or 'no loss'}",
            expected=f"those of {', '.join(expected) or 'none'}",
            remedy="Give the loss to init_state.",
        )


def _scoring_into_sums(logps_fn: LogpsFn, *, has_aux: bool, in_place: bool) -> Callable[..., PyTree]:
    """Returns `score(params, rows, sums) -> ((logps, aux), sums)`, whose gradient with respect to the parameters is
    added to `sums`, by `logps_fn` itself if it accumulates in place."""

    def score(params, rows, sums):
        if in_place:
            scored, sums = logps_fn(params, rows, sums)
        else:
            params, sums = accumulate.collect(params, sums)
            scored = logps_fn(params, rows)
        return scored if has_aux else (scored, {}), sums

    return score


def _mismatched_kl(score_step: Callable[..., PyTree], params: PyTree, batch: Batch) -> Float[Array, ""]:
    if batch.mismatched is None:
        expected = "prompts with the answers to others, from which the loss's `kl` is estimated"
        raise InputError("batch.mismatched", got="got none", expected=expected, remedy="Give them, or another loss.")
    logps, _ = score_step(params, batch.mismatched)
    mismatched = without_padding(batch.mismatched)
    present = mismatched.present.any(0)
    return losses.estimate_kl(logps, mismatched.reference, mismatched.lengths, present, batch.weight)


def scores_first(loss_fn: losses.Loss, microbatches: int) -> bool:
    """Whether an update scores the whole batch without gradient before it differentiates any microbatch.

    It does if the loss reads the whole batch at once and the batch has room for several microbatches.
    """
    return microbatches > 1 and bool(losses.needs_of(loss_fn) & {"present", "running"})


def pair_losses(
    loss_fn: losses.Loss,
    scores: Scores,
    running: PyTree,
    *,
    kl: Array | None = None,
    update_baselines: bool = True,
) -> tuple[Float[Array, "P"], PyTree]:
    """Returns the loss of each pair, not averaged, and the objective's baselines.

    Args:
      running: the baselines so far.
      kl: from `losses.estimate_kl`, in nats, for a loss that reads it.
      update_baselines: whether baselines include these pairs, before the loss reads them.
    """
    if update_baselines and isinstance(loss_fn, losses.Objective):
        compared = scores.logps, scores.reference
        running = loss_fn.follow(
            running, *compared, lengths=scores.lengths, present=scores.present, weight=scores.weight
        )
    stored = {f"reference_{name}": sums for name, sums in scores.reference_sums.items()}
    available = {"present": scores.present, "kl": kl, "running": running, **stored, **scores.sums}
    available |= {"weight": scores.weight, "margin": scores.margin}
    available = {name: value for name, value in available.items() if value is not None}
    for name in sorted(losses.needs_of(loss_fn) - available.keys()):
        raise InputError(
            "loss_fn",
            got=f"it reads {name!r}, and there is none",
            expected=f"inputs out of {', '.join(available)}",
            remedy="Return it from logps_fn, with has_aux=True, or give the parameter a default.",
        )
    names = losses.needs_of(loss_fn) | losses.columns_of(loss_fn) & available.keys()
    extra = {name: available[name] for name in names}
    each = loss_fn(scores.logps, scores.reference, lengths=scores.lengths, **extra)
    if each.shape != scores.present.shape:
        expected = f"shape {list(scores.present.shape)}, a loss for each pair"
        remedy = "Do not average over pairs in the function."
        raise InputError("loss_fn", got=f"losses of shape {list(each.shape)}", expected=expected, remedy=remedy)
    return each, running


def loss_metrics(
    loss_fn: losses.Loss, each: Float[Array, "P"], scores: Scores, *, paired: bool
) -> dict[str, Float[Array, ""]]:
    """Computes `pair_metrics` of pairs and their losses `each`, with the rewards that the loss implies."""
    rewards = losses.rewards_of(loss_fn, scores.logps, scores.reference, scores.lengths)
    sums = {name: values for name, values in scores.sums.items() if name != "shared_logps"}  # no mean over all tokens
    return pair_metrics(
        each,
        scores.logps,
        rewards,
        scores.lengths,
        scores.present,
        weight=scores.weight,
        token_sums=sums,
        paired=paired,
        chosen_only=losses.answers_read_by(loss_fn) == "chosen",
    )


def mixture_metrics(
    loss_fn: losses.Loss,
    each: Float[Array, "P"],
    scores: Scores,
    part: Int[Array, "P"] | None,
    mixture: Sequence[str],
    *,
    paired: bool,
) -> dict[str, Float[Array, ""]]:
    """Computes loss, reward margins and accuracies of each part of a mixture, and counts its pairs.

    Args:
      part: index into `mixture` of each pair; None where that is empty.
    Returns: metrics named by_source/NAME/METRIC; those of a part without pairs are 0.
    """
    metrics = {}
    for index, name in enumerate(mixture):
        subset = scores._replace(present=scores.present & (part == index))
        of_part = loss_metrics(loss_fn, each, subset, paired=paired)
        metrics |= {f"by_source/{name}/{key}": of_part[key] for key in OF_A_PART if key in of_part}
        metrics[f"by_source/{name}/pairs"] = subset.present.sum().astype(each.dtype)
    return metrics


def largest_gaps(scores: Scores) -> Float[Array, "P"]:
    """The largest |policy - reference| of each pair's answers, in nats and float32; 0 for padding."""
    answers = (scores.lengths > 0) & scores.present[:, None]
    gaps = jnp.abs(scores.logps.astype(jnp.float32) - scores.reference)
    return jnp.where(answers, gaps, 0).max(1)


def apply_updates(params: PyTree, updates: PyTree, step: Int[Array, ""], *, seed: int | Array = 0) -> PyTree:
    """Adds updates to parameters, with stochastic rounding of bfloat16 ones.

    A bfloat16 parameter is rounded up or down at random, in proportion to the remainder. Rounded to nearest, an update
    below half a spacing (2^-9 of a parameter) would vanish, and with the learning rates of preference training nearly
    all of them would. Stochastic rounding makes the expected sum exact. The draw is a function of `seed` and `step`,
    so that a resumed run repeats it.

    Args:
      seed: any whole number >= 0, or its `rounding_key`.
    """
    leaves, tree = jax.tree.flatten(params)
    key = rounding_key(seed) if isinstance(seed, int) else seed
    keys = jax.random.split(jax.random.fold_in(key, step), len(leaves))
    changes = tree.flatten_up_to(updates)
    return tree.unflatten([_add(*each) for each in zip(leaves, changes, keys, strict=True)])


def rounding_key(seed: int) -> Array:
    """Returns the random key of a seed, of which no bit is dropped: a key takes 32 of them at a time."""
    low, high = seed % (1 << 32), seed >> 32
    key = jax.random.key(low)
    while high:
        key, high = jax.random.fold_in(key, high % (1 << 32)), high >> 32
    return key


def _add(param, update, key):
    if param.dtype != jnp.bfloat16:
        return (param + update).astype(param.dtype)
    # A bfloat16 is the upper half of a float32: noise in the lower half carries into it as often as it should.
    bits = jax.lax.bitcast_convert_type(param.astype(jnp.float32) + update, jnp.uint32)
    noise = jax.random.bits(key, param.shape, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def make_score_step(
    logps_fn: LogpsFn, *, has_aux: bool = False, crops: Sequence[accumulate.Crop] = ()
) -> Callable[[PyTree, Batch], tuple[Array, dict[str, PyTree]]]:
    """Builds `score(params, batch) -> (logps [P, K], aux)`: the scoring of the update, without gradient.

    `aux["tokens"]` of `logps_fn`, arrays [R, T, ...] with one entry for each scored token, is stacked to
    [A, R, T, ...], 0 where nothing was computed.
    """

    def score(params: PyTree, batch: Batch) -> tuple[Float[Array, "P K"], dict[str, PyTree]]:
        check_batch(batch, crops=len(crops))

        def score_rows(rows, present, _):
            scored = logps_fn(params, rows)
            check_scored(scored, has_aux, batch.reference.shape)
            logps, aux = scored if has_aux else (scored, {})
            sums = {name: values for name, values in aux.items() if name != "tokens"}
            return None, mask_absent(present, (logps, sums)), {name: aux[name] for name in aux.keys() - sums.keys()}

        totals: tuple[Any, Any, Any] = each_microbatch(score_rows, None, without_padding(batch), crops)
        _, (logps, sums), entries = totals
        return jnp.where(is_consistent(batch), logps, jnp.nan), sums | entries

    return score


# Old names, which keep the parameters that they had.


def judge(loss_fn, found, running, *compared, reference_sums=None, kl=None, follows=True):
    """Deprecated: use `pair_losses`."""
    warnings.warn("dpo_jax.steps.judge is now pair_losses", DeprecationWarning, stacklevel=2)
    logps, sums = found
    scores = Scores(logps, sums, *compared, reference_sums=reference_sums or {})
    return pair_losses(loss_fn, scores, running, kl=kl, update_baselines=follows)


def summarize(loss_fn, each, found, *compared, paired):
    """Deprecated: use `loss_metrics`."""
    warnings.warn("dpo_jax.steps.summarize is now loss_metrics", DeprecationWarning, stacklevel=2)
    logps, sums = found
    return loss_metrics(loss_fn, each, Scores(logps, sums, *compared), paired=paired)


__getattr__ = aliases.forward(__name__, {"Crop": "dpo_jax.accumulate.Crop", "summarise": "dpo_jax.steps.summarize"})
