"""The addresses of this machine and their network interfaces."""

from __future__ import annotations

import fcntl
import socket
import struct
from pathlib import Path

# From <linux/sockios.h>: the IPv4 address of an interface.
_SIOCGIFADDR = 0x8915


def addresses() -> dict[str, str]:
    """The interface of each address of this machine; without loopback and link-local addresses."""
    return {**_ipv4(), **_ipv6()}


def _ipv4() -> dict[str, str]:
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # the interface has no IPv4 address
            address = socket.inet_ntoa(answer[20:24])
            if not address.startswith("127."):
                found[address] = name
    return found


def _ipv6(table: Path = Path("/proc/net/if_inet6")) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        lines = table.read_text().split("\n")
    except OSError:
        return found  # a kernel without IPv6
    for line in filter(None, lines):
        digits, _, _, scope, _, name = line.split()
        if scope == "00":  # global
            found[socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))] = name
    return found
