"""Lines and bars that a run prints: truncated and dropped rows, evaluations, and what is waited for."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
import types

import pytest

from dpo_jax.reporting import console
from dpo_jax.runtime import quantities, terminal

REPORT = {"prompts_cut": 2, "answers_cut": 3, "boundary_split": 0, "dropped": []}


@pytest.mark.parametrize(
    ("report", "line"),
    [
        ({}, "2 prompts and 3 answers truncated; no rows dropped"),
        (
            {"boundary_split": 4, "dropped": [{"rows": 5, "reason": "empty"}, {"rows": 1, "reason": "equal answers"}]},
            "2 prompts and 3 answers truncated; 4 pairs with prompt and answer tokenized separately; "
            "5 rows dropped: empty; 1 rows dropped: equal answers",
        ),
    ],
)
def test_truncation_is_one_line(report, line):
    assert console.truncation(REPORT | report) == line


def test_the_table_has_the_metrics_of_the_first_and_the_last_evaluation(capsys):
    rows = [{"step": step, "eval/loss": loss, "eval/pairs": 8} for step, loss in ((0, 0.6931), (2, 0.6), (4, 0.5))]
    console.before_and_after(rows[:1])
    assert capsys.readouterr().err == ""
    console.before_and_after(rows)
    assert [line.split() for line in capsys.readouterr().err.splitlines()] == [
        ["before", "after"],
        ["eval/loss", "0.6931", "0.5000"],
    ]


def test_an_evaluation_is_one_line_of_its_main_metrics():
    row = {"eval/loss": 0.5, "eval/rewards/margins": -1.0, "eval/pairs": 8}
    assert console.evaluation_lines(row) == ["eval/loss 0.5000, eval/rewards/margins -1.0000"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (400, "6 min 40 s"),
        (3599.7, "1 h"),
        (7500, "2 h 5 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_a_time_is_told_in_the_units_of_a_clock(seconds, text):
    assert quantities.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 bytes"), (1000, "1.0 KiB"), (1.5e9, "1.4 GiB"), (2e8, "191 MiB"), (1e16, "8.9 PiB")]
)
def test_a_size_is_told_in_its_largest_unit(count, text):
    assert quantities.size(count) == text


METRICS = {"loss": 0.69211, "rewards/accuracies": 0.53125, "rewards/margins": 0.00123, "pairs_per_s": 3.44}


@contextlib.contextmanager
def pseudo_terminal(columns, monkeypatch):
    """Puts a pseudo-terminal in place of standard error; yields a list that has, at its end, what its line showed."""
    read_from, write_to = pty.openpty()
    fcntl.ioctl(write_to, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    frames, text = [], b""
    with os.fdopen(write_to, "w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        patch.setattr(terminal, "DRAWS_PER_S", 1e9)
        yield frames
    with contextlib.suppress(OSError):  # Linux's way to tell the end
        while part := os.read(read_from, 1 << 16):
            text += part
    os.close(read_from)
    frames += [frame.rstrip() for frame in re.split(r"[\r\n]+|\x1b\[A", text.decode()) if frame.strip()]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now.seconds)
    return now


@pytest.mark.parametrize("columns", [80, 40])
def test_a_bar_begins_at_nothing_and_keeps_the_time_left_where_columns_are_few(columns, clock, monkeypatch):
    with pseudo_terminal(columns, monkeypatch) as frames:
        with terminal.Progress(62) as progress:
            clock.seconds += 80
            progress.update(1, METRICS)
            clock.seconds += 100
            progress.update(11, METRICS)
    first, *_, last = frames
    assert max(map(len, frames)) < columns
    assert first.startswith("step 0/62") and "0 s so far" in first
    assert last.startswith("step 11/62") and "8 min 30 s left" in last
    assert ("loss 0.6921" in last) == (columns == 80) and "pairs/s" not in last


@pytest.mark.parametrize("columns", [80, 40])
def test_a_bar_of_a_long_title_crops_that_before_the_numbers_and_the_time_left(columns, clock, monkeypatch):
    with pseudo_terminal(columns, monkeypatch) as frames:
        with terminal.passes(9876, "reference of step 1000", unit="pairs", after_s=0.0) as progress:
            progress.update(1000)
            clock.seconds += 100
            progress.update(2000)
    last = frames[-1]
    assert last.startswith("ref") and "2,000/9,876 pairs" in last and "13 min 8 s left" in last
    assert len(last) < columns


def test_a_bar_shows_the_time_that_passes_while_nothing_else_moves(clock, monkeypatch):
    with pseudo_terminal(80, monkeypatch) as frames, terminal.Progress(62, title="reference pass", unit="pairs"):
        clock.seconds += 30
        time.sleep(1.1)
    assert any("30 s so far" in frame for frame in frames[:-1])


def test_what_is_waited_for_is_told_if_it_takes_long(clock, capsys, monkeypatch):
    with terminal.waiting("compiling update"):
        pass
    with terminal.passes(8, "weights", unit="bytes") as progress:
        progress.update(8)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(terminal, "SHORT_S", 0.01)
    with terminal.waiting("compiling update"):
        time.sleep(0.1)
    with terminal.passes(3 << 30, "weights", unit="bytes", after_s=0.01) as progress:
        time.sleep(0.1)
        progress.update(3 << 30)
    assert capsys.readouterr().err.splitlines() == [
        "compiling update ...",
        "weights 0 bytes/3.0 GiB",
        "weights 3.0 GiB/3.0 GiB",
    ]
