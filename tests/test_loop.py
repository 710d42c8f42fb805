"""The training loop by itself: what happens, in which order, for a state that is a number."""

import pytest

from dpo_jax.run.loop import Between, Schedule, run_loop
from dpo_jax.runtime import hosts


class Recorder:
    """Writes down what the loop asks for."""

    def __init__(self):
        self.events = []

    def evaluate(self, done, state):
        self.events.append(("evaluate", done, state))

    def save(self, done, state):
        self.events.append(("save", done, state))

    def before(self, done, state):
        self.events.append(("before", done, state))

    def after(self, done, prepared, metrics, waited_s):
        self.events.append(("after", done, metrics))


def run(schedule, state=0):
    recorder = Recorder()
    assert isinstance(recorder, Between)
    batches = ((step, 0.0) for step in range(schedule.start, schedule.total))
    last = run_loop(state, schedule, batches, lambda state, batch: (state + 10**batch, batch), recorder)
    return last, recorder.events


def test_updates_come_in_order_with_evaluations_and_checkpoints_between():
    last, events = run(Schedule(start=0, total=3, evaluate_every=2, save_every=2))
    assert last == 111
    assert events == [
        ("evaluate", 0, 0),
        ("before", 0, 0),
        ("after", 1, 0),
        ("before", 1, 1),
        ("after", 2, 1),
        ("save", 2, 11),
        ("evaluate", 2, 11),
        ("before", 2, 11),
        ("after", 3, 2),
        ("save", 3, 111),
        ("evaluate", 3, 111),
    ]


def test_a_run_that_goes_on_repeats_no_update_and_one_that_is_done_evaluates_once_more():
    assert [event[:2] for event in run(Schedule(start=2, total=3, save_every=2))[1]] == [
        ("before", 2),
        ("after", 3),
        ("save", 3),
        ("evaluate", 3),
    ]
    assert run(Schedule(start=3, total=3)) == (0, [("evaluate", 3, 0)])


def test_a_run_that_is_asked_to_stop_saves_before_the_next_update(monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr(hosts, "asked_to_stop", lambda: next(answers))
    recorder = Recorder()
    with pytest.raises(hosts.Stopped, match="saved at step 1 of 3"):
        run_loop(0, Schedule(0, 3), iter([(0, 0.0), (1, 0.0)]), lambda state, batch: (state + 1, batch), recorder)
    assert recorder.events[-1] == ("save", 1, 1)
