"""Findings about the network, which other nodes and ranks need to reach this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.doctor.finding import Finding
from slurm.interfaces import find_addresses

# NCCL takes prefixes, with '^' to exclude and '=' for full names; gloo takes full names.
_INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True, slots=True)
class Interface:
    """One network interface, with its addresses that other machines can use; the MTU is in bytes.

    The negotiated speed is 0 without a card (a bridge, a tunnel, a container).
    """

    name: str
    addresses: tuple[str, ...]
    megabits: int
    mtu: int


@dataclass(frozen=True, slots=True)
class Port:
    """One InfiniBand or RoCE port, as in 'mlx5_0/1'; state and rate are the text of the kernel."""

    name: str
    state: str
    rate: str


def check_hostname() -> Iterator[Finding]:
    """Whether the host name of this machine resolves to one of its addresses."""
    name = socket.gethostname()
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except OSError as error:
        yield Finding("hostname", "failure", f"{name} has no address: {error}", f"add {name} to /etc/hosts or DNS")
        return
    yield hostname_finding(name, found, set(find_addresses()))


def hostname_finding(name: str, found: set[str], own: set[str]) -> Finding:
    """Other nodes cannot use a name that resolves only to loopback, or to another machine.

    Args:
        name: host name of this machine.
        found: addresses that the name resolves to here.
        own: addresses of this machine, without loopback and link-local ones.
    """
    text = f"{name} is {', '.join(sorted(found))}"
    local = {a for a in found if a.startswith(("127.", "fe80:")) or a == "::1"}
    if found == local:
        advice = "enough for one machine; other nodes need its network address in /etc/hosts or DNS"
        return Finding("hostname", "warning", text, advice)
    foreign = sorted(found - local - own)
    if foreign and not found & own:
        has = ", ".join(sorted(own)) or "none"
        advice = f"correct /etc/hosts or DNS, or set --rdzv-endpoint ADDRESS:PORT with an address of {has}"
        return Finding("hostname", "warning", f"{text}, which is not an address of this machine (it has {has})", advice)
    return Finding("hostname", "ok", text)


def check_interfaces() -> Iterator[Finding]:
    """Every interface with an address, the interfaces that the environment selects, and the InfiniBand ports."""
    yield from interface_findings(read_interfaces(), list(psutil.net_if_stats()), os.environ)
    yield from port_findings(read_ports())


def interface_findings(
    interfaces: Sequence[Interface], names: Sequence[str], env: Mapping[str, str]
) -> Iterator[Finding]:
    """A finding for each interface with an address, and for each variable that selects interfaces.

    A variable that matches none of `names` (of all interfaces, including 'lo') fails every training on several ranks.
    """
    for one in interfaces:
        speed = f", {one.megabits / 1000:g} Gbit/s" if one.megabits else ""
        mtu = f", MTU {one.mtu}" if one.mtu else ""
        yield Finding("network", "ok", f"{one.name}: {', '.join(one.addresses)}{speed}{mtu}")
    if not interfaces:
        advice = "enough for one machine; other nodes cannot reach it"
        yield Finding("network", "warning", "only a loopback address", advice)
    for variable in _INTERFACE_VARIABLES:
        text = env.get(variable, "")
        wanted = [name for name in text.removeprefix("=").split(",") if name]
        if not wanted or text.startswith("^"):
            continue
        is_exact = text.startswith("=") or variable == "GLOO_SOCKET_IFNAME"
        missing = [w for w in wanted if not any(n == w if is_exact else n.startswith(w) for n in names)]
        if len(missing) == len(wanted) or (missing and is_exact):
            advice = f"unset {variable}, or set it to one of {', '.join(sorted(names))}"
            yield Finding("network", "failure", f"{variable}={text}, but there is no such interface", advice)
        else:
            yield Finding("network", "ok", f"{variable}={text}")


def port_findings(ports: Sequence[Port]) -> Iterator[Finding]:
    """A finding for the active InfiniBand ports, and one for the others."""
    up = [port for port in ports if "ACTIVE" in port.state]
    if up:
        rates = sorted({port.rate for port in up})
        yield Finding("InfiniBand", "ok", f"{', '.join(p.name for p in up)}: active, {', '.join(rates)}")
    down = [port for port in ports if port not in up]
    if down:
        found = ", ".join(f"{port.name} is {port.state.partition(':')[2].strip() or port.state}" for port in down)
        advice = "check cable and subnet manager with `ibstat`; NCCL ignores these ports, NCCL_IB_HCA selects ports"
        yield Finding("InfiniBand", "warning", found, advice)


def read_interfaces() -> tuple[Interface, ...]:
    """The interfaces of this machine that have an address."""
    named: dict[str, list[str]] = {}
    for address, name in find_addresses().items():
        named.setdefault(name, []).append(address)
    stats = psutil.net_if_stats()
    return tuple(
        Interface(name, tuple(own), stats[name].speed, stats[name].mtu)
        for name, own in sorted(named.items())
        if name in stats
    )


def read_ports(folder: Path = _INFINIBAND) -> tuple[Port, ...]:
    """The InfiniBand and RoCE ports of this machine."""
    return tuple(
        Port(f"{port.parent.parent.name}/{port.name}", _read_text(port / "state"), _read_text(port / "rate"))
        for port in sorted(folder.glob("*/ports/*"))
    )


def _read_text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return "unknown"  # the driver refused
