"""What a run has behind it: the best of its evaluations, an early stop, and changes of its configuration."""

import dataclasses
import json
import math

import pytest

from dpo_jax import config, train
from dpo_jax.run import history, workdir
from dpo_jax.run.loop import Schedule
from dpo_jax.types import InputError


def configured(best="eval/loss:min", patience=0, **fields):
    chosen = config.Config(
        model=config.Model(path="m"),
        data=config.Data(eval="a"),
        checkpoint=config.Checkpoint(best=best),
        eval=config.Eval(every_steps=1, patience=patience),
    )
    return dataclasses.replace(chosen, **fields)


def of(*values, best="eval/loss:min", patience=0):
    past = history.History(history.goal_of(configured(best, patience)), patience, [], bool(best))
    for step, value in enumerate(values):
        past.add(step, {"eval/loss": value})
    return past


def test_the_best_is_the_first_of_equals_after_the_first_update():
    assert of(0.1, 3.0, 2.0, 2.0, math.nan).best == 2
    assert of(9.0, 3.0, 2.0, best="eval/loss:max").best == 1
    assert of(1.0).best is None and of(1.0, math.nan).best is None
    assert of(1.0, 2.0, best="", patience=1).kept is None  # decides the end, and keeps nothing


def test_a_run_ends_after_so_many_evaluations_without_a_better_one():
    assert [of(*[0, 3, 2, 4, 4][:n], patience=2).over for n in range(1, 6)] == [False, False, False, False, True]
    assert not of(0, 3, 4, 5, 6).over  # patience of 0
    assert of(0, math.nan, math.nan, patience=2).over
    assert history.goal_of(configured("", 2)) == ("eval/loss", False) and history.goal_of(configured("")) is None


@pytest.fixture
def folder(tmp_path):
    """A working folder with four evaluations, the second one the best."""
    rows = [{"step": step, "eval/loss": value} for step, value in enumerate((0.1, 3.0, 1.0, 2.0, 4.0))]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(config.to_json(configured()))
    return tmp_path


def test_only_evaluations_with_a_checkpoint_and_of_the_present_pairs_count(folder, monkeypatch):
    chosen = configured()
    assert history.read_history(chosen, folder, before=5, kept=[2, 4]).kept == 2
    assert history.read_history(chosen, folder, before=2, kept=[1, 2]).kept == 1
    assert history.read_history(chosen, folder, before=5, kept=[3, 4]).kept == 3
    monkeypatch.setattr(workdir, "kept_steps", lambda folder: [2, 4])
    assert [history.step_of(which, chosen, folder) for which in ("", "best", "last", "4", "2")] == [2, 2, 4, 4, 2]
    assert history.step_of("", configured(""), folder) == 4
    for which, best in (("3", "eval/loss:min"), ("newest", "eval/loss:min"), ("best", "")):
        with pytest.raises(InputError, match=f"--step: got {which}; expected last, best or a step that is kept: 2, 4"):
            history.step_of(which, configured(best), folder)
    # The evaluation at an end beyond which the run now goes is kept, unless the schedule makes it again.
    assert [train.keeps_evaluation(Schedule(3, total, 2), folder) for total in (9, 3)] == [True, False]
    history.record_changes({"data.eval": ["a", "b"]}, folder, 3)
    assert not train.keeps_evaluation(Schedule(3, 9, 2), folder)
    assert history.read_history(configured(), folder, before=5, kept=[2, 3, 4]).kept == 3


def test_changes_are_recorded_once_and_take_an_end_away(folder):
    (folder / "export").mkdir()
    (folder / "export" / "config.json").touch()  # which makes it complete
    history.record_end(folder, step=4, total=4, exported=2, reason="all updates made")
    assert history.read_end(folder)["exported"] == 2
    chosen = configured(train=config.Train(steps=9), eval=config.Eval(every_steps=2))
    changes = history.changes_of(chosen, folder)
    assert changes == {"train.steps": [None, 9]}  # the other field decides nothing that is recorded
    for _ in range(2):
        history.record_changes(changes, folder, 4)
    (row,) = history.read_changes(folder)
    assert row["step"] == 4 and row["changes"] == changes and history.shown(changes) == "train.steps: unset -> 9"
    assert not history.read_end(folder)


def test_updates_are_those_of_the_settings_before_them():
    first, second = (configured(optimizer=config.Optimizer(learning_rate=rate)) for rate in (1e-3, 1e-4))
    change = {"step": 6, "changes": {"optimizer.learning_rate": [1e-3, 1e-4], "data.eval": ["a", "b"]}}

    def digest(chosen, step, *changes):
        return workdir.run_digest(chosen, "pairs", changes, step)

    assert digest(second, 6, change) == digest(first, 6) == digest(first, 3) != digest(second, 6)
    assert digest(second, 7, change) not in (digest(first, 7), digest(second, 7))
    assert digest(configured("eval/loss:max", data=config.Data(eval="x")), 7) == digest(configured(), 7)
