"""Functions of `hosts` in a run of one process; several processes are tested in test_processes.py."""

import os
import queue
import signal
import socket
import threading
import time
import types

import pytest

from dpo_jax import config, train
from dpo_jax.runtime import hosts, peers
from dpo_jax.types import InputError
from tests.support.runs import make_config, make_inputs, read_rows, untimed


def test_one_process_agrees_with_itself_and_takes_every_share():
    assert (hosts.index(), hosts.count(), hosts.first()) == (0, 1, True)
    assert hosts.mine("abc") == ["a", "b", "c"] and all(hosts.is_mine(i) for i in range(5))
    assert hosts.all_gather("name", {"a": 1}) == [{"a": 1}] and hosts.gather_dicts("name")({"a": 1}) == {"a": 1}
    assert hosts.broadcast("name", 7) == 7
    hosts.agree("nothing", {"a": 1})
    hosts.barrier("name")
    with hosts.first_alone("name") as alone:
        assert alone


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(coordinator="host:1"), "--processes, --process: not given in the flags, and --coordinator given"),
        (dict(processes=2, process=0), "--coordinator: not given in the flags, and --processes, --process given"),
        (dict(coordinator="host:1", processes=2, process=2), "--coordinator, --processes, --process: got host:1, 2, 2"),
        (
            dict(coordinator="host", processes=2, process=0),
            "--coordinator, --processes, --process: got host, 2, 0; expected HOST:PORT",
        ),
    ],
)
def test_flags_that_do_not_name_a_process_of_several_are_refused(flags, message):
    with pytest.raises(InputError) as caught:
        hosts.join(**flags)
    assert str(caught.value).startswith(message)


def test_environment_that_names_only_the_coordinator_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES, JAX_PROCESS_ID: not given"):
        hosts.join()


