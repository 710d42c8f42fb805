"""One run on many meshes, in one process and over several: the same pairs, numbers and checkpoints."""

import dataclasses
import json
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from dpo_jax import config, sharding, trees
from dpo_jax.data import layout, packing
from dpo_jax.demo import quickstart
from dpo_jax.hf import checkpoints
from dpo_jax.reference import scoring_pass
from dpo_jax.run import choices, programs
from dpo_jax.run.inputs import Source
from dpo_jax.run.state import abstract_state, load_params
from tests.support import hf_folders
from tests.support.processes import Run, arguments, wait_for_all
from tests.support.runs import load_inputs, make_config, make_inputs, make_programs, read_rows
from tests.test_layout import random_pairs, tokens_of

pytestmark = pytest.mark.processes
STEPS, SAVED = 10, 5
PAIRS = 100  # fewer than the steps read, so that a second epoch begins on the way
BOUND = 1e-5  # what another order of summation may change, relative
SIZES = dict(hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=8, head_dim=8)


class Place(NamedTuple):
    """Where a run computes."""

    processes: int
    devices: int  # of all processes together
    mesh: tuple[int, int, int]  # replica, fsdp, tensor
    rows: int  # in a microbatch

    @property
    def redone(self) -> int:
        """Steps that resumed runs make here: each takes long where several processes share a machine."""
        return STEPS - SAVED if self.processes == 1 else 2

    @property
    def options(self) -> dict[str, Any]:
        """Of `Run`."""
        return dict(processes=self.processes, devices=self.devices)

    def fields(self) -> dict[str, Any]:
        sizes = dict(zip(("mesh__replica", "mesh__fsdp", "mesh__tensor"), self.mesh, strict=True))
        return sizes | dict(train__microbatch_rows=self.rows, reference__microbatch_rows=self.rows)


# As few rows as there can be, for many microbatches; in one place twice as many, so that the last one may be cut.
ALONE = "one device"
PLACES = {
    ALONE: Place(1, 1, (1, 1, 1), rows=1),
    "fsdp 8": Place(1, 8, (1, 8, 1), rows=8),
    "tensor 8": Place(1, 8, (1, 1, 8), rows=1),
    "fsdp 4, tensor 2": Place(1, 8, (1, 4, 2), rows=8),
    "replica 2, fsdp 2, tensor 2": Place(1, 8, (2, 2, 2), rows=4),
    "2 processes, fsdp 2, tensor 2": Place(2, 4, (1, 2, 2), rows=2),  # only fsdp crosses from process to process
    "4 processes, fsdp 2, tensor 2": Place(4, 4, (1, 2, 2), rows=2),  # both do
}
OTHERS = [name for name in PLACES if name != ALONE]
# Whose checkpoints each place goes on with: one device with all, and all with that of one device. So each place writes
# what another can read, and reads what another wrote. That a mesh reads what a mesh has written, each shows with that
# of the place before it.
SOURCES = {ALONE: OTHERS} | {name: [ALONE, OTHERS[i - 1]] for i, name in enumerate(OTHERS)}


def write_model(folder, **sizes):
    """Random weights of a scale at which a network can train: from larger ones, rounding errors grow tenfold a step."""
    hf = hf_folders.LLAMA | SIZES | sizes
    hf |= dict(vocab_size=quickstart.VOCAB_SIZE, max_position_embeddings=256, eos_token_id=0)
    shutil.rmtree(folder / "random", ignore_errors=True)
    checkpoints.save_new(quickstart.initial_params(0, hf), hf_config=hf, out=folder / "random")
    for path in (folder / "random").iterdir():
        shutil.copy(path, folder / "model")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), train_pairs=PAIRS, base=hf_folders.LLAMA | SIZES)
    write_model(folder, num_hidden_layers=2)
    return folder


def recipe(inputs, **fields):
    """A run of ten steps in which every weight moves by a few per cent."""
    chosen = dict(
        data__eval="",
        data__row_length=128,
        train__steps=STEPS,
        train__batch_pairs=16,
        checkpoint__every_steps=SAVED,
        checkpoint__keep=2,
        optimizer__learning_rate=1e-3,
        # Key biases matter so little that much of their gradient is rounding error, which a smaller one would scale up.
        optimizer__eps=1e-6,
    )
    return make_config(inputs, **chosen, **fields)


def write_recipe(inputs, name, **fields):
    path = inputs / f"{name}.json"
    path.write_text(config.to_json(recipe(inputs, **fields)))
    return path


