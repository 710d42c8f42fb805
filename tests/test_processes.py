"""Several real processes: start, disagreement, a killed peer, a request to stop, and resuming."""

import json
import shutil
import signal
import socket

import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_jax import config
from dpo_jax.runtime import hosts
from tests.support.processes import ROOT, Run, arguments, wait_for_all
from tests.support.runs import make_config, make_inputs, read_rows, untimed

pytestmark = pytest.mark.processes
STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def recipe(inputs):
    """The configuration of a run, as a file that every process reads."""
    path = inputs / "config.json"
    path.write_text(config.to_json(make_config(inputs, train__steps=STEPS, train__batch_pairs=8)))
    return path


def rows(workdir):
    return read_rows(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").exists() else []


def test_processes_that_disagree_on_the_configuration_or_code_say_who_and_end(recipe, tmp_path):
    shutil.copytree(ROOT / "dpo_jax", tmp_path / "code" / "dpo_jax")
    with (tmp_path / "code" / "dpo_jax" / "steps.py").open("a") as file:
        file.write("# changed\n")
    own, environment = {1: ["--config.loss.beta=0.3"]}, {1: {"PYTHONPATH": str(tmp_path / "code")}}
    places = {i: tmp_path / f"host-{i}" for i in range(2)}  # where no dpo_jax is that would come first
    for place in places.values():
        place.mkdir()
    command = arguments("train", recipe, tmp_path / "run")
    with Run(command, tmp_path, processes=2, extra_arguments=own, environment=environment, folders=places) as run:
        for ended in run.ended_all(within_s=60):
            assert ended.status == 2
            assert "loss.beta is null on process 0" in ended.output and "0.3 on process 1" in ended.output
            assert "configuration: code is" in ended.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_disagree_on_data_or_step_say_who_and_end(recipe, inputs, tmp_path):
    chosen = json.loads(recipe.read_text())
    chosen["data"] |= {"train": "train.jsonl", "eval": ""}
    (tmp_path / "config.json").write_text(json.dumps(chosen))
    places = {i: tmp_path / f"host-{i}" for i in range(2)}
    for place in places.values():
        place.mkdir()
        shutil.copy(inputs / "train.jsonl", place)
    lines = (inputs / "train.jsonl").read_text().splitlines(keepends=True)
    command = arguments("train", tmp_path / "config.json", "run")

    (places[1] / "train.jsonl").write_text("".join(lines[1:]))
    with Run(command, tmp_path / "data", processes=2, folders=places) as run:
        for ended in run.ended_all(within_s=60):
            assert ended.status == 2 and "data and model: train is" in ended.output and "on process 1" in ended.output

    # Two folders of one name: the second holds a run that is further along.
    shutil.copy(inputs / "train.jsonl", places[1])
    alone = arguments("train", tmp_path / "config.json", "run", mesh__fsdp=4)
    with Run(alone, tmp_path / "alone", processes=1, folders={0: places[1]}) as run:
        assert run.ended_all()[0].status == 0
    with Run(command, tmp_path / "step", processes=2, folders=places) as run:
        for ended in run.ended_all(within_s=60):
            assert ended.status == 2 and "step is null on process 0" in ended.output and f"{STEPS} on" in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_others_name_a_killed_process_and_end_within_seconds(recipe, tmp_path, killed):
    command = arguments("train", recipe, tmp_path / "run", train__steps=100_000, checkpoint__every_steps=100_000)
    with Run(command, tmp_path, processes=2) as run:
        run.wait_for(lambda: len(rows(tmp_path / "run")) > 2)
        run.processes[killed].kill()
        ended = run.ended_all(within_s=60)
    assert ended[killed].status == -signal.SIGKILL
    left, host = ended[1 - killed], socket.gethostname()
    assert left.status == 1 and left.seconds < 20, left
    assert f"\nerror: process {killed} ({host}) no longer answers; expected " in left.output, left.output
    # Without process 0, JAX may say so as well, before this process ends.
    assert "Traceback" not in left.output and ("coordination" not in left.output or killed == 0), left.output


@pytest.mark.slow
def test_others_end_when_one_fails(recipe, inputs, tmp_path):
    # A model folder that only one host lacks: an error that the others do not meet.
    places = {i: tmp_path / f"host-{i}" for i in range(2)}
    for place in places.values():
        place.mkdir()
    shutil.copytree(inputs / "model", places[0] / "model")
    command = arguments("train", recipe, tmp_path / "run", model__path="model")
    with Run(command, tmp_path, processes=2, folders=places) as run:
        first, second = run.ended_all(within_s=60)
    assert second.status == 2 and "'model', no such folder" in second.output
    assert first.status == 1 and "process 1" in first.output and "no such folder" in first.output


@pytest.mark.slow
def test_a_request_to_one_stops_all_at_one_step_and_the_command_goes_on(recipe, tmp_path):
    # Ctrl-C, which the process makes a SIGTERM to itself.
    steps = 24
    fields = dict(train__steps=steps, checkpoint__every_steps=1000, train__epochs=1)
    command = arguments("train", recipe, tmp_path / "run", **fields)
    with Run(command, tmp_path / "first", processes=2) as run:
        run.wait_for(lambda: len(rows(tmp_path / "run")) > 2)
        run.processes[1].send_signal(signal.SIGINT)
        ended = run.ended_all()
    assert [each.status for each in ended] == [hosts.STOPPED] * 2, ended
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(saved) == 1 and 2 < saved[0] < steps
    assert f"saved at step {saved[0]} of {steps}" in ended[0].output
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(saved[0]))

    whole = arguments("train", recipe, tmp_path / "whole", **fields)
    wait_for_all([Run(command, tmp_path / "second", processes=2), Run(whole, tmp_path / "third", processes=2)])
    assert untimed(rows(tmp_path / "run")) == untimed(rows(tmp_path / "whole"))
    exported = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert exported[0] == exported[1]


