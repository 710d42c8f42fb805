"""Whole runs: what they write, how they resume, and what they refuse."""

import collections
import contextlib
import datetime
import io
import json
import re
import shutil
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import transformers

import dpo_jax
from dpo_jax import commands, train, trees
from dpo_jax.hf import checkpoints
from dpo_jax.plan import estimate
from dpo_jax.reference.store import hex_keys
from dpo_jax.run import choices, goodput, programs, update_batches, workdir
from dpo_jax.run.state import abstract_state
from dpo_jax.types import InputError
from tests.support import hooks
from tests.support.hf_folders import edit_weights
from tests.support.runs import (
    EVAL_PAIRS,
    STEPS,
    TRAIN_PAIRS,
    Killed,
    killed_at,
    load_inputs,
    make_config,
    make_inputs,
    read_rows,
    untimed,
)

METRICS = {
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "step_time_s",
    "pairs_per_s",
    "positions_computed",
    "tokens_real",
    "tokens_real/s",
    "flops/s",
    "data_wait_s",
    "minor_faults",
    *goodput.FIELDS,
}
NOT_IN_EVALUATION = {
    "step", "grad_norm", "learning_rate", "epoch", "step_time_s", "pairs_per_s", "positions_computed", "tokens_real",
    "tokens_real/s", "flops/s", "data_wait_s", "minor_faults", *goodput.FIELDS,
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A whole run, and its working folder."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train.run(make_config(inputs), folder)
    return folder


def weights(folder):
    config, _ = checkpoints.read_config(folder)
    return trees.flatten(checkpoints.load_params(folder, config))


def test_run_writes_what_a_workdir_holds(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "eval.jsonl", "reference", "checkpoints", "export", "end.json"}
    rows = read_rows(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS)) and all(set(row) == METRICS for row in rows)
    evaluations = read_rows(finished / "eval.jsonl")
    assert [row["step"] for row in evaluations] == [0, STEPS]
    expected = {f"eval/{name}" for name in METRICS - NOT_IN_EVALUATION} | {"step", "eval/pairs", "eval_time_s"}
    assert all(set(row) == expected and row["eval/pairs"] == EVAL_PAIRS for row in evaluations)


def test_the_loop_moves_nothing_between_host_and_devices_that_it_does_not_ask_for(inputs, tmp_path, monkeypatch):
    real = train.run_loop

    def guarded(*arguments):
        jax.config.update("jax_transfer_guard", "disallow")  # in every thread
        try:
            return real(*arguments)
        finally:
            jax.config.update("jax_transfer_guard", "allow")

    monkeypatch.setattr(train, "run_loop", guarded)
    train.run(make_config(inputs, eval__every_steps=2, train__steps=3), tmp_path / "run")
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


