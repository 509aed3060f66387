"""`launcher doctor`: this machine's network, by which other nodes find it and ranks reach each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.doctor.command import Finding
from slurm.interfaces import find_addresses

# Both take a prefix of a name; NCCL a list too, with '^' for all but these and '=' for exactly these.
_CHOSEN_BY = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_NETWORKS = Path("/sys/class/net")
_INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True, slots=True)
class Interface:
    """One network interface.

    Attributes:
        name: the kernel's.
        addresses: those that other machines can use.
        megabits: speed that the card has agreed on, None where there is no card (a bridge, a tunnel, a container).
        mtu: bytes of its largest packet.
    """

    name: str
    addresses: tuple[str, ...]
    megabits: int | None
    mtu: int | None


@dataclass(frozen=True, slots=True)
class Port:
    """One InfiniBand or RoCE port, as in 'mlx5_0/1', with the kernel's words for its state and rate."""

    name: str
    state: str
    rate: str


def check_hostname() -> Iterator[Finding]:
    """Whether other nodes could find this one by its name."""
    name = socket.gethostname()
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except OSError as error:
        yield Finding("hostname", "failure", f"{name} has no address: {error}", f"add {name} to /etc/hosts or DNS")
        return
    yield hostname_finding(name, found, set(find_addresses()))


def hostname_finding(name: str, found: set[str], own: set[str]) -> Finding:
    """A name that means this machine alone is no use to other nodes, one that means another machine even less.

    Args:
        name: of this machine.
        found: addresses that it stands for here.
        own: addresses that this machine has, without loopback and link-local ones.
    """
    said = f"{name} is {', '.join(sorted(found))}"
    local = {a for a in found if a.startswith(("127.", "fe80:")) or a == "::1"}
    if found == local:
        advice = "fine on one machine; other nodes need its network address in /etc/hosts or DNS"
        return Finding("hostname", "warning", said, advice)
    foreign = sorted(found - local - own)
    if foreign and not found & own:
        has = ", ".join(sorted(own)) or "none"
        advice = f"correct /etc/hosts or DNS, or give ranks another way to meet: --rdzv-endpoint ADDRESS:PORT of {has}"
        return Finding("hostname", "warning", f"{said}, which this machine does not have (it has {has})", advice)
    return Finding("hostname", "ok", said)


def check_interfaces() -> Iterator[Finding]:
    """Every interface with an address, the InfiniBand ports, and what the environment chooses among them."""
    yield from interface_findings(read_interfaces(), [name for _, name in socket.if_nameindex()], os.environ)
    yield from port_findings(read_ports())


def interface_findings(
    interfaces: Sequence[Interface], names: Sequence[str], env: Mapping[str, str]
) -> Iterator[Finding]:
    """One line for each interface; a variable that names none would fail every training on several ranks.

    Args:
        interfaces: those with an address.
        names: of all interfaces, 'lo' included.
        env: where the variables are.
    """
    for one in interfaces:
        speed = f", {one.megabits / 1000:g} Gbit/s" if one.megabits else ""
        mtu = f", MTU {one.mtu}" if one.mtu else ""
        yield Finding("network", "ok", f"{one.name}: {', '.join(one.addresses)}{speed}{mtu}")
    if not interfaces:
        yield Finding("network", "warning", "no address but loopback", "fine on one machine; other nodes see it not")
    for variable in _CHOSEN_BY:
        text = env.get(variable, "")
        wanted = [word for word in text.removeprefix("=").split(",") if word]
        if not wanted or text.startswith("^"):
            continue
        exactly = text.startswith("=") or variable == "GLOO_SOCKET_IFNAME"
        missing = [word for word in wanted if not any(n == word if exactly else n.startswith(word) for n in names)]
        if len(missing) == len(wanted) or (missing and exactly):
            advice = f"unset {variable}, or name one of {', '.join(sorted(names))}"
            yield Finding("network", "failure", f"{variable}={text}, but there is no such interface", advice)
        else:
            yield Finding("network", "ok", f"{variable}={text}")


def port_findings(ports: Sequence[Port]) -> Iterator[Finding]:
    """One line for the InfiniBand ports that work; the others are named."""
    up = [port for port in ports if "ACTIVE" in port.state]
    if up:
        rates = sorted({port.rate for port in up})
        yield Finding("InfiniBand", "ok", f"{', '.join(p.name for p in up)}: active, {', '.join(rates)}")
    down = [port for port in ports if port not in up]
    if down:
        found = ", ".join(f"{port.name} is {port.state.partition(':')[2].strip() or port.state}" for port in down)
        advice = "cable or subnet manager: `ibstat`; NCCL goes on without, NCCL_IB_HCA chooses the ports"
        yield Finding("InfiniBand", "warning", found, advice)


def read_interfaces(folder: Path = _NETWORKS) -> tuple[Interface, ...]:
    """This machine's interfaces that have an address."""
    named: dict[str, list[str]] = {}
    for address, name in find_addresses().items():
        named.setdefault(name, []).append(address)
    return tuple(
        Interface(name, tuple(own), _number(folder / name / "speed"), _number(folder / name / "mtu"))
        for name, own in sorted(named.items())
    )


def read_ports(folder: Path = _INFINIBAND) -> tuple[Port, ...]:
    """This machine's InfiniBand and RoCE ports; none without such a card."""
    found: list[Port] = []
    for port in sorted(folder.glob("*/ports/*")):
        name = f"{port.parent.parent.name}/{port.name}"
        found.append(Port(name, _text(port / "state"), _text(port / "rate")))
    return tuple(found)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return "unknown"  # the driver refuses


def _number(file: Path) -> int | None:
    """A positive number; a card that is down or virtual says -1 or refuses to be read."""
    text = _text(file)
    return int(text) if text.isdecimal() and int(text) else None
