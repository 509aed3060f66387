"""Messages on a terminal: lines end at spaces, and what is to be copied stays in one piece."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Iterable
from typing import TextIO

# An option with its value, a quoted command, and a number with its unit; a longer one is broken.
_ONE_PIECE = re.compile(r"--[\w.-]+ [^\s-]\S{0,30}|rm -r \S+|`[^`]{1,60}`|\d (?:[KMGT]i?B|ms|s)\b(?:/\w+)?")
# A line that is a command, which is pasted, or of a log.
_UNCHANGED = re.compile(r"\s*(\||(\S*/)?(launcher|torchrun|python[\d.]*) )")
# Stands for a space at which no line ends.
_JOINED = "\x00"
_NARROWEST = 20


def print_message(text: str) -> None:
    """Print a message to stderr, wrapped on a terminal; a closed terminal ends nothing and changes no exit code."""
    with contextlib.suppress(OSError):
        sys.stderr.write(wrap_for(sys.stderr, text) + "\n")
        sys.stderr.flush()


def escape_controls(name: str) -> str:
    """A name of the user on one line: line ends, tabs and other control characters as in Python's `repr`."""
    return "".join(c if c.isprintable() or c == "\xa0" else c.encode("unicode_escape").decode() for c in name)


def wrap_for(stream: TextIO, text: str) -> str:
    """A message for a stream: unchanged in files and pipes."""
    if not stream.isatty():
        return text
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return text  # a terminal of a notebook has no size
    return "\n".join(wrap_line(line, width) for line in text.splitlines()) if width >= _NARROWEST else text


def wrap_line(line: str, width: int) -> str:
    """A line of a message in lines of less than `width`; a line that is a command, or of a log, is not changed."""
    if len(line) < width or _UNCHANGED.match(line):
        return line
    indent = " " * (len(line) - len(line.lstrip()))
    lines = [indent]
    for part in _join_pieces(line.strip()).split(" "):
        if lines[-1].strip() and len(lines[-1]) + len(part) >= width - 1:
            lines.append(f"{indent}  ")
        lines[-1] += f" {part}" if lines[-1].strip() else part
    return "\n".join(lines).replace(_JOINED, " ")


def wrap_text(text: str, width: int) -> list[str]:
    """A text in lines of at most `width`, all from the same column."""
    return [line.replace(_JOINED, " ") for line in textwrap.wrap(_join_pieces(text), width, break_on_hyphens=False)]


def join_items(items: Iterable[str]) -> str:
    """Items with commas, for `wrap_text`: no line ends in an item."""
    return ", ".join(item.replace(" ", _JOINED) for item in items)


def _join_pieces(text: str) -> str:
    return _ONE_PIECE.sub(lambda found: found[0].replace(" ", _JOINED), text)
