"""Results of a preflight, and findings about them. Pure: `launcher.doctor.preflight_rank` measures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.doctor.finding import Finding
from strategies.units import format_rate

# With larger clock differences, the order of log lines and events of different nodes is wrong.
_MAX_CLOCK_DIFFERENCE_S = 0.1
# Slower than gigabit Ethernet: not intended for training.
_SLOW_NETWORK = 1e8
_MOST_NAMED = 8


@dataclass(frozen=True, slots=True)
class RankResult:
    """Measurements of one rank; None for those that it did not complete.

    Attributes:
        host, device: names.
        dtype: precision of the matrix product, as in 'bf16'.
        flops: floating point operations per second of a large matrix product.
        clock_offset: seconds that its clock is ahead of the clock of rank 0; measured by one rank of each node.
        clock_error: largest possible error of `clock_offset`: half of the round trip.
        all_reduce: bytes per second of an all-reduce of all ranks, as bus bandwidth.
        all_reduce_sum: whether the sum was correct.
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
    """Results of one node.

    Attributes:
        node: rank of the node.
        ranks: number of ranks started there; the first has global rank `node * ranks`.
        log_tails: local rank to the last lines of its log, for ranks that failed.
        error: why it started no rank; empty if it started them.
    """

    node: int
    host: str
    ranks: int
    findings: tuple[Finding, ...] = ()
    log_tails: Mapping[int, str] | None = None
    error: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NodeResult:
        """The inverse of `dataclasses.asdict`, from JSON."""
        tails = values["log_tails"]
        return cls(**{
            **values,
            "findings": tuple(Finding(**finding) for finding in values["findings"]),
            "log_tails": None if tails is None else {int(rank): str(text) for rank, text in tails.items()},
        })  # fmt: skip


# Of a rank, in operations or bytes per second.
_Speed = tuple[float, RankResult]


