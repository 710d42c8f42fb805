"""Whole runs with objectives that read more than pairs: what they keep, report, refuse, and how they resume."""

import json
import math
import shutil

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from dpo_jax import commands, train
from dpo_jax.run import state
from dpo_jax.run.checkpoints import Checkpoints
from dpo_jax.scoring import score_pairs
from dpo_jax.types import InputError
from tests.support import runs
from tests.support.runs import (
    Killed,
    killed_at,
    load_inputs,
    make_config,
    make_inputs,
    make_programs,
    read_rows,
    untimed,
)

# What a run is given besides its loss, by what the loss reads.
UNPAIRED, RANKED = "unpaired", "ranked"
CASES = {
    "ipo": ("paired", {"loss__name": "ipo"}),
    "aot": ("paired", {"loss__name": "aot"}),
    "orpo": ("paired", {"loss__name": "orpo"}),
    "bco_pair, unpaired": (UNPAIRED, {"loss__name": "bco_pair"}),
    "plackett_luce": (RANKED, {"loss__name": "plackett_luce"}),
    "sigmoid, best of a ranking": (RANKED, {"loss__name": "sigmoid", "data__rankings": "best"}),
    "sum": ("paired", {"loss__name": "sigmoid*0.8,sft", "loss__wpo": True, "loss__divergence": "js_divergence"}),
    "ld": ("paired", {"loss__ld_alpha": 0.3, "loss__nll_weight": 1.0}),
}
# Those that carry something on, from update to update or from one reference to the next.
CARRYING = {
    "beta_dpo": ("paired", {"loss__name": "beta_dpo"}),
    "tr, hard": ("paired", {"reference__sync_steps": 2}),
    "tr, tdpo2": ("paired", {"loss__name": "tdpo2", "reference__sync_steps": 3}),
    "tr, kto": (UNPAIRED, {"loss__name": "kto", "reference__sync_steps": 2, "reference__mixup_alpha": 0.6}),
}
# Losses where policy and reference agree.
AT_REFERENCE = {
    "aot": math.log(2),
    "bco_pair, unpaired": math.log(2),
    "sigmoid, best of a ranking": math.log(2),
    "beta_dpo": math.log(2),
    "tr, tdpo2": math.log(2),
    "tr, kto": 0.5,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same preferences in each of the forms that data come in."""
    root = tmp_path_factory.mktemp("inputs")
    pairs = make_inputs(root / "paired")
    forms = {form: runs.convert(pairs, getattr(runs, form), root / form) for form in (UNPAIRED, RANKED)}
    return {"paired": pairs} | forms


@pytest.fixture(scope="module")
def uninterrupted(folders, tmp_path_factory):
    """A function from a name in CARRYING to the configuration and the folder of a whole run, which is made once."""
    root = tmp_path_factory.mktemp("runs")

    def run(name):
        form, fields = CARRYING[name]
        config, folder = make_config(folders[form], **fields), root / name.replace(", ", "-")
        if not folder.exists():
            train.run(config, folder)
        return config, folder

    return run


def check_run(uninterrupted, tmp_path, monkeypatch, name, *, at=3):
    """Trains again with an interruption, with the same result; returns the folder of the run without one."""
    config, whole = uninterrupted(name)
    with killed_at(at, monkeypatch), pytest.raises(Killed):
        train.run(config, tmp_path / "cut")
    train.run(config, tmp_path / "cut")
    for log in ("metrics.jsonl", "eval.jsonl"):
        assert untimed(read_rows(tmp_path / "cut" / log)) == untimed(read_rows(whole / log))
    row = commands.evaluate_checkpoint(config, whole)
    assert untimed([row]) == untimed([read_rows(whole / "eval.jsonl")[-1]])
    return whole


def check_rows(folder, name, steps):
    rows = read_rows(folder / "metrics.jsonl")
    numbers = [value for row in rows for value in row.values()]
    assert len(rows) == steps and np.isfinite(numbers).all() and rows[0]["grad_norm"] > 0
    if name in AT_REFERENCE:
        assert rows[0]["loss"] == pytest.approx(AT_REFERENCE[name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_objective_trains(folders, tmp_path, name):
    form, fields = CASES[name]
    train.run(make_config(folders[form], **fields | {"train__steps": 4}), tmp_path / "run")
    check_rows(tmp_path / "run", name, 4)
    first, last = read_rows(tmp_path / "run" / "eval.jsonl")
    assert last["eval/loss"] != first["eval/loss"] and np.isfinite(list(last.values())).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", CARRYING)
def test_run_that_carries_something_on_resumes_bit_for_bit(uninterrupted, tmp_path, monkeypatch, name):
    at = 5 if name == "tr, tdpo2" else 3
    check_rows(check_run(uninterrupted, tmp_path, monkeypatch, name, at=at), name, runs.STEPS)


@pytest.mark.slow
def test_unpaired_run_scores_answers_of_other_prompts(folders, tmp_path):
    fields = {"loss__name": "kto", "train__steps": 3, "data__eval": ""}
    train.run(make_config(folders[UNPAIRED], **fields), tmp_path / "kto")
    train.run(make_config(folders[UNPAIRED], **fields | {"loss__name": "apo_zero"}), tmp_path / "apo")
    rows, others = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("kto", "apo"))
    # At first the policy is its reference: no divergence, and each answer half way.
    assert 0 <= rows[0]["kl"] < 1e-4 and rows[0]["loss"] == pytest.approx(0.5, rel=1e-5)
    assert all(row["kl"] >= 0 for row in rows) and "kl" not in others[0]
    assert "rewards/accuracies" not in rows[0]
    last = rows[-1]
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], rel=1e-4)
    # What is scored besides is counted.
    assert all(a["positions_computed"] > b["positions_computed"] for a, b in zip(rows, others, strict=True))
    assert all(a["tokens_real"] > 1.5 * b["tokens_real"] for a, b in zip(rows, others, strict=True))
    # Of the examples that the updates read, one value each; and one for each of their prompts with another's answer.
    values = [pq.read_table(path).num_rows for path in (tmp_path / "kto" / "reference").glob("*.parquet")]
    assert sum(values) == 2 * 3 * 8


@pytest.mark.slow
def test_batch_that_is_scored_first_counts_twice(folders, tmp_path):
    # Four microbatches of a row for each device: a loss of the whole batch sees them all before any gradient is made.
    fields = {"train__steps": 2, "train__batch_pairs": 32, "train__microbatch_rows": 8, "data__eval": ""}
    for name in ("aot", "hinge"):
        train.run(make_config(folders["paired"], **fields | {"loss__name": name}), tmp_path / name)
    twice, once = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("aot", "hinge"))
    assert [row["positions_computed"] for row in twice] == [2 * row["positions_computed"] for row in once]
    assert [row["tokens_real"] for row in twice] == [row["tokens_real"] for row in once]


def weigh(folder, into, *, margins=True):
    """Writes the pairs of `folder` with weights, and with margins, next to the same model."""

    def row(fields, index):
        given = {"weight": (0, 1, 2, 0.5)[index % 4]} | ({"margin": (0.3, -0.2, 1.5)[index % 3]} if margins else {})
        return fields | given

    return runs.convert(folder, row, into)


def mean_at_reference(pairs):
    """Loss of pairs where the policy is the reference, with weights and margins: the mean of log(1 + exp(margin))."""
    weights, margins = (np.array([pair[name] for pair in pairs]) for name in ("weight", "margin"))
    return (weights * np.log1p(np.exp(margins))).sum() / weights.sum()


@pytest.mark.slow
def test_weights_and_margins_reach_updates_and_evaluation(folders, tmp_path, capsys):
    folder = weigh(folders["paired"], tmp_path / "inputs")
    config = make_config(folder, train__steps=3)
    train.run(config, tmp_path / "run")
    rows, evaluations = (read_rows(tmp_path / "run" / name) for name in ("metrics.jsonl", "eval.jsonl"))
    given = {name: read_rows(folder / f"{name}.jsonl") for name in ("train", "eval")}
    first = train.order_of(config, load_inputs(config))(0)
    assert rows[0]["loss"] == pytest.approx(mean_at_reference([given["train"][i] for i in first]), abs=1e-5)
    assert evaluations[0]["eval/loss"] == pytest.approx(mean_at_reference(given["eval"]), abs=1e-5)
    assert "train: 30 pairs have a weight other than 1; 0 to 2" in capsys.readouterr().err
    row = commands.evaluate_checkpoint(config, tmp_path / "run")
    assert untimed([row]) == untimed([evaluations[-1]])


def test_weights_and_margins_that_an_objective_cannot_use_are_refused(folders, tmp_path):
    folder = weigh(folders["paired"], tmp_path / "both")
    for loss in ("ipo", "sigmoid*0.8,bco_pair*0.2"):
        with pytest.raises(InputError, match=r"config\.data\.train: 40 pairs with a margin, and loss .* reads none"):
            load_inputs(make_config(folder, loss__name=loss))
    # Fine-tuning reads neither rejected answers nor by how much they are worse.
    assert load_inputs(make_config(folder, loss__name="sft")).sets["train"].margins is None
    weights = weigh(folders["paired"], tmp_path / "weights", margins=False)
    with pytest.raises(InputError, match="30 pairs with a weight, and loss 'aot' compares whole batches"):
        load_inputs(make_config(weights, loss__name="aot"))
    for row in (rows := read_rows(weights / "train.jsonl")):
        row["weight"] = 0
    (weights / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="all weights are 0"):
        load_inputs(make_config(weights))


@pytest.mark.slow
def test_reference_follows_the_policy(uninterrupted, tmp_path):
    config, whole = uninterrupted("tr, hard")
    folder = shutil.copytree(whole, tmp_path / "run")
    rows = read_rows(folder / "metrics.jsonl")
    margins = {row["step"]: row["rewards/margins"] for row in rows}
    # Where it has just taken the policy in, the two agree; an update later they do not.
    assert all(abs(margins[step]) < 1e-5 for step in (0, 2, 4))
    assert all(abs(margins[step]) > 1e-3 for step in (3, 5))  # the first update is one of no learning rate
    identities = {
        path.parent.name: json.loads(path.read_text())["identity"]
        for path in (folder / "reference").glob("**/manifest.json")
    }
    assert set(identities) == {"reference", "sync-000002", "sync-000004"}
    assert identities["sync-000002"]["sync"]["step"] == 2 and "sync" not in identities["reference"]
    # Only what is read until the next time is scored: two updates' pairs, and those of the evaluation.
    values = [pq.read_table(path).num_rows for path in (folder / "reference" / "sync-000002").glob("*.parquet")]
    assert sum(values) == 2 * 8 + runs.EVAL_PAIRS
    # Without the values of step 4, which no checkpoint's parameters give, the run's end cannot be judged.
    (folder / "reference" / "sync-000004").rename(folder / "gone")
    with pytest.raises(InputError, match="sync-000004: log-probs of some pairs are missing"):
        commands.evaluate_checkpoint(config, folder)


@pytest.mark.slow
def test_soft_reference_is_the_mixture_of_parameters(folders, tmp_path):
    alpha = 0.6
    fields = {"reference__sync_steps": 2, "reference__mixup_alpha": alpha, "checkpoint__keep": 9}
    config = make_config(folders["paired"], **fields)
    train.run(config, tmp_path / "run")
    inputs = load_inputs(config, training=True)
    pairs = inputs.sets["eval"]
    built = make_programs(config, inputs)
    mixed = state.load_params(inputs.source, built)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=1, read_only=True)
    like = state.abstract_params(built)[0], state.abstract_running(built)
    for step in (2, 4):
        policy, _ = checkpoints.restore_params(step, *like)
        mixed = jax.tree.map(lambda p, r: alpha * p + (1 - alpha) * r, policy, mixed)
        found = {}
        for path in (tmp_path / "run" / "reference" / f"sync-{step:06d}").glob("*.parquet"):
            table = pq.read_table(path)
            keys, chosen, rejected = (table.column(name).to_pylist() for name in ("key", "chosen", "rejected"))
            found |= dict(zip(keys, zip(chosen, rejected, strict=True), strict=True))
        scored = np.zeros((len(pairs), 2))
        for part in score_pairs(
            lambda batch, mixed=mixed: built.score(mixed, batch),
            pairs,
            pairs.lengths,
            shape=built.score_shape,
        ):
            scored[part.indices] = part.logps
        stored = np.array([found[key.tobytes().hex()] for key in pairs.keys])
        np.testing.assert_allclose(stored, scored, rtol=1e-5)
    checkpoints.close()
    # Of the mixtures, the last one and the one that it was made of are kept.
    kept = sorted(path.parent.name for path in (tmp_path / "run" / "reference").glob("*/weights"))
    assert kept == ["sync-000002", "sync-000004"]


@pytest.mark.slow
def test_token_level_run_keeps_the_references_likely_tokens(folders, tmp_path):
    fields = {"loss__name": "tdpo2", "loss__kl_tokens": 8, "train__steps": 3}
    folder = tmp_path / "run"
    config = make_config(folders["paired"], **fields)
    train.run(config, folder)
    first, last = (read_rows(folder / "metrics.jsonl")[i] for i in (0, -1))
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert abs(first["sequence_kl/chosen"]) < 1e-5 < last["sequence_kl/chosen"]
    assert json.loads((folder / "reference" / "manifest.json").read_text())["identity"]["tokens"] == 8
    with pytest.raises(InputError, match="differs in tokens"):
        other = fields | {"loss__kl_tokens": 9, "reference__path": str(folder / "reference")}
        train.run(make_config(folders["paired"], **other), tmp_path / "other")


BAD = [
    (
        UNPAIRED,
        {"loss__name": "sigmoid"},
        "config.data.train: answers labeled good or bad, and loss 'sigmoid'.*such data are for .*kto",
    ),
    (UNPAIRED, {"loss__name": "bco_pair", "loss__wpo": True}, "answers labeled good or bad, and loss 'bco_pair'"),
    ("paired", {"loss__name": "simpo", "reference__sync_steps": 2}, "config.reference.sync_steps.*reads no reference"),
    ("paired", {"reference__mixup_alpha": 0.5}, "config.reference.mixup_alpha.*sync_steps is set"),
    ("paired", {"reference__sync_steps": 2, "reference__mixup_alpha": 0.5, "lora__rank": 2}, "mixup_alpha"),
    ("paired", {"loss__name": "tests.nothing:here"}, "config.loss.name.*cannot be imported"),
    ("paired", {"loss__kl_tokens": 4}, "config.loss.kl_tokens"),
    ("paired", {"loss__name": "kto,tdpo2"}, "one of the two"),
    ("paired", {"loss__name": "plackett_luce,sigmoid"}, "Leave the losses of pairs out"),
]


@pytest.mark.parametrize(("form", "fields", "message"), BAD)
def test_what_does_not_go_together_is_refused(folders, tmp_path, form, fields, message):
    with pytest.raises(InputError, match=message):
        train.run(make_config(folders[form], **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()
