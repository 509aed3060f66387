"""Reads torch's flight records in a hang and finds the ranks that did not enter a collective.

torch keeps the last collectives of a process in a ring buffer (`FlightRecorder.hpp`), for NCCL and for gloo, and writes
them as JSON. The pickled form is not read, because unpickling a file can run code. Pure except for reading the file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.monitoring.health import format_ranks

_DEFAULT_GROUP = "default_pg"
# Operations that need the same sizes on every rank; others may gather or scatter uneven parts.
_SAME_SIZES = {"all_reduce", "broadcast", "reduce"}


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective that a rank entered.

    Attributes:
        number: position among the group's collectives, from 1; ranks with equal numbers wait for each other.
        sizes: shapes of the input tensors.
        dtypes: types of the input tensors, by torch's names ('Float').
    """

    group: str
    number: int
    operation: str
    sizes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()

    def __str__(self) -> str:
        tensors = ", ".join(f"{list(size)} {dtype}" for size, dtype in zip(self.sizes, self.dtypes, strict=False))
        return f"{self.operation}{' of ' + tensors if tensors else ''} (number {self.number} of {self.group})"

    @property
    def kind(self) -> str:
        """The same for each collective of this operation with these tensors."""
        return f"{self.operation} {self.sizes} {self.dtypes}"

    def matches(self, other: Collective) -> bool:
        """Whether two ranks can complete these together."""
        if self.operation != other.operation:
            return False
        return self.operation not in _SAME_SIZES or (self.sizes, self.dtypes) == (other.sizes, other.dtypes)


@dataclass(frozen=True, slots=True)
class FlightRecord:
    """The flight record of one rank.

    Attributes:
        last: group to the number of the last collective that the rank entered.
        members: group to its ranks, if the recorder knows them.
        earlier: for the kind of each collective in which the rank waits, how often it has completed one.
    """

    last: Mapping[str, int] = field(default_factory=dict[str, int])
    waiting: tuple[Collective, ...] = ()
    members: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    earlier: Mapping[str, int] = field(default_factory=dict[str, int])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlightRecord:
        """The inverse of `dataclasses.asdict`."""
        waiting = tuple(
            Collective(v["group"], v["number"], v["operation"], tuple(map(tuple, v["sizes"])), tuple(v["dtypes"]))
            for v in values["waiting"]
        )
        members = {group: tuple(ranks) for group, ranks in values["members"].items()}
        return cls(values["last"], waiting, members, values.get("earlier", {}))


def read_flight_record(path: Path) -> FlightRecord | None:
    """Read a record from a file; None if it is missing or incomplete."""
    try:
        return parse_flight_record(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def parse_flight_record(text: str | bytes) -> FlightRecord:
    """Read the recorder's JSON, version 2.x.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the text is not a flight record.
    """
    values: dict[str, Any] = json.loads(text)
    last: dict[str, int] = {}
    waiting: list[Collective] = []
    names: dict[str, str] = {}
    completed: Counter[str] = Counter()
    if "version" not in values:
        raise ValueError("not a flight record: it has no version")
    # A recorder without collectives omits the list.
    for entry in values.get("entries", []):
        if entry["is_p2p"]:
            continue
        name, description = entry["process_group"]
        group = description if description == _DEFAULT_GROUP else name
        names[name] = group
        backend, _, operation = entry["profiling_name"].rpartition(":")
        number = int(entry["collective_seq_id"])
        last[group] = max(last.get(group, 0), number)
        # NCCL's watchdog also retires collectives that timed out; gloo never marks one as completed.
        is_done = entry["retired"] if backend == "gloo" else entry["state"] == "completed"
        sizes = tuple(tuple(int(n) for n in size) for size in entry["input_sizes"])
        collective = Collective(group, number, operation, sizes, tuple(entry["input_dtypes"]))
        if is_done:
            completed[collective.kind] += 1
        else:
            waiting.append(collective)
    members = {
        names[name]: tuple(json.loads(config["ranks"]))
        for name, config in values.get("pg_config", {}).items()
        if name in names
    }
    return FlightRecord(last, tuple(waiting), members, {each.kind: completed[each.kind] for each in waiting})


def find_absent_ranks(records: Mapping[int, FlightRecord]) -> dict[int, str]:
    """The ranks that others wait for in a collective, with the collective: mismatched ranks, otherwise late ones.

    After a mismatch one of the two may have entered more collectives, as some do not wait for the others.
    """
    return find_mismatches(records) or find_late_ranks(records)


def find_late_ranks(records: Mapping[int, FlightRecord]) -> dict[int, str]:
    """The ranks that did not enter a collective in which others wait, with the collective.

    A rank is late if it has entered fewer of a group's collectives than a rank that waits. Late ranks that wait in a
    collective themselves are left out if other ranks are late, which may delay them.
    """
    late: dict[int, str] = {}
    for collective, waiting in _waiting_ranks(records).items():
        for rank in sorted(_members(records, collective.group)):
            if records[rank].last.get(collective.group, 0) < collective.number:
                verb = "waits" if len(waiting) == 1 else "wait"
                late.setdefault(rank, f"it did not enter {collective}, in which {format_ranks(waiting)} {verb}")
    if late:
        idle = {rank: text for rank, text in late.items() if not records[rank].waiting}
        return dict(sorted((idle or late).items()))
    return {}


def _waiting_ranks(records: Mapping[int, FlightRecord]) -> dict[Collective, list[int]]:
    """Every incomplete collective, oldest first, with the ranks that wait in it."""
    found: dict[Collective, list[int]] = {}
    for rank in sorted(records):
        for collective in records[rank].waiting:
            found.setdefault(collective, []).append(rank)
    return dict(sorted(found.items(), key=lambda pair: pair[0].number))


def _members(records: Mapping[int, FlightRecord], group: str) -> set[int]:
    """The ranks of a group that have a record; without a list of its ranks, those that have used it."""
    listed = [record.members[group] for record in records.values() if group in record.members]
    if listed:
        return {rank for rank in records if rank in listed[0]}
    if group == _DEFAULT_GROUP:
        return set(records)
    return {rank for rank, record in records.items() if group in record.last}


def find_mismatches(records: Mapping[int, FlightRecord]) -> dict[int, str]:
    """Ranks that wait in a different collective from most of their group: they will wait forever.

    If two collectives have the same number of ranks, those are named whose collective was completed less often before.
    """
    rounds: dict[tuple[str, int], dict[int, Collective]] = {}
    for rank in sorted(records):
        for collective in records[rank].waiting:
            rounds.setdefault((collective.group, collective.number), {})[rank] = collective
    for _, present in sorted(rounds.items(), key=lambda pair: pair[0][1]):
        counted = Counter(present.values()).most_common()
        common, count = counted[0]
        if all(one.matches(common) for one in present.values()):
            continue
        if len(counted) > 1 and counted[1][1] == count:
            earlier = {rank: records[rank].earlier.get(one.kind, 0) for rank, one in present.items()}
            others = {rank: one for rank, one in present.items() if earlier[rank] < max(earlier.values())} or present
        else:
            others = {rank: one for rank, one in present.items() if not one.matches(common)}
        return {rank: f"it entered {one}, where {_describe_others(present, one)}" for rank, one in others.items()}
    return {}


def _describe_others(present: Mapping[int, Collective], own: Collective) -> str:
    rest: dict[Collective, list[int]] = {}
    for rank, collective in present.items():
        if not collective.matches(own):
            rest.setdefault(collective, []).append(rank)
    return " and ".join(f"{format_ranks(ranks)} entered {collective}" for collective, ranks in rest.items())
