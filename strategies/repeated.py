"""A sequence of records that differ only in their number, stored once: what holds for one holds for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

T = TypeVar("T")


@dataclass(frozen=True)
class RepeatedRecords(Sequence[T]):
    """`number` records like the first, each created when it is accessed.

    Attributes:
        numbered: creates the record of a number from the first; changes nothing that a decision depends on.
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
            return tuple(self[position] for position in range(self.number)[index])
        position = range(self.number)[index]
        return self.numbered(self.first, position) if position else self.first


def select(records: Sequence[T], holds: Callable[[T], bool]) -> Sequence[T]:
    """The records for which `holds` is true, in order; all or none of repeated records."""
    if isinstance(records, RepeatedRecords):
        return records if records.number and holds(records.first) else ()
    return [record for record in records if holds(record)]


def count_groups(records: Sequence[T]) -> Sequence[tuple[T, int]]:
    """Records and how many there are of each; repeated records are one group, all others single."""
    if isinstance(records, RepeatedRecords):
        return [(records.first, records.number)] if records.number else []
    return [(record, 1) for record in records]
