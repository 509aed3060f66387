"""`launcher.training.stop.signals.SignalListener` in processes: first signal, second signal, signal to a fork."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from launcher.process.parent_death import STOP_SIGNALS
from tests.support.processes import Finished, run

_PRELUDE = """
import ctypes, multiprocessing, os, signal, socket, sys, threading
import launcher.training.stop.signals
from launcher.training.stop.agreement import StopAgreement
from launcher.training.stop.signals import SignalListener

def emit(*parts):
    os.write(1, (" ".join(map(str, parts)) + "\\n").encode())

class Agreement(StopAgreement):
    def request(self, number):
        super().request(number)
        asked.set()

class Listener(SignalListener):
    def _handle(self, number):
        super()._handle(number)
        emit("handled", number)
        handled.release()

def fork(body):
    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    return child

asked, handled = threading.Event(), threading.Semaphore(0)
agreement = Agreement(None, 0, 1)
listener = Listener(agreement, lambda number: emit("requested", number))
"""


def run_listener(body: str, folder: Path, answers: Mapping[str, int] | None = None) -> Finished:
    """Run the body; each line of its output is answered once with the signal given for it."""
    left = dict(answers or {})

    def on_line(line: str, process: int) -> None:
        number = left.pop(line.strip(), None)
        if number is not None:
            os.kill(process, number)

    # The interpreter's remarks on forks beside threads are not of this test.
    return run([sys.executable, "-W", "ignore", "-c", _PRELUDE + body], folder, timeout=30, on_line=on_line)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_reported_and_requests_a_stop(tmp_path: Path, number: int) -> None:
    body = """
with listener:
    emit("gate", agreement.gate())
    emit("ready")
    emit(asked.wait(20))
    emit("gate", agreement.gate(), int(agreement.signal_number))
    handled.acquire(timeout=20)
"""
    output = run_listener(body, tmp_path, {"ready": number}).check().output
    lines = [line for line in output.splitlines() if not line.startswith("handled")]
    assert lines[:2] == ["gate False", "ready"]
    # Two threads speak: the main one goes on as soon as it is asked.
    assert sorted(lines[2:]) == ["True", f"gate True {int(number)}", f"requested {int(number)}"]


def test_a_second_ctrl_c_ends_a_waiting_main_thread_at_once(tmp_path: Path) -> None:
    body = """
launcher.training.stop.signals._SECOND_AFTER = 0.0
with listener:
    emit("ready")
    threading.Event().wait()
"""
    ended = run_listener(body, tmp_path, {"ready": signal.SIGINT, "handled 2": signal.SIGINT}).check(130)
    assert ended.output.splitlines() == ["ready", "requested 2", "handled 2", "", "second Ctrl-C: ending at once"]


def test_signals_are_handled_while_the_main_thread_is_in_c_code(tmp_path: Path) -> None:
    # As in a collective: no signal interrupts the wait for a mutex, so no handler in Python ever runs.
    body = """
launcher.training.stop.signals._SECOND_AFTER = 0.0
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
libc.pthread_mutex_lock(mutex)
with listener:
    emit("ready")
    libc.pthread_mutex_lock(mutex)
    emit("unreachable")
"""
    ended = run_listener(body, tmp_path, {"ready": signal.SIGINT, "handled 2": signal.SIGINT}).check(130)
    assert ended.output.splitlines() == ["ready", "requested 2", "handled 2", "", "second Ctrl-C: ending at once"]


@pytest.mark.parametrize(
    ("first", "second", "after", "has_agent"),
    [
        pytest.param(signal.SIGINT, signal.SIGINT, 3600.0, False, id="handed on at once"),
        pytest.param(signal.SIGINT, signal.SIGTERM, 0.0, False, id="another signal"),
        pytest.param(signal.SIGUSR1, signal.SIGTERM, 0.0, False, id="a scheduler that warned"),
        pytest.param(signal.SIGUSR2, signal.SIGUSR2, 0.0, False, id="a warning twice"),
        pytest.param(signal.SIGTERM, signal.SIGTERM, 0.0, True, id="an agent hands on what it means"),
    ],
)
def test_a_second_signal_without_urgency_ends_nothing(
    tmp_path: Path, first: int, second: int, after: float, has_agent: bool
) -> None:
    body = f"""
launcher.training.stop.signals._SECOND_AFTER = {after}
listener = Listener(agreement, lambda number: emit("requested", number), has_agent={has_agent})
with listener:
    emit("ready")
    for _ in range(2):
        assert handled.acquire(timeout=20)
emit("went on")
"""
    one, two = int(first), int(second)
    ended = run_listener(body, tmp_path, {"ready": first, f"handled {one}": second}).check()
    assert ended.output.splitlines() == ["ready", f"requested {one}", f"handled {one}", f"handled {two}", "went on"]


def test_a_second_sigterm_ends_the_process_without_an_agent(tmp_path: Path) -> None:
    body = """
launcher.training.stop.signals._SECOND_AFTER = 0.0
with listener:
    emit("ready")
    threading.Event().wait()
"""
    ended = run_listener(body, tmp_path, {"ready": signal.SIGTERM, "handled 15": signal.SIGTERM}).check(143)
    assert ended.output.splitlines() == ["ready", "requested 15", "handled 15", "", "second SIGTERM: ending at once"]


def test_ignored_signals_stay_ignored_as_under_nohup(tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with listener:
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert handled.acquire(timeout=20)
emit(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
"""
    assert run_listener(body, tmp_path).check().output.splitlines() == ["requested 10", "handled 10", "True"]


