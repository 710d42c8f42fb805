"""The update step and the scoring step: pure functions, not jitted; the caller jits, shards and donates.

All they know of a model is `logps_fn(params, rows) -> [P, 2]`, so any model that can score a batch fits; all they know
of an objective are its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from dpo_jax import accumulate, losses
from dpo_jax.accumulate import Crop, each_microbatch, mask_absent
from dpo_jax.metrics import pair_metrics
from dpo_jax.types import Batch, InputError

LogpsFn = Callable[..., Any]  # (params, rows), see make_train_step


class TrainState(NamedTuple):
    """Everything an update changes."""

    step: Int[Array, ""]  # updates made
    params: Any
    opt_state: Any
    running: Any  # what the objective carries from update to update, see `losses.start_of`


def init_state(params: Any, tx: optax.GradientTransformation, loss_fn: losses.Loss | None = None) -> TrainState:
    """The state before the first update. Of objectives, only those of `losses.make_loss` carry anything on."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), losses.start_of(loss_fn) if loss_fn else {})


def make_train_step(
    logps_fn: LogpsFn,
    loss_fn: losses.Loss,
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    adds: bool = False,
    crops: Sequence[Crop] = (),
    penalties: Mapping[str, float] = MappingProxyType({}),
    wanted: Callable[[Any], Any] = lambda grads: grads,
    paired: bool = True,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Builds `step(state, batch) -> (state, metrics)`.

    The gradient is that of the mean loss over all pairs of the batch, whatever microbatches they came in: each
    microbatch adds its pairs' losses over the number of pairs in the batch, into float32 accumulators. Only the
    `batch.count` microbatches in use are computed. A loss that sees the whole batch at once (it names `present`, or
    carries a baseline) is given all of it: where there are several microbatches, they are scored without gradient
    first, which costs a forward pass more, and the loss's slopes are then taken back through one after the other.

    Args:
      logps_fn: `(params, rows) -> [P, K]`, log-probs in nats of every pair of the batch that `rows`, one
        microbatch of `batch.rows`, holds, and finite values for the others.
      loss_fn: `(policy, reference, *, lengths, ...) -> [P]`, of `losses.make_loss` or like those of `losses.LOSSES`:
        what it names of `losses.GIVEN` it is given.
      tx: the optimizer; it sees float32 gradients.
      has_aux: `logps_fn` returns `(logps, {name: [P, K] sums over answer tokens})`, reported as means over tokens.
      adds: `logps_fn` takes the sums of gradients so far as a third argument and returns `(what it would, sums)`, see
        `gradients`; otherwise each microbatch's gradient is made and then added.
      crops: functions of a microbatch's rows; `batch.crop` says which is applied to each. Every one is compiled.
      penalties: weights of means over answer tokens that are made smaller besides, by their names in `has_aux`; they
        are no part of the reported loss.
      wanted: takes gradients to those that count, for where parts of a leaf do not train.
      paired: whether the pairs have both answers, see `pair_metrics`.
    Returns: the step. Its metrics describe the parameters that enter it: those of `pair_metrics`, `grad_norm`, the
      global norm before any clipping, and `kl` or `baseline/NAME` where the loss reads them.
    """
    needs = losses.needs_of(loss_fn)
    carried = losses.start_of(loss_fn).keys()
    score_step = make_score_step(logps_fn, has_aux=has_aux, crops=crops)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        if carried != state.running.keys():
            raise InputError(
                "state.running",
                got=f"baselines of {', '.join(state.running) or 'no loss'}",
                expected=f"those of {', '.join(carried) or 'none'}",
                remedy="Give the loss to init_state.",
            )
        present = batch.present.any(0)
        pairs = jnp.maximum(present.sum(), 1)
        tokens = jnp.maximum(jnp.where(present[:, None], batch.lengths, 0).sum(), 1)
        kl = None
        if "kl" in needs:
            mismatched = batch.mismatched
            scored = score_step(state.params, mismatched)[0]
            there = mismatched.present.any(0)
            kl = losses.estimate_kl(scored, mismatched.reference, mismatched.lengths, there)

        def judged(found):
            return judge(
                loss_fn,
                found,
                state.running,
                batch.reference,
                batch.lengths,
                present,
                reference_sums=batch.reference_sums,
                kl=kl,
            )

        def mean_loss(found, here):
            # Masked after the loss: a masked margin of 0 would still count as log 2.
            return jnp.where(here, judged(found)[0], 0).sum() / pairs

        slopes = None
        if scores_first(loss_fn, len(batch.present)):
            slopes = jax.grad(mean_loss)(score_step(state.params, batch), present)

        def score(rows, sums):
            if adds:
                found, sums = logps_fn(state.params, rows, sums)
            else:
                params, sums = accumulate.collect(state.params, sums)
                found = logps_fn(params, rows)
            return found if has_aux else (found, {}), sums

        def add_gradient(rows, here, sums):
            def microbatch_loss(sums):
                (logps, aux), sums = score(rows, sums)
                if slopes is None:
                    loss = mean_loss((logps, aux), here)
                else:
                    by_slope = jax.tree.map(lambda slope, x: (slope * x).sum(), slopes, mask_absent(here, (logps, aux)))
                    loss = sum(jax.tree.leaves(by_slope))
                for name, weight in penalties.items():
                    loss += weight * jnp.where(here[:, None], aux[name], 0).sum() / tokens
                return (loss, sums), mask_absent(here, (logps, aux))

            (loss, _), pull, scored = jax.vjp(microbatch_loss, sums, has_aux=True)
            return *pull((jnp.ones_like(loss), sums)), scored, None

        grads, found, _ = each_microbatch(add_gradient, accumulate.zeros(state.params), batch, crops)
        grads = wanted(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = apply_updates(state.params, updates, state.step)
        each, running = judged(found)
        metrics = summarize(loss_fn, each, found, batch.reference, batch.lengths, present, paired=paired)
        metrics |= {"grad_norm": optax.tree.norm(grads)} | ({} if kl is None else {"kl": kl})
        metrics |= {f"baseline/{name}": baseline["value"] for name, baseline in running.items()}
        return TrainState(state.step + 1, params, opt_state, running), metrics

    return step


def scores_first(loss_fn: losses.Loss, microbatches: int) -> bool:
    """Whether an update whose batches have room for so many microbatches scores all of them before it differentiates
    any: the loss sees the whole batch at once."""
    return microbatches > 1 and bool(losses.needs_of(loss_fn) & {"present", "running"})


def judge(
    loss_fn: losses.Loss,
    found: tuple[Array, dict[str, Array]],
    running: Any,
    reference: Float[Array, "P K"],
    lengths: Int[Array, "P K"],
    present: Bool[Array, "P"],
    *,
    reference_sums: Mapping[str, Array] | None = None,
    kl: Array | None = None,
    follows: bool = True,
) -> tuple[Float[Array, "P"], Any]:
    """Losses of scored pairs, the loss given whatever it needs, and what it carries on.

    Args:
      found: log-probs of the pairs under the policy, and further sums over their answers.
      reference_sums: of the latter, those that the reference has as well.
      kl: of `losses.estimate_kl`.
      follows: whether baselines take these pairs in, before the loss reads them.
    """
    logps, aux = found
    if follows and isinstance(loss_fn, losses.Objective):
        running = loss_fn.follow(running, logps, reference, lengths=lengths, present=present)
    stored = {f"reference_{name}": sums for name, sums in (reference_sums or {}).items()}
    known = {"present": present, "kl": kl, "running": running, **stored, **aux}
    given = {name: known[name] for name in losses.needs_of(loss_fn)}
    return loss_fn(logps, reference, lengths=lengths, **given), running


def summarize(
    loss_fn: losses.Loss,
    each: Float[Array, "P"],
    found: tuple[Array, dict[str, Array]],
    reference: Float[Array, "P K"],
    lengths: Int[Array, "P K"],
    present: Any,
    *,
    paired: bool,
) -> dict[str, Array]:
    """`pair_metrics` of scored pairs and their losses, by the rewards that the loss implies."""
    logps, aux = found
    rewards = losses.rewards_of(loss_fn, logps, reference, lengths)
    sums = {name: values for name, values in aux.items() if name != "shared_logps"}  # no mean over all tokens
    return pair_metrics(each, logps, rewards, lengths, present, token_sums=sums, paired=paired)


def apply_updates(params: Any, updates: Any, step: Int[Array, ""]) -> Any:
    """The parameters plus their updates, bfloat16 ones rounded up or down at random, in proportion to what is cut off.

    Rounded to nearest, an update below half a spacing (2^-9 of a parameter) would vanish, and with the learning rates
    of preference training nearly all of them would. At random they add up: the expected sum is exact. The draw is a
    function of `step`, so that a resumed run repeats it.
    """
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), len(leaves))
    changes = tree.flatten_up_to(updates)
    return tree.unflatten([_add(*each) for each in zip(leaves, changes, keys, strict=True)])


def _add(param, update, key):
    if param.dtype != jnp.bfloat16:
        return (param + update).astype(param.dtype)
    # A bfloat16 is the upper half of a float32: noise in the lower half carries into it as often as it should.
    bits = jax.lax.bitcast_convert_type(param.astype(jnp.float32) + update, jnp.uint32)
    noise = jax.random.bits(key, param.shape, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def make_score_step(
    logps_fn: LogpsFn, *, has_aux: bool = False, crops: Sequence[Crop] = ()
) -> Callable[[Any, Batch], tuple[Array, dict]]:
    """Builds `score(params, batch) -> (logps [P, K], aux)`: the same scoring as in the update, forward only.

    Where the aux of `logps_fn` has "tokens", arrays [R, T, ...] of entries, so has this one, as [A, R, T, ...], with 0
    in place of what was not computed.
    """

    def score(params: Any, batch: Batch) -> tuple[Float[Array, "P K"], dict[str, Any]]:
        def one(rows, here, _):
            logps, aux = logps_fn(params, rows) if has_aux else (logps_fn(params, rows), {})
            sums = {name: values for name, values in aux.items() if name != "tokens"}
            return None, mask_absent(here, (logps, sums)), {name: aux[name] for name in aux.keys() - sums.keys()}

        _, (logps, sums), entries = each_microbatch(one, None, batch, crops)
        return logps, sums | entries

    return score
