"""What a preflight found, and what is said of it. Pure: `launcher.doctor.preflight_rank` measures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.doctor.command import Finding
from strategies.units import format_rate

# Clocks further apart than this make logs and events of the nodes read in the wrong order.
_CLOCK_APART_S = 0.1
# Slower than gigabit Ethernet, which nobody trains over on purpose.
_SLOW_NETWORK = 1e8
_MOST_NAMED = 8


@dataclass(frozen=True, slots=True)
class RankResult:
    """What one rank measured; None for what it did not come to.

    Attributes:
        rank: global rank.
        host: its node's name.
        device: the vendor's name of what it computed on.
        dtype: what it multiplied in, as in 'bf16'.
        flops: floating point operations per second of a large matrix product.
        clock_offset: seconds that its clock is ahead of rank zero's; one rank of each node tells it.
        clock_error: the most that this is off by: half of the round trip.
        all_reduce: bytes per second of an all-reduce of all ranks, as bus bandwidth.
        all_reduce_sum: whether the sum was right.
        exchange: rank of a partner to bytes per second of an exchange with it.
    """

    rank: int
    host: str
    device: str = ""
    dtype: str = ""
    flops: float | None = None
    clock_offset: float | None = None
    clock_error: float | None = None
    all_reduce: float | None = None
    all_reduce_sum: bool | None = None
    exchange: Mapping[int, float] | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RankResult:
        """The inverse of `dataclasses.asdict`, from JSON."""
        pairs = values["exchange"]
        return cls(**{**values, "exchange": None if pairs is None else {int(r): float(s) for r, s in pairs.items()}})


@dataclass(frozen=True, slots=True)
class NodeResult:
    """What one node said of itself.

    Attributes:
        node: rank of the node.
        host: its name.
        ranks: ranks that were started there, the first with global rank `node * ranks`.
        findings: of the doctor's own checks there.
        last_words: local rank to the last lines of its log, for those that failed.
        error: why it started no rank; empty if it did.
    """

    node: int
    host: str
    ranks: int
    findings: tuple[Finding, ...] = ()
    last_words: Mapping[int, str] | None = None
    error: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NodeResult:
        """The inverse of `dataclasses.asdict`, from JSON."""
        words = values["last_words"]
        return cls(**{
            **values,
            "findings": tuple(Finding(**finding) for finding in values["findings"]),
            "last_words": None if words is None else {int(rank): str(text) for rank, text in words.items()},
        })  # fmt: skip


def exchange_rounds(participants: int) -> list[list[tuple[int, int]]]:
    """Who exchanges with whom, round by round: every participant with both of its neighbours on a ring.

    Two partners for each, so that a slow participant, slow with both, is told from a slow partner. In a round nobody
    has two partners, or they would share its link.
    """
    if participants < 2:
        return []
    if participants == 2:
        return [[(0, 1)]]
    even = [(one, one + 1) for one in range(0, participants - 1, 2)]
    odd = [(one, (one + 1) % participants) for one in range(1, participants - participants % 2, 2)]
    last = [[(participants - 1, 0)]] if participants % 2 else []
    return [even, odd, *last]


def preflight_findings(
    nodes: Sequence[NodeResult], ranks: Sequence[RankResult], expected_nodes: int, slow_factor: float
) -> Iterator[Finding]:
    """Everything that there is to say of a preflight.

    Args:
        nodes: those that told something.
        ranks: those that told something.
        expected_nodes: how many were asked for.
        slow_factor: against the median, from which on a rank is named.
    """
    yield from _of_the_nodes(nodes)
    yield from _who_came(nodes, ranks, expected_nodes)
    yield from _matmul(ranks, slow_factor)
    yield from _all_reduce(ranks)
    yield from _exchange(ranks, slow_factor)
    yield from _clocks(ranks)


def _of_the_nodes(nodes: Sequence[NodeResult]) -> Iterator[Finding]:
    """What the doctor's checks found on the nodes and was not well: once, with all hosts that it is so on."""
    hosts: dict[Finding, list[str]] = {}
    for node in sorted(nodes, key=lambda n: n.node):
        for finding in node.findings:
            if finding.status != "ok":
                hosts.setdefault(finding, []).append(node.host)
    for finding, found_on in hosts.items():
        yield Finding(finding.name, finding.status, f"{_named(found_on)}: {finding.found}", finding.advice)
    if len(nodes) > 1 and not hosts:
        yield Finding("nodes", "ok", f"{_named([n.host for n in nodes])}: versions, devices, disk and limits are well")


def _who_came(nodes: Sequence[NodeResult], ranks: Sequence[RankResult], expected: int) -> Iterator[Finding]:
    """Ranks that did not get to the end, with their last words."""
    world_size = expected * max((n.ranks for n in nodes), default=0)
    done = {r.rank for r in ranks if r.flops is not None and (world_size == 1 or r.exchange is not None)}
    wanted = {n.node * n.ranks + local: (n, local) for n in nodes for local in range(n.ranks)}
    for node in nodes:
        if node.error:
            advice = "open the ports between the nodes, and use a folder that all of them see"
            yield Finding("ranks", "failure", f"{node.host}: {node.error}", advice)
    missing = expected - len(nodes)
    if missing > 0:
        told = f"; {_named([n.host for n in nodes])} did" if nodes else ""
        advice = "keep the silent nodes out with --exclude; `scontrol show node` says how they are"
        yield Finding("ranks", "failure", f"{missing} of {expected} nodes told nothing{told}", advice)
    lost = sorted(set(wanted) - done)
    started = {r.rank: r for r in ranks}
    for rank in lost[:_MOST_NAMED]:
        node, local = wanted[rank]
        words = (node.last_words or {}).get(local, "")
        stage = _stage(started.get(rank))
        found = f"rank {rank} ({node.host}) {stage}" + (f":\n{words}" if words else ", without a word")
        yield Finding("ranks", "failure", found, f"mend what it says; --exclude {node.host} trains without that node")
    if len(lost) > _MOST_NAMED:
        yield Finding("ranks", "failure", f"and {len(lost) - _MOST_NAMED} more ranks", "look at the first ones")
    if wanted and not lost and missing <= 0:
        devices = sorted({r.device for r in ranks})
        found = f"{len(ranks)} on {_named([n.host for n in nodes])} ({', '.join(devices)})"
        yield Finding("ranks", "ok", found)


