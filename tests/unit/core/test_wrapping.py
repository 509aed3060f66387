"""Messages on a terminal are wrapped at spaces, without breaking what is to be copied."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import termios

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.core.wrapping import join_items, wrap_for, wrap_line, wrap_text

_KINDS = ("the", "problems", "--trainer.max_epochs 3", "`launcher fit --help`", "a:", "x" * 90)
_PARTS = st.lists(st.sampled_from(_KINDS), min_size=1, max_size=30)


@given(_PARTS, st.integers(0, 6), st.integers(40, 120))
def test_a_wrapped_line_has_the_same_text_and_fits(parts: list[str], indent: int, width: int) -> None:
    line = " " * indent + " ".join(parts)
    wrapped = wrap_line(line, width).splitlines()
    assert " ".join(each.strip() for each in wrapped) == line.strip()
    if len(line) >= width:
        assert all(len(each) < width or "x" * 90 in each for each in wrapped)
        assert all(each.startswith(" " * (indent + 2)) for each in wrapped[1:])
    kept = [part for part in parts if part.startswith(("--", "`"))]
    assert sum(each.count(part) for each in wrapped for part in set(kept)) == len(kept)


def test_a_command_or_a_line_of_a_log_is_not_changed() -> None:
    for line in (f"  launcher fit {'--config run.yaml ' * 9}", f"    | {'traceback ' * 20}"):
        assert wrap_line(line, 80) == line


def test_a_command_to_delete_is_in_one_piece() -> None:
    command = f"rm -r /{'folder/' * 6}runs"
    assert command in wrap_line(f"error: {'a problem ' * 4}; delete it with: {command}", 80)


def test_only_a_terminal_gets_wrapped_lines() -> None:
    text = "error: " + "a problem " * 20
    assert wrap_for(io.StringIO(), text) == text
    master, slave = pty.openpty()
    try:
        with os.fdopen(slave, "w") as terminal:
            # A new terminal has no size until it gets one.
            assert wrap_for(terminal, text) == text
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
            assert max(map(len, wrap_for(terminal, text).splitlines())) < 80
    finally:
        os.close(master)


@pytest.mark.parametrize("width", [14, 20, 33, 60])
def test_a_number_stays_with_its_unit_and_an_item_in_one_piece(width: int) -> None:
    text = f"limit 10.8 GiB of 11.8 GiB, 0.5 ms/sample; {join_items(['grads 3.0', 'host <0.01', 'a b'])}"
    lines = wrap_text(text, width)
    assert max(map(len, lines)) <= width
    assert " ".join(lines) == text.replace("\x00", " ")
    assert not any(re.search(r"(\d|grads|host|a)$", line) for line in lines[:-1])
