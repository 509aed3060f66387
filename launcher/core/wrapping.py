"""Messages on a terminal: lines end at spaces, and what is to be copied stays in one piece."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import TextIO

# An option with its value, and a quoted command; a longer one is broken.
_ONE_PIECE = re.compile(r"--[\w.-]+ [^\s-]\S{0,30}|rm -r \S+|`[^`]{1,60}`")
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
    for part in _ONE_PIECE.sub(lambda found: found[0].replace(" ", _JOINED), line.strip()).split(" "):
        if lines[-1].strip() and len(lines[-1]) + len(part) >= width - 1:
            lines.append(f"{indent}  ")
        lines[-1] += f" {part}" if lines[-1].strip() else part
    return "\n".join(lines).replace(_JOINED, " ")
