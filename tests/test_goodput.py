"""The account of a run's time over several starts, by clocks that are set."""

from pathlib import Path

import pytest

from dpo_jax.run.goodput import FIELDS, PARTS, Account, total_of
from dpo_jax.runtime import hosts
from dpo_jax.runtime.clocks import Stopwatch


class Start:
    """One start of a run: its stopwatch and the clock on the wall go on when `spend` says so."""

    def __init__(self, at):
        self.began, self.seconds = at, 0.0
        self.watch = Stopwatch()
        self.watch.total = lambda: self.seconds
        self.account = Account(self.watch, lambda: self.began + self.seconds)

    def spend(self, seconds, part=None):
        self.seconds += seconds
        if part:
            self.watch.add(part, seconds)


def parts(account):
    return {part: seconds for part, seconds in account.seconds().items() if seconds}


def started(at, checkpoint, last):
    """A start that needs 10 s, compiles for 4 s and scores the reference for 6 s before it goes on."""
    start = Start(at)
    start.spend(8, "data")  # a part that the account does not name
    start.spend(4, "compile")
    start.spend(6, "reference")
    start.spend(2)
    start.account.begin(checkpoint, last)
    return start


def test_seconds_of_a_start_divide_into_parts_that_add_up():
    start = started(1000, {}, {})
    start.spend(5, "compile")  # of the update, by its first call
    start.spend(30)
    start.spend(3, "evaluation")
    start.spend(2, "save")
    start.spend(20)
    expected = {"start": 10, "compile": 9, "reference": 6, "steps": 50, "evaluate": 3, "save": 2}
    assert parts(start.account) == expected
    fields = start.account.fields()
    assert total_of(fields) == start.seconds == 80 and fields["goodput"] == 50 / 80
    assert fields["time/unix_s"] == 1080 and fields["time/down_s"] == 0
    updates = "goodput 62% of 1 min 20 s: updates 50 s, compiling 9.0 s, reference 6.0 s, evaluation 3.0 s, "
    assert start.account.line() == updates + "checkpoints 2.0 s, start 10 s"


def test_work_after_the_checkpoint_is_lost_and_the_time_between_starts_is_down():
    first = started(1000, {}, {})
    first.spend(40)
    checkpoint = first.account.fields()
    first.spend(1, "save")
    first.spend(25)
    last = first.account.fields()  # its last row; it is killed 7 s later
    second = started(1000 + 60 + 26 + 7 + 100, checkpoint, last)
    second.spend(25)
    second.spend(15)
    # Lost: 25 s of updates and 1 s of saving. Down: what came after the last row, and until the second start.
    expected = {"start": 10, "compile": 8, "reference": 12, "steps": 80, "restart": 26 + 10, "down": 107}
    assert parts(second.account) == expected
    assert total_of(second.account.fields()) == last["time/unix_s"] - 1000 + second.seconds
    assert second.account.line().endswith("restarts 36 s; down for 1 min 47 s besides")

    third = started(2000, second.account.fields(), second.account.fields())  # asked to stop: nothing is lost
    assert parts(third.account)["restart"] == 36 + 10 and parts(third.account)["steps"] == 80


def test_a_run_without_a_checkpoint_loses_all_that_it_did():
    first = started(0, {}, {})
    first.spend(30)
    second = started(100, {}, first.account.fields() | {"loss": 0.7})
    assert parts(second.account) == {"restart": 50 + 10, "compile": 4, "reference": 6, "down": 50}


def test_a_start_before_the_first_update_counts_as_such():
    start = Start(0)
    start.spend(3, "compile")
    start.spend(4)
    assert parts(start.account) == {"compile": 3, "start": 4}
    assert set(start.account.seconds()) == {*PARTS, "down"}


@pytest.mark.parametrize("stopped", [False, True])
def test_account_is_told_at_the_end_and_when_the_run_is_stopped(stopped, capsys):
    start = started(0, {}, {})
    try:
        with start.account.told():
            if stopped:
                raise hosts.Stopped("asked to stop")
    except hosts.Stopped:
        assert stopped
    assert capsys.readouterr().err.startswith("goodput 0% of 20 s: ")


def test_every_field_is_described():
    page = (Path(__file__).parents[1] / "docs/pods.md").read_text()
    assert all(f"`{name}`" in page for name in FIELDS)