def in_every_place(start):
    """Calls `start(name, place)`, which starts a `Run`, for all of PLACES, and waits until all have ended well.

    Those of one process run at the same time: much of what they do, one core does.
    """
    alone = [name for name, place in PLACES.items() if place.processes == 1]
    for names in (alone, *([name] for name in PLACES if name not in alone)):
        wait_for_all((start(name, PLACES[name]) for name in names), within_s=600)


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """A folder with the same run in every place, by its name."""
    folder = tmp_path_factory.mktemp("runs")

    def start(name, place):
        command = arguments("train", write_recipe(inputs, name, **place.fields()), folder / name)
        return Run(command, folder / "output" / name, **place.options)

    in_every_place(start)
    return folder


@pytest.fixture(scope="module")
def resumed(runs, inputs, tmp_path_factory):
    """A folder for every place, with the runs of its SOURCES: each stopped half-way there and resumed here."""
    folder = tmp_path_factory.mktemp("resumed")

    def start(name, place):
        for other in SOURCES[name]:
            copy = shutil.copytree(runs / other, folder / name / other)
            shutil.rmtree(copy / "checkpoints" / str(STEPS))
            shutil.rmtree(copy / "export")
        workdirs = [folder / name / other for other in SOURCES[name]]
        command = [write_recipe(inputs, f"{name} again", **place.fields()), *workdirs, f"--steps={place.redone}"]
        return Run(command, folder / "output" / name, module="tests.support.resumes", **place.options)

    in_every_place(start)
    return folder


