"""Metrics of a run on disk, in trackers and on the terminal, and their continuation on resuming."""

import io
import json
import sys
import time
import types
from typing import Any

import pytest

from dpo_jax.reporting import trackers
from dpo_jax.run.checkpoints import Checkpoints
from dpo_jax.runtime import terminal
from dpo_jax.types import InputError

NONE: dict[str, Any] = {"tensorboard": False, "wandb": ""}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, steps):
    writer = trackers.JsonlWriter(path)
    for step in steps:
        writer.write(step, {"loss": step / 2})
    writer.close()


def test_jsonl_rows_can_be_read_before_the_file_is_closed(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    writer = trackers.JsonlWriter(path)
    writer.write(0, {"loss": 0.5})
    assert rows(path) == [{"step": 0, "loss": 0.5}]
    writer.write(1, {"loss": float("inf"), "rewards/margins": -1.0})
    assert rows(path)[1] == {"step": 1, "loss": float("inf"), "rewards/margins": -1.0}
    writer.close()


def test_jsonl_resuming_gives_the_file_of_an_uninterrupted_run(tmp_path):
    path, whole = tmp_path / "metrics.jsonl", tmp_path / "whole.jsonl"
    write(whole, range(6))
    write(path, range(5))  # the checkpoint was at step 3
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    writer = trackers.JsonlWriter(path)
    writer.truncate_after(2)
    assert rows(path) == rows(whole)[:3]
    for step in (3, 4, 5):
        writer.write(step, {"loss": step / 2})
    writer.close()
    assert path.read_text() == whole.read_text()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["metrics.jsonl", "whole.jsonl"]


def test_jsonl_a_torn_line_is_dropped_even_if_its_step_would_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1}\n{"step": 1, "loss": 1}')  # the value may have had more digits
    trackers.JsonlWriter(path).truncate_after(9)
    assert rows(path) == [{"step": 0, "loss": 1}]


def test_jsonl_truncating_a_file_that_is_not_there_makes_none(tmp_path):
    trackers.JsonlWriter(tmp_path / "metrics.jsonl").truncate_after(-1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["{", "[]", '{"loss": 1}', "7"])
def test_jsonl_refuses_to_drop_what_it_did_not_write(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    text = f'{{"step": 0}}\n{line}\n{{"step": 1}}\n'
    path.write_text(text)
    with pytest.raises(InputError, match="metrics.jsonl:2"):
        trackers.JsonlWriter(path).truncate_after(0)
    assert path.read_text() == text


def test_nothing_is_opened_unless_asked_for(tmp_path):
    trackers.check_available(**NONE)
    assert trackers.open_trackers(tmp_path, **NONE, config={}, resume_step=0) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "package, field, asked",
    [
        ("tensorboardX", "config.log.tensorboard", {"tensorboard": True}),
        ("wandb", "config.log.wandb", {"wandb": "project"}),
    ],
)
def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch, package, field, asked):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError) as caught:
        trackers.check_available(**NONE | asked)
    assert caught.value.place == field
    assert "pip install 'dpo-jax[track]'" in caught.value.remedy