@pytest.fixture(scope="module")
def mixed(inputs, tmp_path_factory):
    """A run on a mixture, evaluated on two sets by name, one of them a mixture; and its working folder."""
    folder = tmp_path_factory.mktemp("runs") / "mixed"
    rows = (inputs / "train.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("short", rows[:4]), ("long", rows[4:])):
        (folder.parent / f"{name}.jsonl").write_text("".join(part))
    short, long, held_out = (folder.parent / "short.jsonl", folder.parent / "long.jsonl", inputs / "eval.jsonl")
    train.run(
        make_config(
            inputs,
            data__train=f"{short},{long}*0.5",
            data__eval=f"both={short},{long},held-out={held_out}",
            train__steps=2,
            hooks="tests.support.hooks:keep",
        ),
        folder,
    )
    return folder


@pytest.mark.slow
def test_a_hook_is_called_with_every_logged_update_and_evaluation(mixed):
    rows, evaluations = (read_rows(mixed / name) for name in ("metrics.jsonl", "eval.jsonl"))
    assert hooks.CALLS == [evaluations[0], *rows, evaluations[1]]


@pytest.mark.slow
def test_metrics_of_a_mixture_are_told_apart_by_source(mixed):
    whole = ("loss", "rewards/margins", "rewards/accuracies")
    for row in read_rows(mixed / "metrics.jsonl"):
        pairs = {name: row.get(f"by_source/{name}/pairs", 0) for name in ("short", "long")}
        assert sum(pairs.values()) == 8
        for metric in whole:
            parts = [row[f"by_source/{name}/{metric}"] * count for name, count in pairs.items() if count]
            assert sum(parts) / 8 == pytest.approx(row[metric], rel=1e-5)


@pytest.mark.slow
def test_evaluation_sets_have_their_names_in_metrics_and_elsewhere(mixed, finished, inputs):
    first, last = read_rows(mixed / "eval.jsonl")
    assert first["eval/both/by_source/short/pairs"] == 4 and first["eval/both/pairs"] == TRAIN_PAIRS
    assert not any(name.startswith(("eval/loss", "eval/held-out/by_source")) for name in last)
    unnamed = read_rows(finished / "eval.jsonl")[0]
    assert first["eval/held-out/logps/chosen"] == pytest.approx(unnamed["eval/logps/chosen"], rel=1e-6)
    card = (mixed / "export" / "README.md").read_text()
    assert "| eval/both data | short.jsonl, long.jsonl: 40 pairs |" in card and "| eval/held-out/loss |" in card
    assert json.loads((mixed / "config.json").read_text())["data"]["eval"].startswith("both=")


def test_policy_is_the_reference_at_step_zero(finished):
    first = read_rows(finished / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5) and abs(first["rewards/margins"]) < 1e-5
    assert read_rows(finished / "eval.jsonl")[0]["eval/loss"] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.slow
def test_policy_is_the_reference_at_step_zero_in_bfloat16_too(inputs, tmp_path):
    # Rows, gradients and all: XLA must round the same intermediates in both programs.
    train.run(make_config(inputs, model__dtype="bfloat16", train__steps=1, data__eval=""), tmp_path / "run")
    (first,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5) and abs(first["rewards/chosen"]) < 1e-5


@pytest.fixture(scope="module")
def watched(inputs, tmp_path_factory):
    """Everything seen of one run that is profiled, and evaluated and logged every fourth step."""
    seen = types.SimpleNamespace(folder=tmp_path_factory.mktemp("runs") / "watched", threads=[], digests=[])
    make_batch, digest = update_batches.make_batch, checkpoints.digest
    chosen = make_config(inputs, log__every_steps=4, eval__every_steps=4, profile__steps=2)
    before = jax.config.values["jax_compilation_cache_dir"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as messages:
        patch.setattr(
            update_batches,
            "make_batch",
            lambda *a, **k: seen.threads.append(threading.current_thread()) or make_batch(*a, **k),
        )
        patch.setattr(checkpoints, "digest", lambda folder, **k: seen.digests.append(folder) or digest(folder, **k))
        jax.config.update("jax_compilation_cache_dir", None)
        try:
            train.run(chosen, seen.folder)
            seen.cache = jax.config.values["jax_compilation_cache_dir"]
        finally:
            jax.config.update("jax_compilation_cache_dir", before)
    seen.messages = messages.getvalue()
    return seen


@pytest.mark.slow
def test_batches_are_made_in_another_thread(watched):
    assert len(watched.threads) == STEPS
    assert all(thread is not threading.main_thread() for thread in watched.threads)
    rows = read_rows(watched.folder / "metrics.jsonl")
    assert all(0 <= row["data_wait_s"] <= row["step_time_s"] + 1 for row in rows)


@pytest.mark.slow
def test_programs_are_kept_in_the_users_cache(watched, cache_folder):
    assert Path(watched.cache) == cache_folder / "xla"


@pytest.mark.slow
def test_profile_is_written_for_the_steps_asked_for(watched):
    (trace,) = (watched.folder / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    assert "profile: in" in watched.messages


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "offload"])
def test_remat_changes_no_metric(finished, inputs, tmp_path, remat):
    train.run(make_config(inputs, model__remat=remat, train__steps=3, data__eval=""), tmp_path / "run")
    for ours, theirs in zip(
        read_rows(tmp_path / "run" / "metrics.jsonl"), read_rows(finished / "metrics.jsonl"), strict=False
    ):
        for name in ("loss", "grad_norm", "logps/chosen"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_training_learns_the_preferences(finished):
    # Six steps at a high rate over forty pairs: the loss of what was seen falls clearly.
    rows = read_rows(finished / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05 and rows[-1]["rewards/margins"] > 0.1


def test_counts_of_work_are_those_of_the_layout(finished):
    for row in read_rows(finished / "metrics.jsonl"):
        assert row["tokens_real"] <= row["positions_computed"] and row["positions_computed"] % 8 == 0
        assert row["pairs_per_s"] == pytest.approx(8 / row["step_time_s"])
    epochs = [row["epoch"] for row in read_rows(finished / "metrics.jsonl")]
    assert epochs == pytest.approx([step * 8 / TRAIN_PAIRS for step in range(STEPS)])


def test_export_is_a_folder_that_transformers_reads(finished, inputs):
    export = finished / "export"
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    assert tokenizer.decode(tokenizer("Customer: Hello").input_ids) == "Customer: Hello"
    assert transformers.AutoConfig.from_pretrained(export).vocab_size == 1024
    changed = [name for name, array in weights(export).items() if np.any(array != weights(inputs / "model")[name])]
    assert set(changed) == set(weights(export))
    card = (export / "README.md").read_text()
    for shown in ("sigmoid, beta 0.1", "train.jsonl: 40 pairs", "eval/rewards/accuracies", "6 of 8 pairs"):
        assert shown in card
    assert str(inputs) not in card


def test_model_with_a_padded_vocabulary_trains_and_keeps_its_shape(finished, inputs):
    tokens = len(transformers.AutoTokenizer.from_pretrained(inputs / "model"))
    before, after = weights(inputs / "model"), weights(finished / "export")
    assert {path: leaf.shape for path, leaf in after.items()} == {path: leaf.shape for path, leaf in before.items()}
    old, new = before["embed/embedding"], after["embed/embedding"]
    assert len(new) > tokens
    np.testing.assert_array_equal(new[tokens:], old[tokens:])  # no text reads them
    assert (new[:tokens] != old[:tokens]).any()
    assert load_inputs(make_config(inputs), training=True).warnings == ()


def test_softmax_of_padded_rows_has_parity_with_transformers(finished, inputs):
    torch = pytest.importorskip("torch")
    found = load_inputs(make_config(inputs), training=True).sets["eval"]
    tokens = len(transformers.AutoTokenizer.from_pretrained(inputs / "model"))
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model")
    sums, without = [], []
    for prompt, chosen, *_ in (found[i] for i in range(len(found))):
        ids, answer = (torch.tensor(side, dtype=torch.long) for side in ([*prompt, *chosen], chosen))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
        for total, scores in ((sums, logits), (without, logits[:, :tokens])):
            total.append(scores.log_softmax(-1).gather(-1, answer[:, None]).sum().item())
    ours = read_rows(finished / "eval.jsonl")[0]["eval/logps/chosen"]
    assert ours == pytest.approx(np.mean(sums), rel=1e-5)
    assert ours != pytest.approx(np.mean(without), rel=1e-3)


@pytest.mark.slow
def test_tokenizer_whose_pad_is_its_eos_trains_as_one_without(finished, inputs, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "model")
    assert tokenizer.pad_token is None
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = str(tmp_path / "tokenizer")
    train.run(make_config(inputs, tokenizer__path=path), tmp_path / "run")
    rows = [untimed(read_rows(run / "metrics.jsonl")) for run in (finished, tmp_path / "run")]
    assert rows[0] == rows[1]


def test_config_json_reproduces_the_run(finished, tmp_path):
    from dpo_jax.config import from_json

    again = from_json((finished / "config.json").read_text(), "config.json")
    train.run(again, tmp_path / "again")
    assert untimed(read_rows(tmp_path / "again" / "metrics.jsonl")) == untimed(read_rows(finished / "metrics.jsonl"))


def test_complete_run_is_left_alone(finished, inputs, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    train.run(make_config(inputs), finished)
    assert "complete at step 6" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_interrupted_run_goes_on_bit_for_bit(finished, inputs, tmp_path, monkeypatch, at):
    began = time.time()
    with killed_at(at, monkeypatch), pytest.raises(Killed):
        train.run(make_config(inputs), tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    lost = read_rows(log) if log.exists() else []  # or part of it, if a checkpoint was made before
    train.run(make_config(inputs), tmp_path / "run")
    last = read_rows(log)[-1]
    spent = sum(last[f"time/{part}_s"] for part in (*goodput.PARTS, "down"))
    assert 0 < last["goodput"] < 1
    if lost:  # a start that logged nothing is known to nobody
        assert spent == pytest.approx(last["time/unix_s"] - began, abs=0.5)
        assert lost[-1]["time/restart_s"] == 0 < last["time/restart_s"]
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert untimed(read_rows(tmp_path / "run" / name)) == untimed(read_rows(finished / name))
    ours, theirs = weights(tmp_path / "run" / "export"), weights(finished / "export")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_export_of_an_unfinished_run_is_not_taken_for_the_finished_one(finished, inputs, tmp_path, monkeypatch):
    config, folder = make_config(inputs), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "export_model", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train.run(config, folder)
    commands.export_checkpoint(config, folder, None)
    assert (folder / f"export-{STEPS}" / "config.json").exists() and not (folder / "export").exists()
    with pytest.raises(InputError, match="the place of the finished run's export"):
        commands.export_checkpoint(config, folder, folder / "export")
    train.run(config, folder)
    ours, theirs = weights(folder / "export"), weights(finished / "export")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert untimed(read_rows(folder / "eval.jsonl")) == untimed(read_rows(finished / "eval.jsonl"))


@pytest.mark.slow
def test_any_model_is_evaluated_against_any_other_or_none(finished, inputs, tmp_path):
    config, export = make_config(inputs), str(finished / "export")
    (of_run,) = untimed([read_rows(finished / "eval.jsonl")[-1]])
    alone = {
        name: value for name, value in of_run.items() if not name.startswith(("step", "eval/loss", "eval/rewards"))
    }
    with_run = untimed([commands.evaluate_model(config, finished, export, "")])[0]
    with_other = untimed([commands.evaluate_model(config, None, export, str(inputs / "model"))])[0]
    without = untimed([commands.evaluate_model(config, None, export, "")])[0]
    assert with_run == pytest.approx({name: of_run[name] for name in with_run}, rel=1e-5)
    assert with_other == pytest.approx(with_run, rel=1e-4, abs=1e-4)
    assert without.keys() - alone.keys() == {"eval/logps/margins", "eval/logps/accuracies"}
    assert {name: without[name] for name in alone} == pytest.approx(alone, rel=1e-5)
    difference = of_run["eval/logps/chosen"] - of_run["eval/logps/rejected"]
    assert without["eval/logps/margins"] == pytest.approx(difference, rel=1e-4)
    other_tokenizer(make_inputs(tmp_path / "other"))
    with pytest.raises(InputError, match="--reference: .* whose tokenizer is not that of"):
        commands.evaluate_model(config, None, export, str(tmp_path / "other" / "model"))


@pytest.mark.slow
def test_second_run_on_the_same_data_makes_no_reference_pass(finished, inputs, tmp_path, monkeypatch, capsys):
    # Another learning rate, the same model and data. Weights loaded for scoring would be a reference pass.
    config = make_config(
        inputs, reference__path=str(finished / "reference"), optimizer__learning_rate=1e-3, data__eval=""
    )
    forwards = []
    real = train.make_programs

    def counting(*args, **options):
        built = real(*args, **options)
        return built._replace(scoring=lambda *args: forwards.append(1))

    monkeypatch.setattr(train, "make_programs", counting)
    train.run(config, tmp_path / "run")
    assert forwards == [] and f", {TRAIN_PAIRS} from {finished}" in capsys.readouterr().err


def other_weights(folder):
    edit_weights(folder / "model", lambda tensors: tensors["model.norm.weight"].__iadd__(0.01))


def other_template(folder):
    (folder / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")


def other_tokenizer(folder):
    path = folder / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("part", "change", "fields"),
    [
        ("weights", other_weights, {}),
        ("template", other_template, {}),
        ("tokenizer", other_tokenizer, {}),
        ("max_length", lambda folder: None, {"data__max_length": 127}),
    ],
)
def test_reference_of_something_else_is_refused(finished, inputs, tmp_path, part, change, fields):
    shutil.copytree(inputs, tmp_path / "inputs")
    change(tmp_path / "inputs")
    config = make_config(tmp_path / "inputs", reference__path=str(finished / "reference"), **fields)
    with pytest.raises(InputError, match=rf"reference log-probs of a run that differs in {part} \("):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def loaded(inputs):
    """The model of the runs as scripts load it, and texts of its pairs."""
    rows = read_rows(inputs / "train.jsonl")
    return dpo_jax.load(inputs / "model"), [row["prompt"] for row in rows], [row["chosen"] for row in rows]


def test_log_probs_of_a_loaded_model_are_those_of_the_reference_store(finished, inputs, loaded):
    model, prompts, answers = loaded
    keys = hex_keys(load_inputs(make_config(inputs)).sets["train"].keys)
    parts = [pq.read_table(path).to_pydict() for path in (finished / "reference").glob("*.parquet")]
    stored = {key: value for part in parts for key, value in zip(part["key"], part["chosen"], strict=True)}
    np.testing.assert_allclose(model.logps(prompts, answers), [stored[key] for key in keys], rtol=1e-5)


def test_log_probs_and_hidden_states_of_a_loaded_model_parity_with_transformers(inputs, loaded):
    torch = pytest.importorskip("torch")
    model, (*prompts, _), (*answers, _) = loaded
    theirs = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model").eval()
    texts = prompts[:3], answers[:3]
    ids = model.token_ids(*texts)
    for tokens, prompt, logps, hidden in zip(ids, prompts, model.logps(*texts), model.hidden(*texts), strict=False):
        with torch.no_grad():
            out = theirs(torch.tensor(tokens[None].astype(np.int64)), output_hidden_states=True)
        each = out.logits.log_softmax(-1)[0, range(len(tokens) - 1), tokens[1:]].numpy()
        begun = len(model.tokenizer(prompt)["input_ids"]) - 1
        np.testing.assert_allclose(logps, each[begun:].sum(), rtol=1e-5)
        np.testing.assert_allclose(hidden, out.hidden_states[-1][0].numpy(), atol=1e-4)


def test_loaded_model_reads_messages_and_refuses_what_does_not_fit(loaded, monkeypatch):
    model, prompts, answers = loaded
    assert model.logps([], []).shape == (0,) and model.hidden([], []) == []
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    prompt = [{"role": "user", "content": "hello"}]
    ids = model.token_ids([prompt, prompt], ["hi there", [{"role": "assistant", "content": "hi there"}]])
    for each in ids:
        np.testing.assert_array_equal(each, model.tokenizer("<user>hello<assistant>hi there")["input_ids"])
    for wrong, message in [
        ((["word " * 300], ["yes"]), "^pair 0: too long; expected at most 256 tokens"),
        ((prompts[:2], answers[:1]), "^prompts, answers: lists of other lengths"),
        ((prompts[0], answers[:1]), "^prompts, answers: a single text"),
        (([prompts[0]], [""]), "^pair 0"),
    ]:
        with pytest.raises(InputError, match=message):
            model.logps(*wrong)
    with pytest.raises(InputError, match="^path: 'no/where/at/all', no such folder"):
        dpo_jax.load("no/where/at/all")


@pytest.mark.slow
def test_program_of_an_update_holds_no_number_of_objective_or_optimizer(inputs):
    # Fields that are read as numbers: two programs of all their first and all their second values are the same text.
    fields = {
        "loss__name": ("sigmoid*0.8,sft*0.2", "sigmoid*0.7,sft*0.4"),
        "loss__beta": (0.1, 0.3),
        "loss__label_smoothing": (0.0, 0.1),
        "loss__ld_alpha": (0.5, 0.6),
        "loss__nll_weight": (0.2, 0.3),
        "optimizer__learning_rate": (1e-3, 2e-3),
        "optimizer__weight_decay": (0.1, 0.2),
        "optimizer__clip_norm": (1.0, 2.0),
        "optimizer__b1": (0.9, 0.8),
        "optimizer__b2": (0.999, 0.99),
        "optimizer__eps": (1e-8, 1e-6),
        "optimizer__min_lr_rate": (0.1, 0.2),
        "optimizer__warmup_steps": (0, 3),
        "train__steps": (5, 7),
        "seed": (0, 2**40 + 1),
    }
    read, texts, numbers = None, [], []
    for at in range(2):
        chosen = make_config(inputs, **{name: values[at] for name, values in fields.items()}, model__dtype="float32")
        read = read or load_inputs(chosen)
        objective = choices.objective_of(chosen.loss)
        built = programs.make_programs(chosen, objective, read.model, read.lengths)
        tx, _ = choices.optimizer_of(chosen.optimizer, total_steps=fields["train__steps"][at])
        step, _ = programs.update_step(built, tx)
        batch = estimate.abstract_batch(built, built.update_shape, update=True)
        arguments = abstract_state(built, tx), {}, batch, programs.numbers_of(built, tx)
        texts.append(jax.jit(step).lower(*arguments).as_text())
        numbers.append(arguments[-1])
    assert texts[0] == texts[1]
    assert not np.isclose(*(each.values for each in numbers)).any() and (numbers[0][1] != numbers[1][1]).any()


def test_a_run_compiles_three_programs_of_the_model(finished, inputs, tmp_path, caplog):
    events, numbers = collections.Counter(), {"loss__beta": 0.3, "optimizer__learning_rate": 3e-3}
    numbers |= {
        "optimizer__b2": 0.98,
        "optimizer__eps": 1e-7,
        "optimizer__warmup_steps": 1,
        "optimizer__clip_norm": 2.0,
    }
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    jax.config.update("jax_log_compiles", True)
    try:
        train.run(make_config(inputs, eval__every_steps=2, **numbers), tmp_path / "run")
    finally:
        jax.config.update("jax_log_compiles", False)
    rows = [read_rows(folder / "metrics.jsonl") for folder in (finished, tmp_path / "run")]
    assert rows[1][0]["rewards/chosen"] == pytest.approx(rows[0][0]["rewards/chosen"], abs=1e-5)
    assert all(abs(one["loss"] - other["loss"]) > 1e-3 for one, other in zip(*rows, strict=True) if one["step"] > 2)
    # Other numbers of the objective and the optimizer: all programs are those of the finished run, in JAX's cache.
    assert events["/jax/compilation_cache/cache_hits"] >= 4 and not events["/jax/compilation_cache/cache_misses"]
    compiled = re.findall(r"Compiling jit\((\w+)\)", caplog.text)
    ours = {"update", "score", "first"}
    assert sorted(name for name in compiled if name in ours) == sorted(ours)
    # Besides those that the finished run before it has left: slices of leaves for the export, and such.
    assert len(compiled) < 40 and compiled.count("summary") == 1


@pytest.mark.slow
def test_a_run_reads_the_weights_for_their_digest_once(watched, inputs):
    assert watched.digests == [inputs / "model"]


@pytest.mark.slow
def test_source_whose_rows_are_all_skipped_is_not_blamed_on_its_weight(inputs, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "", "rejected": "b"}\n')
    data = f"{inputs / 'train.jsonl'},{tmp_path / 'bad.jsonl'}"
    config = make_config(inputs, data__train=data, data__format="plain", data__on_bad_row="skip", train__steps=1)
    train.run(config, tmp_path / "run")


@pytest.mark.slow
def test_reference_command_leaves_train_nothing_to_score(inputs, tmp_path, capsys):
    commands.score_reference(make_config(inputs), tmp_path / "run")
    assert f"{TRAIN_PAIRS + EVAL_PAIRS} scored" in capsys.readouterr().err
    train.run(make_config(inputs, train__steps=1), tmp_path / "run")
    assert ", 0 scored\n" in capsys.readouterr().err


@pytest.mark.slow
def test_only_pairs_that_the_updates_read_are_scored_and_a_longer_run_scores_the_others(inputs, tmp_path, capsys):
    # KTO reads the values of mismatched pairs too.
    fields = {"reference__path": str(tmp_path / "store"), "loss__name": "kto", "train__batch_pairs": 4}
    train.run(make_config(inputs, train__steps=2, **fields), tmp_path / "one")
    told = capsys.readouterr().err
    assert f"the updates read 8 of {TRAIN_PAIRS} pairs" in told
    assert f"0 from {tmp_path / 'store'}, {2 * (8 + EVAL_PAIRS)} scored" in told
    train.run(make_config(inputs, train__steps=3, data__eval="", **fields), tmp_path / "two")
    assert f"16 from {tmp_path / 'store'}, 8 scored" in capsys.readouterr().err
    # The log-probs of pairs scored at another time are the reference's.
    assert read_rows(tmp_path / "two" / "metrics.jsonl")[0]["loss"] == pytest.approx(
        read_rows(tmp_path / "one" / "metrics.jsonl")[0]["loss"], rel=1e-6
    )


def test_day_that_templates_write_is_the_one_on_which_the_run_began(finished, inputs, tmp_path, monkeypatch):
    def day(config, folder):
        return workdir.dated(config, folder).data.date

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return cls(2999, 1, 2)

    config, began = make_config(inputs), json.loads((finished / "config.json").read_text())["data"]["date"]
    monkeypatch.setattr(datetime, "date", Tomorrow)
    assert day(config, tmp_path / "new") == "2999-01-02" and day(config, finished) == began < "2999"
    workdir.check(workdir.dated(config, finished), finished)  # the run may go on
    # A reference pass before the run keeps the day on which it was begun.
    manifest = json.loads((finished / "reference" / "manifest.json").read_text())
    kept = make_config(inputs, reference__path=str(finished / "reference"))
    assert manifest["date"] == began == day(kept, tmp_path / "new")
    chosen = make_config(inputs, data__date="2024-02-29")
    assert day(chosen, finished) == day(chosen, tmp_path / "new") == "2024-02-29"
    with pytest.raises(InputError, match=f"data.date: '{began}' -> '2024-02-29'"):
        workdir.check(chosen, finished)


def test_evaluate_repeats_the_last_evaluation(finished, inputs):
    row = commands.evaluate_checkpoint(make_config(inputs), finished)
    assert untimed([row]) == untimed([read_rows(finished / "eval.jsonl")[-1]])


def test_export_command_writes_the_newest_checkpoint(finished, inputs, tmp_path):
    commands.export_checkpoint(make_config(inputs), finished, tmp_path / "out")
    ours, theirs = weights(tmp_path / "out"), weights(finished / "export")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "out" / "README.md").read_text() == (finished / "export" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_ends_early_exports_its_best_and_goes_on(finished, inputs, tmp_path, monkeypatch, capsys):
    fields = dict(eval__every_steps=1, eval__patience=2, checkpoint__best="eval/loss:min", checkpoint__keep=1)
    config, run, again = make_config(inputs, **fields), tmp_path / "run", tmp_path / "again"
    for at in (2, None):  # interrupted once, between evaluations that are no better
        with contextlib.nullcontext() if at is None else killed_at(at, monkeypatch), contextlib.suppress(Killed):
            train.run(config, run)
    train.run(config, again)
    evaluations = untimed(read_rows(run / "eval.jsonl"))
    assert [row["step"] for row in evaluations] == [0, 1, 2, 3] and evaluations == untimed(
        read_rows(again / "eval.jsonl")
    )
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"1", "3"}
    assert json.loads((run / "end.json").read_text())["exported"] == 1
    ours, theirs = weights(run / "export"), weights(again / "export")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    train.run(config, run)
    assert "is complete at step 3, before 6: no better eval/loss:min in 2 evaluations" in capsys.readouterr().err
    row = commands.evaluate_checkpoint(config, run, step="best")
    assert untimed([row]) == [evaluations[1]]
    # It goes on, under another learning rate and without an end, with the same reference.
    fields |= dict(eval__patience=0, train__steps=4, optimizer__learning_rate=1e-3)
    train.run(make_config(inputs, **fields), run)
    shown = capsys.readouterr().err
    assert "changed at step 3: eval.patience: 2 -> 0; train.steps: 6 -> 4; " in shown and ", 0 scored\n" in shown
    rates = [row["learning_rate"] for row in read_rows(run / "metrics.jsonl")]
    assert rates == pytest.approx([0, 5e-3, 1e-2, 1e-3 / 2])
    assert "| changed after update 3 |" not in (run / "export" / "README.md").read_text()  # the best is from before
    commands.export_checkpoint(make_config(inputs, **fields), run, None, step="last")
    assert "optimizer.learning_rate: 0.01 -> 0.001" in (run / "export-4" / "README.md").read_text()
    train.run(make_config(inputs, **fields | dict(optimizer__learning_rate=1.0)), run)
    assert "no update is left for a change (optimizer.learning_rate" in capsys.readouterr().err
    # Other pairs to evaluate on: evaluated and exported once, though no checkpoint is made with them.
    others = dict(optimizer__learning_rate=1.0, data__eval=str(inputs / "train.jsonl"))
    train.run(make_config(inputs, **fields | others), run)
    capsys.readouterr()
    train.run(make_config(inputs, **fields | others), run)
    assert "is complete at step 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train__steps": 5}, "config.train.steps: 5 updates, and the run has made 6"),
        (
            {"checkpoint__best": "eval/accuracy:max", "eval__every_steps": 1},
            "config.checkpoint.best: 'eval/accuracy'; expected a metric of this run's evaluations: eval/logits/chosen",
        ),
    ],
)
def test_a_run_that_cannot_go_on_so_is_refused(finished, inputs, fields, message):
    before = (finished / "config.json").read_text()
    with pytest.raises(InputError) as error:
        train.run(make_config(inputs, **fields), finished)
    assert message in str(error.value) and (finished / "config.json").read_text() == before


