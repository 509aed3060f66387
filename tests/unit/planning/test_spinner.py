"""The line with the current activity: on a terminal only, and never mixed with other output."""

from __future__ import annotations

import argparse
import io
import json
import sys
import threading
from typing import Any

import pytest
from typing_extensions import override

import launcher.planning.spinner
from launcher.cli.config_commands import PLAN
from launcher.config.schema import RunConfig
from launcher.hardware.topology import Topology
from launcher.planning.spinner import find_terminal, show_activity
from launcher.process.activity import doing
from tests.support.toy import Toy

ERASE = "\r\x1b[2K"


@pytest.fixture(autouse=True)
def _drawn_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.planning.spinner, "_INTERVAL", 0.01)
    monkeypatch.setattr(launcher.planning.spinner, "_QUIET", 0.05)


class Terminal(io.StringIO):
    """Records what is written, and lets a test wait for a text."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    @override
    def isatty(self) -> bool:
        return True

    @override
    def write(self, text: str, /) -> int:
        with self._changed:
            self._changed.notify_all()
            return super().write(text)

    def wait_for(self, text: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.getvalue(), timeout=20), self.getvalue()

    def final_lines(self) -> list[str]:
        """The lines of the screen at the end."""
        return [line.rpartition(ERASE)[2] for line in self.getvalue().split("\n")]


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Put stdout and stderr on one terminal; not a fixture, as pytest sets its own streams when the test begins."""
    found = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", found)
    monkeypatch.setattr(sys, "stderr", found)
    return found


def test_activity_and_its_duration_are_shown_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with show_activity(find_terminal()):
        terminal.wait_for("making the plan (")
        with doing("tracing a training step"):
            terminal.wait_for("tracing a training step (0 s)")
    assert terminal.final_lines() == [""]
    assert sys.stdout is sys.stderr is terminal


def test_other_output_is_on_its_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with show_activity(find_terminal()), doing("tracing"):
        terminal.wait_for("tracing")
        print("from stdout")
        sys.stderr.write("from stderr\n")
        # The line is drawn again, below.
        before = len(terminal.getvalue())
        terminal.wait_for(f"from stderr\n{ERASE}")
        assert len(terminal.getvalue()) > before
    assert terminal.final_lines() == ["from stdout", "from stderr", ""]


def test_no_line_is_drawn_over_an_unfinished_one(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with show_activity(find_terminal()):
        terminal.wait_for("making")
        sys.stdout.write("50 %")
        drawn = terminal.getvalue().count("making")
        assert sys.stdout.isatty(), "other attributes are those of the stream"
    assert terminal.final_lines() == ["50 %"]
    assert terminal.getvalue().count("making") == drawn


def test_error_erases_the_line_and_restores_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)

    def plan() -> None:
        with show_activity(find_terminal()):
            terminal.wait_for("making")
            raise ValueError("no plan")

    with pytest.raises(ValueError, match="no plan"):
        plan()
    assert sys.stdout is terminal
    assert terminal.final_lines() == [""]
    assert not any(thread.name == "launcher-spinner" for thread in threading.enumerate())


def test_stream_of_the_user_is_not_replaced_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch)
    own = io.StringIO()
    with show_activity(find_terminal()):
        monkeypatch.setattr(sys, "stdout", own)
    assert sys.stdout is own


@pytest.mark.parametrize("pipes", [("stdout",), ("stdout", "stderr"), ("stderr",)])
def test_pipe_gets_no_line(monkeypatch: pytest.MonkeyPatch, pipes: tuple[str, ...]) -> None:
    terminal = on_terminal(monkeypatch)
    for name in pipes:
        monkeypatch.setattr(sys, name, io.StringIO())
    # A rank's stderr is a pipe to its log, and its stdout the terminal.
    assert find_terminal() is (terminal if pipes == ("stderr",) else None)
    with show_activity(None):
        assert not any(thread.name == "launcher-spinner" for thread in threading.enumerate())


def test_terminal_that_cannot_move_its_cursor_gets_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    assert find_terminal() is terminal
    monkeypatch.setenv("TERM", "dumb")
    assert find_terminal() is None


@pytest.mark.parametrize("as_json", [False, True])
def test_plan_shows_its_activity_unless_it_prints_json(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    terminal = on_terminal(monkeypatch)
    step = Toy.training_step

    def slow_step(self: Toy, *given: Any) -> Any:
        if not as_json:
            terminal.wait_for("tracing a training step (")
        return step(self, *given)

    monkeypatch.setattr(Toy, "training_step", slow_step)
    config = RunConfig(
        model={"class_path": "tests.support.toy.Toy"}, data={"class_path": "tests.support.toy.ToyData"},
        accelerator="cpu", devices=1,
    )  # fmt: skip
    options = argparse.Namespace(json=as_json, plot=None, gpus=None, gpus_per_node=None, gpu=None, gpu_memory=None)
    assert PLAN.execute(config, Topology.single("host"), options) == 0
    if as_json:
        assert json.loads(terminal.getvalue())["strategy"]["name"] == "single_device"
    else:
        assert not any("tracing" in line for line in terminal.final_lines())
