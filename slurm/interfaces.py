"""The addresses of this machine and their network interfaces."""

from __future__ import annotations

import ipaddress
import socket


def find_addresses() -> dict[str, str]:
    """The interface of each address of this machine; without loopback and IPv6 link-local addresses."""
    import psutil  # few commands need it

    found = (
        (entry.address, name)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    )
    return {address: name for address, name in found if not _is_local(address)}


def _is_local(address: str) -> bool:
    # A link-local IPv6 address ends with the name of its interface, as in fe80::1%eth0.
    parsed = ipaddress.ip_address(address)
    return parsed.is_loopback or (parsed.version == 6 and parsed.is_link_local)
