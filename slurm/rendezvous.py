"""The nodes of one attempt find each other, before any rank runs.

Node 0 publishes a free port, a token and all its addresses in a file on the shared disk. The other nodes try these
addresses until one answers with the token. Each node then knows an address of node 0, and the interface to it.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from slurm.interfaces import find_addresses
from slurm.ownership import describe_owner, is_own

_TOKEN_BYTES = 32
# Limit for one connection to one address.
_TRY_SECONDS = 3.0
_POLL_SECONDS = 0.2


class RendezvousError(RuntimeError):
    """The nodes did not find each other; `missing` are the numbers of those that did not join, if they are known."""

    def __init__(self, message: str, missing: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of the ranks' rendezvous, as this node reaches it; `interface` is None if there are several."""

    host: str
    port: int
    interface: str | None


@dataclass(frozen=True, slots=True)
class _Published:
    """The file of node 0: its names and addresses, the ranks' port, the port that answers, and the token."""

    hosts: list[str]
    port: int
    answers: int
    token: str


class PortReservation:
    """A free port of this machine that no other program gets, but on which a process of the launcher can listen.

    Linux allows two sockets with SO_REUSEADDR on one port as long as only one of them listens.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(_family())
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("", 0))
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Release the port."""
        self._socket.close()


@contextlib.contextmanager
def rendezvous(file: Path, node: int, nodes: int, names: list[str], timeout: float) -> Generator[Endpoint]:
    """The endpoint of the ranks' rendezvous; node 0's port is reserved until the context ends.

    Arguments and errors are those of `host_rendezvous` and `join_rendezvous`.
    """
    if node > 0:
        yield join_rendezvous(file, node, timeout)
        return
    with contextlib.closing(PortReservation()) as reserved:
        yield host_rendezvous(file, nodes, reserved.port, names, timeout)


def host_rendezvous(file: Path, nodes: int, port: int, names: list[str], timeout: float) -> Endpoint:
    """Node 0: publish the endpoint, and wait `timeout` seconds for the other nodes.

    The file is new for each attempt, on a disk that the nodes share. The port is reserved for the ranks. The first of
    this node's names is the preferred one; its addresses are added.

    Raises:
        RendezvousError: lists the nodes that did not join.
    """
    token = secrets.token_hex(_TOKEN_BYTES // 2)
    interfaces = find_addresses()
    with socket.create_server(("", 0), family=_family(), dualstack_ipv6=_family() == socket.AF_INET6) as server:
        answers = server.getsockname()[1]
        hosts = list(dict.fromkeys([*names, *interfaces]))
        _publish(file, _Published(hosts, port, answers, token))
        used = _wait_for_nodes(server, nodes, token, interfaces, timeout)
    file.unlink(missing_ok=True)
    return Endpoint(names[0], port, used.pop() if len(used) == 1 else None)


def join_rendezvous(file: Path, node: int, timeout: float, now: Callable[[], float] = time.monotonic) -> Endpoint:
    """Another node: read the file, then try node 0's addresses until one answers.

    Raises:
        RendezvousError: node 0 published nothing, or none of the listed addresses answered.
    """
    deadline = now() + timeout
    tried: dict[str, str] = {}
    while now() < deadline:
        published = _read(file)
        if published is not None:
            for host in published.hosts:
                try:
                    local = _greet(host, published.answers, published.token, node)
                except OSError as error:
                    tried[host] = error.strerror or str(error)
                else:
                    return Endpoint(host, published.port, find_addresses().get(local))
        time.sleep(_POLL_SECONDS)
    if not tried:
        with contextlib.suppress(OSError):
            found = file.lstat()
            if file.is_symlink() or not is_own(found, file.parent):
                what = f"{'a link' if file.is_symlink() else 'a file'} of {describe_owner(found)}"
                raise RendezvousError(f"{file} is {what}, so it is not trusted; remove it, or set another runs_dir",
                                   missing=(0,))  # fmt: skip
        raise RendezvousError(
            f"node 0 published no address in {file} within {timeout:g} s; check that the nodes share that folder",
            missing=(0,),
        )
    failures = "; ".join(f"{host}: {why}" for host, why in tried.items())
    raise RendezvousError(
        f"node {node} ({socket.gethostname()}) cannot reach any address of node 0: {failures}; "
        "open the ports between the nodes"
    )


def _wait_for_nodes(
    server: socket.socket, nodes: int, token: str, interfaces: Mapping[str, str], timeout: float
) -> set[str | None]:
    """Answer each node once; returns the interfaces of their connections."""
    missing = set(range(1, nodes))
    used: set[str | None] = set()
    deadline = time.monotonic() + timeout
    while missing:
        server.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            numbers = tuple(sorted(missing))
            raise RendezvousError(
                f"node {', '.join(map(str, numbers))} of {nodes} did not join within {timeout:g} s", numbers
            ) from None
        with connection:
            connection.settimeout(_TRY_SECONDS)
            try:
                line = connection.makefile("rb").readline(200).decode(errors="replace").split()
                if len(line) == 2 and line[1].isdecimal() and hmac.compare_digest(line[0], token):
                    connection.sendall(f"{token}\n".encode())
                    # A node that did not get the answer asks again.
                    missing.discard(int(line[1]))
                    used.add(interfaces.get(_plain(connection.getsockname()[0])))
            except OSError:
                continue  # the node tries again
    return used


def _greet(host: str, port: int, token: str, node: int) -> str:
    """Ask one address of node 0; returns this node's address of the connection."""
    with socket.create_connection((host, port), timeout=_TRY_SECONDS) as connection:
        connection.sendall(f"{token} {node}\n".encode())
        answer = connection.makefile("rb").readline(200).decode(errors="replace").strip()
        if not hmac.compare_digest(answer, token):
            raise OSError(f"another program answers at port {port}")
        return _plain(connection.getsockname()[0])


def _plain(address: str) -> str:
    """10.0.0.1 for ::ffff:10.0.0.1, the form of a dual-stack socket."""
    return address.removeprefix("::ffff:")


def _family() -> socket.AddressFamily:
    return socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET


def _publish(file: Path, values: _Published) -> None:
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(asdict(values), stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _read(file: Path) -> _Published | None:
    try:
        # NFS clients cache that a file is missing; listing its folder refreshes the cache.
        os.listdir(file.parent)  # noqa: PTH208 -- nothing of the result is used
        with open(file, encoding="utf-8", opener=_open_without_links) as stream:
            # All ranks would connect to an address that another user publishes here.
            if not is_own(os.fstat(stream.fileno()), file.parent):
                return None
            return _Published(**json.load(stream))
    except OSError as error:
        if error.errno != errno.ELOOP and not isinstance(error, FileNotFoundError | PermissionError):
            raise
        return None
    except (ValueError, TypeError):
        return None


def _open_without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)
