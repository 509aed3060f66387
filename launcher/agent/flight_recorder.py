"""What torch's flight recorder knows of a hang: the collectives that each rank has entered, and who did not enter one.

torch keeps the last collectives of a process in a ring buffer (`FlightRecorder.hpp`), for NCCL and for gloo, and writes
them as JSON. Its pickled form is not read: a file that came from elsewhere must not be run. Pure but for reading.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_DEFAULT_GROUP = "default_pg"
# What every rank must give the same sizes to; other operations may gather or scatter uneven parts.
_SAME_SIZES = {"all_reduce", "broadcast", "reduce"}


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective that a rank entered.

    Attributes:
        group: name of the process group.
        number: counts the group's collectives, from 1; equal numbers meet.
        operation: 'all_reduce' and the like.
        sizes: shapes of the tensors that went in.
        dtypes: of the same tensors, in torch's words ('Float').
    """

    group: str
    number: int
    operation: str
    sizes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()

    def __str__(self) -> str:
        tensors = ", ".join(f"{list(size)} {dtype}" for size, dtype in zip(self.sizes, self.dtypes, strict=False))
        return f"{self.operation}{' of ' + tensors if tensors else ''} (number {self.number} of {self.group})"

    def meets(self, other: Collective) -> bool:
        """Whether two ranks can be in these together."""
        if self.operation != other.operation:
            return False
        return self.operation not in _SAME_SIZES or (self.sizes, self.dtypes) == (other.sizes, other.dtypes)


@dataclass(frozen=True, slots=True)
class FlightRecord:
    """What one rank's recorder says.

    Attributes:
        last: group to the number of the last collective that the rank entered.
        waiting: the collectives that it entered and that are not done, oldest first.
        members: group to its ranks, where the recorder knows them.
    """

    last: Mapping[str, int] = field(default_factory=dict[str, int])
    waiting: tuple[Collective, ...] = ()
    members: Mapping[str, frozenset[int]] = field(default_factory=dict[str, frozenset[int]])

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "last": dict(self.last),
            "waiting": [asdict(collective) for collective in self.waiting],
            "members": {group: sorted(ranks) for group, ranks in self.members.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlightRecord:
        """The inverse of `to_dict`."""
        waiting = tuple(
            Collective(v["group"], v["number"], v["operation"], tuple(map(tuple, v["sizes"])), tuple(v["dtypes"]))
            for v in values["waiting"]
        )
        return cls(values["last"], waiting, {group: frozenset(ranks) for group, ranks in values["members"].items()})


def read_flight_record(path: Path) -> FlightRecord | None:
    """The record in a file; None if there is none, or no whole one."""
    try:
        return parse_flight_record(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def parse_flight_record(text: str | bytes) -> FlightRecord:
    """Read the recorder's JSON, version 2.x.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it has another form.
    """
    values: dict[str, Any] = json.loads(text)
    last: dict[str, int] = {}
    waiting: list[Collective] = []
    names: dict[str, str] = {}
    if "version" not in values:
        raise ValueError("no flight record: its version is missing")
    # A recorder that has seen nothing leaves the list out.
    for entry in values.get("entries", []):
        if entry["is_p2p"]:
            continue
        name, description = entry["process_group"]
        group = description if description == _DEFAULT_GROUP else name
        names[name] = group
        backend, _, operation = entry["profiling_name"].rpartition(":")
        number = int(entry["collective_seq_id"])
        last[group] = max(last.get(group, 0), number)
        # NCCL's watchdog retires what has timed out, too; gloo never says that anything is completed.
        done = entry["retired"] if backend == "gloo" else entry["state"] == "completed"
        if not done:
            sizes = tuple(tuple(int(n) for n in size) for size in entry["input_sizes"])
            waiting.append(Collective(group, number, operation, sizes, tuple(entry["input_dtypes"])))
    members = {
        names[name]: frozenset(json.loads(config["ranks"]))
        for name, config in values.get("pg_config", {}).items()
        if name in names
    }
    return FlightRecord(last, tuple(waiting), members)


def ranks_that_did_not_enter(records: Mapping[int, FlightRecord]) -> dict[int, str]:
    """The ranks that others wait for in a collective, and which one.

    A rank that has entered fewer of a group's collectives than one that waits is late; if all have entered as many,
    those are named that entered another one than the rest. Of the late ranks the ones that wait for nobody themselves
    are named, if there are any: the others are late because of them.

    Args:
        records: by global rank; ranks that could not tell are left out.
    """
    late: dict[int, str] = {}
    for collective, waiting in _waited_for(records).items():
        for rank in sorted(_members(records, collective.group)):
            if records[rank].last.get(collective.group, 0) < collective.number:
                late.setdefault(rank, f"it did not enter {collective}, in which {_ranks(waiting)} waits")
    if late:
        idle = {rank: text for rank, text in late.items() if not records[rank].waiting}
        return dict(sorted((idle or late).items()))
    return _mismatched(records)


def _waited_for(records: Mapping[int, FlightRecord]) -> dict[Collective, list[int]]:
    """Every collective that a rank waits in, the oldest first, and the ranks that do."""
    found: dict[Collective, list[int]] = {}
    for rank in sorted(records):
        for collective in records[rank].waiting:
            found.setdefault(collective, []).append(rank)
    return dict(sorted(found.items(), key=lambda pair: pair[0].number))


def _members(records: Mapping[int, FlightRecord], group: str) -> set[int]:
    """The ranks of a group that have told; without a list of them those that were ever in it."""
    listed = [record.members[group] for record in records.values() if group in record.members]
    if listed:
        return {rank for rank in records if rank in listed[0]}
    if group == _DEFAULT_GROUP:
        return set(records)
    return {rank for rank, record in records.items() if group in record.last}


def _mismatched(records: Mapping[int, FlightRecord]) -> dict[int, str]:
    """All have come, but to different collectives."""
    rounds: dict[tuple[str, int], dict[int, Collective]] = {}
    for rank in sorted(records):
        for collective in records[rank].waiting:
            rounds.setdefault((collective.group, collective.number), {})[rank] = collective
    for _, present in sorted(rounds.items(), key=lambda pair: pair[0][1]):
        counted = Counter(present.values()).most_common()
        common, count = counted[0]
        if all(one.meets(common) for one in present.values()):
            continue
        others = present if len(counted) > 1 and counted[1][1] == count else {
            rank: one for rank, one in present.items() if not one.meets(common)}  # fmt: skip
        return {rank: f"it entered {one}, where {_where(present, one)}" for rank, one in others.items()}
    return {}


def _where(present: Mapping[int, Collective], own: Collective) -> str:
    """What the rest entered in its place."""
    rest: dict[Collective, list[int]] = {}
    for rank, collective in present.items():
        if not collective.meets(own):
            rest.setdefault(collective, []).append(rank)
    return " and ".join(f"{_ranks(ranks)} entered {collective}" for collective, ranks in rest.items())


def _ranks(ranks: Sequence[int] | Iterable[int], limit: int = 8) -> str:
    listed = sorted(ranks)
    named = f"rank {listed[0]}" if len(listed) == 1 else f"each of ranks {', '.join(map(str, listed[:limit]))}"
    return named if len(listed) <= limit else f"{named} and {len(listed) - limit} more"