def test_a_run_of_one_needs_no_coordinator(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node1")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    hosts.join()
    hosts.join("nowhere:1", 1, 0)
    assert hosts.count() == 1


def test_differences_are_named_with_who_has_which(monkeypatch):
    facts = [{"beta": 0.1, "step": 3}, {"beta": 0.2, "step": 3}, {"beta": 0.1, "step": 3}]
    monkeypatch.setattr(hosts, "all_gather", lambda *_, **__: facts)
    with pytest.raises(InputError) as caught:
        hosts.agree("configuration", facts[0])
    assert "configuration: beta is 0.1 on process 0, process 2, 0.2 on process 1" in str(caught.value)


@pytest.mark.parametrize(
    "error, timeout_s, expected",
    [
        ("DEADLINE_EXCEEDED: key", None, [1, 2]),  # without a limit, an expired wait begins again
        ("DEADLINE_EXCEEDED: key", 5, "process 1: no answer about name in 5 s"),
        ("UNAVAILABLE: the service has ended", None, "UNAVAILABLE"),
        ("UNAVAILABLE: the service has ended", 5, "UNAVAILABLE"),
    ],
)
def test_waiting_for_a_process_ends_with_its_answer_or_the_services_error(monkeypatch, error, timeout_s, expected):
    stored, errors = {}, [error]

    def get(key, wait_ms):
        if key.endswith("/1") and errors:
            raise RuntimeError(errors.pop())
        return stored.get(key, "2")

    client = types.SimpleNamespace(key_value_set=stored.__setitem__, blocking_key_value_get=get)
    state = types.SimpleNamespace(process_id=0, num_processes=2, client=client)
    monkeypatch.setattr(hosts, "_state", lambda: state)
    if isinstance(expected, list):
        assert hosts.all_gather("name", 1, timeout_s=timeout_s) == expected
    else:
        with pytest.raises((InputError, RuntimeError), match=expected):
            hosts.all_gather("name", 1, timeout_s=timeout_s)


def test_code_digest_changes_with_the_code(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(hosts, "__file__", str(tmp_path / "hosts.py"))
    before = hosts.code_digest.__wrapped__()
    (tmp_path / "a.py").write_text("a = 2\n")
    assert hosts.code_digest.__wrapped__() != before


@pytest.mark.slow
def test_sigterm_stops_a_run_after_the_step_and_the_same_call_goes_on(tmp_path):
    inputs = make_inputs(tmp_path / "inputs")
    fields = dict(checkpoint__every_steps=1000, mesh__fsdp=8, data__eval="", data__date="2024-02-29")
    chosen = make_config(inputs, train__steps=40, **fields)
    folder = tmp_path / "run"

    def ask():
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if (folder / "metrics.jsonl").exists() and len(read_rows(folder / "metrics.jsonl")) > 1:
                return os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=ask)
    thread.start()
    with pytest.raises(hosts.Stopped, match="saved at step"):
        train.run(chosen, folder)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    saved = [int(path.name) for path in (folder / "checkpoints").iterdir()]
    rows = read_rows(folder / "metrics.jsonl")
    assert len(saved) == 1 and 0 < saved[0] < 40 and [row["step"] for row in rows] == list(range(saved[0]))
    train.run(chosen, folder)
    train.run(chosen, tmp_path / "whole")
    assert untimed(read_rows(folder / "metrics.jsonl")) == untimed(read_rows(tmp_path / "whole" / "metrics.jsonl"))
    assert config.from_json((folder / "config.json").read_text(), "config.json") == chosen


@pytest.mark.parametrize("chips, skipped", [([], "1"), (["/dev/accel0"], None)])
def test_libtpu_is_told_where_there_is_no_tpu_and_only_there(monkeypatch, chips, skipped):
    monkeypatch.setattr(hosts.os, "environ", {"JAX_PLATFORMS": "cpu"})
    monkeypatch.setattr(hosts.glob, "glob", lambda pattern: chips if "accel" in pattern else [])
    hosts.join()
    assert os.environ.get("TPU_SKIP_MDS_QUERY") == skipped


def test_listening_within_listening_keeps_a_request_to_stop():
    with hosts.listening():
        with hosts.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            assert hosts.asked_to_stop()
        assert hosts.asked_to_stop()  # a stage that ends does not take it away
    assert not hosts.asked_to_stop() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_process_that_ends_without_a_word_is_lost_and_no_other():
    lost = queue.Queue()
    server = peers.Server(lost.put)
    ends = [peers.Client("127.0.0.1", server.port, server.token, i, lambda _: None) for i in (1, 2, 12)]
    ends[0].end()  # as an orderly process does before its connection closes
    stranger = socket.create_connection(("127.0.0.1", server.port))
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    for connection in (ends[0]._connection, stranger, ends[2]._connection):
        connection.shutdown(socket.SHUT_RDWR)
    assert lost.get(timeout=5) == 12
    ends[1]._connection.shutdown(socket.SHUT_RDWR)
    assert lost.get(timeout=5) == 2 and lost.empty()


@pytest.mark.parametrize("orderly", [True, False])
def test_the_end_of_process_0_is_noticed_unless_it_said_so(orderly):
    lost, server = queue.Queue(), peers.Server(lambda _: None)
    client = peers.Client("127.0.0.1", server.port, server.token, 1, lost.put)
    until = time.monotonic() + 5
    while not server._said and time.monotonic() < until:
        time.sleep(0.01)
    if orderly:
        server.end()
        client._thread.join(5)
    else:
        next(iter(server._said)).shutdown(socket.SHUT_RDWR)
        assert lost.get(timeout=5) == 0
    assert lost.empty()


def test_an_interrupt_asks_to_stop_and_a_second_one_ends_at_once(monkeypatch, capsys):
    came, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(hosts, "_end_at_once", ended.set)
    monkeypatch.setattr(hosts, "_ask", lambda: came.set() or hosts._asked.set())
    with hosts.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert came.wait(5) and hosts.asked_to_stop() and not ended.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert ended.wait(5)
    assert "Ctrl-C again ends at once" in capsys.readouterr().err
    assert not hosts.asked_to_stop() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1 and "interrupts" not in {each.name for each in threading.enumerate()}