def assert_same_run(folder, other, steps=STEPS):
    ours, theirs = read_rows(folder / "metrics.jsonl"), read_rows(other / "metrics.jsonl")[:steps]
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(steps))

    def column(rows, name):
        return np.array([row[name] for row in rows])

    for name in ("epoch", "learning_rate", "tokens_real"):
        assert column(ours, name).tolist() == column(theirs, name).tolist(), name
    for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
        np.testing.assert_allclose(column(ours, name), column(theirs, name), rtol=BOUND, err_msg=name)
    # A difference of log-probs of about -200, each off by a few units in the last place.
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        np.testing.assert_allclose(column(ours, name), column(theirs, name), rtol=0, atol=BOUND, err_msg=name)
    if steps < STEPS:
        return
    ours, theirs = (load_file(each / "export" / "model.safetensors") for each in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, weights in theirs.items():
        np.testing.assert_allclose(ours[name], weights, rtol=0, atol=BOUND * abs(weights).max(), err_msg=name)


@pytest.mark.slow
def test_run_moves_every_weight(runs, inputs):
    before, after = (load_file(path / "model.safetensors") for path in (inputs / "model", runs / ALONE / "export"))
    for name, weights in before.items():
        assert abs(after[name] - weights).max() > 100 * BOUND * abs(weights).max(), name
    losses = [row["loss"] for row in read_rows(runs / ALONE / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_run_is_the_same_on_every_mesh(runs, name):
    assert_same_run(runs / name, runs / ALONE)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_checkpoint_of_another_mesh_goes_on(resumed, runs, name):
    output = (resumed / "output" / name / "process-0.txt").read_text()
    assert output.count(f"steps {SAVED} to {STEPS}: ") == len(SOURCES[name]) == (6 if name == ALONE else 2)
    for other in SOURCES[name]:
        assert_same_run(resumed / name / other, runs / ALONE, SAVED + PLACES[name].redone)


def test_tensor_axis_cuts_every_matrix(inputs):
    chosen = recipe(inputs, **PLACES["tensor 8"].fields())
    model, _ = checkpoints.read_config(inputs / "model")
    built = programs.make_programs(chosen, choices.objective_of(chosen.loss), model, np.array([[20, 30, 30]]))
    params = load_params(Source(inputs / "model", None, 0), built)
    for path, leaf in trees.flatten(params).items():
        held = {shard.data.size for shard in leaf.addressable_shards}
        cut = path.endswith(("kernel", "embedding")) or "/".join(path.split("/")[-2:]) in {"q/bias", "k/bias", "v/bias"}
        cut |= path.endswith(("gate/bias", "up/bias"))
        assert held == {leaf.size // 8 if cut else leaf.size}, path


@pytest.mark.slow
def test_update_on_cpus_sums_without_the_collective_that_fails_there(inputs):
    # Wrong once in some ten thousand times, between processes: no run of a test is sure to meet it.
    chosen = recipe(inputs, **PLACES["replica 2, fsdp 2, tensor 2"].fields())
    read = load_inputs(chosen, training=True)
    built = make_programs(chosen, read)
    tx, _ = choices.optimizer_of(chosen.optimizer, total_steps=STEPS)
    state = abstract_state(built, tx)
    shape = built.update_shape
    batch = layout.collate([read.sets["train"][i] for i in range(shape.pairs)], None, shape)
    update = programs.make_update(built, tx, state)
    text = update.compile(state, {}, sharding.put(batch, built.mesh)).as_text() or ""
    assert " all-reduce(" in text and "reduce-scatter" not in text


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("rows", [8, 16])
def test_processes_together_write_the_whole_batch(rows, processes):
    pairs = random_pairs(40)
    shape = packing.Shape(pairs=40, rows=rows, row_length=64, microbatches=8, layout="shared", shards=8)
    each = 8 // processes
    shares = [tuple(range(i * each, (i + 1) * each)) for i in range(processes)]

    def collate(here):
        values = np.arange(80.0).reshape(40, 2)
        part, sums = dataclasses.replace(shape, local_shards=here), {"shared_logps": values / 2}
        tokens = tokens_of(pairs, 3)
        return layout.collate(pairs, values, part, reference_sums=sums, tokens=tokens)

    whole, nothing = collate(None), collate(())
    parts = [collate(here) for here in shares]
    for part, here in zip(parts, shares, strict=True):
        mine = np.isin(np.arange(rows) // (rows // 8), here)
        for ours, all_of_it, padding in zip(part.rows, whole.rows, nothing.rows, strict=True):
            np.testing.assert_array_equal(ours[:, mine], all_of_it[:, mine])
            np.testing.assert_array_equal(ours[:, ~mine], padding[:, ~mine])
        for ours, all_of_it in zip(jax.tree.leaves(part[1:]), jax.tree.leaves(whole[1:]), strict=True):
            np.testing.assert_array_equal(ours, all_of_it)
    written = [(part.rows.slot >= 0).sum() for part in parts]
    assert all(written) and sum(written) == (whole.rows.slot >= 0).sum() == sum(
        len(p.chosen) + len(p.rejected) for p in pairs
    )


def read_part(path):
    table = pq.read_table(path).to_pydict()
    return {key: values for key, *values in zip(table["key"], table["chosen"], table["rejected"], strict=True)}


@pytest.mark.slow
def test_reference_pass_of_four_processes_is_that_of_one(tmp_path):
    count = 4 * scoring_pass.PART_PAIRS + 76
    folder = make_inputs(tmp_path / "inputs", train_pairs=count, eval_pairs=1, base=hf_folders.LLAMA | SIZES)
    write_model(folder, num_hidden_layers=1)
    path = write_recipe(folder, "recipe", reference__path="store")
    # Each in a folder of its own, where a relative path is another store: what lies there, that process wrote.
    places = {processes: [tmp_path / f"{i} of {processes}" for i in range(processes)] for processes in (1, 4)}
    command, runs = arguments("reference", path, tmp_path / "run"), []
    for processes, folders in places.items():
        for place in folders:
            place.mkdir()
        places_of = dict(enumerate(folders))
        runs.append(Run(command, tmp_path / str(processes), folders=places_of, processes=processes, devices=processes))
    wait_for_all(runs)
    stores = {
        processes: [[read_part(part) for part in sorted((place / "store").glob("*.parquet"))] for place in folders]
        for processes, folders in places.items()
    }
    (alone,), together = stores[1], stores[4]
    assert sorted(map(len, alone)) == [76, *[scoring_pass.PART_PAIRS] * 4]
    assert [sorted(map(len, parts)) for parts in together] == [
        [76, scoring_pass.PART_PAIRS],
        *[[scoring_pass.PART_PAIRS]] * 3,
    ]
    one, four = ({key: value for part in parts for key, value in part.items()} for parts in (alone, sum(together, [])))
    assert one.keys() == four.keys() and len(one) == count
    keys = list(one)
    np.testing.assert_allclose([four[key] for key in keys], [one[key] for key in keys], rtol=BOUND)
    assert json.loads((tmp_path / "0 of 4" / "store" / "manifest.json").read_text()) == json.loads(
        (tmp_path / "0 of 1" / "store" / "manifest.json").read_text()
    )
