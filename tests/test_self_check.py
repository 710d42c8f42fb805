"""A run that starts at its reference begins with margins of 0, or stops and says what disagrees."""

import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax import commands, train
from dpo_jax.types import InputError
from tests.support.hf_folders import edit_weights
from tests.support.runs import make_config, make_inputs, read_rows, untimed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def store(inputs, tmp_path_factory):
    """The reference log-probs of the inputs, as a pass has stored them."""
    folder = tmp_path_factory.mktemp("runs") / "scored"
    commands.score_reference(make_config(inputs), folder)
    return folder / "reference"


def one_step(inputs, store, **fields):
    return make_config(inputs, reference__path=str(store), train__steps=1, data__eval="", **fields)


def edited(store, folder, edit):
    """A copy of a store with the values of its rejected answers changed."""
    shutil.copytree(store, folder)
    for path in folder.glob("part-*.parquet"):
        table = pq.read_table(path)
        at = table.column_names.index("rejected")
        pq.write_table(table.set_column(at, "rejected", pa.array(edit(table.column("rejected").to_numpy()))), path)
    return folder


def test_rejected_log_probs_of_zero_in_the_store_stop_the_run(inputs, store, tmp_path):
    config = one_step(inputs, edited(store, tmp_path / "store", np.zeros_like))
    with pytest.raises(InputError, match="policy and reference differ by .* the cause is the store") as error:
        train.run(config, tmp_path / "run")
    assert error.value.place == str(tmp_path / "store")
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.slow
def test_values_of_other_pairs_stop_the_run_though_their_mean_is_right(inputs, store, tmp_path):
    config = one_step(inputs, edited(store, tmp_path / "store", lambda values: np.roll(values, 1)))
    with pytest.raises(InputError, match="the cause is the store"):
        train.run(config, tmp_path / "run")


@pytest.mark.slow
def test_other_weights_in_the_state_stop_the_run(inputs, store, tmp_path, monkeypatch):
    real = train.first_state

    def moved(*arguments):
        state, frozen = real(*arguments)
        return state._replace(params=jax.tree.map(lambda x: x * 1.5, state.params)), frozen

    monkeypatch.setattr(train, "first_state", moved)
    with pytest.raises(InputError, match="the cause is the weights") as error:
        train.run(one_step(inputs, store), tmp_path / "run")
    assert error.value.place == str(inputs / "model")


@pytest.mark.slow
def test_damaged_tokens_stop_the_run(inputs, store, tmp_path):
    config = one_step(inputs, store, data__cache_dir=str(tmp_path / "cache"))
    commands.inspect(config, tmp_path / "run", pairs=0)
    (path,) = (tmp_path / "cache").rglob("tokens.npy")
    tokens = np.load(path, mmap_mode="r+")
    tokens[:] = np.roll(tokens, 7)
    tokens.flush()
    with pytest.raises(InputError, match="the cause is the data"):
        train.run(config, tmp_path / "run")


@pytest.mark.slow
def test_weights_that_are_not_finite_are_named_and_not_the_store(inputs, tmp_path):
    shutil.copytree(inputs, tmp_path / "inputs")
    edit_weights(tmp_path / "inputs" / "model", lambda tensors: tensors["model.norm.weight"].fill(np.nan))
    with pytest.raises(InputError, match="the cause is the weights: they give log-probs that are not finite"):
        train.run(make_config(tmp_path / "inputs", train__steps=1, data__eval=""), tmp_path / "run")


@pytest.mark.slow
def test_damaged_store_of_a_sync_is_named_and_made_again(inputs, tmp_path):
    fields = {
        "reference__sync_steps": 2,
        "train__steps": 4,
        "checkpoint__every_steps": 1,
        "checkpoint__keep": 9,
        "data__eval": "",
    }
    config, folder = make_config(inputs, **fields), tmp_path / "run"
    train.run(config, folder)
    rows = untimed(read_rows(folder / "metrics.jsonl"))
    synced = folder / "reference" / "sync-000002"
    shutil.rmtree(folder / "export")
    for step in (3, 4):
        shutil.rmtree(folder / "checkpoints" / str(step), ignore_errors=True)
    shutil.copytree(synced, tmp_path / "kept")
    shutil.rmtree(synced)
    edited(tmp_path / "kept", synced, lambda values: values + 5)
    with pytest.raises(InputError, match="the cause is the store: the policy at step 2") as error:
        train.run(config, folder)
    assert error.value.place == str(synced)
    shutil.rmtree(synced)
    train.run(config, folder)
    assert untimed(read_rows(folder / "metrics.jsonl")) == rows


@pytest.mark.slow
def test_own_loss_without_beta_reads_both_answers_and_leaves_a_store_that_others_can_use(inputs, tmp_path):
    store = tmp_path / "store"
    train.run(one_step(inputs, store, loss__name="tests.support.own_losses:margin"), tmp_path / "own")
    stored = np.concatenate([pq.read_table(path).column("rejected").to_numpy() for path in store.glob("*.parquet")])
    assert np.all(stored < -1)
    (own,) = read_rows(tmp_path / "own" / "metrics.jsonl")
    assert own["loss"] == pytest.approx(np.log(2), abs=1e-5) and "logps/rejected" in own
    train.run(one_step(inputs, store), tmp_path / "sigmoid")
    (first,) = read_rows(tmp_path / "sigmoid" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5) and abs(first["rewards/margins"]) < 1e-5