def _stage(result: RankResult | None) -> str:
    """How far a rank came that did not come to the end."""
    if result is None:
        return "did not start"
    if result.flops is None:
        return "did not multiply"
    return "did not reduce with the others" if result.all_reduce is None else "did not exchange with its neighbours"


def _matmul(ranks: Sequence[RankResult], factor: float) -> Iterator[Finding]:
    """The median; and each rank that is slower by the factor or more, the slowest first."""
    told = [(r.flops, r) for r in ranks if r.flops]
    if not told:
        return
    speeds = [speed for speed, _ in told]
    middle = statistics.median(speeds)
    dtypes = ", ".join(sorted({r.dtype for _, r in told}))
    found = f"{_flops(middle)} a rank in {dtypes} (median), from {_flops(min(speeds))} to {_flops(max(speeds))}"
    yield Finding("matmul", "ok", found)
    for speed, rank in _slow(told, middle, factor):
        found = (
            f"rank {rank.rank} ({rank.host}, {rank.device}): {_flops(speed)}, {middle / speed:.1f} times slower than "
            "the median"
        )
        advice = f"others' processes, heat or low clocks there (nvidia-smi -q -d PERFORMANCE); --exclude {rank.host}"
        yield Finding("matmul", "warning", found, advice)


def _slow(told: Sequence[tuple[float, RankResult]], middle: float, factor: float) -> list[tuple[float, RankResult]]:
    """Those that are slower than the median by the factor or more, the slowest first."""
    return sorted((t for t in told if middle / t[0] >= factor), key=lambda t: (t[0], t[1].rank))[:_MOST_NAMED]


def _all_reduce(ranks: Sequence[RankResult]) -> Iterator[Finding]:
    wrong = [r for r in ranks if r.all_reduce_sum is False]
    for rank in wrong[:_MOST_NAMED]:
        advice = "data changes on the way: look at memory, PCIe and network cards; set NCCL_P2P_DISABLE=1 to narrow it"
        yield Finding("all-reduce", "failure", f"rank {rank.rank} ({rank.host}) got a wrong sum", advice)
    speeds = [r.all_reduce for r in ranks if r.all_reduce]
    if speeds and not wrong:
        yield Finding("all-reduce", "ok", f"{format_rate(min(speeds))} over {len(ranks)} ranks (bus bandwidth)")


def _exchange(ranks: Sequence[RankResult], factor: float) -> Iterator[Finding]:
    """A rank, or a node, is as fast as with the better of its two neighbours: the other may be the slow one."""
    told = [(max(r.exchange.values()), r) for r in ranks if r.exchange]
    if not told:
        return
    middle = statistics.median(speed for speed, _ in told)
    hosts = {r.host for _, r in told}
    between = f"{len(hosts)} nodes" if len(hosts) > 1 else f"{len(told)} ranks"
    status = "warning" if len(hosts) > 1 and middle < _SLOW_NETWORK else "ok"
    advice = "ranks would wait for the network: choose another with --interface" if status == "warning" else ""
    yield Finding("exchange", status, f"{format_rate(middle)} between neighbours of {between} (median)", advice)
    for speed, rank in _slow(told, middle, factor):
        found = (
            f"rank {rank.rank} ({rank.host}): {format_rate(speed)} with the better of its neighbours, "
            f"{middle / speed:.1f} times slower than the median"
        )
        advice = f"every all-reduce waits for it: cable, network card or PCIe link there; --exclude {rank.host}"
        yield Finding("exchange", "warning", found, advice)


def _clocks(ranks: Sequence[RankResult]) -> Iterator[Finding]:
    told = [(r.clock_offset, r.clock_error or 0.0, r.host) for r in ranks if r.clock_offset is not None]
    if len({host for _, _, host in told}) < 2:
        return
    apart = sorted((t for t in told if abs(t[0]) - t[1] > _CLOCK_APART_S), key=lambda t: -abs(t[0]))
    for offset, _, host in apart[:_MOST_NAMED]:
        ahead = "ahead of" if offset > 0 else "behind"
        found = f"{host} is {abs(offset):.3g} s {ahead} rank 0's node"
        yield Finding("clock", "warning", found, "logs of the nodes read in the wrong order: run chrony or ntpd there")
    if not apart:
        most, error = max((abs(offset), error) for offset, error, _ in told)
        found = f"at most {most * 1e3:.3g} ms (+- {error * 1e3:.2g} ms) from rank 0's node"
        yield Finding("clock", "ok", found)


def _named(hosts: Sequence[str]) -> str:
    names = list(dict.fromkeys(hosts))
    return ", ".join(names[:_MOST_NAMED]) + (
        f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    )


def _flops(value: float) -> str:
    return f"{value / 1e12:.3g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP/s"
