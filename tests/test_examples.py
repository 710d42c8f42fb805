"""The examples do what they say."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_jax
from dpo_jax import config
from dpo_jax.losses import make_loss
from dpo_jax.steps import init_state, make_train_step
from dpo_jax.types import Batch
from examples import nnx_step
from tests.support import runs, user_script

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
FOCAL = "examples.own_loss:focal"
RATIOS = np.array([[3.0, -2.0], [0.0, 0.0], [-40.0, 5.0]])


def focal(options, name=FOCAL):
    return make_loss(name, options)(jnp.asarray(RATIOS), jnp.zeros((3, 2)), lengths=jnp.ones((3, 2), int))


def test_own_loss_is_the_focal_loss():
    # -(1 - p)^2 log p with p = S(0.1 h), h = 5, 0, -45.
    p = 1 / (1 + np.exp(-0.1 * np.array([5, 0, -45])))
    np.testing.assert_allclose(focal({"gamma": 2.0}), -((1 - p) ** 2) * np.log(p), rtol=1e-5)
    np.testing.assert_allclose(focal({"gamma": 0.0}), focal({}, "sigmoid"), rtol=1e-6)


def test_own_loss_trains():
    # The model of README.md: a table of four numbers, and a pair is two indices into it.
    loss_fn, tx = make_loss(f"{FOCAL}*0.8,ipo*0.2", {"beta": 0.5}), optax.adam(0.1)
    step = jax.jit(make_train_step(lambda table, rows: jax.nn.log_softmax(table)[rows], loss_fn, tx))
    batch = Batch(
        rows=np.array([[[0, 1], [0, 2], [3, 2]]]),
        count=np.int32(1),
        present=np.ones((1, 3), bool),
        reference=np.full((3, 2), np.log(0.25), np.float32),
        lengths=np.ones((3, 2), np.int32),
    )
    state, losses = init_state(jnp.zeros(4), tx, loss_fn), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(0.8 * np.log(2) / 2 + 0.2, rel=1e-5)
    assert losses[-1] < 0.5 * losses[0] and metrics["rewards/accuracies"] == 1


@pytest.mark.slow
def test_own_loss_trains_from_the_command_line(tmp_path):
    chosen = runs.make_config(runs.make_inputs(tmp_path), train__steps=12)
    (tmp_path / "config.json").write_text(config.to_json(chosen))
    command = [sys.executable, "-m", "dpo_jax", "train", f"--config={tmp_path}/config.json"]
    command += [f"--config.loss.name={FOCAL}", "--config.loss.gamma=2", f"--workdir={tmp_path}/run"]
    subprocess.run(command, cwd=ROOT, check=True)
    rows = runs.read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(np.log(2) / 4, rel=1e-3)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


def test_notebook_is_stored_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
def test_notebook_runs_and_learns(capsys):
    names = {}
    for number, cell in enumerate(json.loads(NOTEBOOK.read_text())["cells"]):
        if cell["cell_type"] == "code":
            code = compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec")
            with jax.numpy_rank_promotion("allow"):  # as where a user runs it
                exec(code, names)
    printed = capsys.readouterr().out
    assert "loss 0.693 before, 0.0" in printed and printed.count("beta ") == 3


def test_the_package_imports_jax_when_a_function_is_used():
    code = "import sys, dpo_jax; assert 'jax' not in sys.modules and {*dpo_jax.__all__} <= {*dir(dpo_jax)}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert all(getattr(dpo_jax, name) is not None for name in dpo_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        dpo_jax.lod  # noqa: B018


def test_script_of_a_user_runs():
    assert user_script.train(50) < 0.3 and user_script.refused().startswith("make_loss(gamma=...)")


def test_nnx_step_learns_and_says_so(capsys):
    losses, before, after = nnx_step.main()
    assert losses[0] > 0.5 and losses[-1] < 0.1
    assert 0.4 < before < 0.6 and after > 0.95
    assert f"accuracy {before:.3f} before, {after:.3f} after" in capsys.readouterr().out
