"""Reference log-probs of a run's pairs: their store, its identity, and the pass that completes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Int, PyTree

from dpo_jax.data.batches import PairSubset, ReferenceValues
from dpo_jax.data.tokenize import identity
from dpo_jax.hf import checkpoints
from dpo_jax.reference.scoring_pass import PairsToScore, PassResult, platform, run_pass
from dpo_jax.reference.store import Store, check_identity
from dpo_jax.run.inputs import Inputs
from dpo_jax.run.programs import Programs
from dpo_jax.run.state import load_params
from dpo_jax.runtime import hosts
from dpo_jax.runtime.files import Path
from dpo_jax.runtime.quantities import duration
from dpo_jax.runtime.terminal import Counter, say


def reference_store(inputs: Inputs, programs: Programs, folder: Path) -> Store | None:
    """Returns the run's store of reference log-probs, in `folder`; None for an objective that reads none.

    Reads all weights, for their digest. Raises: InputError if the folder holds a store of another identity.
    """
    objective = inputs.objective
    if objective.reference_free:
        return None
    tokens = objective.reference_tokens
    parts = {
        **inputs.source.adapters_digest(inputs.trainable),
        **({} if tokens is None else {"tokens": tokens}),
        **({"base": programs.quantize} if programs.quantize else {}),
        "weights": checkpoints.digest(inputs.source.folder, mine=hosts.mine, gather=hosts.gather_dicts("weights")),
        **identity(inputs.tokenizer),
        **inputs.data_rules,
        "answers": objective.answers_read,
        "layout": programs.layout,
        "dtype": np.dtype(programs.dtype).name,
        "param_dtype": programs.param_dtype,
        "attention": programs.attention,
        "platform": platform(),
    }
    store = Store(folder, parts, inputs.date)
    check_identity(store)
    return store


def complete_store(
    inputs: Inputs, store: Store | None, programs: Programs, *, only: Mapping[str, Int[np.ndarray, "n"]] | None = None
) -> tuple[dict[str, ReferenceValues], PyTree | None]:
    """Completes the store; returns the reference log-probs of each set of pairs, none for a reference-free objective,
    and the weights if they had to be loaded.

    Args:
      only: indices of the pairs that are needed, by set; sets that it lacks are needed whole.
    """
    if store is None:
        return {}, None
    for name, indices in (only or {}).items():
        if 0 < len(indices) < (pairs := len(inputs.sets[name])):
            say(f"{name}: the updates read {len(indices):,} of {pairs:,} pairs; the reference scores no others")
    started = time.perf_counter()
    loaded: list[PyTree] = []

    def weights() -> PyTree:
        if not loaded:
            loaded.append(load_params(inputs.source, programs))
        return loaded[0]

    with Counter("reference pass", unit="pairs") as counter:
        values, done = score_missing(inputs, store, programs, weights, counter.update, only=only)
    seconds = time.perf_counter() - started
    speed = f" in {duration(seconds)} ({done.scored / seconds:.1f} pairs/s)" if done.scored else ""
    say(
        f"reference log-probs: {done.provided} pairs from the data, {done.stored} from {store.folder}, "
        f"{done.scored} scored{speed}"
    )
    return values, loaded[0] if loaded else None


def score_missing(
    inputs: Inputs,
    store: Store,
    programs: Programs,
    params: Callable[[], PyTree],
    report: Callable[[int, int], None] = lambda done, total: None,
    *,
    only: Mapping[str, Int[np.ndarray, "n"]] | None = None,
    provided: bool = True,
) -> tuple[dict[str, ReferenceValues], PassResult]:
    """Returns reference log-probs of each set of pairs, scored now only where neither data nor store have them.

    Args:
      params: returns the reference's parameters; called only where something has to be scored.
      report: called with the numbers of pairs scored so far and to score, at first with none scored.
      only: indices of the pairs that are needed, by set; sets that it lacks are needed whole.
      provided: use reference log-probs that came with the data.
    Raises: InputError if the store holds values of another identity.
    """
    indices = {name: np.arange(len(pairs)) for name, pairs in inputs.sets.items()} | dict(only or {})
    sets: dict[str, PairSubset] = {}
    for name, pairs in inputs.sets.items():
        sets[name] = PairSubset(pairs, indices[name], provided)
        if name in inputs.mismatched:
            sets[f"{name} mismatched"] = PairSubset(inputs.mismatched[name], indices[name], provided)
    tokens = programs.objective.reference_tokens
    done = run_pass(
        store,
        {name: PairsToScore(each, each.lengths, each.keys, each.reference, each.scored) for name, each in sets.items()},
        lambda batch: programs.score_reference(params(), batch),
        shape=programs.score_shape,
        report=report,
        tokens=tokens,
    )
    by_token = done.tokens or {}
    values = {}
    for name, pairs in inputs.sets.items():
        place = np.full(len(pairs), -1)
        place[indices[name]] = np.arange(len(indices[name]))
        each = by_token.get(name)
        sums = {} if each is None else {"shared_logps": each.shared_logps()}
        values[name] = ReferenceValues(
            place, done.values[name], sums, each if tokens else None, done.values.get(f"{name} mismatched")
        )
    return values, done
