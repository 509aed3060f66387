"""The facts on which all ranks must agree before the model is built, and their comparison."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launcher.core.errors import AgreementError
from launcher.hardware.devices import Hardware
from launcher.hardware.nvme import NvmeFolder
from launcher.hardware.topology import Topology
from launcher.user_code.sources import differing
from strategies.precision import RankCapability
from strategies.repeated import RepeatedRecords, count_groups


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What one rank sends to the others.

    Attributes:
        hardware: its device and versions; None if it failed earlier.
        config_digest: `RunConfig.digest()`; None if it has no valid config.
        config: dotted path to value, only if the digest differs from rank zero's; without its secrets.
        secrets: dotted path to digest of the config's secrets.
        traits: properties of its classes, equal on all ranks with equal code.
        sources_digest: of the user's source files; None if it has not imported them.
        sources: file to digest, only if that digest differs from rank zero's.
        deepspeed_fp16: whether DeepSpeed trains in fp16 on its device.
        nvme: the folders for ZeRO's offload that it checked, with the result.
        token: unique to this process; an earlier process of the same rank has another one.
    """

    rank: int
    local_rank: int
    local_world_size: int
    node_rank: int
    host: str
    hardware: Hardware | None = None
    config_digest: str | None = None
    config: Mapping[str, Any] | None = None
    secrets: Mapping[str, str] = field(default_factory=dict)
    traits: Mapping[str, Any] = field(default_factory=dict)
    sources_digest: str | None = None
    sources: Mapping[str, str] | None = None
    deepspeed_fp16: bool = True
    nvme: tuple[NvmeFolder, ...] = ()
    error: str | None = None
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @classmethod
    def of(cls, topology: Topology, **known: Any) -> RankFacts:
        """The facts of the rank at `topology`."""
        return cls(
            rank=topology.rank,
            local_rank=topology.local_rank,
            local_world_size=topology.local_world_size,
            node_rank=topology.node_rank,
            host=topology.host,
            **known,
        )

    def to_json(self) -> str:
        """As the text that the store holds."""
        return json.dumps({**asdict(self), "hardware": self.hardware.to_dict() if self.hardware else None}, default=str)

    @classmethod
    def from_json(cls, text: str | bytes) -> RankFacts:
        """The inverse of `to_json`."""
        values = json.loads(text)
        if values["hardware"]:
            values["hardware"] = Hardware.from_dict(values["hardware"])
        values["nvme"] = tuple(NvmeFolder(**folder) for folder in values["nvme"])
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Every rank's facts, in the order of the ranks; those that must be equal are equal.

    Attributes:
        facts: one record per rank; for identical ranks that don't run yet, see `make_identical_ranks`.
        assumed: whether the ranks are only assumed to be like this one (a plan for ranks that don't run yet).
    """

    facts: Sequence[RankFacts]
    assumed: bool = False

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.facts)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host names, in the order of the ranks, each once."""
        return list_hosts(self.facts)

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        if isinstance(self.facts, RepeatedRecords):
            return self.facts[-1].node_rank + 1
        return len({f.node_rank for f in self.facts})

    def kinds(self) -> Sequence[tuple[RankFacts, int]]:
        """One rank of each kind, and the number of ranks like it."""
        return count_groups(self.facts)

    def capabilities(self) -> Sequence[RankCapability]:
        """The capabilities of each rank's device."""
        facts = self.facts
        if isinstance(facts, RepeatedRecords):
            first = _capability(facts.first)
            return () if first is None else RepeatedRecords(first, facts.number, _numbered_capability(facts))
        return [known for known in map(_capability, facts) if known is not None]


def make_identical_ranks(first: RankFacts, count: int) -> RepeatedRecords[RankFacts]:
    """The facts of `count` ranks like the first one, `local_world_size` of them on each node."""
    return RepeatedRecords(first, count, _numbered)


def list_hosts(facts: Sequence[RankFacts]) -> tuple[str, ...]:
    """Host names, in the order of the ranks, each once."""
    if isinstance(facts, RepeatedRecords):
        return tuple(_host(facts.first, rank) for rank in range(0, facts.number, facts.first.local_world_size))
    return tuple(dict.fromkeys(f.host for f in facts))


def _numbered(first: RankFacts, rank: int) -> RankFacts:
    node, local = divmod(rank, first.local_world_size)
    return dataclasses.replace(first, rank=rank, local_rank=local, node_rank=node, host=_host(first, rank))


def _host(first: RankFacts, rank: int) -> str:
    return first.host if rank < first.local_world_size else f"node-{rank // first.local_world_size}"


def _capability(facts: RankFacts) -> RankCapability | None:
    if facts.hardware is None:
        return None
    device = facts.hardware.device
    return RankCapability(facts.rank, facts.host, device.kind, device.name, frozenset(device.native_dtypes))


def _numbered_capability(facts: RepeatedRecords[RankFacts]) -> Callable[[RankCapability, int], RankCapability]:
    return lambda first, rank: dataclasses.replace(first, rank=rank, host=_host(facts.first, rank))


def agree_on(facts: Sequence[RankFacts]) -> Agreement:
    """Compare the facts of all ranks.

    Raises:
        AgreementError: lists every rank that failed or differs, with its host and the difference.
    """
    ordered = sorted(facts, key=lambda f: f.rank)
    failed: dict[str, list[RankFacts]] = {}
    for fact in ordered:
        if fact.error is not None:
            failed.setdefault(fact.error, []).append(fact)
    if failed:
        if len(failed) == 1 and len(next(iter(failed.values()))) == len(ordered):
            raise AgreementError(next(iter(failed)), [f.rank for f in ordered])
        lines = [f"{_name(ranks)}: {error}" for error, ranks in failed.items()]
        raise AgreementError("\n".join(lines), [f.rank for ranks in failed.values() for f in ranks])
    lines: list[str] = []
    ranks: set[int] = set()
    for what, value_of in _MUST_MATCH.items():
        groups: dict[Any, list[RankFacts]] = {}
        for fact in ordered:
            groups.setdefault(value_of(fact), []).append(fact)
        if len(groups) > 1:
            groups_by_size = sorted(groups.items(), key=lambda g: (-len(g[1]), g[1][0].rank))
            lines.append(f"{what}: " + "; ".join(f"{value} on {_name(members)}" for value, members in groups_by_size))
            ranks.update(f.rank for _, members in groups_by_size[1:] for f in members)
    lines += _config_differences(ordered)
    lines += _secret_differences(ordered)
    lines += _source_differences(ordered)
    if lines:
        raise AgreementError(
            "the ranks differ, so they would not train the same model:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\ninstall the same versions and use the same config and code on every node",
            sorted(ranks),
        )
    return Agreement(tuple(ordered))


def _version(name: str) -> Callable[[RankFacts], Any]:
    return lambda fact: fact.hardware.versions.get(name) if fact.hardware else None


# Patch releases of Python do not matter; a build of torch ("+cpu", "+cu130") is part of its version.
_MUST_MATCH: dict[str, Callable[[RankFacts], Any]] = {
    "torch version": _version("torch"),
    "lightning version": _version("lightning"),
    "deepspeed version": _version("deepspeed"),
    "config": lambda fact: fact.config_digest[:12] if fact.config_digest else None,
    "code": lambda fact: json.dumps(fact.traits, sort_keys=True, default=str),
}


def _config_differences(facts: Sequence[RankFacts]) -> list[str]:
    base = facts[0].config or {}
    lines: list[str] = []
    for fact in facts[1:]:
        if fact.config_digest == facts[0].config_digest or fact.config is None:
            continue
        lines += [
            f"{path}: {base.get(path)!r} on {_name(facts[:1])}, {fact.config.get(path)!r} on {_name([fact])}"
            for path in sorted({*fact.config, *base})
            if fact.config.get(path) != base.get(path)
        ]
    return lines[:20]


def _secret_differences(facts: Sequence[RankFacts]) -> list[str]:
    """The secrets that differ from rank zero's, without their values."""
    lines: list[str] = []
    for path in sorted({path for fact in facts for path in fact.secrets}):
        others = [fact for fact in facts if fact.secrets.get(path) != facts[0].secrets.get(path)]
        if others:
            lines.append(f"{path}: differs on {_name(others)} from {_name(facts[:1])} (a secret, not shown)")
    return lines


def _source_differences(facts: Sequence[RankFacts]) -> list[str]:
    base = facts[0].sources or {}
    by_files: dict[tuple[str, ...], list[RankFacts]] = {}
    for fact in facts[1:]:
        if fact.sources_digest != facts[0].sources_digest and (files := differing(base, fact.sources or {})):
            by_files.setdefault(tuple(files), []).append(fact)
    return [
        f"code: {', '.join(files[:8])}{f' and {len(files) - 8} more' if len(files) > 8 else ''} differ"
        f"{'s' if len(files) == 1 else ''} on {_name(members)} from {_name(facts[:1])}"
        for files, members in by_files.items()
    ]


def _name(facts: Sequence[RankFacts], limit: int = 8) -> str:
    """As in 'rank 0 (node1), rank 3 (node2) and 2 more'."""
    named = ", ".join(f"rank {f.rank} ({f.host})" for f in facts[:limit])
    return named if len(facts) <= limit else f"{named} and {len(facts) - limit} more"