@pytest.mark.slow
def test_supervised_stage_comes_first_and_is_its_own_reference(inputs, tmp_path):
    config = make_config(inputs, sft__steps=3, sft__batch_pairs=8, sft__learning_rate=1e-2, train__steps=2)
    train.run(config, tmp_path / "run")
    stage = read_rows(tmp_path / "run" / "sft" / "metrics.jsonl")
    assert stage[-1]["loss"] < stage[0]["loss"] - 0.05
    assert not any(name.startswith("rewards/") or name.endswith("/rejected") for name in stage[0])
    # Nor is a rejected answer computed: what is real is the prompts and the chosen answers.
    assert stage[0]["tokens_real"] < 0.75 * read_rows(tmp_path / "run" / "metrics.jsonl")[0]["tokens_real"]
    first = read_rows(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    # What the second stage starts from is what the first one ended with.
    assert first["logps/chosen"] > read_rows(tmp_path / "run" / "sft" / "eval.jsonl")[0]["eval/logps/chosen"]


def test_supervised_stage_refuses_reference_values_of_the_model_before_it(inputs, tmp_path):
    rows = read_rows(inputs / "train.jsonl")
    given = [row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in rows]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    config = make_config(inputs, sft__steps=3, sft__batch_pairs=8, data__train=str(tmp_path / "given.jsonl"))
    with pytest.raises(InputError, match=r"config\.sft\.steps: got 3, and 40 pairs with reference log-probs"):
        train.run(config, tmp_path / "run")


@pytest.mark.slow
def test_two_stages_can_be_moved_and_called_by_another_path(tmp_path, monkeypatch):
    make_inputs(tmp_path / "run" / "inputs")
    config = make_config(Path("{workdir}/inputs"), sft__steps=2, sft__batch_pairs=8, train__steps=2)
    monkeypatch.chdir(tmp_path)
    train.run(config, Path("run"))
    first = untimed([commands.evaluate_checkpoint(config, tmp_path / "run")])
    (tmp_path / "run").rename(tmp_path / "moved")
    assert untimed([commands.evaluate_checkpoint(config, Path("moved"))]) == first
    # What a command that only reads cannot find it does not make.
    shutil.rmtree(tmp_path / "moved" / "sft")
    with pytest.raises(InputError, match=r"sft/export: no such folder; expected the fine-tuned model"):
        commands.evaluate_checkpoint(config, tmp_path / "moved")


def test_data_inside_a_working_folder_whose_name_would_be_read_as_several_is_refused(inputs, tmp_path):
    config = make_config(inputs, data__train="{workdir}/train.jsonl")
    with pytest.raises(InputError, match=r"without ',' and '\*'"):
        train.run(config, tmp_path / "lr=1,b=2")


@pytest.mark.slow
def test_log_every_steps_keeps_the_last_step(watched):
    assert [row["step"] for row in read_rows(watched.folder / "metrics.jsonl")] == [0, 4, 5]


@pytest.mark.slow
def test_evaluation_comes_every_so_many_steps_and_at_the_end(watched):
    assert [row["step"] for row in read_rows(watched.folder / "eval.jsonl")] == [0, 4, STEPS]


# --- refused before anything is written ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss__name": "sgimoid"}, "config.loss.name: got 'sgimoid'"),
        ({"optimizer__name": "adam"}, "config.optimizer.name"),
        ({"model__attention": "flash"}, "config.model.attention: got 'flash'"),
        ({"model__remat": "all"}, "config.model.remat: got 'all'"),
        ({"data__train": ""}, "config.data.train: empty"),
        ({"data__train": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"train__batch_pairs": 41}, "config.train.batch_pairs: got 41, and an epoch has 40 pairs"),
        ({"sft__steps": 1, "sft__batch_pairs": 64}, "config.sft.batch_pairs: got 64"),
        ({"prepare": "dpo_jax.nowhere:make"}, "config.prepare"),
        ({"hooks": "dpo_jax.nowhere:call"}, "config.hooks: 'dpo_jax.nowhere:call' cannot be imported"),
        ({"data__eval": "{inputs}/eval.jsonl*0.5"}, "config.data.eval: weight 0.5 of"),
        ({"data__train": "{inputs}/train.jsonl,{inputs}/train.jsonl*0.01"}, "leaves none of its pairs in an epoch"),
        ({"model__path": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_bad_run_is_refused_and_leaves_nothing(inputs, tmp_path, fields, message):
    fields = {k: v.replace("{inputs}", str(inputs)) if isinstance(v, str) else v for k, v in fields.items()}
    with pytest.raises(InputError) as error:
        train.run(make_config(inputs, **fields), tmp_path / "run")
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_workdir_of_another_run_is_refused_and_names_the_field(finished, inputs):
    before = (finished / "config.json").read_text()
    with pytest.raises(InputError, match=r"optimizer\.b1: 0\.9 -> 0\.8"):
        train.run(make_config(inputs, optimizer__b1=0.8), finished)
    assert (finished / "config.json").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "eval"])
def test_data_changed_under_a_run_is_refused(inputs, tmp_path, split):
    shutil.copytree(inputs, tmp_path / "inputs")
    config = make_config(tmp_path / "inputs", train__steps=2)
    train.run(config, tmp_path / "run")
    path = tmp_path / "inputs" / f"{split}.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    # Whether it is complete, as here, or goes on.
    for _ in range(2):
        with pytest.raises(
            InputError, match=rf"config\.data\.{split}: .*, which are not those of the checkpoint at step 2"
        ):
            train.run(config, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "export", ignore_errors=True)


@pytest.mark.slow
def test_refused_run_leaves_the_folder_to_the_corrected_one(inputs, tmp_path):
    with pytest.raises(InputError, match=r"config\.data\.row_length: got 32"):
        train.run(make_config(inputs, data__row_length=32, train__steps=1), tmp_path / "run")
    # Unset it is chosen from the pairs.
    train.run(make_config(inputs, data__row_length=None, train__steps=1), tmp_path / "run")


def test_export_in_another_type_is_another_run(finished, inputs):
    with pytest.raises(InputError, match=r"export\.dtype: '' -> 'bfloat16'"):
        train.run(make_config(inputs, export__dtype="bfloat16"), finished)


def test_evaluation_under_another_optimizer_reads_the_same_parameters(finished, inputs):
    row = commands.evaluate_checkpoint(make_config(inputs, optimizer__name="sgd", train__steps=1), finished)
    assert untimed([row]) == untimed([read_rows(finished / "eval.jsonl")[-1]])
    with pytest.raises(InputError, match=r"model\.path: .* -> '.*elsewhere'"):
        commands.evaluate_checkpoint(make_config(inputs, model__path=str(inputs / "elsewhere")), finished)


def test_reference_pass_of_a_loss_that_reads_none_is_refused(inputs, tmp_path):
    with pytest.raises(InputError, match=r"config\.loss\.name: 'sft', which reads no reference"):
        commands.score_reference(make_config(inputs, loss__name="sft"), tmp_path / "run")


def test_folder_that_cannot_be_written_to_is_refused(inputs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written to|: a file; expected a folder"):
        train.run(make_config(inputs), tmp_path / "file" / "run")


def test_evaluate_without_a_checkpoint_is_refused(inputs, tmp_path):
    with pytest.raises(InputError, match="no checkpoint in it; expected one of a training run"):
        commands.evaluate_checkpoint(make_config(inputs), tmp_path)