@pytest.mark.parametrize(
    ("in_child", "exit_code"),
    [("pass", -15), ("signal.signal(signal.SIGTERM, lambda *_: os._exit(7))", 7)],
    ids=["without a handler", "with its own handler"],
)
def test_a_fork_handles_its_own_signals_and_stops_no_other_process(
    tmp_path: Path, in_child: str, exit_code: int
) -> None:
    body = f"""
ours, theirs = socket.socketpair()

def work():
    {in_child}
    theirs.send(b"x")
    while True:
        signal.pause()

with listener:
    child = fork(work)
    ours.recv(1)
    child.terminate()
    child.join(10)
    emit("child", child.exitcode)
    child.kill()
    child.join()
    # What the child's signal had left in the listener's socket would come before this.
    os.kill(os.getpid(), signal.SIGINT)
    assert handled.acquire(timeout=20)
"""
    output = run_listener(body, tmp_path).check().output
    assert output.splitlines() == [f"child {exit_code}", "requested 2", "handled 2"]


def test_on_exit_the_earlier_handlers_are_restored_and_kept_by_a_later_fork(tmp_path: Path) -> None:
    body = """
def mine(*_):
    os._exit(7)

reader, writer = socket.socketpair()
writer.setblocking(False)
signal.set_wakeup_fd(writer.fileno())
signal.signal(signal.SIGINT, mine)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
with listener:
    emit([signal.getsignal(number) in (mine, signal.SIG_DFL) for number in launcher.training.stop.signals.SIGNALS])
emit(signal.getsignal(signal.SIGINT) is mine, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
child = fork(lambda: os.kill(os.getpid(), signal.SIGINT))
child.join(20)
emit("child", child.exitcode)
emit(signal.set_wakeup_fd(-1) == writer.fileno())
"""
    assert run_listener(body, tmp_path).check().output.splitlines() == [
        str([False] * len(STOP_SIGNALS)),
        "True True",
        "child 7",
        "True",
    ]


def test_install_sets_the_handlers_again(tmp_path: Path) -> None:
    body = """
with listener:
    signal.signal(signal.SIGTERM, lambda *_: emit("somebody else's"))
    listener.install()
    os.kill(os.getpid(), signal.SIGTERM)
    assert handled.acquire(timeout=20)
"""
    assert run_listener(body, tmp_path).check().output.splitlines() == ["requested 15", "handled 15"]


@pytest.mark.parametrize("kind", ["a function", "a method", "faulthandler"])
@pytest.mark.parametrize("reason", ["has_agent", "has_scheduler", None])
def test_a_scripts_handler_of_an_unused_signal_stays(tmp_path: Path, kind: str, reason: str | None) -> None:
    body = f"""
import faulthandler

class Mine:
    def handle(self, number, frame):
        emit("mine", number)

why = dict.fromkeys({[reason] if reason else []}, True)
listener = Listener(agreement, lambda number: emit("requested", number), **why)
numbers = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
for number in numbers:
    if "{kind}" == "faulthandler":
        faulthandler.register(number, file=open(f"stacks-{{number}}", "w"))
    else:
        signal.signal(number, Mine().handle if "{kind}" == "a method" else lambda *arguments: Mine().handle(*arguments))
with listener:
    for number in numbers:
        os.kill(os.getpid(), number)
    if {reason!r}:
        for _ in numbers:
            assert handled.acquire(timeout=20)
    emit("gate", agreement.gate())
emit([os.path.exists(f"stacks-{{number}}") and os.path.getsize(f"stacks-{{number}}") > 0 for number in numbers])
"""
    lines = run_listener(body, tmp_path).check().output.splitlines()
    taken = reason is not None
    assert ("gate True" in lines, "requested 1" in lines) == (taken, taken)
    assert [line for line in lines if line.startswith("mine")] == (
        [] if taken or kind == "faulthandler" else ["mine 1", "mine 10", "mine 12"]
    )
    if kind == "faulthandler":
        assert lines[-1] == str([not taken] * 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_scripts_handler_of_a_stop_signal_is_available_afterwards(tmp_path: Path, number: int) -> None:
    body = f"""
listener = Listener(agreement, lambda number: emit("requested", number), has_scheduler=True)
emit(listener.first, listener.users_handler)
signal.signal({int(number)}, lambda *arguments: emit("mine", *arguments))
with listener:
    os.kill(os.getpid(), {int(number)})
    assert handled.acquire(timeout=20)
emit(listener.first)
listener.users_handler()
"""
    lines = run_listener(body, tmp_path).check().output.splitlines()
    signal_number = int(number)
    assert lines == ["None None", f"requested {signal_number}", f"handled {signal_number}", str(signal_number),
                     f"mine {signal_number} None"]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_of_python_and_lightning_are_not_the_scripts(tmp_path: Path, number: int) -> None:
    body = f"""
def lightnings(*_):
    emit("Lightning's")

lightnings.__module__ = "lightning.pytorch.trainer.connectors.signal_connector"
if {int(number)} != signal.SIGINT:
    signal.signal({int(number)}, lightnings)
with listener:
    os.kill(os.getpid(), {int(number)})
    assert handled.acquire(timeout=20)
emit(listener.users_handler)
"""
    assert run_listener(body, tmp_path).check().output.splitlines()[-1] == "None"


def test_the_listener_imports_no_torch_which_would_cost_each_process_here_seconds(tmp_path: Path) -> None:
    assert run_listener('emit("torch" in sys.modules)', tmp_path).check().output == "False\n"
