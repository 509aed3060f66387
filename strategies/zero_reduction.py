"""DeepSpeed's split of gradients over ranks, and the copies with which stages 1 and 2 reduce a bucket. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from strategies.model_states import ModelShape
from strategies.zero_states import MOST_RANKS, owned_parts

# With more ranks a bucket has pieces for so many ranks that one rank may need a copy of nearly all of it.
_MOST_RANKS = 64


@dataclass(frozen=True, slots=True)
class Reduction:
    """The largest buffers in addition to a bucket while it is reduced, in elements.

    Attributes:
        joined: copy of the pieces of one rank, if they are not contiguous.
        sent: what one rank receives at once.
    """

    numel: int
    joined: int
    sent: int


def find_offsets(model: ModelShape, world_size: int) -> dict[int, tuple[int, int]]:
    """The offset of each parameter in the flat buffer of its group, and the part of the buffer per rank, in elements.

    Empty with more than `_MOST_RANKS` ranks.
    """
    places: dict[int, tuple[int, int]] = {}
    if world_size > _MOST_RANKS:
        return places
    groups = [[i for i in group if model.parameters[i].trainable] for group in model.groups]
    for group, part in zip([g for g in groups if g], owned_parts(model, 1, world_size), strict=True):
        begin = 0
        for number in group:
            places[number] = begin, part
            begin += model.parameters[number].numel
    return places


def find_largest_pieces(model: ModelShape, stage: int, world_size: int) -> list[int]:
    """The most elements of one parameter's gradient that each rank owns, for the first `MOST_RANKS` ranks."""
    groups = model.trained_groups()
    ranks = min(world_size, MOST_RANKS)
    if stage == 3:
        return [max((-(-numel // world_size) for sizes in groups for numel in sizes), default=0)] * ranks
    largest = [0] * ranks
    for sizes, part in zip(groups, owned_parts(model, stage, world_size), strict=True):
        begin = 0
        for numel in sizes:
            end = begin + numel
            for rank in range(begin // part, min((end - 1) // part + 1, ranks)):
                piece = min(end, (rank + 1) * part) - max(begin, rank * part)
                largest[rank] = max(largest[rank], piece)
            begin = end
    return largest


def find_reduction(
    content: Sequence[tuple[int | None, int]], places: Mapping[int, tuple[int, int]], width: int
) -> Reduction:
    """The buffers for reducing a bucket.

    Args:
        content: index of the parameter and bytes of its gradient, in order of arrival.
        places: from `find_offsets`; a missing parameter may be anywhere.
        width: bytes of an element.
    """
    numel = sum(size for _, size in content) // width
    if len(content) == 1 and content[0][0] not in places:
        return Reduction(numel, 0, numel)
    # For each rank the lengths of its pieces; contiguous pieces are one.
    pieces: defaultdict[int, list[int]] = defaultdict(list)
    last: int | None = None
    for number, size in content:
        if number is None or number not in places:
            return Reduction(numel, numel, numel)
        begin, part = places[number]
        end = begin + size // width
        while begin < end:
            rank = begin // part
            until = min(end, (rank + 1) * part)
            if rank == last:
                pieces[rank][-1] += until - begin
            else:
                pieces[rank].append(until - begin)
            begin, last = until, rank
    joined = max((sum(lengths) for lengths in pieces.values() if len(lengths) > 1), default=0)
    return Reduction(numel, joined, max((sum(lengths) for lengths in pieces.values()), default=0))
