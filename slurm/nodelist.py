"""SLURM's short form for lists of nodes: `n[01-03,7],login`. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

# No cluster has more nodes.
_MOST_NODES = 1_000_000


class NodeListError(ValueError):
    """A list that is not in SLURM's notation."""


def expand_nodes(text: str) -> list[str]:
    """The names in a node list such as `n[1-3,10]` or `rack[01-02]-n[001-004],a`, in its order, with zero padding.

    Raises:
        NodeListError: brackets do not match, a range is descending, or a name is empty.
    """
    return [name for part in _split(text) for name in _expand(part, text)]


def _split(text: str) -> Iterator[str]:
    """The parts between the commas outside of brackets."""
    depth, start = 0, 0
    for position, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            break
        if letter == "," and depth == 0:
            yield text[start:position]
            start = position + 1
    if depth != 0:
        raise NodeListError(f"given {text!r}; its brackets do not match; expected a list like n[01-08]")
    yield text[start:]


def _expand(part: str, text: str) -> Iterator[str]:
    pieces = re.split(r"\[([^\]]*)\]", part)
    if not part:
        raise NodeListError(f"given {text!r}; a name is empty; expected a list like n[01-08]")
    # re.split puts the contents of brackets at odd positions.
    choices = [_ranges(piece, text) if place % 2 else [piece] for place, piece in enumerate(pieces)]
    for combination in itertools.product(*choices):
        yield "".join(combination)


def _ranges(inside: str, text: str) -> list[str]:
    names: list[str] = []
    for item in inside.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", item, re.ASCII)
        if found is None:
            raise NodeListError(f"given {text!r}; {item!r} is not a number or a range like 01-08")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last - first >= _MOST_NODES:
            raise NodeListError(f"given {text!r}; the range {item} is descending or too long")
        names += [str(number).zfill(len(found[1])) for number in range(first, last + 1)]
    return names
