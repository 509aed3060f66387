"""Many records that differ in their number alone, kept once: what is decided of one is decided of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

T = TypeVar("T")


@dataclass(frozen=True)
class RepeatedRecords(Sequence[T]):
    """`number` records like the first, each made when it is asked for.

    Attributes:
        first: the record number 0.
        number: how many there are.
        numbered: makes the record of a number from the first; changes nothing that a decision looks at.
    """

    first: T
    number: int
    numbered: Callable[[T, int], T]

    def __len__(self) -> int:
        return self.number

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(self.number)[index])
        place = range(self.number)[index]
        return self.numbered(self.first, place) if place else self.first


def where(records: Sequence[T], holds: Callable[[T], bool]) -> Sequence[T]:
    """The records that `holds` is true of, in order; of records that are alike, all or none."""
    if isinstance(records, RepeatedRecords):
        return records if records.number and holds(records.first) else ()
    return [record for record in records if holds(record)]


def counted(records: Sequence[T]) -> Sequence[tuple[T, int]]:
    """Records and how many there are of each: one of those that are alike, any other by itself."""
    if isinstance(records, RepeatedRecords):
        return [(records.first, records.number)] if records.number else []
    return [(record, 1) for record in records]