def test_tensorboard_reads_back_what_was_written_and_resuming_hides_the_rest(tmp_path):
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    asked: dict[str, Any] = NONE | {"tensorboard": True}
    killed = []  # before the first checkpoint, and after the one at 2: nothing is closed
    for resume_step, steps, scale in [(0, range(3), 7.0), (0, range(4), 1.0), (2, range(2, 6), 10.0)]:
        (tracker,) = trackers.open_trackers(tmp_path, **asked, config={}, resume_step=resume_step)
        for step in steps:
            tracker.write(step, {"loss": scale * step, "rewards/margins": -scale})
        killed.append(tracker)
        time.sleep(1.5)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss", "rewards/margins"]
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(0, 0.0), (1, 1.0), (2, 20.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    for tracker in killed:
        tracker.close()


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that records how it is called."""
    calls = []

    class Run:
        def log(self, row, step):
            calls.append(("log", step, row))

        def finish(self):
            calls.append(("finish",))

    module = types.ModuleType("wandb")

    def init(**options):
        calls.append(("init", options))
        return Run()

    module.__dict__["init"] = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_gets_every_row_and_a_resumed_folder_goes_on_in_its_run(tmp_path, wandb):
    asked: dict[str, Any] = NONE | {"wandb": "project"}
    fields = {"loss": {"beta": 0.1}}
    trackers.check_available(**asked)
    for resume_step in (0, 1):
        (tracker,) = trackers.open_trackers(tmp_path, **asked, config=fields, resume_step=resume_step)
        tracker.write(resume_step, {"loss": 0.5})
        tracker.close()
    kinds = [call[0] for call in wandb]
    assert kinds == ["init", "log", "finish"] * 2
    first, second = wandb[0][1], wandb[3][1]
    assert first == second
    assert (first["project"], first["config"], first["dir"]) == ("project", fields, str(tmp_path))
    assert first["resume"] == "allow" and len(first["id"]) == 32
    assert [call[1:] for call in wandb if call[0] == "log"] == [(0, {"loss": 0.5}), (1, {"loss": 0.5})]


def test_wandb_runs_of_two_folders_are_two_runs(tmp_path, wandb):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        trackers.open_trackers(tmp_path / name, tensorboard=False, wandb="p", config={}, resume_step=0)
    assert wandb[0][1]["id"] != wandb[1][1]["id"]


@pytest.fixture
def tensorboard(monkeypatch):
    """A stand-in for tensorboardX whose writers count how often they are closed."""
    writers = []

    class SummaryWriter:
        def __init__(self, *_, **__):
            self.closed = 0
            writers.append(self)

        def close(self):
            self.closed += 1

    module = types.ModuleType("tensorboardX")
    module.__dict__["SummaryWriter"] = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    return writers


def test_trackers_opened_before_one_that_fails_are_closed(tmp_path, tensorboard, monkeypatch):
    class Failing:
        def __init__(self, *_):
            raise RuntimeError("no network")

    monkeypatch.setattr(trackers, "WandbWriter", Failing)
    with pytest.raises(RuntimeError, match="no network"):
        trackers.open_trackers(tmp_path, tensorboard=True, wandb="p", config={}, resume_step=0)
    assert [writer.closed for writer in tensorboard] == [1]


def test_trackers_that_open_stay_open_and_closing_twice_closes_once(tmp_path, tensorboard, wandb):
    opened = trackers.open_trackers(tmp_path, tensorboard=True, wandb="p", config={}, resume_step=0)
    assert [writer.closed for writer in tensorboard] == [0] and len(wandb) == 1
    for tracker in opened * 2:
        tracker.close()
    assert [writer.closed for writer in tensorboard] == [1]
    assert [call[0] for call in wandb] == ["init", "finish"]


def test_jsonl_closes_on_an_error_and_closing_again_has_no_effect(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(RuntimeError), trackers.JsonlWriter(path) as writer:
        writer.write(0, {"loss": 0.5})
        raise RuntimeError
    assert writer._log._file is None
    writer.close()
    trackers.JsonlWriter(tmp_path / "never.jsonl").close()
    assert rows(path) == [{"step": 0, "loss": 0.5}] and not (tmp_path / "never.jsonl").exists()


def test_checkpoints_close_on_an_error_and_closing_again_has_no_effect(tmp_path):
    with pytest.raises(RuntimeError), Checkpoints(tmp_path, keep=1) as checkpoints:
        raise RuntimeError
    checkpoints.close()


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now.seconds)
    return now


METRICS = {
    "loss": 0.69211,
    "rewards/accuracies": 0.53125,
    "rewards/margins": 0.00123,
    "pairs_per_s": 3.44,
    "grad_norm": 7.0,
}


def test_progress_prints_plain_lines_where_there_is_no_terminal(clock, capsys):
    progress = terminal.Progress(62, start=10)
    progress.update(11, METRICS)
    clock.seconds += 2.0
    progress.update(12, METRICS)
    progress.say("step 12: evaluated")
    progress.update(62, {"loss": 0.5})
    progress.close()
    shown = "loss 0.6921, accuracy 0.531, margin 0.0012, 3.4 pairs/s"
    assert capsys.readouterr().err.splitlines() == [
        "step 10/62",
        f"step 11/62: {shown}",
        f"step 12/62: {shown}, 1 min 40 s left",
        "step 12: evaluated",
        "step 62/62: loss 0.5000",
    ]


def test_progress_time_left_leaves_out_what_came_before_the_first_step(clock, capsys):
    progress = terminal.Progress(4)
    clock.seconds += 1000.0  # compiling
    progress.update(1, {})
    clock.seconds += 1.0
    progress.update(2, {})
    assert capsys.readouterr().err.splitlines() == ["step 0/4", "step 1/4", "step 2/4: 2.0 s left"]


def test_progress_plain_lines_keep_their_distance_but_the_last_one_comes(clock, capsys):
    progress = terminal.Progress(40, line_every_s=10.0)
    for step in range(1, 41):
        progress.update(step)
        clock.seconds += 1.0
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == [
        "0/40",
        "11/40:",
        "21/40:",
        "31/40:",
        "40/40:",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_draws_one_bar_on_a_terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = terminal.Progress(62, start=10)
    progress.update(12, METRICS)
    progress.say("a line of its own")
    progress.update(62, METRICS | {"loss": 0.25})
    progress.close()
    text = stream.getvalue()
    frames = text.replace("\n", "\r").split("\r")
    assert any(frame.strip() == "a line of its own" for frame in frames)
    drawn = [frame for frame in frames if frame.startswith("step ")]
    assert drawn[0].startswith("step 10/62")
    assert drawn[-1].startswith("step 62/62 100%") and "loss 0.2500, accuracy 0.531" in drawn[-1]
    assert text.count("\n") == 2  # the said line and the end of the bar


def test_counter_learns_its_total_from_the_first_report(capsys, clock):
    with terminal.Counter("reference pass", unit="pairs") as counter:
        counter.update(0, 24)
        clock.seconds += 60.0  # compiling
        counter.update(8, 24)
        clock.seconds += 1.0
        counter.update(16, 24)
        clock.seconds += 9.0
        counter.update(20, 24)
        counter.update(24, 24)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "reference pass 0/24 pairs",
        "reference pass 8/24 pairs",
        "reference pass 20/24 pairs: 1.2/s, 3.3 s left",
        "reference pass 24/24 pairs: 1.6/s",
    ]


def test_counter_of_nothing_prints_nothing(capsys):
    with terminal.Counter("reference pass", unit="pairs"):
        pass
    assert capsys.readouterr() == ("", "")


def test_say_goes_to_standard_error(capsys):
    terminal.say("train: 8 pairs")
    assert capsys.readouterr() == ("", "train: 8 pairs\n")