def by_one_and_by_two(folder, command, recipe, *flags, **fields):
    """Runs a command by one process and, at the same time, by two; returns the working folder of each."""
    workdirs = [folder / "alone", folder / "together"]
    given = [[*arguments(command, recipe, workdir, **fields), *flags] for workdir in workdirs]
    wait_for_all(Run(each, folder / command / str(i), processes=i) for i, each in enumerate(given, 1))
    return workdirs


@pytest.mark.slow
def test_adapters_train_over_processes_as_in_one(recipe, tmp_path):
    """On a quantized model, and merged in the end."""
    pytest.importorskip("qwix", reason="the quantize extra")
    fields = dict(lora__rank=2, lora__base="int8")
    alone, together = by_one_and_by_two(tmp_path, "train", recipe, **fields)
    by_one_and_by_two(tmp_path, "export", recipe, "--merge", **fields)
    one, other = ([row["loss"] for row in rows(each)] for each in (alone, together))
    alone, together = (load_file(each / f"merged-{STEPS}" / "model.safetensors") for each in (alone, together))
    assert other == pytest.approx(one, abs=1e-4) and len(set(one)) > 2
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        np.testing.assert_allclose(together[name], tensor, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"loss__name": "kto"}, {"loss__name": "tdpo2", "reference__sync_steps": 3}])
def test_objectives_that_read_more_train_over_processes_as_in_one(recipe, tmp_path, fields):
    """Mismatched answers; token values of a synced reference, of which each process stores its share."""
    alone, together = (untimed(rows(each)) for each in by_one_and_by_two(tmp_path, "train", recipe, **fields))
    assert len(alone) == len(together) == STEPS
    for one, two in zip(alone, together, strict=True):
        assert one.keys() == two.keys() and two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        for name in {"kl", "sequence_kl/rejected"} & one.keys():
            assert two[name] == pytest.approx(one[name], abs=1e-3)