def exchange_rounds(participants: int) -> list[list[tuple[int, int]]]:
    """Pairs that exchange data, by round: every participant with both of its neighbours on a ring.

    With two partners each, a slow participant (slow with both) can be distinguished from a slow partner. In a round
    each participant has at most one partner, so that no link is shared.
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
    """All findings of a preflight.

    Args:
        nodes: nodes that reported.
        ranks: ranks that reported.
        expected_nodes: requested number of nodes.
        slow_factor: ratio to the median at which a rank is reported as slow.
    """
    yield from _check_findings(nodes)
    yield from _rank_findings(nodes, ranks, expected_nodes)
    yield from _matmul_findings(ranks, slow_factor)
    yield from _all_reduce_findings(ranks)
    yield from _exchange_findings(ranks, slow_factor)
    yield from _clock_findings(ranks)


def _check_findings(nodes: Sequence[NodeResult]) -> Iterator[Finding]:
    """Warnings and failures of the checks on the nodes, each once with all hosts that have it."""
    hosts: dict[Finding, list[str]] = {}
    for node in sorted(nodes, key=lambda n: n.node):
        for finding in node.findings:
            if finding.status != "ok":
                hosts.setdefault(finding, []).append(node.host)
    for finding, found_on in hosts.items():
        yield Finding(finding.name, finding.status, f"{_list_hosts(found_on)}: {finding.found}", finding.advice)
    if len(nodes) > 1 and not hosts:
        names = _list_hosts([n.host for n in nodes])
        yield Finding("nodes", "ok", f"{names}: versions, devices, disk and limits are ok")


def _rank_findings(nodes: Sequence[NodeResult], ranks: Sequence[RankResult], expected: int) -> Iterator[Finding]:
    """Nodes that did not report, and ranks that did not complete, with the end of their logs."""
    world_size = expected * max((n.ranks for n in nodes), default=0)
    done = {r.rank for r in ranks if r.flops is not None and (world_size == 1 or r.exchange is not None)}
    wanted = {n.node * n.ranks + local: (n, local) for n in nodes for local in range(n.ranks)}
    for node in nodes:
        if node.error:
            advice = "open the ports between the nodes, and run it from a folder that all nodes share"
            yield Finding("ranks", "failure", f"{node.host}: {node.error}", advice)
    missing = expected - len(nodes)
    if missing > 0:
        others = f"; {_list_hosts([n.host for n in nodes])} did" if nodes else ""
        advice = "check the missing nodes with `scontrol show node`, or leave them out with --exclude"
        yield Finding("ranks", "failure", f"{missing} of {expected} nodes did not report{others}", advice)
    incomplete = sorted(set(wanted) - done)
    started = {r.rank: r for r in ranks}
    for rank in incomplete[:_MOST_NAMED]:
        node, local = wanted[rank]
        tail = (node.log_tails or {}).get(local, "")
        stage = _describe_stage(started.get(rank))
        found = f"rank {rank} ({node.host}) {stage}" + (f":\n{tail}" if tail else ", and logged nothing")
        yield Finding("ranks", "failure", found, f"fix the error, or train without the node: --exclude {node.host}")
    if len(incomplete) > _MOST_NAMED:
        yield Finding("ranks", "failure", f"and {len(incomplete) - _MOST_NAMED} more ranks", "fix the first ones")
    if wanted and not incomplete and missing <= 0:
        devices = sorted({r.device for r in ranks})
        found = f"{len(ranks)} on {_list_hosts([n.host for n in nodes])} ({', '.join(devices)})"
        yield Finding("ranks", "ok", found)


def _describe_stage(result: RankResult | None) -> str:
    """The first measurement that a rank did not complete."""
    if result is None:
        return "did not start"
    if result.flops is None:
        return "did not complete the matmul"
    return f"did not complete the {'all-reduce' if result.all_reduce is None else 'exchange'}"


def _matmul_findings(ranks: Sequence[RankResult], factor: float) -> Iterator[Finding]:
    """The median, and each slow rank."""
    measured = [(r.flops, r) for r in ranks if r.flops]
    if not measured:
        return
    speeds = [speed for speed, _ in measured]
    middle = statistics.median(speeds)
    dtypes = ", ".join(sorted({r.dtype for _, r in measured}))
    span = f"from {_format_flops(min(speeds))} to {_format_flops(max(speeds))}"
    yield Finding("matmul", "ok", f"{_format_flops(middle)} a rank in {dtypes} (median), {span}")
    for speed, rank in _find_slow(measured, middle, factor):
        times = f"{middle / speed:.1f} times slower than the median"
        found = f"rank {rank.rank} ({rank.host}, {rank.device}): {_format_flops(speed)}, {times}"
        advice = f"check other processes, heat and clocks (nvidia-smi -q -d PERFORMANCE), or --exclude {rank.host}"
        yield Finding("matmul", "warning", found, advice)


def _find_slow(measured: Sequence[_Speed], middle: float, factor: float) -> list[_Speed]:
    """Ranks that are slower than the median by at least the factor, the slowest first."""
    return sorted((t for t in measured if middle / t[0] >= factor), key=lambda t: (t[0], t[1].rank))[:_MOST_NAMED]


def _all_reduce_findings(ranks: Sequence[RankResult]) -> Iterator[Finding]:
    wrong = [r for r in ranks if r.all_reduce_sum is False]
    for rank in wrong[:_MOST_NAMED]:
        advice = "transfers corrupt data: check memory, PCIe and network cards; NCCL_P2P_DISABLE=1 narrows it down"
        yield Finding("all-reduce", "failure", f"rank {rank.rank} ({rank.host}) received a wrong sum", advice)
    speeds = [r.all_reduce for r in ranks if r.all_reduce]
    if speeds and not wrong:
        yield Finding("all-reduce", "ok", f"{format_rate(min(speeds))} over {len(ranks)} ranks (bus bandwidth)")


def _exchange_findings(ranks: Sequence[RankResult], factor: float) -> Iterator[Finding]:
    """The speed of a rank, or of a node, is that with its faster neighbour: the other may be the slow one."""
    measured = [(max(r.exchange.values()), r) for r in ranks if r.exchange]
    if not measured:
        return
    middle = statistics.median(speed for speed, _ in measured)
    hosts = {r.host for _, r in measured}
    between = f"{len(hosts)} nodes" if len(hosts) > 1 else f"{len(measured)} ranks"
    status = "warning" if len(hosts) > 1 and middle < _SLOW_NETWORK else "ok"
    advice = "ranks would wait for the network: select another with --interface" if status == "warning" else ""
    yield Finding("exchange", status, f"{format_rate(middle)} between neighbours of {between} (median)", advice)
    for speed, rank in _find_slow(measured, middle, factor):
        found = (
            f"rank {rank.rank} ({rank.host}): {format_rate(speed)} with its faster neighbour, "
            f"{middle / speed:.1f} times slower than the median"
        )
        advice = f"every all-reduce waits for it: check its cable, network card and PCIe link, or --exclude {rank.host}"
        yield Finding("exchange", "warning", found, advice)


def _clock_findings(ranks: Sequence[RankResult]) -> Iterator[Finding]:
    measured = [(r.clock_offset, r.clock_error or 0.0, r.host) for r in ranks if r.clock_offset is not None]
    if len({host for _, _, host in measured}) < 2:
        return
    apart = sorted((t for t in measured if abs(t[0]) - t[1] > _MAX_CLOCK_DIFFERENCE_S), key=lambda t: -abs(t[0]))
    for offset, _, host in apart[:_MOST_NAMED]:
        ahead = "ahead of" if offset > 0 else "behind"
        found = f"{host} is {abs(offset):.3g} s {ahead} the node of rank 0"
        advice = "the order of log lines of different nodes is wrong: run chrony or ntpd there"
        yield Finding("clock", "warning", found, advice)
    if not apart:
        most, error = max((abs(offset), error) for offset, error, _ in measured)
        found = f"at most {most * 1e3:.3g} ms (+- {error * 1e3:.2g} ms) from the node of rank 0"
        yield Finding("clock", "ok", found)


def _list_hosts(hosts: Sequence[str]) -> str:
    names = list(dict.fromkeys(hosts))
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _format_flops(value: float) -> str:
    return f"{value / 1e12:.3g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP/s"
