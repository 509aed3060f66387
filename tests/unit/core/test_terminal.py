"""The console: its width and colours on a terminal and in a pipe, for the variables that rich documents."""

from __future__ import annotations

import io
import itertools
import os
import pty
import sys
import termios
from collections.abc import Callable, Iterator
from typing import TextIO

import pytest
from rich.table import Table

from launcher.core.terminal import is_interactive, make_console

_VARIABLES = ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM")
OpenStdout = Callable[[bool], Callable[[], str]]


@pytest.fixture
def open_stdout(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenStdout]:
    """Make stdout a terminal of 80 columns or a pipe; the returned function reads what was written."""
    opened: list[TextIO] = []
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def replace(is_terminal: bool) -> Callable[[], str]:
        if is_terminal:
            reading, writing = pty.openpty()
            termios.tcsetwinsize(writing, (24, 80))
        else:
            reading, writing = os.pipe()
        stream = os.fdopen(writing, "w")
        opened.extend((stream, os.fdopen(reading)))
        monkeypatch.setattr(sys, "stdout", stream)

        def read() -> str:
            stream.flush()
            return os.read(reading, 1 << 20).decode().replace("\r\n", "\n")

        return read

    yield replace
    for stream in opened:
        stream.close()


@pytest.mark.parametrize("columns", [None, "", "40", "200", "many"])
@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("forced", [None, "1"])
def test_a_pipe_has_no_width_unless_columns_is_set(
    open_stdout: OpenStdout, monkeypatch: pytest.MonkeyPatch, is_terminal: bool, columns: str | None, forced: str | None
) -> None:
    read = open_stdout(is_terminal)
    for name, value in (("COLUMNS", columns), ("FORCE_COLOR", forced)):
        if value is not None:
            monkeypatch.setenv(name, value)
    console = make_console()
    words = " ".join(["word"] * 400)
    console.print(words)
    given = int(columns) if columns is not None and columns.isdigit() else None
    longest = max(len(line) for line in read().splitlines())
    if given is None and not is_terminal:
        assert longest == len(words)
    else:
        width = given or 80
        assert width - 5 <= longest <= width


def test_a_table_in_a_pipe_is_not_filled_with_spaces(open_stdout: OpenStdout) -> None:
    read = open_stdout(False)
    table = Table(box=None, show_header=False)
    table.add_row("short", "x")
    table.add_row("long", "y " * 200)
    console = make_console()
    console.print(table)
    console.print("no newline ", end="")
    lines = read().split("\n")
    assert [line.split() for line in lines[:2]] == [["short", "x"], ["long", *["y"] * 200]]
    assert all(line == line.rstrip() for line in lines[:2])
    assert lines[2] == "no newline "


@pytest.mark.parametrize(
    ("is_terminal", "no_color", "forced", "term"),
    list(itertools.product([True, False], [None, "1"], [None, "1"], ["xterm-256color", "dumb"])),
)
def test_colours_and_redraws_follow_the_environment(
    open_stdout: OpenStdout,
    monkeypatch: pytest.MonkeyPatch,
    is_terminal: bool,
    no_color: str | None,
    forced: str | None,
    term: str,
) -> None:
    read = open_stdout(is_terminal)
    for name, value in (("NO_COLOR", no_color), ("FORCE_COLOR", forced), ("TERM", term)):
        if value is not None:
            monkeypatch.setenv(name, value)
    console = make_console()
    console.print("text", style="red")
    has_colour = (is_terminal or bool(forced)) and not no_color and term != "dumb"
    assert ("\x1b[" in read()) == has_colour
    # A bar in a file, which FORCE_COLOR alone must not cause, would be thousands of lines of control codes.
    assert is_interactive(console) == (is_terminal and term != "dumb")


def test_animations_can_be_switched_off(open_stdout: OpenStdout, monkeypatch: pytest.MonkeyPatch) -> None:
    open_stdout(True)
    monkeypatch.setenv("TTY_INTERACTIVE", "0")
    assert not is_interactive(make_console())


def test_stdout_may_be_any_object(monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        def __init__(self) -> None:
            self.text = io.StringIO()

        def write(self, text: str) -> int:
            return self.text.write(text)

        def flush(self) -> None: ...

    writer = Writer()
    monkeypatch.setattr(sys, "stdout", writer)
    console = make_console()
    console.print("text")
    assert writer.text.getvalue() == "text\n"
    assert not is_interactive(console)
