"""The training loop by itself: what happens, in which order, for a state that is a number."""

import time
import types

import pytest

from dpo_jax.run.loop import Between, Schedule, run_loop
from dpo_jax.runtime import clocks, hosts

IMPORTED = time.clock_gettime(time.CLOCK_BOOTTIME)


class Recorder:
    """Writes down what the loop asks for."""

    def __init__(self, ends_at=None):
        self.events, self.ends_at = [], ends_at

    def evaluate(self, done, state):
        self.events.append(("evaluate", done, state))
        return done == self.ends_at

    def save(self, done, state):
        self.events.append(("save", done, state))

    def before(self, done, state):
        self.events.append(("before", done, state))

    def after(self, done, prepared, metrics, waited_s):
        self.events.append(("after", done, metrics))


def run(schedule, state=0, *, ends_at=None):
    recorder = Recorder(ends_at)
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


def test_an_evaluation_may_end_the_run_which_is_saved():
    schedule = Schedule(start=0, total=5, evaluate_every=2, save_every=4)
    last, events = run(schedule, ends_at=2)
    assert last == 11 and [event[:2] for event in events[-3:]] == [("after", 2), ("evaluate", 2), ("save", 2)]


def test_every_evaluation_after_an_update_may_have_a_checkpoint():
    _, events = run(Schedule(start=0, total=5, evaluate_every=2, save_every=3, save_evaluated=True))
    assert [done for event, done, _ in events if event == "save"] == [2, 3, 4, 5]
    assert [done for event, done, _ in events if event == "evaluate"] == [0, 2, 4, 5]


def test_a_run_that_is_asked_to_stop_saves_before_the_next_update(monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr(hosts, "asked_to_stop", lambda: next(answers))
    recorder = Recorder()
    with pytest.raises(hosts.Stopped, match="saved at step 1 of 3"):
        run_loop(0, Schedule(0, 3), iter([(0, 0.0), (1, 0.0)]), lambda state, batch: (state + 1, batch), recorder)
    assert recorder.events[-1] == ("save", 1, 1)


def test_what_a_start_goes_into_adds_up_to_all_of_it(monkeypatch):
    now = types.SimpleNamespace(seconds=50.0)
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now.seconds)
    watch = clocks.Stopwatch(age_s=4.0)

    def passes(seconds):
        now.seconds += seconds

    with watch.part("data"):
        passes(3)
    passes(1)
    with watch.part("reference"):
        passes(100)
        with watch.part("compile"):
            passes(60)
        with watch.part("weights"):
            passes(2)
        passes(100)
    watch.add("first batch", 0.5)
    passes(0.5)
    parts = watch.divided()
    expected = {"start": 4, "data": 3, "compile": 60, "weights": 2, "reference": 200, "first batch": 0.5, "other": 1}
    assert parts == pytest.approx(expected) and list(parts)[-1] == "other"
    assert sum(parts.values()) == pytest.approx(4 + now.seconds - 50)
    assert str(watch).startswith("4 min 30 s: start 4.0 s, ") and "reference 3 min 20 s" in str(watch)


def test_the_age_of_a_process_grows_as_the_clock_does_and_began_before_this_module():
    before, at = clocks.age_of_process(), time.perf_counter()
    time.sleep(0.05)
    assert clocks.age_of_process() - before == pytest.approx(time.perf_counter() - at, abs=0.02)
    boot_to_start = time.clock_gettime(time.CLOCK_BOOTTIME) - before
    assert 0 < boot_to_start < IMPORTED
